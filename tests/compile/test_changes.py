"""Changes while calls run: what a call uses stays as it was until it returns, and stays alive."""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, InputError, NotThereError, PieceworkError, StaticGraphError

MODES = [None, "PIECEWISE", "FULL"]
LAYERS = 4
inside: list[Callable[[], object]] = []  # what the operator does besides its work, once


@piecework.splitting_op("changes::halve", mutates_args=("out",))
def halve(x: torch.Tensor, out: torch.Tensor) -> None:
    if inside:
        inside.pop()()
    out.copy_(x / 2)


class Model(nn.Module):
    """``x`` times the product of the scales of all layers; a mixture of old and new weights shows in the power of two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(LAYERS))
        self.set_weights(scaled(1))

    def set_weights(self, weights: list[nn.Parameter]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            y = layer(x)
            out = torch.empty_like(y)
            halve(y, out)
            x = out * 2
        return x


def scaled(factor: int) -> list[nn.Parameter]:
    return [nn.Parameter(factor * torch.eye(8), requires_grad=False) for _ in range(LAYERS)]


NEW = 2**LAYERS
OTHERS = [("rebind", NEW), ("edit to another meaning", 2)]  # changes, and what results are times
X = torch.randn(4, 8)


def made(mode: str | None) -> tuple[Model, piecework.StitchedModule]:
    """The model, compiled once for the whole file, with its first weights and text."""
    model, stitched = compiled_once()
    model.set_weights(scaled(1))
    stitched.rebind()
    stitched.use_edited(stitched.source.code)
    return model, captured(stitched, mode)


@functools.cache
def compiled_once() -> tuple[Model, piecework.StitchedModule]:
    return fresh()


def fresh() -> tuple[Model, piecework.StitchedModule]:
    model = Model()
    return model, piecework.compile(model, (X,), splitting_ops=[halve], config=EAGER)


def captured(stitched: piecework.StitchedModule, mode: str | None) -> piecework.StitchedModule:
    if mode is None:
        return stitched
    return stitched.capture([2, 4], mode=mode, progress=False, estimate=False)


def doubled(text: str) -> str:
    """Another meaning: the result times two."""
    head, _, last = text.rpartition("return (")
    name, _, rest = last.partition(",)")
    return f"{head}return ({name} * 2,){rest}"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    inside.clear()
    yield
    inside.clear()


@contextmanager
def calling(stitched: piecework.StitchedModule, threads: int = 3) -> Iterator[list[object]]:
    """Call from several threads during the block; what came out is judged afterwards."""
    results: list[object] = []
    stop = threading.Event()

    def run() -> None:
        over = False
        while not over:
            over = stop.is_set()  # each of them calls at least once, and once after all changes
            try:
                results.append(stitched(X))
            except InputError as error:  # between a replaced weight and its rebind
                assert "replaced" in str(error) or "changed since" in str(error)
            except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
                results.append(error)
                return

    workers = [threading.Thread(target=run) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield results
    finally:
        stop.set()
        for worker in workers:
            worker.join(120)
    assert not any(worker.is_alive() for worker in workers)


def assert_old_or_new(results: list[object], *factors: int) -> None:
    assert results
    for result in results:
        if isinstance(result, BaseException):
            raise result
        assert any(torch.equal(result, X * factor) for factor in factors), result / X  # type: ignore[arg-type, operator]


# --- from other threads ------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "factor"), OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_change_while_others_call_gives_the_old_or_the_new(
    mode: str | None, what: str, factor: int
) -> None:
    model, stitched = made(mode)
    with calling(stitched) as results:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            change(what, model, stitched)
            if what == "rebind":
                captured(stitched, mode)
            time.sleep(0.005)
            made(mode)  # as it was
            stitched.accept_settings()
            time.sleep(0.005)
    assert_old_or_new(results, 1, factor)


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_a_call_keeps_its_graphs_until_it_returns(mode: str) -> None:
    model, stitched = made(mode)
    graphs = stitched.static_graphs.graphs
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go_on.wait(120)

    inside.append(wait)
    results: list[object] = []
    worker = threading.Thread(target=lambda: results.append(stitched(X)))
    worker.start()
    assert entered.wait(120)
    model.set_weights(scaled(2))
    stitched.rebind()
    assert torch.equal(stitched(X), X * NEW), "calls after the rebind have the new weights"
    captured(stitched, mode)
    assert torch.equal(stitched(X), X * NEW)
    assert graphs.nbytes > 0, "the call that is in them still needs them"
    go_on.set()
    worker.join(120)
    assert_old_or_new(results, 1)
    assert graphs.nbytes == 0 and not graphs.records


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_captures_and_rebinds_of_several_threads_take_turns(mode: str) -> None:
    _, stitched = made(None)
    failures: list[BaseException] = []

    def change(what: Callable[[], object]) -> None:
        try:
            for _ in range(5):
                what()
        except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
            failures.append(error)

    work = [lambda: captured(stitched, mode), stitched.rebind, stitched.accept_settings]
    workers = [threading.Thread(target=change, args=(each,)) for each in work]
    with calling(stitched, threads=1) as results:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    assert not failures
    assert_old_or_new(results, 1)


def test_a_returned_weight_belongs_to_the_same_binding_as_the_rest() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.told = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * self.scale, self.told

    model = Returns()
    stitched = piecework.compile(model, (X,), splitting_ops=[], config=EAGER)
    entry = stitched.entry
    old = model.told
    look = entry.__globals__["bound"][1]

    def change_after_the_check() -> bool:
        fine = look()
        model.scale, model.told = nn.Parameter(2 * torch.ones(8)), nn.Parameter(2 * torch.ones(8))
        stitched.rebind()
        return fine

    serves, _, *rest = entry.__globals__["bound"]
    entry.__globals__["bound"] = (serves, change_after_the_check, *rest)
    try:
        result, told = stitched(X)
    except (InputError, BindError):
        return  # refused, and not mixed
    assert (torch.equal(result, X) and told is old) or (
        torch.equal(result, 2 * X) and told is model.told
    )


# --- from inside a splitting op ----------------------------------------------------------------------


@pytest.mark.parametrize(("what", "factor"), OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_a_change_inside_an_op_is_for_the_next_call(
    mode: str | None, what: str, factor: int
) -> None:
    model, stitched = made(mode)

    def inside_the_op() -> None:
        change(what, model, stitched)
        stitched.accept_settings()

    inside.append(inside_the_op)
    assert torch.equal(stitched(X), X)
    assert not inside
    assert torch.equal(stitched(X), X * factor)


@pytest.mark.sample(2)
@pytest.mark.parametrize("what", ["rebind", "accept_settings", "capture", "use_edited"])
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_changes_inside_the_op_of_a_warm_up_are_refused(mode: str, what: str) -> None:
    _, stitched = made(None)
    arguments = {"capture": ([2],), "use_edited": (stitched.source.code,)}.get(what, ())
    inside.append(lambda: getattr(stitched, what)(*arguments))
    with pytest.raises(PieceworkError, match=rf"{what}\(\) was called from inside capture\(\)"):
        captured(stitched, mode)
    assert torch.equal(stitched(X), X)
    assert torch.equal(captured(stitched, mode)(X), X)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_called_by_its_own_op(mode: str | None) -> None:
    _, stitched = made(mode)
    inner: list[torch.Tensor] = []
    inside.append(lambda: inner.append(stitched(3 * X)))
    assert torch.equal(stitched(X), X)
    assert torch.equal(inner[0], 3 * X)
    assert torch.equal(stitched(X), X)


# --- interrupts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_an_interrupt_anywhere_leaves_the_graphs_usable(mode: str) -> None:
    model, stitched = made(mode)
    sets = [scaled(2), scaled(1)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    stopped = 0
    try:
        end = time.monotonic() + 120  # an interrupt takes as long as a slow machine does
        while stopped <= 20 and time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.003 * (stopped % 7) / 7)
                for _ in range(100):
                    stitched(X)
                model.set_weights(sets[stopped % 2])
                stitched.rebind()
                captured(stitched, mode)
            except KeyboardInterrupt:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # torch.no_grad() itself can be stopped half-way
    assert stopped > 20
    # A served call leaves the graphs free for the next one, wherever it was stopped.
    assert not stitched.static_graphs._user or stitched.static_graphs._retired
    model.set_weights(scaled(1))
    stitched.rebind()
    captured(stitched, mode)
    assert torch.equal(stitched(X), X)
    assert [(row.mode, row.calls) for row in stitched.call_report()] == [(mode, 1)]


# --- what an edit means for replays ------------------------------------------------------------------


def test_an_edited_text_of_another_meaning_is_not_captured() -> None:
    _, stitched = made(None)
    text = stitched.source.code
    stitched.use_edited(doubled(text))
    with pytest.raises(StaticGraphError, match="means something else than the graph"):
        captured(stitched, "PIECEWISE")
    assert torch.equal(stitched(X), X * 2)
    stitched.use_edited(text)
    assert torch.equal(captured(stitched, "PIECEWISE")(X), X)


# --- one change after another --------------------------------------------------------------------------


@functools.cache
def guarded() -> tuple[Model, piecework.StitchedModule]:
    """Compiled with guards that each call evaluates, and nothing else that refuses a size."""
    model = Model()
    config = EAGER.replace(
        dynamic_shapes_config={"type": "backed", "evaluate_guards": True},
        stitching_config={"check_inputs": False},
    )
    return model, piecework.compile(model, (X,), splitting_ops=[halve], config=config)


def change(what: str, model: Model, stitched: piecework.StitchedModule) -> None:
    match what:
        case "edit":
            stitched.use_edited(stitched.source.code + "# edited\n")
        case "edit to another meaning":
            stitched.use_edited(doubled(stitched.source.code))
        case "rebind":
            model.set_weights(scaled(2))
            stitched.rebind()
        case "rebind to the same":
            stitched.rebind()
        case "accept":
            stitched.accept_settings()
        case "capture":
            captured(stitched, "PIECEWISE")
        case "release":
            stitched.static_graphs.release()


CHANGES = ("edit", "edit to another meaning", "rebind", "rebind to the same", "accept", "capture")


@pytest.mark.sample(4)
@pytest.mark.parametrize("second", (*CHANGES, "release"))
@pytest.mark.parametrize("first", CHANGES)
def test_a_change_keeps_what_the_one_before_it_set(first: str, second: str) -> None:
    model, stitched = guarded()
    model.set_weights(scaled(1))
    stitched.rebind()
    stitched.use_edited(stitched.source.code)
    captured(stitched, "PIECEWISE")  # what serves before either change
    both = (first, second)
    change(first, model, stitched)
    if second == "capture" and first == "edit to another meaning":
        with pytest.raises(StaticGraphError, match="means something else than the graph"):
            change(second, model, stitched)
    elif second == "release" and first in ("edit", "edit to another meaning", "rebind"):
        with pytest.raises(NotThereError, match="nothing is captured"):  # the graphs went before
            change(second, model, stitched)
    else:
        change(second, model, stitched)

    # The text that runs is the last edit, over the last weights.
    [trace] = stitched.traces
    edits = [each for each in both if each.startswith("edit")]
    expected = {"edit": stitched.source.code + "# edited\n"}
    expected["edit to another meaning"] = doubled(stitched.source.code)
    assert trace.entry.now.edited is not None
    assert trace.entry.now.edited.code == (expected[edits[-1]] if edits else stitched.source.code)
    factor = (NEW if "rebind" in both else 1) * (2 if edits[-1:] == [CHANGES[1]] else 1)
    before = replays(stitched)
    assert torch.equal(stitched(X), X * factor)
    # Guards are evaluated whatever serves.
    with pytest.raises(InputError, match="has size 1"):
        stitched(X[:1])
    # Static graphs serve unless something came after their capture that they know nothing of.
    serves = True
    for each in both:
        if each in ("edit", "edit to another meaning", "rebind", "release"):
            serves = False
        elif each == "capture":
            serves = each == first or first != "edit to another meaning"
    assert replays(stitched) - before == serves
    held = sum(each.static.graphs.nbytes for each in stitched.traces if each.static is not None)
    assert (held > 0) == serves, "what serves no more is given back"


def replays(stitched: piecework.StitchedModule) -> int:
    return sum(row.calls for row in stitched.call_report() if row.mode == "PIECEWISE")
