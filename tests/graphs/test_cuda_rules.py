"""The CUDA platform against the rules of CUDA graphs in torch, which `fake_cuda` keeps: failed captures, workspaces, captures of others."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from fake_cuda import FORBIDDEN, GRAPH, LOST, SEGMENT, STEP, FakeCuda, Watch
from gpu_models import Unsigned
from models import EAGER, Layers
from ran import Ran
from torch import nn
from torchs_graph import RealGraphs, newer

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import current_forward_context, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.device.cpu import CpuGraphPool, CpuStaticGraph
from piecework.runtime.graphs.device.cuda import (
    CudaGraphPlatform,
    CudaGraphPool,
    CudaStaticGraph,
    _CallOrder,
)
from piecework.runtime.graphs.memory import owner
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper
from piecework.runtime.graphs.plan.phase import capture_graphs
from piecework.runtime.graphs.serve import model as served

DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=["2.11", "2.13", "2.15", pytest.param("2.15 as it is", marks=newer)])
def cuda(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeCuda:
    fake = RealGraphs() if "is" in request.param else FakeCuda(request.param)
    fake.install(monkeypatch)
    return fake


class Capturing:
    """A pool, and callables captured into it."""

    def __init__(self) -> None:
        self.pool = CudaGraphPool(DEVICE)
        self.x = torch.ones(4)

    def capture(self, runnable) -> tuple[CudaStaticGraph, object]:
        graph = CudaStaticGraph(self.pool)
        return graph, graph.capture(runnable, (self.x,), {})


# --- failed captures ---------------------------------------------------------------------------------


def plus_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def reads_on_the_host(x: torch.Tensor) -> torch.Tensor:
    return x * x.sum().item()


def synchronises(x: torch.Tensor) -> torch.Tensor:
    torch.cuda.synchronize()
    return x


def hides_its_error(x: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
    return x + 1


def leaves_another_stream(x: torch.Tensor) -> torch.Tensor:
    cuda = torch.cuda.current_stream().cuda  # the fake's
    cuda.current = cuda.default
    raise RuntimeError("CUDA error: out of memory")


def raises(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no such layer")


def refused_by_the_driver(cuda: FakeCuda, made: Capturing, here: pytest.MonkeyPatch) -> None:
    def refused(self, pool, capture_error_mode="global"):
        cuda.begin_allocate(pool, self)
        here.undo()
        raise RuntimeError("CUDA error: operation would make the legacy stream depend on a capture")

    here.setattr(torch.cuda.CUDAGraph, "capture_begin", refused)


# What is captured, what is wrong beside it, what is said.
WAYS_TO_FAIL: list[tuple[Callable[..., object], Callable[..., object] | None, str]] = [
    (reads_on_the_host, None, "CUDA error"),
    (synchronises, None, "CUDA error"),
    (hides_its_error, None, "CUDA error"),
    (leaves_another_stream, None, "CUDA error"),
    (raises, None, "no such layer"),
    # torch has ended that one, so it gives the pool back itself: once more would free others' memory.
    (plus_one, lambda cuda, _, here: here.setattr(cuda, "cannot_instantiate", True), "of memory"),
    (plus_one, refused_by_the_driver, "legacy stream"),
    # A capture that did not begin has no reference to give back.
    (plus_one, lambda cuda, made, here: here.setattr(made.pool, "stream", cuda.default), "default"),
]


@pytest.mark.parametrize(("runnable", "wrong", "said"), WAYS_TO_FAIL)
def test_after_a_failed_capture_the_next_one_works_and_nothing_leaks(
    cuda, monkeypatch, runnable, wrong, said
):
    made = Capturing()
    before, first = made.capture(plus_one)
    with monkeypatch.context() as here:
        if wrong is not None:
            wrong(cuda, made, here)
        with pytest.raises((RuntimeError, ValueError), match=said):
            made.capture(runnable)
    assert cuda.capturing is None and not cuda.recording
    gc.collect()  # the graph that failed may go now
    after, second = made.capture(lambda x: x * 5)
    before.replay(), after.replay()
    assert (first.tolist(), second.tolist()) == ([2.0] * 4, [5.0] * 4)
    # One reference for each graph, and one for the empty one that opens a pool.
    assert sum(cuda.references.values()) == 3 and not cuda.probes
    cuda.random_number()


def test_a_device_that_is_lost_does_not_hide_what_lost_it(cuda):
    made = Capturing()

    def lose(x):
        cuda.lost = True
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error") as caught:
        made.capture(lose)
    assert [LOST in note for note in caught.value.__notes__] == [True, True]


def test_clearing_a_pool_gives_every_reference_back(cuda):
    made = Capturing()
    graph, _ = made.capture(plus_one)
    with pytest.raises(RuntimeError):
        made.capture(synchronises)
    graph.reset()
    made.pool.clear()
    assert sum(cuda.references.values()) == 1  # the empty graph of the new memory
    assert made.capture(plus_one)[0].replay() is None


@piecework.splitting_op("cuda_rules::mix", rows="independent")
def mix(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == Failing.size and torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize()
    return x * 2


mix.register_fake(torch.empty_like)


class Failing:
    size = 0


class Blocks(nn.Module):
    def __init__(self, op: Callable[[torch.Tensor], torch.Tensor] = mix) -> None:
        super().__init__()
        self.first, self.second, self.op = nn.Linear(4, 4), nn.Linear(4, 4), op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.second(self.op(x))


class OnCuda(FakeCuda):
    """The fake, once a model is compiled: Dynamo would ask a real device."""

    def stitch(self, model: nn.Module, *args: torch.Tensor) -> piecework.StitchedModule:
        stitched = piecework.compile(model, args or (torch.randn(8, 4),), config=EAGER)
        self.install(self.monkeypatch)
        return stitched


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> OnCuda:
    """Models are captured by the CUDA platform, under the fake."""
    fake = OnCuda()
    fake.monkeypatch = monkeypatch
    return fake


@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE"])
def test_a_size_that_fails_leaves_the_others_captured(on_cuda, monkeypatch, mode):
    monkeypatch.setattr(Failing, "size", 4)
    model = Blocks()
    stitched = on_cuda.stitch(model)
    stitched.capture(
        [1, 2, 4, 8], mode=mode, on_failure="uncaptured", progress=False, estimate=False
    )
    report = stitched.static_graphs.report
    failed = {(o.key[0].name, o.key[1].num_tokens) for o in report.outcomes if o.error}
    assert failed == {("FULL", 4)}
    assert FORBIDDEN in str(next(o.error for o in report.outcomes if o.error))
    for n in (1, 2, 4, 8):
        x = torch.randn(n, 4)
        torch.testing.assert_close(stitched(x), model(x))
    assert on_cuda.replays and not on_cuda.recording


class Cache:
    """State that an operator reaches by itself, and its kernel, which a GPU loads when it is first launched."""

    seen: ClassVar[list[tuple[bool, bool]]] = []
    rows = torch.zeros(8, 4)


@piecework.splitting_op("cuda_rules::keep", rows="context")
def keep(x: torch.Tensor) -> torch.Tensor:
    context, capturing = current_forward_context(), torch.cuda.is_current_stream_capturing()
    dry = context is not None and context.dry
    if not dry:
        if not any(not each for each, _ in Cache.seen) and capturing:
            torch.cuda.synchronize()  # loading a kernel is not allowed in a capture
        Cache.rows[: x.shape[0]].copy_(x)
    Cache.seen.append((dry, capturing))
    return x + Cache.rows[: x.shape[0]]


keep.register_fake(torch.empty_like)


@torch.no_grad()
def test_before_a_whole_forward_is_captured_it_runs_as_it_will_be_and_leaves_no_trace(on_cuda):
    Cache.seen.clear()
    before = Cache.rows.fill_(5).clone()
    model, x = Blocks(keep), torch.randn(8, 4)
    stitched = on_cuda.stitch(model, x)
    stitched.capture([4], mode="FULL", progress=False, estimate=False)
    assert Cache.seen == [(True, False), (False, False), (False, True)]
    assert torch.equal(Cache.rows, before)
    served = stitched(x[:4])
    assert torch.equal(Cache.rows[:4], model.first(x[:4])), "and calls write"
    torch.testing.assert_close(served, model(x[:4]))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_calls_on_several_streams_come_one_after_the_other(on_cuda, mode):
    """Also those of models that share memory."""
    models = Blocks(), Blocks()
    first = piecework.compile(models[0], (torch.randn(8, 4),), config=EAGER)
    second = on_cuda.stitch(models[1])
    first.capture([2, 4], mode=mode, progress=False)
    second.capture([2, 4], mode=mode, progress=False, memory_of=first.static_graphs.graphs)
    for stream in (*on_cuda.streams, on_cuda.default, on_cuda.streams[0]):
        for stitched, model in zip((first, second), models, strict=True):
            with on_cuda.on(stream):
                for n in (2, 3):
                    x = torch.randn(n, 4)
                    torch.testing.assert_close(stitched(x), model(x))


class Meanwhile:
    """What happens in another thread whenever the operator below runs."""

    call: ClassVar[Callable[[], object] | None] = None


@piecework.splitting_op("cuda_rules::wait", rows="independent")
def wait(x: torch.Tensor) -> torch.Tensor:
    if Meanwhile.call is not None and not torch.cuda.is_current_stream_capturing():
        thread = threading.Thread(target=Meanwhile.call)
        thread.start()
        thread.join(20)
    return x * 2


wait.register_fake(torch.empty_like)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL"])
def test_while_one_model_is_captured_the_others_of_its_memory_run_uncaptured(
    on_cuda, monkeypatch, mode
):
    """In the estimate, in the phase, and in the replay of each that follows."""
    target, draft, x, results = Blocks(), Blocks(wait), torch.randn(4, 4), []
    first = piecework.compile(target, (torch.randn(8, 4),), config=EAGER)
    second = on_cuda.stitch(draft)
    first.capture([4], progress=False)
    monkeypatch.setattr(Meanwhile, "call", lambda: results.append(first(x)))
    second.capture([2, 4], mode=mode, memory_of=first.static_graphs.graphs, progress=False)
    monkeypatch.setattr(Meanwhile, "call", None)
    assert len(results) > 6
    [row] = first.call_report()
    assert (row.mode, row.calls) == ("NONE", len(results)) and "another call" in row.reason
    for stitched, model in ((first, target), (second, draft)):
        torch.testing.assert_close(stitched(x), model(x))
    torch.testing.assert_close(results, [target(x)] * len(results))
    assert {row.mode for row in first.call_report()} == {"NONE", "PIECEWISE"}


@torch.no_grad()
def test_a_capture_waits_for_the_call_that_has_the_memory_and_not_for_ever(on_cuda, monkeypatch):
    stitched = on_cuda.stitch(Blocks())
    graphs = stitched.capture([4], progress=False).static_graphs.graphs
    graphs.users[0] = object()
    threading.Timer(0.1, graphs.users.clear).start()
    with graphs.alone():
        assert graphs.users
    graphs.users[0] = object()
    monkeypatch.setattr(owner, "_PATIENCE", 0.05)
    with pytest.raises(StaticGraphError, match="does not return"), graphs.capturing():
        pass
    assert not graphs.is_open


def test_memory_is_not_given_back_while_another_thread_captures_into_it():
    graphs, order = StaticGraphs("cpu", lazy=True), []
    other = threading.Thread(target=lambda: (graphs.clear_all_graphs(), order.append("cleared")))
    record = owner.CaptureRecord("it", CUDAGraphMode.FULL, BatchDescriptor(4))
    with graphs.one_capture(record) as graph:
        other.start()
        graph.capture(lambda x: x + 1, (torch.ones(4),), {})
        time.sleep(0.1)
        order.append("captured")
    other.join(10)
    assert order == ["captured", "cleared"]


def test_the_order_of_calls_is_one_for_all_threads(monkeypatch):
    """Two that come at once must not both wait for the same call before them, and one of them be forgotten."""
    here, waits = threading.local(), []

    class Stream:
        def wait_stream(self, other):
            time.sleep(0.1)
            waits.append((self, other))

    monkeypatch.setattr(torch_compat, "stream_number", lambda device: id(here.stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here.stream)
    order = _CallOrder(DEVICE)

    def call(stream):
        here.stream = stream
        order()

    call(first := Stream())
    threads = [threading.Thread(target=call, args=(Stream(),)) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(10)
    assert [before for _, before in waits] == [first, *(after for after, _ in waits[:-1])]


class Looks(nn.Module):
    """Rows of a table by whole numbers that it is given, or that it makes of floats."""

    def __init__(self, rows: int, *, of_floats: bool, how: str, outputs: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 4)
        self.of_floats, self.how, self.outputs = of_floats, how, outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = self.look(x)
        return found if self.outputs == 1 else (found, found * 2)

    def look(self, x: torch.Tensor) -> torch.Tensor:
        at = (x * 0).long() if self.of_floats else x
        if self.how == "embedding":
            return torch.ops.cuda_rules.mix(self.table(at)) + 1
        table = self.table.weight
        found = table[at] if self.how == "getitem" else torch.index_select(table, 0, at)
        return torch.ops.cuda_rules.mix(found) + 1


class Launched(Ran):
    """What copies or fills outside of captures: on a GPU each loads its kernel when it is first launched."""

    def __init__(self) -> None:
        super().__init__(unless=torch.cuda.is_current_stream_capturing)

    def moves(self) -> set[tuple[str, torch.dtype]]:
        found = set()
        for name, args in self.calls:
            given = args[0][0] if args and isinstance(args[0], list) else next(iter(args), None)
            moves = any(word in name for word in ("copy", "clone", "fill", "zero"))
            if moves and isinstance(given, torch.Tensor):
                found.add((name, given.dtype))
        return found


@torch.no_grad()
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_first_served_call_launches_nothing_for_the_first_time(on_cuda, outputs):
    model = Looks(5, of_floats=False, how="embedding", outputs=outputs)
    stitched = on_cuda.stitch(model, torch.zeros(8, dtype=torch.int64))
    with Launched() as before:
        stitched.capture([4], progress=False, estimate=False)
    served, launched = stitched.static_graphs, Launched()
    [step] = served._ready.values()
    for rows in (4, 3):  # the second fills what the first left
        x = torch.arange(rows)
        with launched:
            results = served._trimmed(step.call([x]), [x], rows, 4)
        expected = model(x)
        torch.testing.assert_close(results[0], expected[0] if outputs == 2 else expected)
    assert {("copy_", torch.int64)} < launched.moves() <= before.moves()


@torch.no_grad()
@pytest.mark.parametrize("how", ["embedding", "getitem", "index_select"])
@pytest.mark.parametrize(("rows", "of_floats"), [(1, False), (5, False), (5, True)])
def test_a_gpu_is_not_given_made_up_data_that_may_point_beyond_a_table(
    on_cuda, monkeypatch, rows, of_floats, how
):
    """There it is an assertion on the device, after which the process can do nothing more with it."""
    tried = []
    monkeypatch.setattr(served, "padded_difference", lambda *given: tried.append(given))
    model = Looks(rows, of_floats=of_floats, how=how)
    x = torch.zeros(8) if of_floats else torch.zeros(8, dtype=torch.int64)
    stitched = on_cuda.stitch(model, x)
    stitched.capture([2, 4], progress=False)
    assert bool(tried) == (rows > 1 and not of_floats)
    torch.testing.assert_close(stitched(x[:3]), model(x[:3]))


@torch.no_grad()
def test_what_a_gpu_copies_only_one_by_one_is_served(on_cuda):
    model = Unsigned()
    given = [torch.arange(8).to(torch.uint16) for _ in range(2)]
    stitched = on_cuda.stitch(model, *given)
    stitched.capture([2, 4], progress=False)
    for n in (2, 3, 4):
        batch = [each[:n].clone() for each in given]
        assert all(map(torch.equal, stitched(*batch), model(*batch)))
    assert {row.mode for row in stitched.call_report()} == {"PIECEWISE"}


def test_the_workspace_of_a_capture_that_failed_is_used_by_no_later_one(cuda):
    """It lies in memory that nobody keeps any more."""
    made, matrix = Capturing(), torch.ones(4, 4)

    def product_and_error(x):
        torch.cuda.synchronize() if (matrix @ matrix).numel() else None

    with pytest.raises(RuntimeError, match="CUDA error"):
        made.capture(product_and_error)
    made.capture(lambda x: matrix @ matrix)
    assert cuda.workspaces[made.pool.stream] == made.pool.handle


# --- workspaces of cuBLAS ------------------------------------------------------------------------------


@pytest.mark.parametrize("occupied", [False, True])
def test_the_workspace_that_graphs_use_lies_in_their_pool(on_cuda, occupied):
    if occupied:  # torch hands out the same few streams again and again
        on_cuda.workspaces.update(dict.fromkeys(on_cuda.streams))
    stitched = on_cuda.stitch(Blocks())
    with Watch(on_cuda):
        stitched.capture([4, 8], warmups=2, progress=False, estimate=False)
    pool = stitched.static_graphs.graphs.pool
    assert on_cuda.workspaces[pool.stream] == pool.handle
    assert on_cuda.workspaces[on_cuda.default] is None, "it was warmed up on the caller's stream"


def test_a_new_pool_is_not_given_the_workspace_of_the_old_one(cuda):
    made = Capturing()
    matrix = torch.ones(4, 4)
    graph, _ = made.capture(lambda x: matrix @ matrix)
    old = made.pool.handle
    assert cuda.workspaces[made.pool.stream] == old
    graph.reset()
    made.pool.clear()
    # Older torch keeps a workspace until somebody lets go of all of them.
    assert cuda.held == ({made.pool.handle} if cuda.newer else {made.pool.handle, old})
    made.capture(lambda x: matrix @ matrix)
    assert cuda.workspaces[made.pool.stream] == made.pool.handle != old


@torch.no_grad()
def test_workspaces_of_others_stay_and_nobody_else_uses_that_of_a_pool(on_cuda):
    """Graphs of others may hold theirs; and what torch hands out to others must not be the stream whose workspace replays write to."""
    stitched, matrix = on_cuda.stitch(Blocks()), torch.ones(4, 4)
    theirs = {stream: object() for stream in (on_cuda.default, *on_cuda.streams)}
    on_cuda.workspaces.update(theirs)
    with Watch(on_cuda):
        stitched.capture([4, 8], progress=False)
        pool = stitched.static_graphs.graphs.pool.handle
        for _ in on_cuda.streams:
            with on_cuda.on(torch.cuda.Stream(DEVICE)):
                matrix @ matrix
        assert [stream for stream, at in on_cuda.workspaces.items() if at == pool] == [
            on_cuda.own[-1]
        ]
        stitched.static_graphs.release()
    assert all(on_cuda.workspaces[stream] is place for stream, place in theirs.items())


def test_without_a_driver_there_is_no_stream_to_capture_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    if not torch.cuda.is_available():
        with pytest.raises(StaticGraphError, match="made no stream to capture on: libcuda"):
            torch_compat.own_stream(DEVICE)


# --- what captures take --------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL_AND_PIECEWISE"])
def test_the_estimate_is_near_though_the_device_tells_in_coarse_steps(on_cuda, mode):
    """A segment holds some sizes, and a step of what is free some graphs."""
    stitched = on_cuda.stitch(Layers(Blocks() for _ in range(8)))
    sizes = [*range(1, 9), *range(16, 129, 8)]
    stitched.capture(sizes, mode=mode, progress=False)
    graphs = stitched.static_graphs.graphs
    taken = SEGMENT * len(on_cuda.segments[graphs.pool.handle]) + GRAPH * len(graphs.records)
    report = stitched.memory_report()
    assert report.estimate.total == pytest.approx(taken, rel=0.1)
    assert graphs.nbytes == pytest.approx(taken, abs=2 * STEP)


# --- captures of others --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_call_that_somebody_else_captures_is_a_part_of_that_capture(on_cuda):
    model = Blocks()
    stitched = on_cuda.stitch(model)
    stitched.capture([2, 4], progress=False)
    x = torch.randn(3, 4)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        outer.capture_begin(pool=torch.cuda.graph_pool_handle())
        result = stitched(x)
        outer.capture_end()
    for _ in range(2):
        x.copy_(torch.randn(3, 4))
        outer.replay()
        torch.testing.assert_close(result, model(x))
    before = on_cuda.replays
    torch.testing.assert_close(stitched(x), model(x))
    assert on_cuda.replays > before, "and afterwards it is served from the graphs again"


@torch.no_grad()
def test_on_the_cpu_likewise():
    model = Blocks()
    stitched = piecework.compile(model, (torch.randn(8, 4),), config=EAGER)
    stitched.capture([2, 4], progress=False)
    x = torch.randn(3, 4)
    outer = CpuStaticGraph(CpuGraphPool())
    result = outer.capture(stitched, (x,), {})
    for _ in range(2):
        x.copy_(torch.randn(3, 4))
        outer.replay()
        torch.testing.assert_close(result, model(x))
    rows = {row.reason: row.calls for row in stitched.call_report()}
    assert rows == {"somebody else captures this call, and a replay can't be captured": 3}


def test_wrappers_stand_aside_in_the_capture_of_others(cuda):
    graphs = StaticGraphs(CudaGraphPlatform(DEVICE))
    x = torch.ones(2)
    graphs.addresses.register_persistent("x", x)
    double = CUDAGraphWrapper(lambda x: x * 2, None, CUDAGraphMode.FULL, graphs=graphs)
    capture_graphs(lambda d: double(x), [(CUDAGraphMode.FULL, [BatchDescriptor(2)])], graphs)
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
        outer.capture_begin(pool=torch.cuda.graph_pool_handle())
        for descriptor in (BatchDescriptor(2), BatchDescriptor(3)):  # captured, and never seen
            with set_forward_context(
                cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=descriptor
            ):
                result = double(x)
        outer.capture_end()
    outer.replay()
    assert result.tolist() == [2.0, 2.0]


# --- what is refused -----------------------------------------------------------------------------------


def test_an_allocator_without_private_pools_is_refused(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(StaticGraphError, match="torch's allocator is cudaMallocAsync"):
        CudaGraphPlatform(DEVICE)


def test_a_pool_of_the_callers_that_takes_the_memory_of_captures_is_refused(cuda, monkeypatch):
    """Outputs are held weakly: what a capture lets go of must not become somebody else's."""
    made = Capturing()
    monkeypatch.setattr(cuda, "users_pool", (7, 0))
    with pytest.raises(StaticGraphError, match="captures would lie in another pool"):
        made.capture(plus_one)
    monkeypatch.setattr(cuda, "users_pool", None)
    assert made.capture(plus_one)[0].replay() is None
    assert sum(cuda.references.values()) == 2 and not cuda.recording and not cuda.probes


def test_other_threads_may_allocate_and_nothing_is_collected_while_something_is_captured(cuda):
    made, collects = Capturing(), []

    def runs(x):
        cuda.malloc_in_another_thread()
        collects.append(gc.isenabled())
        return x + 1

    assert gc.isenabled() and made.capture(runs)[0].replay() is None
    assert collects == [False] and gc.isenabled()


def test_captures_of_several_threads_take_turns(cuda):
    """torch takes one capture in a process; who waits for the device meanwhile makes it invalid."""
    one, other = Capturing(), Capturing()
    inside, found = threading.Event(), []

    def slow(x):
        inside.set()
        time.sleep(0.2)
        return x + 1

    def in_another_thread():
        inside.wait(10)
        CudaGraphPlatform(DEVICE).synchronize()
        found.append(other.capture(lambda x: x * 3)[0].replay() is None)

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    one.capture(slow)
    thread.join()
    assert found == [True]


def test_captures_do_not_nest(cuda):
    made = Capturing()
    with pytest.raises(StaticGraphError, match="is being captured already"):
        made.capture(lambda x: Capturing.capture(made, lambda y: y))
    assert made.capture(plus_one)[0].replay() is None
