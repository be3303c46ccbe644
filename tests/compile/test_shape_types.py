"""Compilation modes and shape types: the same results in each, what each serves, and guards evaluated on request."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import mix
from torch import nn

import piecework
from piecework import CompilationConfig, counters, support_torch_compile
from piecework.errors import BindError, ConfigError, InputError
from piecework.runtime.compile import UnstitchedModule
from piecework.runtime.decorators import stitched_of
from piecework.runtime.model_tag import set_on_compilation_complete

SHAPES = ("backed", "unbacked", "backed_size_oblivious")


@support_torch_compile
class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(x + y)
        out = torch.empty_like(hidden)
        mix(hidden, out)
        return out.relu()


def config(**fields: object) -> CompilationConfig:
    shapes = {
        "type": fields.pop("shapes", "backed"),
        "evaluate_guards": fields.pop("guards", False),
    }
    return CompilationConfig(**{"backend": "eager", "dynamic_shapes_config": shapes, **fields})


def pair(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 8), torch.randn(batch, 8)


def same(made: Callable[..., object], model: nn.Module, *args: torch.Tensor) -> None:
    torch.testing.assert_close(made(*args), model.forward(*args))


# --- modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorated", [True, False], ids=["decorator", "compile"])
@pytest.mark.parametrize(
    "mode", [0, "STOCK_TORCH_COMPILE", 2, "dynamo_trace_once", 3, "VLLM_COMPILE"]
)
def test_each_mode_by_number_or_name(mode: int | str, decorated: bool) -> None:
    made = config(mode=mode)
    model = Model(compilation_config=made)
    run = model if decorated else piecework.compile(model, config=made)
    graphs = int(made.mode >= 2)
    with counters.expect(num_graphs_seen=graphs, num_eager_compiles=2 * graphs - (made.mode == 2)):
        for batch in (4, 9, 2):
            same(run, model, *pair(batch))
    stitched = stitched_of(model) if decorated else run
    if made.mode >= 2:
        report = stitched.report()
        assert (report.pieces, report.splitting) == ((2, 1) if made.mode == 3 else (1, 0))
        assert "def execution_fn(" in stitched.source.code


@pytest.mark.parametrize("mode", ["NONE", "STOCK_TORCH_COMPILE"])
def test_a_mode_that_stitches_nothing_says_so(mode: str) -> None:
    made = piecework.compile(Model(), pair(4), config=config(mode=mode))
    assert isinstance(made, UnstitchedModule)
    for ask in (lambda: made.source, lambda: made.pieces, lambda: made.split_gm, made.report):
        with pytest.raises(BindError, match=f"mode {mode} stitches nothing"):
            ask()
    made.rebind()


def test_mode_none_runs_the_models_python_each_time() -> None:
    seen: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x + 1

    made = piecework.compile(model, (torch.randn(1),), config=config(mode=0))
    assert seen == []
    made(torch.randn(2))
    made(torch.randn(3))
    assert seen == [2, 3]


def test_stock_runs_nothing_on_example_arguments_and_keeps_their_marks() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return x + 1

    model, example = Counts(), torch.randn(4, 8)
    torch._dynamo.mark_dynamic(example, 0)
    heard: list[int] = []
    with set_on_compilation_complete(lambda: heard.append(1)):
        made = piecework.compile(model, (example,), config=config(mode=1))
        assert (model.calls, heard) == (0, [])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (5, 3, 7):
                x = torch.randn(batch, 8)
                torch.testing.assert_close(made(x), x + 1)
                assert not vars(x)
    assert (model.calls, heard) == (3, [1])
    decorated = support_torch_compile(Counts)(compilation_config=config(mode=1))
    decorated(torch.randn(4, 8))
    assert decorated.calls == 1


def test_splitting_ops_and_a_mode_that_cuts_nowhere_conflict() -> None:
    for made, ops in (
        (config(mode=2), ["models::mix"]),
        (config(mode=2, splitting_ops=["models::mix"]), None),
    ):
        with pytest.raises(ConfigError, match="compiles the graph whole"):
            piecework.compile(Model(), pair(4), splitting_ops=ops, config=made)


@pytest.mark.parametrize(("mode", "pieces"), [(2, 1), (3, 2)])
def test_the_dynamo_backend_cuts_by_mode(mode: int, pieces: int) -> None:
    model = Model()
    options = {"backend": "eager", "mode": mode}
    compiled = torch.compile(model.forward, backend="piecework", fullgraph=True, options=options)
    with counters.expect(num_piecewise_capturable_graphs_seen=pieces):
        same(compiled, model, *pair(4))


# --- shape types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("shapes", SHAPES)
def test_shape_types_give_the_same_results(shapes: str, mode: int) -> None:
    model = Model(compilation_config=config(mode=mode, shapes=shapes))
    for batch in (4, 2, 33):
        same(model, model, *pair(batch))


@pytest.mark.parametrize("decorated", [True, False], ids=["decorator", "compile"])
@pytest.mark.parametrize("first", [1, 0, 4])
@pytest.mark.parametrize("shapes", SHAPES[1:])
def test_sizes_zero_and_one_are_served(shapes: str, first: int, decorated: bool) -> None:
    made = config(shapes=shapes)
    model = Model(compilation_config=made)
    example = pair(first)
    if not decorated:
        for each in example:
            torch._dynamo.mark_dynamic(each, 0)
    run = model if decorated else piecework.compile(model, example, config=made)
    with counters.expect(num_graphs_seen=int(decorated)):
        for batch in (first, 1, 0, 5):
            same(run, model, *pair(batch))
    assert stitched_of(model) is None or not decorated or "s0" in stitched_of(model).source.code


def test_unbacked_without_marks_takes_the_first_dimensions_and_leaves_no_mark() -> None:
    model, example = Model(), pair(4)
    made = piecework.compile(model, example, config=config(shapes="unbacked"))
    for batch in (1, 0, 7):
        same(made, model, *pair(batch))
    with pytest.raises(InputError):
        made(torch.randn(4, 9), torch.randn(4, 9))
    assert not any(vars(each) for each in example)


def test_the_setting_ends_with_the_trace() -> None:
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious
    for mode in (1, 3):
        model = Model(compilation_config=config(shapes="backed_size_oblivious", mode=mode))
        same(model, model, *pair(4))
        assert _config.backed_size_oblivious is before


# --- guards ------------------------------------------------------------------------------------------


def halves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The trace assumes more than 4 rows, an even number of them, and one size for both."""
    if x.shape[0] > 4 and x.shape[0] % 2 == 0:
        return (x + y).reshape(2, -1)
    return x - y


@pytest.mark.parametrize("sizes", [(4, 4), (7, 7), (1, 1), (8, 6)])
def test_guards_are_evaluated_at_each_call(sizes: tuple[int, int]) -> None:
    made = config(guards=True, stitching_config={"check_inputs": False})
    stitched = piecework.compile(halves, (torch.randn(6), torch.randn(6)), config=made)
    for batch in (6, 8, 12):
        x, y = torch.randn(batch), torch.randn(batch)
        torch.testing.assert_close(stitched(x, y), halves(x, y))
    with pytest.raises(InputError):
        stitched(*map(torch.randn, sizes))
