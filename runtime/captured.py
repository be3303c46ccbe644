"""A stitched model with static graphs. In: a compiled entry and sizes to capture. Out: the same function, served from replays where a batch is captured.

It never captures while serving; a batch that no graph covers runs as it ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console

from piecework.codegen.replay_plan import ReplaySource
from piecework.errors import PieceworkError, StaticGraphError
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.captured_calls import Calls, Step
from piecework.runtime.captured_inputs import CapturedInputs
from piecework.runtime.captured_options import CaptureOptions, plan_capture
from piecework.runtime.captured_replay import Replay, ReplayMaker
from piecework.runtime.captured_report import CallRow, MemoryReport
from piecework.runtime.captured_shape import batch_shape
from piecework.runtime.counters import counters
from piecework.runtime.entry import Entry
from piecework.runtime.forward_context import current_forward_context, set_forward_context
from piecework.runtime.graphs.capture import (
    CaptureOutcome,
    CaptureReport,
    CaptureWatcher,
    FailurePolicy,
    Key,
    capture_graphs,
)
from piecework.runtime.graphs.captured_call import CapturedCall
from piecework.runtime.graphs.covered import CoverageRow, coverage
from piecework.runtime.graphs.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.graphs.memory import MemoryEstimate, estimate_memory, fit_budget
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.owner import CaptureRecord, StaticGraphs
from piecework.runtime.graphs.progress import CaptureProgress
from piecework.runtime.graphs.wrapper import CUDAGraphOptions, CUDAGraphWrapper
from piecework.runtime.mutation import written_inputs

_FULL, _PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


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
        sizes: the batch sizes that were to be captured.
        graphs: the owner of what is captured.
        dispatcher: which batch runs as what.
        options: how it was captured.
        report: what the last capture phase did; None if it was stopped.
        replays: mode and descriptor → its replay.
        failures: descriptors whose checked replay failed, with the reason.
    """

    def __init__(
        self,
        entry: Entry,
        backend: PieceworkBackend,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
    ) -> None:
        self._entry, self._backend, self.options = entry, backend, options
        self.shape = batch_shape(entry.captured, backend, options.same_as_batch)
        plan = plan_capture(self.shape, backend.config, sizes, options)
        self.sizes, self.dispatcher = plan.sizes, plan.dispatcher
        self._forward: Callable[..., object] = entry.execution_fn
        self._counting = False
        self._inputs = {
            tuple(values.items()): CapturedInputs(
                self.shape, max(self.sizes), values, options.pads, options.poison
            )
            for values in plan.others
        }
        self.graphs = StaticGraphs(
            self.shape.device,
            address_policy=options.address_policy,
            check_addresses=options.check_addresses,
            on_capture=self._count,
        )
        for inputs in self._inputs.values():
            inputs.register(self.graphs)
        self._weights = self._weights_now()
        self.graphs.addresses.register_weights(self._weights)
        self._maker = ReplayMaker(
            self.shape, backend, self._weights, self.graphs.address_policy.value
        )
        self._wrapped = [self._wrap(submods, n) for n, submods in enumerate(backend.submod_lists)]
        self._whole = [self._wrap_whole(number) for number in range(len(backend.submod_lists))]
        self.report: CaptureReport | None = None
        self.estimate: MemoryEstimate | None = None
        self.dropped: tuple[Key, ...] = ()
        self.replays: dict[Key, Replay] = {}
        self.failures: dict[Key, PieceworkError] = {}
        self._ready: dict[Key, Step] = {}
        self._calls = Calls(self.shape, self.dispatcher, self._ready, options)

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
            self._make_ready([(o.mode, o.descriptor) for o in recorder.outcomes if o.captured])

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

    def _make_ready(self, captured: Sequence[Key]) -> None:
        """Check and bind what was captured; what a stop or a failure leaves undone is given up."""
        waiting = list(captured)
        try:
            while waiting:
                key = waiting[0]
                try:
                    self._ready[key] = self._step_of(*key)
                except PieceworkError as error:
                    self.failures[key] = error
                    self._give_up(key)
                    if self.options.on_failure is FailurePolicy.RAISE:
                        raise
                waiting.pop(0)
        finally:
            for key in waiting:
                self._give_up(key)
            self._calls.forget()
            self._entry.serve_with(self)

    def _give_up(self, key: Key) -> None:
        self.graphs.discard(*key)
        self.dispatcher.give_up(*key)

    def release(self) -> None:
        """Give all graphs up: the model runs uncaptured again."""
        for mode, group in self.dispatcher.get_capture_descs():
            for descriptor in group:
                self.dispatcher.give_up(mode, descriptor)
        self.replays.clear()
        self._ready.clear()
        self._calls.forget()
        self.graphs.clear_all_graphs()

    def weights_rebound(self) -> bool:
        """Told after a rebind: graphs that read memory of weights that were replaced are given up.

        Returns:
            Whether graphs were given up.
        """
        if not self.graphs.addresses.changed_weights(self._weights_now()):
            return False
        self.release()
        return True

    def _weights_now(self) -> dict[str, torch.Tensor]:
        """Path → tensor, as the entry holds them now."""
        weights = self._entry.weights
        return {w.path: t for w, t in zip(weights.traced, weights.tensors, strict=True)}

    def _warmups(self) -> int:
        if self.options.warmups is not None:
            return self.options.warmups
        return max(
            self._backend.config.cudagraph_num_of_warmups, int(self.shape.device.type == "cuda")
        )

    # --- what is captured --------------------------------------------------------------------------

    def _wrap(
        self, submods: Sequence[Callable[..., object]], number: int
    ) -> Sequence[Callable[..., object]]:
        """The pieces of one batch range, each captured by itself."""
        source, split_gm = self._backend.source, self._backend.split_gm
        assert source is not None and split_gm is not None
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
                    mutated_args=written_inputs(split_gm.get_submodule(name)),  # type: ignore[arg-type]
                ),
                graphs=self.graphs,
                name=name + (f" of range {number}" if number else ""),
            )
            for index, (submod, name) in enumerate(zip(submods, source.submod_names, strict=True))
        ]

    def _wrap_whole(self, number: int) -> CUDAGraphWrapper:
        """The whole forward of one batch range, splitting ops included; the pieces' own wrappers stand aside in it."""
        return CUDAGraphWrapper(
            partial(self._forward, __vllm_submods__=tuple(self._wrapped[number])),
            None,
            _FULL,
            CUDAGraphOptions(weak_ref_output=True),
            graphs=self.graphs,
            name="the whole forward" + (f" of range {number}" if number else ""),
        )

    def pieces_for(self, size: int) -> Sequence[Callable[..., object]]:
        """The wrapped pieces of a batch size, in order."""
        return self._wrapped[self._range_of(size)]

    def _range_of(self, size: int) -> int:
        table = self._backend.range_table
        return 0 if table is None else table.index(size)

    def _count(self, record: CaptureRecord) -> None:
        if self._counting:
            counters.num_cudagraph_captured += 1

    def _context_for(self, mode: CUDAGraphMode, descriptor: BatchDescriptor):  # type: ignore[no-untyped-def]
        make = self.options.context_for
        if make is not None:
            return make(mode, descriptor)
        return set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)

    def _others(self, descriptor: BatchDescriptor) -> dict[str, int]:
        """The sizes beside the batch size that a descriptor was captured for."""
        axes = dict(descriptor.extra)
        return {other.label: axes[other.label] for other in self.shape.others}  # type: ignore[misc]

    def _inputs_of(self, descriptor: BatchDescriptor) -> CapturedInputs:
        return self._inputs[tuple(self._others(descriptor).items())]

    def _dummy(self, descriptor: BatchDescriptor) -> object:
        """One forward on the static inputs, whatever they hold; the context's mode says which wrapper acts."""
        size = descriptor.num_tokens
        views = self._inputs_of(descriptor).views(size)
        with torch.no_grad():
            return self._run(self._flat(views, descriptor), self._range_of(size))

    def _run(self, flat: Sequence[object], number: int) -> object:
        return self._whole[number](*flat)

    def _flat(self, tensors: Sequence[torch.Tensor], descriptor: BatchDescriptor) -> list[object]:
        others = self._others(descriptor)
        flat: list[object] = [descriptor.num_tokens] * len(self.shape.names)
        for each, tensor in zip(self.shape.staged, tensors, strict=True):
            flat[each.position] = tensor
        for position, label in self.shape.numbers.items():
            flat[position] = others[label]
        for position, path in self.shape.weights.items():
            flat[position] = self._weights[path]
        return flat

    # --- what serves it ----------------------------------------------------------------------------

    def _step_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Step:
        """What serves a captured descriptor: its replay source, after one replay through the wrappers, which check every address.

        Raises:
            PieceworkError: an address is not what was captured, or the source did not prove.
        """
        with self._context_for(mode, descriptor):
            self._dummy(descriptor)
        inputs, padded = self._inputs_of(descriptor), descriptor.num_tokens
        call = self._emit(mode, descriptor)
        if self.options.check_addresses:
            call = self._checked_call(mode, descriptor)
        return Step(call, padded, mode, descriptor, bring_back=inputs.bringer(padded))

    def _emit(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Callable[..., object]:
        size, inputs = descriptor.num_tokens, self._inputs_of(descriptor)
        number, others = self._range_of(size), self._others(descriptor)
        views, stage = inputs.views(size), inputs.stager(size)
        if mode is _FULL:
            call = _captured(self._whole[number], descriptor)
            made = self._maker.of_whole(call, views, stage, others)
        else:
            calls = [_captured(each, descriptor) for each in self._wrapped[number]]
            pieces = self._backend.submod_lists[number]
            made = self._maker.of_pieces(calls, pieces, views, stage, others)
        self.replays[mode, descriptor] = made
        return made.call

    def _checked_call(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> Callable[..., object]:
        """Serves through the wrappers, which check every address where the owner says so."""
        inputs, size = self._inputs_of(descriptor), descriptor.num_tokens
        stage, flat = inputs.stager(size), self._flat(inputs.views(size), descriptor)
        number = self._range_of(size)

        def run(tensors: Sequence[torch.Tensor]) -> object:
            stage(tensors)
            outer = current_forward_context()
            with set_forward_context(
                None if outer is None else outer.attn_metadata,
                cudagraph_runtime_mode=mode,
                batch_descriptor=descriptor,
                state=None if outer is None else outer.state,
            ):
                return self._run(flat, number)

        return run

    def __call__(self, *flat: object, **submods: object) -> object:
        """What the entry calls in place of ``execution_fn``."""
        step, count = self._calls.step_for(flat)
        call = step.call
        if call is None:
            step.calls += 1
            return self._entry.execution_fn(*flat, **submods)
        for position, path in self.shape.weights.items():
            if flat[position] is not self._weights[path]:
                raise _replaced(path)
        inputs = [flat[each.position] for each in self.shape.staged]
        bring_back = step.bring_back
        if bring_back is not None and self._inputs_of(step.descriptor).shares_what_is_written(inputs):  # type: ignore[arg-type]
            self._calls.shared.calls += 1
            return self._entry.execution_fn(*flat, **submods)
        step.calls += 1
        outputs = call(inputs)
        if bring_back is not None:
            bring_back(inputs, count)  # type: ignore[arg-type]
        return self._trimmed(outputs, count, step.padded)

    def _trimmed(self, outputs: object, count: int, padded: int) -> object:
        assert isinstance(outputs, (tuple, list))
        clone = self.options.clone_outputs
        trimmed = []
        for output, rule in zip(outputs, self.shape.results, strict=True):
            if isinstance(output, torch.Tensor):
                if count != padded:
                    for dim in rule.dims:
                        output = output.narrow(dim, 0, count)
                output = output.clone() if clone else output
            elif rule.is_count:
                output = count
            trimmed.append(output)
        return tuple(trimmed)

    # --- what it says ------------------------------------------------------------------------------

    def coverage(self, max_num_batched_tokens: int | None = None) -> list[CoverageRow]:
        """How each batch size runs now, by default up to one more than the largest captured size."""
        low = self.shape.low  # smaller batches are refused where arguments are checked
        rows = coverage(self.dispatcher, max_num_batched_tokens or max(self.sizes) + 1)
        return [replace(row, first=max(row.first, low)) for row in rows if row.last >= low]

    def calls(self) -> list[CallRow]:
        """What the calls since the capture ran as, and why, most frequent first."""
        rows = [
            *self._calls.rows(),
            *(CallRow("NONE", "", why, n) for why, n in self._entry.careful_calls.items()),
        ]
        return sorted(rows, key=lambda row: (-row.calls, row.mode, row.graph, row.reason))

    def memory_report(self) -> MemoryReport:
        """What the captures were expected to take, and take."""
        return MemoryReport(self.estimate, self.graphs.bytes_by_descriptor(), self.dropped)

    def source_for(self, size: int, kind: BatchKind | None = None) -> ReplaySource:
        """The replay source that serves a batch of ``size``.

        Args:
            kind: what kind of batch; a plain one by default.

        Raises:
            StaticGraphError: that batch runs uncaptured.
        """
        found = self.dispatcher.ask(size, kind or BatchKind(), strict=False)
        replay = self.replays.get((found.mode, found.descriptor))
        if replay is None:
            raise StaticGraphError(f"size {size} runs uncaptured: {found.reason.value}")
        return replay.source


def _captured(wrapper: Callable[..., object], descriptor: BatchDescriptor) -> CapturedCall:
    assert isinstance(wrapper, CUDAGraphWrapper)
    call = wrapper.concrete_cudagraph_entries[descriptor].call
    if call is None:
        raise StaticGraphError("was not captured", where=wrapper.name)
    return call


def _replaced(path: str) -> StaticGraphError:
    return StaticGraphError(
        f"weight {path} was replaced after the capture",
        where="weights",
        hint="load new values in place (param.copy_), or rebind and capture again",
    )
