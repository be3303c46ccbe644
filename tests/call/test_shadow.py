"""Shadow mode: a wrong piece is found and named, callers get what the pieces computed, and nothing stays behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import Block, Layers, mix, mix_pair
from torch import nn

import piecework
from piecework.errors import BindError
from piecework.runtime.call.shadow import Shadow
from piecework.runtime.compilers import EagerAdaptor
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.trace import every_size

sys.modules.setdefault("shadow_compilers", sys.modules[__name__])

Change = Callable[[list[object]], object]


class Spoiling(EagerAdaptor):
    """Changes what pieces of a number in `changes` return, counted as they are compiled."""

    name = "spoiling"
    changes: ClassVar[dict[int, Change]] = {}

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        made = super().compile(graph, example_inputs, config, compile_range)
        change = self.changes.get(self.compiled)
        self.compiled += 1
        if change is None:
            return made
        return CompiledPiece(lambda *args: change(list(made.runnable(*args))))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, object]]:
    """The configuration whose compiled pieces of these numbers return something else."""

    def of(changes: dict[int, Change]) -> dict[str, object]:
        monkeypatch.setattr(Spoiling, "changes", changes)
        return {"backend": "shadow_compilers:Spoiling"}

    return of


def times(number: int, factor: float) -> Change:
    """Output ``number`` times ``factor``."""

    def change(outputs: list[object]) -> object:
        outputs[number] = outputs[number] * factor  # type: ignore[operator]
        return tuple(outputs)

    return change


def layers(count: int = 3) -> nn.Module:
    return Layers(Block(mix_pair) for _ in range(count)).eval()


X = torch.randn(4, 8)


def shadowed(stitched: StitchedModule, *calls: Sequence[torch.Tensor], **how: object) -> Shadow:
    with torch.no_grad(), stitched.shadow(**how) as found:  # type: ignore[arg-type]
        for args in calls:
            stitched(*args)
    return found


def test_pieces_that_are_right_differ_nowhere() -> None:
    stitched = piecework.compile(layers(), (X,), config={"backend": "eager"})
    found = shadowed(stitched, (X,), (torch.randn(7, 8),))
    assert (found.calls, found.compared) == (2, 8) and not found.left_out
    assert found.first is None and found.differences == ()
    assert str(found) == "compared 8 runs of pieces in 2 calls: no difference"


def test_a_wrong_piece_is_named_and_its_caller_gets_what_it_computed(spoil) -> None:  # type: ignore[no-untyped-def]
    model = layers()
    stitched = piecework.compile(model, (X,), config=spoil({2: times(0, 1.5)}))
    with torch.no_grad():
        wrong = stitched(X)
        assert not torch.allclose(wrong, model(X))
        with stitched.shadow() as found:
            assert torch.equal(stitched(X), wrong)
    [difference] = found.differences
    assert found.first is difference
    last = stitched.pieces[-1]
    assert (difference.piece, difference.modules, difference.call) == (last.name, last.modules, 1)
    assert "layers.2" in difference.modules and difference.output.startswith("output 0, node %")
    assert "models.py:" in difference.output  # the model's own line
    assert difference.error == pytest.approx(0.5 * (wrong / 1.5).abs().max().item(), rel=1e-3)
    assert difference.allowed == pytest.approx(1e-3 * (wrong / 1.5).abs().max().item(), rel=1e-3)
    assert f"{last.name} of {last.modules}: output 0" in str(found) and "is off by" in str(found)


class Advancing(nn.Module):
    """Counts calls in a buffer, in place, inside a piece."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        mix(self.enter(x), out)
        self.count.add_(1)
        self.steps += 2
        return out + self.count


def test_what_a_piece_writes_is_written_once_and_compared(spoil) -> None:  # type: ignore[no-untyped-def]
    model = Advancing().eval()
    stitched = piecework.compile(model, (X,), config={"backend": "eager"})
    found = shadowed(stitched, (X,), (X,))
    assert (model.count.item(), model.steps.item()) == (2, 4)
    assert found.compared == 4 and found.first is None, str(found)

    def once_more(outputs: list[object]) -> object:
        model.steps.add_(1)
        return tuple(outputs)

    stitched = piecework.compile(model, (X,), config=spoil({1: once_more}))
    before = model.steps.item()  # compiled pieces are tried
    found = shadowed(stitched, (X,))
    assert found.first is not None and "written in place" in found.first.output
    assert "steps" in found.first.output and "differs in 1 of 1 elements" in found.first.how
    assert model.steps.item() == before + 3


def test_memory_that_a_piece_hands_on_unwritten_is_not_compared(spoil) -> None:  # type: ignore[no-untyped-def]
    """``torch.empty`` holds anything, so it can't be wrong."""

    def fill(outputs: list[object]) -> object:
        unwritten = [each for each in outputs if each.shape == (4, 8)]  # type: ignore[attr-defined]
        assert len(outputs) == 2 and len(unwritten) == 2
        outputs[0].fill_(torch.nan)  # type: ignore[attr-defined]
        return tuple(outputs)

    def model(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        mix(x.sin(), out)
        return out.cos()

    stitched = piecework.compile(model, (X,), config=spoil({0: fill}))
    found = shadowed(stitched, (X,))
    assert found.compared == 2 and found.first is None, str(found)


def drops(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    mix(nn.functional.dropout(x, 0.5, training=True), out)
    return out + 1


def test_random_numbers_stay_the_caller_s() -> None:
    stitched = piecework.compile(drops, (X,), config={"backend": "eager"})
    torch.manual_seed(3)
    plain = [stitched(X), stitched(X)]
    torch.manual_seed(3)
    with stitched.shadow() as found:
        beside = [stitched(X), stitched(X)]
    assert all(map(torch.equal, plain, beside))
    assert found.compared == 2 and found.first is None
    [(name, why)] = found.left_out.items()
    assert name == "submod_0" and "draws random numbers" in why
    assert "not compared: submod_0, " in str(found)


def test_a_splitting_op_inside_a_piece_is_never_run_twice() -> None:
    config = {"backend": "eager", "mode": "DYNAMO_TRACE_ONCE"}
    stitched = piecework.compile(layers(), (X,), config=config)
    with pytest.raises(BindError, match=r"no piece can be run a second time.*is a splitting op"):
        shadowed(stitched, (X,))
    assert stitched(X).shape == X.shape


@pytest.mark.parametrize(
    ("dtype", "factor", "differs"),
    [
        (torch.float64, 1 + 1e-5, True),
        (torch.float32, 1 + 1e-6, False),
        (torch.float32, 1 + 1e-2, True),
        (torch.bfloat16, 1 + 1e-2, False),
        (torch.bfloat16, 1.5, True),
    ],
)
def test_what_may_differ_goes_by_dtype(dtype, factor, differs, spoil) -> None:  # type: ignore[no-untyped-def]
    model, x = layers(1).to(dtype), X.to(dtype)
    stitched = piecework.compile(model, (x,), config=spoil({1: times(0, factor)}))
    assert (shadowed(stitched, (x,)).first is not None) == differs


def to_nan(outputs: list[object]) -> object:
    outputs[0] = outputs[0].clone()  # type: ignore[attr-defined]
    outputs[0][0, 0] = torch.nan  # type: ignore[index]
    return outputs


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda outputs: [outputs[0][:1]], "float32[1, 8] on cpu, and the graph gives float32[4"),
        (lambda outputs: [outputs[0].double()], "is float64[4, 8] on cpu"),
        (lambda outputs: [None], "is None, and the graph gives tensor"),
        (lambda outputs: [3], "is 3, and the graph gives tensor"),
        (to_nan, "is off by up to inf"),
    ],
)
def test_other_kinds_of_difference(change: Change, says: str, spoil) -> None:  # type: ignore[no-untyped-def]
    stitched = piecework.compile(lambda x: mix_of(x.sin()).cos(), (X,), config=spoil({0: change}))
    found = shadowed(stitched, (X,))
    assert found.first is not None and says in str(found.first), str(found)
    assert found.first.piece == "submod_0" and found.first.error == float("inf")


@piecework.splitting_op("shadow::mix_of")
def mix_of(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(4, 8)


@mix_of.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_only_every_so_many_calls_are_compared(spoil) -> None:  # type: ignore[no-untyped-def]
    stitched = piecework.compile(layers(1), (X,), config={"backend": "eager"})
    found = shadowed(stitched, *[(X,)] * 7, every=3)
    assert (found.calls, found.compared) == (3, 6)


def test_each_batch_range_is_compared(spoil) -> None:  # type: ignore[no-untyped-def]
    """Three pieces in two ranges: the fourth compilation is the second piece for larger batches."""
    config = spoil({3: times(0, 1.5)}) | {"compile_ranges_endpoints": [4]}
    stitched = piecework.compile(layers(2), (X,), config=config)
    assert len(stitched.report().ranges) == 2
    assert shadowed(stitched, (X,)).first is None
    first = shadowed(stitched, (torch.randn(9, 8),)).first
    assert first is not None and first.piece == stitched.pieces[1].name


def test_a_trace_that_is_made_meanwhile_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(every_size, "ROWS", ("not in this test",))
    stitched = piecework.compile(layers(1), (X,), config={"backend": "eager"})
    with torch.no_grad(), stitched.shadow() as found:
        stitched(X)
        assert len(stitched.traces) == 1
        stitched(torch.randn(1, 8))
    assert len(stitched.traces) == 2 and (found.calls, found.compared) == (2, 4)
    stitched(torch.randn(1, 8))
    assert found.calls == 2


def test_what_was_loaded_is_compared(tmp_path: Path) -> None:
    model = layers(2)
    piecework.compile(model, (X,), config={"backend": "eager"}).save(tmp_path / "saved")
    loaded = piecework.load(tmp_path / "saved", model)
    found = shadowed(loaded, (X,))
    assert found.compared == 3 and found.first is None, str(found)


def test_a_graph_that_can_t_be_run_leaves_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stitched = piecework.compile(layers(1), (X,), config={"backend": "eager"})
    right = stitched(X)

    def broken(*args: object) -> object:
        raise MemoryError("no room for it")

    monkeypatch.setattr("piecework.runtime.call.shadow.uncompiled", lambda graph: broken)
    with torch.no_grad(), stitched.shadow() as found:
        assert torch.equal(stitched(X), right)
    assert found.compared == 0 and set(found.left_out) == {"submod_0", "submod_2"}
    assert "its graph fails beside it: MemoryError: no room for it" in str(found)


@pytest.fixture
def plain() -> Iterator[StitchedModule]:
    stitched = piecework.compile(layers(1), (X,), config={"backend": "eager"})
    entry = stitched.traces[0].entry
    stitched(X)  # the first call looks at the stance of torch's compiler
    before = dict(vars(stitched)), dict(entry.call.__globals__), entry.now
    lists = [list(each) for each in stitched.program.submod_lists]
    yield stitched
    assert (dict(vars(stitched)), dict(entry.call.__globals__), entry.now) == before
    assert [list(each) for each in stitched.program.submod_lists] == lists


def test_nothing_stays_behind(plain: StitchedModule) -> None:
    with pytest.raises(ZeroDivisionError), plain.shadow() as found:
        plain(X)
        raise ZeroDivisionError
    assert found.calls == 1
    plain(X)
    assert found.calls == 1
    with plain.shadow() as again, pytest.raises(piecework.PieceworkError):
        plain(torch.randn(4, 9))
    assert again.compared == 0 and again.calls == 0
