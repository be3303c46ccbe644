"""A stitched model with static graphs: captured here, then served from replays where they cover."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from piecework.codegen.replay.plan import ReplaySource
from piecework.errors import PieceworkError, StaticGraphError, short_errors
from piecework.runtime import torch_compat
from piecework.runtime.batch.coverage import CoverageRow, coverage
from piecework.runtime.batch.descriptor import PLAIN, BatchDescriptor, BatchKind, Key
from piecework.runtime.batch.dispatcher import Reason
from piecework.runtime.batch.forward_context import ForwardContext, current_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.call.entry import Entry, by_path_of
from piecework.runtime.counters import counters
from piecework.runtime.graphs.device.contract import plain_parts
from piecework.runtime.graphs.plan import phase
from piecework.runtime.graphs.plan.batch_shape import FixedDims
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.plan.padding import padded_difference, why_not_padded
from piecework.runtime.graphs.plan.phase import text_of
from piecework.runtime.graphs.serve.graphs import CapturedGraphs
from piecework.runtime.graphs.serve.replay import STAGE
from piecework.runtime.graphs.serve.report import CallRow, MemoryReport, uncaptured_rows
from piecework.runtime.graphs.serve.writes import acting_unseen
from piecework.runtime.pieces.program import Program
from piecework.runtime.pieces.ranks import in_common, require_agreement
from piecework.runtime.watch.weights import BoundWeights

_log = logging.getLogger(__name__)
Found = TypeVar("Found")
# Why calls run uncaptured whatever their size.
_ALWAYS = {
    "shared": "an argument that is written to shares memory with another",
    "busy": "another call is using the graphs, in a thread or around this one",
    "inside": "somebody else captures this call, and a replay can't be captured",
    "skipped": "the forward context skips graphs",
    "told": "the forward context says mode NONE for this descriptor",
    "empty": "the batch is empty",
    "unequal": "a size beside the batch size is not the captured one",
}


@dataclass(eq=False, slots=True)
class Step:
    """How calls of one kind are served."""

    reason: str = ""
    call: Callable[..., object] | None = None  # takes the tensor arguments; None: uncaptured
    mode: CUDAGraphMode = CUDAGraphMode.NONE
    graph: str = ""  # in words
    padded: int = 0
    bring_back: Callable[..., None] | None = None  # copies written arguments back
    calls: int = 0
    padding: int = 0  # rows that each is padded by


class CapturedModel(CapturedGraphs):
    """A stitched model with static graphs; stands where its entry calls ``execution_fn``."""

    def __init__(
        self,
        entry: Entry,
        program: Program,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
        fixed: FixedDims | None = None,
    ) -> None:
        super().__init__(entry, program, sizes, options, fixed)
        self.unpadded: str | None = None  # why no batch is padded, if so
        self.report: phase.CaptureReport | None = None
        self.estimate: phase.MemoryEstimate | None = None
        self.dropped: tuple[Key, ...] = ()
        self.failures: dict[Key, PieceworkError] = {}  # whose checked replay failed
        self._ready: dict[Key, Step] = {}
        # Inputs, results and what lies between have one place each: one call at a time, of all
        # models that share the memory. Who is in them stands under 0: taking and leaving are
        # single steps of the interpreter, so that an interrupt never leaves them taken.
        self._user = self.graphs.users
        self._in_place = self._watch_weights()
        self._is_capturing = self.graphs.platform.is_capturing
        self._retired = False
        rules = enumerate(self.shape.results)
        self._same = [(n, e) for n, e in rules if (e.argument, e.earlier) != (None, None)]
        self._order, self._join = self.graphs.call_order, options.join
        least = int(not self.graphs.platform.stand_in)
        warmups = max(program.config.cudagraph_num_of_warmups, least)
        self._warmups = warmups if options.warmups is None else options.warmups
        self._raises = options.on_failure is phase.FailurePolicy.RAISE
        first = self.shape.dynamic[0]
        self._batch_at = (first.position, first.dim)
        self._asks = bool(self.shape.others)
        self.count_anew()

    # --- capture -----------------------------------------------------------------------------------

    def capture(
        self, *, memory_budget: int | None, progress: bool | phase.CaptureWatcher, estimate: bool
    ) -> None:
        """Capture, largest first, and serve from then on what was captured, also after a stop."""
        try:
            if self.lowered:
                _log.warning("capture: less than a whole forward is captured: %s", self.lowered)
            for name in acting_unseen(self._program.split_gm, self._between):
                _log.warning(
                    "%s declares neither a result nor a write: capturing runs it on dummy inputs, "
                    "and only what it writes through torch's operators is put back. Let it look "
                    "at get_forward_context().dry",
                    name,
                )
            with self.graphs.alone():
                try:
                    self._prepare(memory_budget, estimate, shows=progress is True)
                except BaseException:
                    self.release()
                    raise
                self._capture(memory_budget, progress)
        finally:
            self.dry_writes.forget()
            if self._retired:
                self._free()

    def _prepare(self, budget: int | None, estimate: bool, *, shows: bool) -> None:
        """Agree with other ranks, and settle padding and the sizes that fit."""
        measures = estimate or budget is not None
        planned = [str(self._warmups), str(measures), *map(text_of, self._planned())]
        require_agreement(self._program, self.options.runtime, planned)
        self._settle_padding()
        if not measures:
            return
        try:
            self.estimate = self._in_phase(phase.estimate_memory)
        except PieceworkError:
            if self._raises or budget is not None:
                raise
            return
        if shows:
            console = phase.Console(stderr=True)
            console.print(str(self.estimate), markup=False, highlight=False)
        if budget is not None:
            self.dropped = phase.fit_budget(self.estimate, self.dispatcher, budget)
            self.dropped += self._keep_in_common()

    def _capture(self, budget: int | None, progress: bool | phase.CaptureWatcher) -> None:
        if progress is True:
            progress = phase.CaptureProgress(phase.Console(stderr=True))
        try:
            self.report = self._in_phase(
                phase.capture_graphs,
                dispatcher=self.dispatcher,
                on_failure=self.options.on_failure,
                watcher=progress or None,
                affordable=None if budget is None else partial(self._affordable, budget),
            )
        finally:
            captured = sum(not record.eager_reason for record in self.graphs.records)
            counters.num_cudagraph_captured += captured
            self._make_ready(list(self.graphs.bytes_by_descriptor()))
        for each in self.report.outcomes:
            _log.info("capture: %s", each.text)
        self._keep_in_common()

    def _in_phase(self, act: Callable[..., Found], **how: object) -> Found:
        """Run a part of the capture phase for all that is planned."""
        descs = self.dispatcher.get_capture_descs()
        how |= {"warmups": self._warmups, "context_for": self.context_for}
        with (self.options.around or nullcontext)():
            return act(self.dummy, descs, self.graphs, **how)

    # Processes that run a model together must pad a batch to the same size, as collectives see it.

    def _in_common(self, offers: Sequence[str]) -> frozenset[str]:
        return in_common(self._program, self.options.runtime, offers)

    def _keep_in_common(self) -> tuple[Key, ...]:
        """Give up what not every process has that runs this model with this one, and return it."""
        planned = self._planned()
        common = self._in_common([*map(text_of, planned)])
        alone = tuple(key for key in planned if text_of(key) not in common)
        for key in alone:
            self._ready.pop(key, None)
            self._give_up(key)
        if alone:
            self._steps.clear()
            _log.warning("capture: other ranks do not have %s", ", ".join(map(text_of, alone)))
        return alone

    def _planned(self) -> list[Key]:
        return [
            (mode, each) for mode, group in self.dispatcher.get_capture_descs() for each in group
        ]

    def _settle_padding(self) -> None:
        """Have the dispatcher pad no batch where that isn't declared, or a try says otherwise."""
        pad, why = self.options.pad, Reason.UNPADDED.value
        if pad is not False:
            survives = self.graphs.platform.stand_in
            split_gm, attempt = self._program.split_gm, self._try_padding
            why = why_not_padded(split_gm, self.shape, pad, attempt, survives=survives) or ""
        agreed = self._in_common([] if why else ["rows are independent"])
        if agreed:
            return
        why = why or "on another rank a padded run gave other rows"
        if pad:
            why = f"pad=True, and rows are not independent: {why}"
            hint = "leave pad out, and only batches of a captured size are replayed"
            raise StaticGraphError(why, where="capture", hint=hint)
        self.unpadded = why
        self.dispatcher.exact = Reason.UNPADDED if pad is False else Reason.NOT_EXACT
        if pad is None:
            _log.warning("capture: only batches of a captured size are replayed: %s", why)

    def _try_padding(self) -> str | None:
        planned = [descriptor for _, descriptor in self._planned()]
        if not planned:
            return None
        smallest = min(planned, key=lambda each: each.num_tokens)
        run = partial(self.run_uncaptured, smallest)
        return padded_difference(self.shape, self.sizes, self.options.pads, run)

    def _affordable(self, budget: int, key: Key) -> bool:
        """Whether a capture still fits the budget, in view of what the captures before it took."""
        assert self.estimate is not None
        held, text = self.graphs.nbytes, text_of(key)
        step = self.estimate.models[phase.kind_of(key)].step_of(key[1].num_tokens)
        if self._in_common([text] if held == 0 or held + step <= budget else []) >= {text}:
            return True
        self.dropped = (*self.dropped, key)
        return False

    def _make_ready(self, captured: Sequence[Key]) -> None:
        """Check and bind what was captured; what a stop or a failure leaves undone is given up."""
        try:
            for key in captured:
                try:
                    self._ready[key] = self._step_of(*key)
                except PieceworkError as error:
                    self.failures[key] = error
                    if self._raises:
                        raise
        finally:
            for key in captured:
                if key not in self._ready:
                    self._give_up(key)
            self._steps.clear()
            self._entry.capture(self)

    def _step_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Step:
        """What serves a captured descriptor, after a call that loads the kernels of serving it."""
        padded, serve = descriptor.num_tokens, self.replay_of(mode, descriptor)
        bring_back = self.inputs.bringer(padded)
        step = Step("", serve, mode, descriptor.describe(), padded, bring_back)
        if not self.graphs.platform.stand_in:
            given, count = self.inputs.short_batch(padded)
            scope = self.context_for(mode, descriptor)
            with torch.no_grad(), scope, self.harmless(current_forward_context()):
                self._serve(step, given, self._flat(given, count), count)
        return step

    def _give_up(self, key: Key) -> None:
        self.graphs.discard(*key)
        self.dispatcher.give_up(*key)

    def release(self) -> None:
        """Give all graphs up, once no call is in them: the model runs uncaptured again."""
        self._retired = True
        for key in self._planned():
            self.dispatcher.give_up(*key)
        self._ready.clear()
        self._steps.clear()
        self._free()

    def _free(self) -> None:
        """Give the memory back, unless a call is in it, which then does it when it leaves."""
        mine = object()
        if self._user.setdefault(0, mine) is mine:
            try:
                self.replays.clear()
                self.graphs.clear_all_graphs()
            finally:
                del self._user[0]  # a model that shares the memory runs on

    def still_reads(self, weights: BoundWeights) -> bool:
        """Whether the captured graphs read the memory of these weights."""
        return not self.graphs.addresses.changed_weights(by_path_of(weights))

    def _watch_weights(self) -> Callable[[], bool] | None:
        """Whether the weights are where the graphs read them; None if not needed."""
        # Graphs on the CPU run on the tensors themselves.
        tensors = [part for each in self.weights.values() for part in plain_parts(each)]
        in_place, quick = torch_compat.places_guard(tensors)
        needed = not self.graphs.platform.stand_in or self.options.check_addresses
        return in_place if tensors and (needed or quick) else None

    # --- serving -----------------------------------------------------------------------------------

    def __call__(self, *flat: object, **submods: object) -> object:
        """What the entry calls in place of ``execution_fn``."""
        step, count = self._step_for(flat)
        if step.call is None:
            step.calls += 1
            return self.forward(*flat, **submods)
        if self._is_capturing():
            self._always["inside"].calls += 1
            return self.forward(*flat, **submods)
        for position, path in self.shape.weights.items():
            if flat[position] is not self.weights[path]:
                raise _stale(path, "replaced")
        if self._in_place is not None and not self._in_place():
            raise _stale(
                next(iter(self.graphs.addresses.changed_weights(self.weights)), ""), "moved"
            )
        inputs = [flat[each.position] for each in self.shape.staged]
        if step.bring_back is not None and self.inputs.shares_what_is_written(inputs):  # type: ignore[arg-type]
            self._always["shared"].calls += 1
            return self.forward(*flat, **submods)
        mine = object()
        user = self._user
        try:
            if user.setdefault(0, mine) is mine and not self._retired:
                step.calls += 1
                return self._serve(step, inputs, flat, count)
        finally:
            if user.get(0) is mine:
                del user[0]
            if self._retired:
                self._free()
        self._always["busy"].calls += 1
        return self.forward(*flat, **submods)

    def _serve(
        self, step: Step, inputs: Sequence[object], flat: Sequence[object], count: int
    ) -> object:
        if self._order is not None:
            self._order()
        if self._join is not None:
            self._join()
        outputs = step.call(inputs)  # type: ignore[misc]
        if step.bring_back is not None:
            step.bring_back(inputs, count)
        return self._trimmed(outputs, flat, count, step.padded)

    def _trimmed(self, outputs: object, flat: Sequence[object], count: int, padded: int) -> object:
        assert isinstance(outputs, (tuple, list))
        clone = self.options.clone_outputs
        trimmed: list[object] = []
        for output, rule in zip(outputs, self.shape.results, strict=True):
            if isinstance(output, torch.Tensor):
                if count != padded:
                    for dim in rule.dims:
                        output = output.narrow(dim, 0, count)
                output = output.clone() if clone else output
            elif rule.is_count:
                output = count
            trimmed.append(output)
        for number, rule in self._same:
            same = trimmed[rule.earlier] if rule.argument is None else flat[rule.argument]  # type: ignore[index]
            trimmed[number] = same
        return tuple(trimmed)

    # --- which graph serves a call --------------------------------------------------------------

    def _step_for(self, flat: Sequence[object]) -> tuple[Step, int]:
        """What serves a call, and its batch size."""
        position, dim = self._batch_at
        count: int = flat[position].shape[dim]  # type: ignore[attr-defined]
        context = current_forward_context()
        if context is None and not self._asks:
            step = self._steps.get(count)
            return (self._find(count, PLAIN, count) if step is None else step), count
        return self._asked(count, context, flat), count

    def _asked(self, count: int, context: ForwardContext | None, flat: Sequence[object]) -> Step:
        if not all(each.fits(flat, count) for each in self.shape.others):
            return self._always["unequal"]
        kind = PLAIN
        if context is not None:
            if context.skip_cuda_graphs:
                return self._always["skipped"]
            if context.batch_descriptor is not None:
                return self._chosen(count, context.cudagraph_runtime_mode, context.batch_descriptor)
            kind = context.batch or kind
        key: object = count if kind is PLAIN else (count, kind)
        step = self._steps.get(key)
        return self._find(count, kind, key) if step is None else step

    def _find(self, count: int, kind: BatchKind, key: object) -> Step:
        """Ask the dispatcher, which may be strict, and remember the answer."""
        if count < 1:
            return self._always["empty"]
        found = self.dispatcher.explain(count, kind)
        ready = self._ready.get((found.mode, found.descriptor), Step())
        return self._keep(key, replace(ready, reason=found.reason.value, padding=found.padding))

    def _chosen(self, count: int, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Step:
        """The step that the caller chose by itself, if it is captured and large enough."""
        if mode is CUDAGraphMode.NONE:
            return self._always["told"]
        key = (mode, descriptor, count)
        step = self._steps.get(key)
        if step is not None:
            return step
        ready = self._ready.get((mode, descriptor))
        exact = self.dispatcher.exact and count != descriptor.num_tokens
        if ready is None or count > descriptor.num_tokens or exact:
            what = "is not captured" if ready is None else f"can't serve a batch of {count}"
            why = f"the forward context asks for {mode.name} {descriptor.describe()}, which {what}"
            hint = "take mode and descriptor from stitched.dispatch(size), or set neither"
            raise StaticGraphError(why, where="forward context", hint=hint)
        padding, reason = descriptor.num_tokens - count, "the forward context chose it"
        return self._keep(key, replace(ready, reason=reason, padding=padding))

    def _keep(self, key: object, step: Step) -> Step:
        self._steps[key] = step
        self._counted.append(step)
        return step

    # --- what it says ------------------------------------------------------------------------------

    @short_errors
    def coverage(self, max_num_batched_tokens: int | None = None) -> list[CoverageRow]:
        """How each batch size runs now, by default up to one more than is captured."""
        low = self.shape.low  # smaller batches are refused where arguments are checked
        rows = coverage(self.dispatcher, max_num_batched_tokens or max(self.sizes) + 1)
        high = max(row.last for row in rows) if self.shape.high is None else self.shape.high
        return [
            replace(row, first=max(row.first, low), last=min(row.last, high))
            for row in rows
            if row.last >= low and row.first <= high
        ]

    def serves(self, size: int) -> bool:
        """Whether the trace allows batches of ``size``."""
        return self.shape.low <= size and (self.shape.high is None or size <= self.shape.high)

    def calls(self) -> list[CallRow]:
        """What the calls since the capture ran as, and why, most frequent first."""
        calls: Counter[tuple[str, str, str]] = Counter()
        padding: Counter[tuple[str, str, str]] = Counter()
        for step in tuple(self._counted):
            key = (step.mode.name, step.graph, step.reason)
            calls[key] += step.calls
            padding[key] += step.calls * step.padding
        rows = [CallRow(*key, n, padding[key]) for key, n in calls.items() if n]
        rows += uncaptured_rows(0, self._entry.careful_calls)
        return sorted(rows, key=lambda row: (-row.calls, row.mode, row.graph, row.reason))

    def count_anew(self) -> None:
        """Leave what ran so far out of `calls`: it was no call of the user's."""
        self._steps: dict[object, Step] = {}  # that were asked for since something was captured
        self._always = {name: Step(reason) for name, reason in _ALWAYS.items()}
        self._counted = list(self._always.values())  # all of which calls were made

    def memory_report(self) -> MemoryReport:
        """What the captures were expected to take, and take."""
        return MemoryReport(self.estimate, self.graphs.bytes_by_descriptor(), self.dropped)

    @contextmanager
    def named_replays(self, labels: Sequence[str], *, by_layer: bool) -> Iterator[None]:
        """Show replays by name in ``torch.profiler``; ``labels`` are the pieces', in order."""
        with ExitStack() as stack:
            for key, replay in self.replays.items():
                stack.enter_context(replay.named(_replay_names(key, labels), by_layer=by_layer))
            yield

    def stages(self, labels: Sequence[str]) -> list[str]:
        """What staging and replays are called in a profile."""
        replays = [each for key in self.replays for each in _replay_names(key, labels)]
        return [STAGE, *replays] if replays else []

    @short_errors
    def source_for(self, size: int, kind: BatchKind | None = None) -> ReplaySource:
        """The replay source that serves a batch of ``size``, a plain one by default."""
        if self.partitions is not None:
            raise StaticGraphError(
                "there is no replay source: Inductor cut this model, and its code calls the replays",
                where="use_inductor_graph_partition",
                hint="without that option piecework cuts the model, and writes it",
            )
        found = self.dispatcher.explain(size, kind or BatchKind(), strict=False)
        replay = self.replays.get((found.mode, found.descriptor))
        if replay is None:
            why = f"size {size} runs uncaptured: {found.reason.value}"
            raise StaticGraphError(why, hint="coverage() says of each size what it runs as")
        return replay.source


def _stale(path: str, how: str) -> StaticGraphError:
    why = f"weight {path} was {how} after the capture, which reads its old place"
    hint = "load new values in place (param.copy_), or rebind and capture again"
    return StaticGraphError(why, where="weights", hint=hint)


def _replay_names(key: Key, labels: Sequence[str]) -> list[str]:
    """What the replays of one captured descriptor are called, by their pieces' names."""
    pieces = ["the whole forward"] if key[0] is CUDAGraphMode.FULL else labels
    return [f"replay {each}, {text_of(key)}" for each in pieces]
