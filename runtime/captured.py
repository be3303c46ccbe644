"""A stitched model with static graphs. In: a compiled entry and sizes to capture. Out: the same function, served from replays where a size is captured.

It never captures while serving; a batch that no graph covers runs as it ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from piecework.codegen.bind import execute_source
from piecework.codegen.replay import REPLAY_NAME, generate_replay
from piecework.codegen.replay_check import ReplayProof
from piecework.codegen.replay_plan import ReplaySource
from piecework.errors import BindError, PieceworkError, StaticGraphError
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.captured_shape import BatchShape, StagedInput, batch_shape, require_sizes
from piecework.runtime.counters import counters
from piecework.runtime.dispatch import CudagraphDispatcher
from piecework.runtime.entry import Entry
from piecework.runtime.forward_context import (
    current_forward_context,
    set_forward_context,
)
from piecework.runtime.graphs.address import AddressPolicy
from piecework.runtime.graphs.capture import (
    CaptureOutcome,
    CaptureReport,
    CaptureWatcher,
    ContextFor,
    FailurePolicy,
    Key,
    capture_graphs,
    format_bytes,
)
from piecework.runtime.graphs.covered import CoverageRow, coverage
from piecework.runtime.graphs.descriptor import BatchDescriptor
from piecework.runtime.graphs.memory import MemoryEstimate, estimate_memory, fit_budget
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.owner import CaptureRecord, StaticGraphs
from piecework.runtime.graphs.progress import CaptureProgress
from piecework.runtime.graphs.sizes import default_capture_sizes
from piecework.runtime.graphs.wrapper import CUDAGraphOptions, CUDAGraphWrapper
from piecework.runtime.inputs import InputSpec, Number, StaticInputs
from piecework.runtime.replay_facts import bind_replay, replay_facts

_PIECEWISE = CUDAGraphMode.PIECEWISE
_WORTH_CAPTURING = 512


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How a stitched model is captured.

    Attributes:
        address_policy: what becomes of fresh tensors that enter a captured piece.
        warmups: uncaptured runs before each capture; by default the configuration's, and at least one on CUDA.
        on_failure: what a failed capture does.
        raise_interrupt: raise ``KeyboardInterrupt`` again after Ctrl-C; what was captured serves either way.
        clone_outputs: return copies; otherwise the next call overwrites what this one returned.
        strict: a batch that falls back to running uncaptured although its size was to be captured is an error.
        pads: what fills the tail of each padded input, by its parameter's name; 0 by default.
        poison: pad floating inputs with NaN, to find out what reads beyond the batch (debugging).
        context_for: makes the forward context of runs on dummy inputs.
        check_addresses: serve through pieces that check every address instead of through replay source (debugging).
    """

    address_policy: AddressPolicy | str = AddressPolicy.COPY
    warmups: int | None = None
    on_failure: FailurePolicy = FailurePolicy.RAISE
    raise_interrupt: bool = True
    clone_outputs: bool = True
    strict: bool = False
    pads: Mapping[str, Number] | None = None
    poison: bool = False
    context_for: ContextFor | None = None
    check_addresses: bool = False


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What captures take.

    Attributes:
        estimate: what was expected before the capture; None if it was not asked for.
        held: bytes that each captured shape added.
        dropped: shapes that were given up for the budget.
    """

    estimate: MemoryEstimate | None
    held: Mapping[Key, int]
    dropped: tuple[Key, ...]

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def table(self) -> Table:
        """The report for a terminal: expected and held memory of each shape."""
        expected = {} if self.estimate is None else dict(self.estimate.rows)
        table = Table(title=f"Static graphs hold {format_bytes(self.total)}", title_justify="left")
        for heading in ("mode", "graph", "expected", "held", "note"):
            right = heading in ("expected", "held")
            table.add_column(heading, justify="right" if right else "left")
        for key in dict.fromkeys([*expected, *self.held]):
            table.add_row(
                key[0].name,
                key[1].describe(),
                format_bytes(expected[key]) if key in expected else "",
                format_bytes(self.held[key]) if key in self.held else "",
                "dropped for the budget" if key in self.dropped else "",
            )
        return table

    def as_json(self) -> dict[str, object]:
        """The report as plain values."""
        expected = {} if self.estimate is None else dict(self.estimate.rows)
        return {
            "total": self.total,
            "graphs": [
                {
                    "mode": mode.name,
                    "tokens": descriptor.num_tokens,
                    "expected": expected.get((mode, descriptor)),
                    "held": self.held.get((mode, descriptor)),
                    "dropped": (mode, descriptor) in self.dropped,
                }
                for mode, descriptor in dict.fromkeys([*expected, *self.held])
            ],
        }


@dataclass(frozen=True, slots=True)
class Replay:
    """The replay of one captured size: its source, its proof, and the function itself."""

    source: ReplaySource
    proof: ReplayProof
    call: Callable[[Sequence[torch.Tensor]], object]


class _Inputs:
    """Persistent buffers for every tensor argument, with and without a batch dimension."""

    def __init__(self, shape: BatchShape, maximum: int, options: CaptureOptions) -> None:
        self._dynamic = [n for n, each in enumerate(shape.staged) if each.dim is not None]
        pads = dict(options.pads or {})
        unknown = sorted(set(pads) - {each.name for each in shape.dynamic})
        if unknown:
            raise BindError(
                f"no padded input {unknown[0]!r}",
                where="pads",
                hint=f"inputs: {', '.join(each.name for each in shape.dynamic)}",
            )
        self.static = StaticInputs.allocate(
            {each.name: _example(each) for each in shape.dynamic},
            maximum,
            [InputSpec(e.name, e.dim or 0, pads.get(e.name, 0)) for e in shape.dynamic],
            poison=options.poison,
        )
        self._fixed = {
            n: torch.zeros_like(_example(each))
            for n, each in enumerate(shape.staged)
            if each.dim is None
        }
        self.names = tuple(each.name for each in shape.staged)

    def register(self, graphs: StaticGraphs) -> None:
        self.static.register(graphs.addresses)
        for number, buffer in self._fixed.items():
            graphs.addresses.register_persistent(self.names[number], buffer)

    def views(self, padded: int) -> tuple[torch.Tensor, ...]:
        views = dict(zip(self._dynamic, self.static.views(padded), strict=True))
        return tuple({**views, **self._fixed}[n] for n in range(len(self.names)))

    def stager(self, padded: int) -> Callable[[Sequence[torch.Tensor]], None]:
        """What copies all tensor arguments into the buffers, padded to ``padded``."""
        stage, fixed, dynamic = self.static.stage, tuple(self._fixed.items()), self._dynamic
        if not fixed:
            return lambda inputs: stage(inputs, padded) and None

        def stage_all(inputs: Sequence[torch.Tensor]) -> None:
            stage([inputs[n] for n in dynamic], padded)
            for number, buffer in fixed:
                buffer.copy_(inputs[number], non_blocking=True)

        return stage_all


def _example(each: StagedInput) -> torch.Tensor:
    fake = each.fake
    shape = [1 if dim == each.dim else int(size) for dim, size in enumerate(fake.shape)]
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=fake.dtype, device=fake.device)


class _Recorder:
    """Keeps outcomes of a capture phase, also of one that is stopped, and passes them on."""

    def __init__(self, inner: CaptureWatcher | None) -> None:
        self.inner = inner
        self.outcomes: list[CaptureOutcome] = []

    def started(self, total: int) -> None:
        if self.inner is not None:
            self.inner.started(total)

    def finished(self, outcome: CaptureOutcome, held_bytes: int) -> None:
        self.outcomes.append(outcome)
        if self.inner is not None:
            self.inner.finished(outcome, held_bytes)

    def ended(self) -> None:
        if self.inner is not None:
            self.inner.ended()


class CapturedModel:
    """Static graphs of one stitched model; stands where its entry calls ``execution_fn``.

    Attributes:
        shape: how the graph depends on the batch size.
        graphs: the owner of what is captured.
        dispatcher: which batch runs as what.
        options: how it was captured.
        report: what the last capture phase did; None if it was stopped.
        replays: captured size → its replay.
        failures: captured sizes whose checked replay failed, with the reason.
    """

    def __init__(
        self,
        entry: Entry,
        backend: PieceworkBackend,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
    ) -> None:
        self._entry, self._backend, self.options = entry, backend, options
        self.shape = batch_shape(entry.captured, backend)
        self._weights = self._weights_by_name()
        self.sizes = self._sizes(sizes)
        self._forward: Callable[..., object] = entry.execution_fn
        self._counting = False
        self._inputs = _Inputs(self.shape, max(self.sizes), options)
        self.graphs = StaticGraphs(
            self.shape.dynamic[0].fake.device,
            address_policy=options.address_policy,
            check_addresses=options.check_addresses,
            on_capture=self._count,
        )
        self._inputs.register(self.graphs)
        traced = zip(entry.weights.traced, entry.weights.tensors, strict=True)
        self.graphs.addresses.register_weights({each.path: tensor for each, tensor in traced})
        self.dispatcher = CudagraphDispatcher(
            _PIECEWISE, self.sizes, max_num_seqs=max(self.sizes), strict=options.strict
        )
        self._wrapped = [self._wrap(submods, n) for n, submods in enumerate(backend.submod_lists)]
        self.report: CaptureReport | None = None
        self.estimate: MemoryEstimate | None = None
        self.dropped: tuple[Key, ...] = ()
        self.replays: dict[int, Replay] = {}
        self.failures: dict[int, PieceworkError] = {}
        self._steps: dict[int, tuple[Callable[..., object], int] | None] = {}

    # --- capture -----------------------------------------------------------------------------------

    def capture(
        self, *, memory_budget: int | None, progress: bool | CaptureWatcher, estimate: bool
    ) -> None:
        """Capture, largest first, and serve from then on what was captured.

        Raises:
            StaticGraphError: a capture failed under ``FailurePolicy.RAISE``; what was captured before it serves.
            KeyboardInterrupt: likewise, on Ctrl-C.
        """
        console = Console(stderr=True)
        warmups = self._warmups()
        if estimate or memory_budget is not None:
            self._estimate(warmups, required=memory_budget is not None)
            if progress is True and self.estimate is not None:
                console.print(self.estimate.table())
        if memory_budget is not None and self.estimate is not None:
            self.dropped = fit_budget(self.estimate, self.dispatcher, memory_budget)
        watcher = CaptureProgress(console) if progress is True else (progress or None)
        recorder = _Recorder(watcher)
        self._counting = True
        try:
            self.report = capture_graphs(
                self._dummy,
                self.dispatcher.get_capture_descs(),
                self.graphs,
                warmups=warmups,
                context_for=self._context_for,
                dispatcher=self.dispatcher,
                on_failure=self.options.on_failure,
                raise_interrupt=self.options.raise_interrupt,
                watcher=recorder,
            )
        finally:
            self._counting = False
            for outcome in recorder.outcomes:
                if outcome.captured:
                    self._make_replay(outcome.descriptor)
            self._install()

    def _estimate(self, warmups: int, *, required: bool) -> None:
        """Measure what capturing takes; a failure there is one of capturing, and follows the policy for those."""
        descs = self.dispatcher.get_capture_descs()
        try:
            self.estimate = estimate_memory(
                self._dummy, descs, self.graphs, warmups=warmups, context_for=self._context_for
            )
        except BaseException as error:
            skips = self.options.on_failure is FailurePolicy.UNCAPTURED and not required
            if not (skips and isinstance(error, PieceworkError)):
                self.release()
                raise

    def _install(self) -> None:
        self._steps.clear()
        self._entry.call.__globals__["execution_fn"] = self

    def release(self) -> None:
        """Give all graphs up: the model runs uncaptured again."""
        for mode, group in self.dispatcher.get_capture_descs():
            for descriptor in group:
                self.dispatcher.give_up(mode, descriptor)
        self.replays.clear()
        self._steps.clear()
        self.graphs.clear_all_graphs()

    def weights_rebound(self) -> bool:
        """Told after a rebind: graphs that read memory of weights that were replaced are given up.

        Returns:
            Whether graphs were given up.
        """
        weights = self._entry.weights
        traced = zip(weights.traced, weights.tensors, strict=True)
        now = {each.path: tensor for each, tensor in traced}
        if not self.graphs.addresses.changed_weights(now):
            return False
        self.release()
        return True

    def _sizes(self, sizes: Iterable[int] | None) -> tuple[int, ...]:
        config = self._backend.config
        chosen = config.cudagraph_capture_sizes if sizes is None else sizes
        if chosen is not None:
            found = tuple(sorted(set(chosen)))
            require_sizes(self.shape, found)
        else:
            largest = config.max_cudagraph_capture_size or _WORTH_CAPTURING
            defaults = default_capture_sizes(largest)
            found = tuple(size for size in defaults if self.shape.refusal(size) is None)
        if not found:
            raise StaticGraphError("there is no size to capture", where="capture sizes")
        return found

    def _warmups(self) -> int:
        if self.options.warmups is not None:
            return self.options.warmups
        on_cuda = self.shape.dynamic[0].fake.device.type == "cuda"
        return max(self._backend.config.cudagraph_num_of_warmups, int(on_cuda))

    def _wrap(
        self, submods: Sequence[Callable[..., object]], number: int
    ) -> list[CUDAGraphWrapper]:
        source = self._backend.source
        assert source is not None
        last = len(submods) - 1
        return [
            CUDAGraphWrapper(
                submod,
                None,
                _PIECEWISE,
                CUDAGraphOptions(
                    debug_log_enable=index == 0,
                    gc_disable=index > 0,
                    weak_ref_output=index == last,
                ),
                graphs=self.graphs,
                name=source.submod_names[index] + (f" of range {number}" if number else ""),
            )
            for index, submod in enumerate(submods)
        ]

    def _wrapped_for(self, size: int) -> list[CUDAGraphWrapper]:
        table = self._backend.range_table
        return self._wrapped[0 if table is None else table.index(size)]

    def _count(self, record: CaptureRecord) -> None:
        if self._counting:
            counters.num_cudagraph_captured += 1

    def _context_for(self, mode: CUDAGraphMode, descriptor: BatchDescriptor):  # type: ignore[no-untyped-def]
        make = self.options.context_for
        if make is not None:
            return make(mode, descriptor)
        return set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)

    def _dummy(self, descriptor: BatchDescriptor) -> object:
        size = descriptor.num_tokens
        with torch.no_grad():
            return self._run_wrapped(self._inputs.views(size), size)

    def _run_wrapped(self, tensors: Sequence[torch.Tensor], size: int) -> object:
        """The stitching function on static tensors, with wrapped pieces."""
        flat = self._flat(tensors, size)
        return self._forward(*flat, __vllm_submods__=tuple(self._wrapped_for(size)))

    def _flat(self, tensors: Sequence[torch.Tensor], size: int) -> list[object]:
        flat: list[object] = [size] * len(self.shape.names)
        for each, tensor in zip(self.shape.staged, tensors, strict=True):
            flat[each.position] = tensor
        for position in self.shape.weights:
            flat[position] = self._weights[self.shape.names[position]]
        return flat

    # --- replay source -----------------------------------------------------------------------------

    def _make_replay(self, descriptor: BatchDescriptor) -> None:
        """Replay once through the wrappers, which check every address; then emit, prove and bind the source."""
        source, split_gm = self._backend.source, self._backend.split_gm
        assert source is not None and split_gm is not None
        size = descriptor.num_tokens
        try:
            with self._context_for(_PIECEWISE, descriptor):
                self._dummy(descriptor)
            wrapped = self._wrapped_for(size)
            calls = [each.concrete_cudagraph_entries[descriptor].call for each in wrapped]
            views = self._inputs.views(size)
            facts = replay_facts(
                source,
                self.shape,
                views,
                [call for call in calls if call is not None],
                self._weights,
                size,
                self.graphs.address_policy.value,
                f"model: {self._backend.prefix or 'model'}",
            )
            emitted, proof = generate_replay(source, split_gm, facts)
            held = {**dict(zip(self._inputs.names, views, strict=True)), **self._weights}
            namespace = bind_replay(emitted, calls, wrapped, self._inputs.stager(size), held)
            function = execute_source(emitted.code, namespace, REPLAY_NAME)
        except PieceworkError as error:
            self.graphs.discard(_PIECEWISE, descriptor)
            self.dispatcher.give_up(_PIECEWISE, descriptor)
            self.failures[size] = error
            if self.options.on_failure is FailurePolicy.RAISE:
                raise
            return
        self.replays[size] = Replay(emitted, proof, function)

    def _weights_by_name(self) -> dict[str, torch.Tensor]:
        """Tensors of the names that the stitching source holds or is passed."""
        source, weights = self._backend.source, self._entry.weights
        assert source is not None
        by_path = {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}
        found = {row.name: by_path[row.path] for row in source.module.bound}
        for position, path in self.shape.weights.items():
            found[self.shape.names[position]] = by_path[path]
        return found

    # --- serving -----------------------------------------------------------------------------------

    def __call__(self, *flat: object, **submods: object) -> object:
        """What the entry calls in place of ``execution_fn``."""
        first = self.shape.dynamic[0]
        count = flat[first.position].shape[first.dim]  # type: ignore[attr-defined]
        step = self._steps[count] if count in self._steps else self._step(count)
        context = current_forward_context()
        if step is None or (context is not None and context.skip_cuda_graphs):
            return self._entry.execution_fn(*flat, **submods)
        for position, path in self.shape.weights.items():
            if flat[position] is not self._weights[self.shape.names[position]]:
                raise _replaced(path)
        replay, padded = step
        outputs = replay([flat[each.position] for each in self.shape.staged])
        return self._trimmed(outputs, count, padded)

    def _step(self, count: int) -> tuple[Callable[..., object], int] | None:
        mode, descriptor = self.dispatcher.dispatch(count)
        found = self.replays.get(descriptor.num_tokens) if mode is _PIECEWISE else None
        step = None
        if found is not None:
            padded = descriptor.num_tokens
            call = self._checked_call(descriptor) if self.options.check_addresses else found.call
            step = (call, padded)
        self._steps[count] = step
        return step

    def _checked_call(self, descriptor: BatchDescriptor) -> Callable[..., object]:
        stage, size = self._inputs.stager(descriptor.num_tokens), descriptor.num_tokens

        def run(inputs: Sequence[torch.Tensor]) -> object:
            stage(inputs)
            outer = current_forward_context()
            with set_forward_context(
                None if outer is None else outer.attn_metadata,
                cudagraph_runtime_mode=_PIECEWISE,
                batch_descriptor=descriptor,
                state=None if outer is None else outer.state,
            ):
                return self._run_wrapped(self._inputs.views(size), size)

        return run

    def _trimmed(self, outputs: object, count: int, padded: int) -> object:
        assert isinstance(outputs, (tuple, list))
        clone = self.options.clone_outputs
        trimmed = []
        for output, dim in zip(outputs, self.shape.output_dims, strict=True):
            if dim is not None:
                output = output if count == padded else output.narrow(dim, 0, count)
                output = output.clone() if clone else output
            trimmed.append(output)
        return tuple(trimmed)

    # --- what it says ------------------------------------------------------------------------------

    def coverage(self, max_num_batched_tokens: int | None = None) -> list[CoverageRow]:
        """How each batch size runs now, by default up to one more than the largest captured size."""
        low = self.shape.low  # smaller batches are refused where arguments are checked
        rows = coverage(self.dispatcher, max_num_batched_tokens or max(self.sizes) + 1)
        return [replace(row, first=max(row.first, low)) for row in rows if row.last >= low]

    def memory_report(self) -> MemoryReport:
        """What the captures were expected to take, and take."""
        return MemoryReport(self.estimate, self.graphs.bytes_by_descriptor(), self.dropped)

    def source_for(self, size: int) -> ReplaySource:
        """The replay source that serves a batch of ``size``.

        Raises:
            StaticGraphError: that size runs uncaptured.
        """
        found = self.dispatcher.explain(size, strict=False)
        replay = self.replays.get(found.descriptor.num_tokens)
        if found.mode is not _PIECEWISE or replay is None:
            raise StaticGraphError(f"size {size} runs uncaptured: {found.reason.value}")
        return replay.source


def _replaced(path: str) -> StaticGraphError:
    return StaticGraphError(
        f"weight {path} was replaced after the capture",
        where="weights",
        hint="load new values in place (param.copy_), or rebind and capture again",
    )


def capture_model(
    entry: Entry,
    backend: PieceworkBackend,
    sizes: Iterable[int] | None,
    options: CaptureOptions,
    *,
    memory_budget: int | None,
    progress: bool | CaptureWatcher,
    estimate: bool,
    keep: Callable[[CapturedModel], None],
) -> None:
    """Capture a compiled model; ``keep`` gets the result before capturing starts, so that a stop leaves it usable."""
    model = CapturedModel(entry, backend, sizes, options)
    keep(model)
    model.capture(memory_budget=memory_budget, progress=progress, estimate=estimate)
