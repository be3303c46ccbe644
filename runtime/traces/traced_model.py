"""One trace of a model, compiled: its backend, its entry, and the static graphs captured of it."""

from __future__ import annotations

import contextvars
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.codegen.split.splitting import SplittingOps
from piecework.codegen.stitch.bind import filename_of
from piecework.errors import CaptureError, PieceCompileError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.call.entry import Entry
from piecework.runtime.call.profile_names import layer_by_line, named_pieces
from piecework.runtime.observe.dump import generated_sources
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.every_size import EverySize, NotAdmitted
from piecework.runtime.trace.sizes import KeptMarks, SizePolicy, attempts, require_fitting
from piecework.runtime.watch.weights import Weight

if TYPE_CHECKING:
    from piecework.runtime.batch.descriptor import BatchDescriptor
    from piecework.runtime.batch.mode import CUDAGraphMode
    from piecework.runtime.call.shadow import Shadow
    from piecework.runtime.graphs.plan.batch_shape import BatchShape, FixedDims
    from piecework.runtime.graphs.plan.options import CaptureOptions
    from piecework.runtime.graphs.serve.model import CapturedModel
    from piecework.runtime.graphs.serve.report import CallRow, MeasuredSize

Call = tuple[tuple[object, ...], dict[str, object]]
NewBackend = Callable[[], PieceworkBackend]
_PIECE = re.compile(r"__vllm_submods__\[(\d+)\]\(")


@dataclass(eq=False, repr=False)
class TracedModel:
    """A model as one trace has it."""

    model: Callable[..., object]  # what was traced
    as_it_is: Callable[..., object]  # runs it uncompiled; see `piecework.runtime.call.entry.Entry`
    backend: PieceworkBackend  # made the program
    program: Program  # what was compiled and emitted
    entry: Entry  # the emitted function behind a call

    @property
    def call(self) -> Callable[..., object]:
        """What serves a call."""
        return self.entry.call

    @property
    def static(self) -> CapturedModel | None:
        """The static graphs that serve calls, if some were captured."""
        return self.entry.now.graphs  # type: ignore[return-value]

    def calls(self) -> list[CallRow]:
        """What its calls ran as, since static graphs were captured or released last."""
        from piecework.runtime.graphs.serve.report import uncaptured_rows

        if self.static is not None:
            return self.static.calls()
        return uncaptured_rows(self.entry.uncaptured_calls, self.entry.careful_calls)

    def add_note(self, error: Exception) -> None:
        """Note on an exception of a call which emitted statement ran, and the module it is of."""
        source = self.program.source
        frames = traceback.walk_tb(error.__traceback__)
        filename = filename_of(source.code)
        lines = [number for frame, number in frames if frame.f_code.co_filename == filename]
        if not lines or any("stitched source, line" in n for n in getattr(error, "__notes__", ())):
            return
        text = source.code.splitlines()[lines[-1] - 1].strip()
        origin, piece = source.lines.get(lines[-1]), _PIECE.search(text)
        what = source.submod_names[int(piece.group(1))] if piece else text.partition("(")[0]
        of = f" of {origin.module}" if origin is not None and origin.module else ""
        at = f" ({origin.source})" if origin is not None and origin.source else ""
        error.add_note(f"in {what}{of}{at}; stitched source, line {lines[-1]}: {text}")

    # --- at work ----------------------------------------------------------------------------------

    def _labels(self) -> dict[str, str]:
        """What each piece is called in a profile, which writes ASCII only: its name and modules."""
        pieces = self.program.pieces
        return {e.name: f"{e.name} {e.modules.replace('…', '...')}".strip() for e in pieces}

    @contextmanager
    def named_pieces(self, *, by_layer: bool = True) -> Iterator[None]:
        """Show pieces, replays and operators by name in ``torch.profiler`` for the block."""
        source, labels = self.program.source, self._labels()
        operators = {alias.name: alias.name for alias in source.module.aliases}
        names = [labels[name] for name in source.submod_names]
        layer = layer_by_line(source.code, source.lines) if by_layer else None
        function, lists = self.entry.now.function, self.program.submod_lists
        with named_pieces(function, lists, names, operators, layer), ExitStack() as stack:
            if self.static is not None:
                stack.enter_context(self.static.named_replays(names, by_layer=by_layer))
            yield

    def stages(self) -> dict[str, tuple[str, ...]]:
        """What a profile calls pieces, replays and operators, and Inductor's code of each."""
        last, labels = self.program.compile_ranges[-1], self._labels()
        found = {
            label: generated_sources(self.program.backends[name].entries[last].compiled)
            for name, label in labels.items()
        }
        names = [labels[name] for name in self.program.source.submod_names]
        replays = [] if self.static is None else self.static.stages(names)
        aliases = (alias.name for alias in self.program.source.module.aliases)
        return found | dict.fromkeys((*replays, *aliases), ())

    def shadowed(self, found: Shadow) -> AbstractContextManager[None]:
        """Run the graph of each piece beside it for the block, in calls that ``found`` asks for."""
        splitting_ops = SplittingOps(self.backend.declared_ops or ())
        return self.entry.served_beside(found.beside(self.program, splitting_ops))

    # --- captured ---------------------------------------------------------------------------------

    def capture_graphs(
        self,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
        fixed: FixedDims | None = None,
        **how: Any,
    ) -> CapturedModel:
        """Capture static graphs, in place of those that there are; see `StitchedModule.capture`."""
        from piecework.runtime.graphs.serve.model import CapturedModel

        edited = self.entry.now.edited
        if edited is not None and edited.difference is not None:
            why = "the edited source means something else than the graph, which replays follow"
            hint = "use_edited(stitched.source.code) goes back to the generated source"
            raise StaticGraphError(f"{why}: {edited.difference}", hint=hint)
        self.entry.capture(None)
        made = CapturedModel(self.entry, self.program, sizes, options, fixed)
        # In a context of its own: whatever stops it, no forward context stays behind.
        contextvars.copy_context().run(made.capture, **how)
        return made

    def batch_of_one(self) -> FixedDims:
        """Where a trace of a single row has its batch, as this one has a larger one."""
        from piecework.runtime.graphs.plan.batch_shape import batch_dims

        return batch_dims(self.entry, self.program)

    def call_of(self, size: int, options: CaptureOptions) -> Call:
        """A call with a batch of ``size``, zeros, and the captured value of every other size."""
        from piecework.runtime.graphs.plan.batch_shape import batch_shape

        shape = batch_shape(self.entry, self.program, options.other_sizes)
        return self._call_of(size, shape)

    def _call_of(self, size: int, shape: BatchShape) -> Call:
        from piecework.runtime.call.example_call import example_call

        plan = self.entry.plan()
        symbols = {each.name: max(each.low or 0, 2) for each in plan.symbols}
        return example_call(plan.parameters, symbols | shape.sizes(size))

    def measure(self, *, seconds: float) -> Iterator[MeasuredSize]:
        """Time each captured size eager, uncaptured, and as it was captured."""
        static = self.static
        if static is None:
            return
        captured = static.graphs.bytes_by_descriptor()
        for mode, group in static.dispatcher.get_capture_descs():
            for descriptor in (each for each in group if (mode, each) in captured):
                yield self._measured(static, mode, descriptor, seconds)
        static.count_anew()

    def _measured(
        self,
        static: CapturedModel,
        mode: CUDAGraphMode,
        descriptor: BatchDescriptor,
        seconds: float,
    ) -> MeasuredSize:
        from piecework.runtime.batch.mode import CUDAGraphMode
        from piecework.runtime.graphs.serve.report import CAPTURED, EAGER, STITCHED, measured

        size = descriptor.num_tokens
        args, kwargs = self._call_of(size, static.shape)

        def run(mode: CUDAGraphMode, call: Callable[..., object]) -> None:
            with torch.no_grad(), static.context_for(mode, descriptor):
                call(*args, **kwargs)

        calls = {
            EAGER: partial(run, CUDAGraphMode.NONE, self.as_it_is),
            STITCHED: partial(run, CUDAGraphMode.NONE, self.call),
            CAPTURED: partial(run, mode, self.call),
        }
        with static.without_traces(descriptor):
            return measured(size, calls, static.graphs.platform.synchronize, seconds=seconds)


def trace_model(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    new_backend: NewBackend,
    sizes: SizePolicy | None,
    as_it_is: Callable[..., object],
) -> TracedModel:
    """Trace ``model`` and compile what it does."""
    from piecework.runtime.call.entry_plan import made_entry
    from piecework.runtime.pieces.compilation import require_registered
    from piecework.runtime.trace.layers import RepeatedLayers
    from piecework.runtime.trace.one_trace import trace_once

    backend = new_backend()
    require_registered(backend.declared_ops)  # before a trace that may take long
    require_fitting(model, args, kwargs)
    backend.compiler_manager.begin()
    start = time.perf_counter()
    layers = RepeatedLayers(backend.config.repeated_layers)
    failures: list[CaptureError | PieceCompileError] = []
    for attempt in attempts(args, kwargs, sizes, failures):
        try:
            traced = trace_once(model, args, kwargs, attempt, layers)
            if backend.used:  # what was made of an earlier trace is not
                backend = new_backend()
            with traced.compiling():
                weights = traced.weights()
                tried = _tried(traced.graph, weights, sizes)
                paths = {name: each.path for name, each in weights.items()}
                made = backend.prepare(traced.graph, paths, tried)
        except (CaptureError, PieceCompileError) as error:
            if isinstance(error, PieceCompileError) and error.whatever_is_traced:
                raise
            failures.append(error.with_traceback(None))
            continue
        tracing = time.perf_counter() - start - sum(made.phases.values())
        phases = {"capture": tracing, **made.phases}
        report = replace(made.compiled, layers=layers.text)
        program = replace(made, phases=phases, compiled=report)
        entry = made_entry(traced.closed(), program, as_it_is)
        backend.compiler_manager.write_entry(entry.source.code)
        return TracedModel(model, as_it_is, backend, program, entry)
    raise _clearest(failures)


def _clearest(failures: Sequence[CaptureError | PieceCompileError]) -> Exception:
    """The failure that says best why: that of the first attempt that was made in any case."""
    plain = [each for each in failures if not isinstance(each, NotAdmitted)]
    last = [each for each in plain if not torch_compat.data_dependent(each)]
    return (last or plain or list(failures))[0]


def _tried(
    graph: torch.fx.GraphModule, weights: Mapping[str, Weight], sizes: SizePolicy | None
) -> EverySize | None:
    """The try of a trace that would serve every size; None where all sizes have numbers."""
    if sizes is None or isinstance(sizes, KeptMarks):
        return None
    placeholders = graph.graph.find_nodes(op="placeholder")
    symbols = torch_compat.unbacked_symbols(map(value_of, placeholders))
    tensors = {name: each.tensor for name, each in weights.items()}
    return EverySize(symbols, tensors, sizes.rows_in_one) if symbols else None
