"""What may be padded: what operators and callers say, what the graph shows, what the try at the capture finds, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import EAGER

import piecework
from piecework.closeness import same_values
from piecework.errors import ConfigError, SplitError, StaticGraphError
from piecework.runtime.batch.dispatcher import Reason
from piecework.runtime.batch.forward_context import current_forward_context, set_forward_context

W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@piecework.splitting_op("padding::silent")
def silent(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@piecework.splitting_op("padding::independent", rows="independent")
def independent(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@piecework.splitting_op("padding::lies", rows="independent")
def lies(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@piecework.splitting_op("padding::counts", rows="context")
def counts(x: torch.Tensor) -> torch.Tensor:
    """The sum of the real rows, in each of them."""
    context = current_forward_context()
    real = x.shape[0] if context is None or context.attn_metadata is None else context.attn_metadata
    return x[:real].sum(0).expand(x.shape) * 1


@piecework.splitting_op("padding::writes", mutates_args=("out",), rows="independent")
def writes(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


@piecework.splitting_op("padding::stores", mutates_args=("store",), rows="independent")
def stores(x: torch.Tensor, store: torch.Tensor) -> None:
    store[: x.shape[0]] += x


@torch.library.custom_op("padding::plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x + 1


for each in (silent, independent, lies, counts, plain):
    each.register_fake(torch.empty_like)


def captured(
    model: Callable[..., object],
    *args: torch.Tensor,
    dynamic: int = 1,
    ops: tuple[str, ...] | None = None,
    **options: object,
) -> piecework.StitchedModule:
    args = args or (torch.randn(5, 4),)
    for tensor in args[:dynamic]:
        torch._dynamo.mark_dynamic(tensor, 0)
    config = EAGER if ops is None else EAGER.replace(splitting_ops=ops)
    made = piecework.compile(model, args, config=config)
    return made.capture([4, 8], progress=False, estimate=False, **options)


def reason_of(module: piecework.StitchedModule, size: int = 5) -> Reason:
    [row] = [row for row in module.coverage(8) if row.first <= size <= row.last]
    return row.reason


def require_right(module: piecework.StitchedModule, model: Callable[..., object]) -> None:
    for rows in (3, 4, 5, 7, 8):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(module(x), model(x))


def set_to_zero(x: torch.Tensor, where: object) -> torch.Tensor:
    y = x * 1
    y[where] = 0  # type: ignore[index]
    return y


def through_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    y.t()[0].add_(x[:, 1])
    return y


INDEPENDENT: dict[str, Callable[[torch.Tensor], object]] = {
    "rowwise": lambda x: torch.relu(x @ W) + F.softmax(x, -1) + x.sum(-1, keepdim=True),
    "reshaped and back": lambda x: x.view(-1, 2, 2).transpose(1, 2).reshape(x.shape[0], 4).t().t(),
    "positions and weights": lambda x: x + torch.arange(x.shape[0])[:, None] + W.sum(0) + W.mean(),
    "made like rows": lambda x: x + torch.zeros_like(x) + x.new_zeros(4) + torch.ones(x.shape[0], 1),
    "convolved and normed within rows": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 3))[:, 0]
    + F.group_norm(x, 2)[:, :2],
    "written through a view": lambda x: through_a_view(set_to_zero(x, (slice(None), -1))),
}  # fmt: skip
MIXED: dict[str, Callable[[torch.Tensor], object]] = {
    "mean": lambda x: x - x.mean(0),
    "last row": lambda x: x + x[-1],
    "softmax": lambda x: F.softmax(x, 0),
    "flip": lambda x: x.flip(0),
    "truth values sorted": lambda x: (x > 0).sort(0).values,
    "attention": lambda x: torch.softmax(x @ x.t(), -1) @ x,
    "batch norm in training": lambda x: F.batch_norm(x, None, None, training=True),
    "random numbers": lambda x: x + torch.rand_like(x),
    "twice the rows": lambda x: torch.cat([x, x]),
    "in a branch": lambda x: torch.cond(
        x[0, 0] > 9, lambda z: z + 1, lambda z: z - z.mean(0), (x,)
    ),
    "an operator that says nothing": lambda x: silent(x + 1) * 2,
    "an operator that says what is not so": lambda x: lies(x + 1) * 2,
}  # fmt: skip


SAID = {
    "an operator that says nothing": ("silent (test_padding.py", "declare_rows"),
    "an operator that says what is not so": ("result 0",),
}


@pytest.mark.parametrize("name", INDEPENDENT)
def test_independent_rows_are_padded(name: str, warned: list[str]) -> None:
    module = captured(INDEPENDENT[name])
    assert reason_of(module) is Reason.PADDED and module.static_graphs.unpadded is None
    require_right(module, INDEPENDENT[name])
    assert not warned


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_meet_are_not_padded(name: str, warned: list[str]) -> None:
    model = MIXED[name]
    module = captured(model)
    assert reason_of(module) is Reason.NOT_EXACT and module.static_graphs.unpadded is not None
    assert "random" in name or require_right(module, model) is None
    [text] = [text for text in warned if "captured size" in text]
    assert all(each in text for each in SAID.get(name, ()))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_whole_numbers_are_tried_too(dtype: torch.dtype) -> None:
    x = torch.zeros(5, 2).to(dtype)
    assert reason_of(captured(lambda x: x.flip(0), x)) is Reason.NOT_EXACT
    assert reason_of(captured(lambda x: x.sort(0).values, x)) is Reason.NOT_EXACT
    assert reason_of(captured(lambda x: x.logical_not(), x)) is Reason.PADDED


# --- what is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda x: (x * 2, lies(x)), "result 1 is another one"),
        (lambda x: (x * 2, x.sum(0)), "result 1 is another one"),
        (lambda x: (x, x, torch.cat([x, x])), "its size is computed from the batch"),
    ],
)
def test_a_caller_who_says_what_is_not_so_is_told_which_result_differs(
    model: Callable[..., object], named: str
) -> None:
    with pytest.raises(StaticGraphError, match=named):
        captured(model, pad=True)


def test_a_caller_may_say_what_nothing_shows(warned: list[str]) -> None:
    module = captured(lambda x: x + x.mean(0) * 0.0 if x.dim() == 3 else x + W.mean(0), pad=True)
    assert reason_of(module) is Reason.PADDED
    table = torch.randn(1, 4)  # the try passes 0 and 1
    ids = torch.zeros(5, dtype=torch.long)
    assert reason_of(captured(lambda ids: table[ids] + 1, ids)) is Reason.NOT_EXACT
    assert any("pad=True" in text for text in warned)
    module = captured(lambda ids: table[ids] + 1, ids, pad=True)
    torch.testing.assert_close(module(ids[:3]), table[[0, 0, 0]] + 1)
    assert [row.reason for row in module.call_report()] == [Reason.PADDED.value]


def test_nothing_is_padded_where_the_caller_says_so(warned: list[str]) -> None:
    module = captured(lambda x: x + 1, pad=False)
    row = next(row for row in module.coverage(8) if row.first <= 5 <= row.last)
    assert row.reason is Reason.UNPADDED and not row.is_fallback and not warned
    with pytest.raises(ConfigError, match=r"pad: .* boolean"):
        captured(lambda x: x + 1, pad="yes")


def test_what_reads_the_real_size_is_padded_where_the_caller_says_so(warned: list[str]) -> None:
    model = lambda x: counts(x * 2) + 1  # noqa: E731
    assert reason_of(captured(model)) is Reason.NOT_EXACT
    assert any("pad=True" in text for text in warned)
    module, x = captured(model, pad=True), torch.randn(3, 4)
    with set_forward_context(3):
        torch.testing.assert_close(module(x), (x * 2).sum(0).expand(3, 4) + 1)
    assert [row.reason for row in module.call_report()] == [Reason.PADDED.value]


def test_an_operator_of_another_library_is_declared_by_name() -> None:
    def reason() -> Reason:
        return reason_of(captured(lambda x: plain(x * 2) + 1, ops=("padding::plain",)))

    assert reason() is Reason.NOT_EXACT
    for op in ("padding::plain", plain, torch.ops.padding.plain.default):
        piecework.declare_rows(op, "independent")
        assert reason() is Reason.PADDED
        piecework.declare_rows(op, None)
    assert reason() is Reason.NOT_EXACT
    for rows in ("Independent", 3):
        with pytest.raises(SplitError, match="independent"):
            piecework.declare_rows("padding::plain", rows)  # type: ignore[arg-type]
    with pytest.raises(SplitError, match="namespace::name"):
        piecework.declare_rows("plain", "independent")


# --- what is written -----------------------------------------------------------------------------------


def test_written_arguments_are_tried_too_and_brought_back() -> None:
    def model(x, out):
        writes(x + 1, out)
        return x * 2

    def wrong(x, out):
        out.copy_(x.flip(0))
        return x * 2

    given = (torch.randn(5, 4), torch.zeros(5, 4))
    same = {"dynamic": 2, "other_sizes": {"out.0": "batch"}}
    module = captured(model, *given, **same)
    assert reason_of(module) is Reason.PADDED
    x, out = torch.randn(3, 4), torch.zeros(3, 4)
    torch.testing.assert_close(module(x, out), x * 2)
    torch.testing.assert_close(out, (x + 1) * 2)
    with pytest.raises(StaticGraphError, match="argument out, which is written to"):
        captured(wrong, *given, pad=True, **same)


def test_memory_without_rows_gets_none_beyond_the_batch(warned: list[str]) -> None:
    def model(x, store):
        stores(x + 1, store)
        return x * 2

    def inside(x, cache):
        cache[: x.shape[0]].copy_(x)
        return x + 1

    for each in (model, inside):
        module = captured(each, torch.randn(5, 4), torch.zeros(9, 4))
        assert reason_of(module) is Reason.NOT_EXACT
        for rows in (3, 4, 5, 8):
            x, seen, expected = (
                torch.randn(rows, 4),
                torch.full((9, 4), 7.0),
                torch.full((9, 4), 7.0),
            )
            torch.testing.assert_close(module(x, seen), each(x, expected))
            torch.testing.assert_close(seen, expected)
    assert any("would keep rows beyond the batch" in text for text in warned)


# --- sizes, and what is equal ----------------------------------------------------------------------------


def test_a_graph_that_reads_the_size_alone_is_refused_by_name() -> None:
    with pytest.raises(StaticGraphError, match="batch size alone"):
        captured(lambda x: torch.arange(x.shape[0]) * 2)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.ones(3), torch.ones(3) + 1e-5, True),
        (torch.ones(3), torch.ones(3) + 1e-2, False),
        (torch.tensor([1e-6, 0.0]), torch.tensor([0.0, 0.0]), True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), False),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.ones(3), torch.ones(2), False),
        (torch.ones(3), torch.ones(3).double(), False),
        (torch.ones(0), torch.ones(0), True),
        (torch.ones(2, dtype=torch.cfloat), torch.ones(2, dtype=torch.cfloat) * 1.5, False),
        (3, 3, True),
        (3, 3.0, False),
        (None, None, True),
    ],
)  # fmt: skip
def test_values_are_the_same_up_to_the_tolerance_of_their_dtype(
    one: object, other: object, same: bool
) -> None:
    assert same_values(one, other) is same
