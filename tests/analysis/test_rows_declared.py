"""What operators say of their rows, and what captures make of it: padded, or not, and saying why; and the try at the capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import EAGER

import piecework
from piecework.errors import SplitError, StaticGraphError
from piecework.runtime.analysis.rows.verdict import rows_of
from piecework.runtime.batch.dispatcher import Reason
from piecework.runtime.batch.forward_context import current_forward_context


@piecework.splitting_op("rows_declared::silent")
def silent(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@piecework.splitting_op("rows_declared::independent", rows="independent")
def independent(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@piecework.splitting_op("rows_declared::lies", rows="independent")
def lies(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0)


@piecework.splitting_op("rows_declared::counts", rows="context")
def counts(x: torch.Tensor) -> torch.Tensor:
    """The sum of the real rows, in each of them."""
    context = current_forward_context()
    real = x.shape[0] if context is None or context.attn_metadata is None else context.attn_metadata
    return x[:real].sum(0).expand(x.shape) * 1


@piecework.splitting_op("rows_declared::writes", mutates_args=("out",), rows="independent")
def writes(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 2)


@piecework.splitting_op("rows_declared::silent_effect", mutates_args=("store",))
def silent_effect(x: torch.Tensor, store: torch.Tensor) -> None:
    store[: x.shape[0]] += x


@torch.library.custom_op("rows_declared::plain", mutates_args=())
def plain(x: torch.Tensor) -> torch.Tensor:
    return x + 1


for each in (silent, independent, lies, counts):
    each.register_fake(torch.empty_like)
plain.register_fake(torch.empty_like)


def stitched(
    model: Callable[..., object],
    *args: torch.Tensor,
    dynamic: int = 1,
    ops: tuple[str, ...] | None = None,
) -> piecework.StitchedModule:
    for tensor in args[:dynamic]:
        torch._dynamo.mark_dynamic(tensor, 0)
    config = EAGER if ops is None else EAGER.replace(splitting_ops=ops)
    return piecework.compile(model, args, config=config)


def captured(model: Callable[..., object], *args: torch.Tensor, dynamic: int = 1, **options):
    made = stitched(model, *args, dynamic=dynamic, ops=options.pop("ops", None))
    return made.capture([4, 8], progress=False, estimate=False, **options)


def modes(module: piecework.StitchedModule) -> dict[int, str]:
    return {n: row.mode.name for row in module.coverage(8) for n in range(row.first, row.last + 1)}


def test_nothing_is_padded_around_an_operator_that_says_nothing(warned: list[str]) -> None:
    module = captured(lambda x: silent(x + 1) * 2, torch.randn(5, 4))
    assert {n for n, mode in modes(module).items() if mode != "NONE"} == {4, 8}
    [row] = [row for row in module.coverage(8) if row.first <= 5 <= row.last]
    assert row.reason is Reason.UNDECLARED and row.is_fallback
    [text] = [text for text in warned if "captured size" in text]
    assert "silent" in text and "declare_rows" in text
    for rows in (4, 5, 7, 8):
        x = torch.randn(rows, 4)
        y = x + 1
        torch.testing.assert_close(module(x), (y - y.mean(0)) * 2)


def test_batches_are_padded_around_one_that_keeps_rows_apart(warned: list[str]) -> None:
    module = captured(lambda x: independent(x + 1) * 2, torch.randn(5, 4))
    assert set(modes(module).values()) == {"PIECEWISE"}
    for rows in (3, 4, 7):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(module(x), (x + 1) * 6)
    assert [row.reason for row in module.call_report()].count(Reason.PADDED.value) == 2
    assert not warned


def test_one_that_reads_the_real_size_may_take_rows_together() -> None:
    from piecework.runtime.batch.forward_context import set_forward_context

    module = captured(lambda x: counts(x * 2) + 1, torch.randn(5, 4))
    x = torch.randn(3, 4)
    with set_forward_context(3):
        torch.testing.assert_close(module(x), (x * 2).sum(0).expand(3, 4) + 1)
    assert [row.reason for row in module.call_report()] == [Reason.PADDED.value]


def test_a_claim_that_does_not_hold_is_found_at_the_capture(warned: list[str]) -> None:
    module = captured(lambda x: lies(x + 1) * 2, torch.randn(5, 4))
    [row] = [row for row in module.coverage(8) if row.first <= 5 <= row.last]
    assert row.reason is Reason.CHECKED
    assert any("result 0" in text for text in warned)
    x = torch.randn(5, 4)
    torch.testing.assert_close(module(x), (x - x.mean(0)) * 2)


def test_the_try_can_be_left_out(warned: list[str]) -> None:
    module = captured(lambda x: lies(x + 1) * 2, torch.randn(5, 4), check_padding=False)
    assert set(modes(module).values()) == {"PIECEWISE"} and not warned


def test_the_try_does_not_stop_a_capture_that_made_up_data_breaks(warned: list[str]) -> None:
    table = torch.randn(1, 4)  # the try passes 0 and 1
    module = captured(lambda ids: table[ids] + 1, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(module(torch.zeros(3, dtype=torch.long)), table[[0, 0, 0]] + 1)


def test_written_arguments_are_tried_too_and_brought_back() -> None:
    def model(x, out):
        writes(x + 1, out)
        return out * 2

    module = captured(
        model, torch.randn(5, 4), torch.zeros(5, 4), dynamic=2, other_sizes={"out.0": "batch"}
    )
    assert set(modes(module).values()) == {"PIECEWISE"}
    x, out = torch.randn(3, 4), torch.zeros(3, 4)
    torch.testing.assert_close(module(x, out), (x + 1) * 4)
    torch.testing.assert_close(out, (x + 1) * 2)  # a splitting op wrote to the caller's tensor


def test_an_effect_beside_the_results_is_enough_not_to_pad() -> None:
    def model(x, store):
        silent_effect(x + 1, store)
        return x * 2

    module = captured(model, torch.randn(5, 4), torch.zeros(9, 4))
    assert modes(module)[5] == "NONE"
    for rows in (4, 5):
        x, store = torch.randn(rows, 4), torch.zeros(9, 4)
        module(x, store)
        torch.testing.assert_close(store[:rows], x + 1)
        assert not store[rows:].any()


def test_a_cache_gets_no_rows_beyond_the_batch() -> None:
    def model(x, cache):
        cache[: x.shape[0]].copy_(x)
        return x + 1

    module = captured(model, torch.randn(5, 4), torch.zeros(9, 4))
    for rows in (3, 4, 5, 8):
        x, cache = torch.randn(rows, 4), torch.full((9, 4), 7.0)
        torch.testing.assert_close(module(x, cache), x + 1)
        torch.testing.assert_close(cache[:rows], x)
        assert (cache[rows:] == 7).all()


def test_an_operator_of_another_library_is_declared_by_name() -> None:
    def padded() -> bool:
        module = captured(
            lambda x: plain(x * 2) + 1, torch.randn(5, 4), ops=("rows_declared::plain",)
        )
        return modes(module)[5] == "PIECEWISE"

    assert not padded()
    for name in (
        "rows_declared::plain",
        plain,
        torch.ops.rows_declared.plain,
        torch.ops.rows_declared.plain.default,
    ):
        piecework.declare_rows(name, "independent")
        assert padded()
        piecework.declare_rows(name, None)
        assert not padded()


@pytest.mark.parametrize("rows", ["Independent", "yes", 3])
def test_other_words_are_refused(rows: object) -> None:
    with pytest.raises(SplitError, match="independent"):
        piecework.declare_rows("rows_declared::plain", rows)  # type: ignore[arg-type]
    with pytest.raises(SplitError, match="namespace::name"):
        piecework.declare_rows("plain", "independent")


def test_a_recommender_with_offsets_is_not_padded() -> None:
    table = torch.randn(20, 4)

    def model(dense, offsets, ids):
        bags = F.embedding_bag(ids, table, offsets, mode="sum")
        return dense + bags

    dense, ids = torch.randn(3, 4), torch.arange(9)
    offsets = torch.tensor([0, 2, 5])
    torch._dynamo.mark_dynamic(dense, 0)
    torch._dynamo.mark_dynamic(offsets, 0)
    program = piecework.compile(model, (dense, offsets, ids), config=EAGER).program
    found = rows_of(program.graph, {program.batch.symbol})
    assert found.reason is not None


def test_a_declared_operator_does_not_mend_what_it_is_given() -> None:

    module = captured(lambda x: independent(x - x.mean(0)), torch.randn(5, 4))
    assert modes(module)[5] == "NONE"


def test_a_graph_that_reads_the_size_alone_is_refused_by_name() -> None:
    with pytest.raises(StaticGraphError, match="batch size alone"):
        captured(lambda x: torch.arange(x.shape[0]) * 2, torch.randn(5, 4))
