"""Every size by as many traces as it takes. In: models, examples and calls of other sizes. Out: eager's results, and how many traces there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, InputError
from piecework.runtime.trace import every_size


@pytest.fixture
def nothing_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace for sizes of 2 and more, whatever the graph is."""
    monkeypatch.setattr(every_size, "ROWS", ("not in this test",))


def compiled(model: Callable[..., object], *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
    return piecework.compile(model, args, kwargs, config=EAGER)


def same(
    stitched: Callable[..., object], model: Callable[..., object], *args: object, **kwargs: object
) -> None:
    with torch.no_grad():
        torch.testing.assert_close(stitched(*args, **kwargs), model(*args, **kwargs))


def right_or_refused(
    stitched: Callable[..., object], model: Callable[..., object], *args: object
) -> bool:
    """Whether a call was served; right, if it was."""
    try:
        found = stitched(*args)
    except InputError:
        return False
    torch.testing.assert_close(found, model(*args))
    return True


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(self.conv(x)).relu())


def attended(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ATTENTION(x, x, x)


ATTENTION = nn.MultiheadAttention(8, 2, batch_first=True).eval()
SHAPES = {
    "convolutions": (Image().eval(), (3, 8, 8)),
    "attention": (attended, (5, 8)),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (5, 8)),
    "transposed": (lambda x: (x.t().contiguous(), (torch.ones(4, 6) @ x.t()).t() * 2), (6,)),
    "square": (nn.Linear(4, 4), (4,)),
    "gated": (nn.GLU(), (6,)),
    "pooled": (nn.AdaptiveAvgPool2d(2), (3, 8, 8)),
    "batch norm": (nn.BatchNorm1d(4).eval(), (4,)),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("first", [4, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_a_model_serves_every_batch(name: str, first: int) -> None:
    model, rest = SHAPES[name]
    stitched = compiled(model, torch.randn(first, *rest))
    rows = (0,) if name in ("square", "gated") else ()
    for batch in (first, 4, 1, 2, 5, 1, 3, *rows):
        same(stitched, model, torch.randn(batch, *rest))


@pytest.mark.inductor
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convolutions", marks=pytest.mark.nightly),
        pytest.param("attention", marks=pytest.mark.nightly),
        "transposed",
    ],
)
def test_inductor_serves_every_batch(name: str) -> None:
    model, rest = SHAPES[name]
    stitched = piecework.compile(model, (torch.randn(4, *rest),))
    for batch in (4, 1, 2, 5):
        same(stitched, model, torch.randn(batch, *rest))


@pytest.mark.inductor
def test_an_operator_gets_the_layout_that_the_model_made() -> None:
    strides = []

    @piecework.splitting_op("traces::read_layout", mutates_args=("out",))
    def read_layout(x: torch.Tensor, out: torch.Tensor) -> None:
        strides.append(x.is_contiguous())
        out.copy_(x)

    def model(x: torch.Tensor) -> torch.Tensor:
        rows = x.t().contiguous()
        read_layout(rows, out := torch.empty_like(rows))
        return out

    stitched = piecework.compile(model, (torch.randn(4, 8),))
    for batch in (4, 1, 5, 2):
        same(stitched, model, torch.randn(batch, 8))
    assert all(strides)


# --- what an example must not decide ---------------------------------------------------------------------


def test_a_batch_that_equals_a_number_of_the_model_stays_free(nothing_admitted: None) -> None:
    model = nn.Linear(4, 4)
    stitched = compiled(model, torch.randn(4, 4))
    assert "s0" in stitched.entry_source.code
    for batch in (4, 1, 5):
        same(stitched, model, torch.randn(batch, 4))


def test_what_the_model_decides_by_its_batch_is_traced_for_each_answer() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] == 4 else x * 3

    stitched = compiled(model, torch.randn(4, 3))
    for batch in (4, 5, 4, 6):
        same(stitched, model, torch.randn(batch, 3))


# --- what the graph does not read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (lambda x, m: x * 2 if m is not None else x, [torch.randn(2, 2), torch.randn(7, 3)]),
        (lambda x, m: x * 2 if m.shape[0] > 4 else x, [torch.randn(3, 3), torch.randn(7, 3)]),
        (lambda x, m: x * 2 if m.size(-1) > 4 else x, [torch.randn(6, 3), torch.randn(6, 5)]),
        (lambda x, m: x * 2 if m.stride(0) == 1 else x, [torch.randn(3, 6).t(), torch.randn(3, 6)]),
        (lambda x, m: x * 2 if m.is_contiguous() else x, [torch.randn(3, 6).t(), torch.randn(3, 6)]),
        (lambda x, m: x * 2 if m.requires_grad else x, [torch.randn(6, 3, requires_grad=True)]),
        (lambda x, m: x * 2 if isinstance(m, nn.Parameter) else x, [nn.Parameter(torch.randn(6, 3))]),
        (lambda x, m: x * 2 if x is m else x, [torch.randn(4, 3)]),
        (lambda x, m: (x * 2, m), [torch.randn(2, 3)]),
        (lambda x, m: torch.arange(m.shape[1]), [torch.randn(2, 9), torch.randn(2, 1)]),
    ],
    ids=["presence", "rows", "columns", "stride", "contiguous", "grad", "parameter", "identity", "returned", "size"],
)  # fmt: skip
def test_an_argument_that_is_only_asked_about_counts(
    model: Callable[..., object], others: list[torch.Tensor]
) -> None:
    example = torch.randn(6, 6)
    stitched = compiled(model, torch.randn(4, 3), example)
    x = torch.randn(5, 3)
    for other in (example, others[0], example):
        same(stitched, model, x, other)
    for other in (*others, x):
        assert right_or_refused(stitched, model, x, other)


# --- numbers in results ------------------------------------------------------------------------------------


def test_text_made_from_a_size_is_that_of_each_call() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, str, dict[str, torch.Tensor]]:
        return x * 2, f"{x.shape[0]} rows", {f"of {x.shape[0]}": x + 1}

    stitched = compiled(model, torch.randn(4, 3))
    for batch in (4, 5):
        _, text, table = stitched(torch.randn(batch, 3))
        assert (text, *table) == (f"{batch} rows", f"of {batch}")


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x * 2, f"{x.sum().item()}"),
        lambda x: {x.sum().item(): x},
        lambda x: (x, x.sum().item() > 3),
        lambda x: (x, int(x.sum().item()) % 2),
    ],
    ids=["text", "key", "comparison", "arithmetic"],
)
def test_what_python_computes_from_data_is_right_or_refused(model: Callable[..., object]) -> None:
    try:
        stitched = compiled(model, torch.ones(4, 3))
    except CaptureError:
        return
    for x in (torch.ones(4, 3), torch.full((2, 3), 0.25)):
        assert repr(stitched(x)) == repr(model(x))


# --- several traces ----------------------------------------------------------------------------------------


def test_no_more_traces_are_made_than_allowed_but_on_request(nothing_admitted: None) -> None:
    model = nn.Linear(4, 2)
    config = {"backend": "eager", "dynamic_shapes_config": {"max_traces": 2}}
    stitched = piecework.compile(model, (torch.randn(4, 4),), config=config)
    same(stitched, model, torch.randn(1, 4))
    for _ in range(2):
        with pytest.raises(InputError, match="has size 0"):
            stitched(torch.randn(0, 4))
    stitched.trace_ahead([0])
    same(stitched, model, torch.randn(0, 4))
    asked = piecework.compile(model, (torch.randn(4, 4),), config=config, sizes=[1])
    for batch in (1, 0, 4):
        same(asked, model, torch.randn(batch, 4))
    assert len(asked.traces) == 3


def test_threads_that_need_a_trace_at_once_make_one(nothing_admitted: None) -> None:
    model = nn.Linear(4, 2)
    stitched = compiled(model, torch.randn(4, 4))
    inputs = [torch.randn(1 if n % 2 else 3, 4) for n in range(16)]
    with ThreadPoolExecutor(16) as threads:
        for x, result in zip(inputs, threads.map(stitched, inputs), strict=True):
            torch.testing.assert_close(result, model(x).detach())
    assert len(stitched.traces) == 2


def test_weights_are_bound_anew_in_every_trace(nothing_admitted: None) -> None:
    model = nn.Linear(4, 2)
    stitched = compiled(model, torch.randn(4, 4))
    same(stitched, model, torch.randn(1, 4))
    model.weight = nn.Parameter(torch.randn(2, 4))
    for batch in (1, 3):
        with pytest.raises(InputError, match="weight"):
            stitched(torch.randn(batch, 4))
    stitched.rebind()
    for batch in (1, 3):
        same(stitched, model, torch.randn(batch, 4))


def test_a_call_that_the_model_refuses_is_refused_in_the_first_trace_s_words() -> None:
    stitched = compiled(lambda x, y: x + y, torch.randn(4, 3), torch.randn(4, 3))
    for _ in range(2):
        with pytest.raises(InputError, match="y has size 6"):
            stitched(torch.randn(5, 3), torch.randn(6, 3))
    assert len(stitched.traces) == 1


def test_dimensions_that_are_marked_are_the_ones_that_may_differ() -> None:
    example = torch.randn(4, 4)
    torch._dynamo.mark_dynamic(example, 0)
    stitched = compiled(lambda x: x * 2, example)
    for batch in (4, 1, 6):
        same(stitched, lambda x: x * 2, torch.randn(batch, 4))
    with pytest.raises(InputError, match="traced with 4"):
        stitched(torch.randn(4, 5))


def test_a_batch_of_one_is_captured_by_a_trace_of_its_own(nothing_admitted: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    for sizes, expected in (([1, 2, 4], 2), ([1], 2), ([2, 4], 1), (None, 2)):
        config = piecework.CompilationConfig(backend="eager", max_cudagraph_capture_size=4)
        stitched = piecework.compile(model, (torch.randn(4, 4),), config=config)
        stitched.capture(sizes, progress=False)
        assert len(stitched.traces) == expected
        for batch in (1, 2, 4, 1, 3):
            same(stitched, model, torch.randn(batch, 4))
        served = sum(row.calls for row in stitched.call_report() if row.mode != "NONE")
        assert served == (2 if sizes == [1] else 5 if sizes != [2, 4] else 3)
        assert next(row.first for row in stitched.coverage()) == (2 if sizes == [2, 4] else 1)
        assert stitched.memory_report().total > 0


@pytest.mark.inductor
def test_a_compiler_that_asks_for_the_number_of_a_size_gets_a_trace_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(every_size.EverySize, "_require_tried", lambda *_: None)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(torch.func.grad(lambda row: row.sin().sum()))(x) + 1

    stitched = piecework.compile(model, (torch.randn(6, 8),))
    for rows in (6, 2):
        same(stitched, model, torch.randn(rows, 8))


def test_a_first_call_under_a_function_mode_leaves_no_trace_of_it() -> None:
    class Tenfold(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 10 if function is torch.sin else result

    x = torch.ones(3)
    stitched = piecework.compile(lambda x: torch.sin(x), config={"backend": "eager"})
    with Tenfold():
        result = stitched(x)
        with pytest.raises(CaptureError, match="a torch mode is active"):
            compiled(lambda x: torch.sin(x), x)
    torch.testing.assert_close(result, torch.sin(x) * 10)
    torch.testing.assert_close(stitched(x), torch.sin(x))
