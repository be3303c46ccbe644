"""What is captured of one stitched model: its pieces, its whole forward, its static inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from types import FunctionType

import torch
import torch.fx

from piecework.codegen.plan.ir import Origin
from piecework.codegen.replay.emit import whole_forward
from piecework.codegen.replay.plan import ReplayFacts
from piecework.codegen.stitch.bind import filename_of
from piecework.codegen.stitch.source import StitchedSource
from piecework.errors import BindError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor, Key
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    current_forward_context,
    override_forward_context,
)
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.call.entry import Entry, by_path_of
from piecework.runtime.call.profile_names import by_statement
from piecework.runtime.compilers.inductor import Partition, partitions_taken_by
from piecework.runtime.graphs.device.cuda import kernels_of
from piecework.runtime.graphs.memory.addresses import Placement, ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import (
    CUDAGraphOptions,
    CUDAGraphWrapper,
)
from piecework.runtime.graphs.plan.batch_shape import (
    BatchShape,
    FixedDims,
    batch_shape,
    passed_inputs,
)
from piecework.runtime.graphs.plan.captured_values import (
    capture_device,
    numbers_of,
    require_sizes_only,
    sizes_of,
)
from piecework.runtime.graphs.plan.options import CaptureOptions, full_graphs_of, plan_capture
from piecework.runtime.graphs.plan.phase import plain_context
from piecework.runtime.graphs.serve.replay import Replay, facts_of, make_replay
from piecework.runtime.graphs.serve.writes import DryWrites
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs, new_buffer
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.writes import written_inputs

_FULL, _PIECES = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


def _of(number: int) -> str:
    """Which batch range, where it isn't the first."""
    return f" of range {number}" if number else ""


class CapturedGraphs:
    """The static graphs of one stitched model; `model` decides which serves a call."""

    def __init__(
        self,
        entry: Entry,
        program: Program,
        sizes: Iterable[int] | None,
        options: CaptureOptions,
        fixed: FixedDims | None = None,
    ) -> None:
        self._entry, self._program, self.options = entry, program, options
        config, split_gm = program.config, program.split_gm
        self.context_for = options.context_for or plain_context
        self.shape = shape = batch_shape(entry, program, options.other_sizes, fixed)
        self._between = [item.submod_name for item in program.items if item.is_splitting_graph]
        declared = full_graphs_of(split_gm, self._between)
        # ``lowered``: why less is captured than the mode that was asked for; "" if it isn't.
        self.dispatcher, self.lowered = plan_capture(shape, config, sizes, options, declared)
        self.sizes = self.dispatcher.capture_sizes
        # What is captured: the pieces, and all where a whole forward is.
        every = [item.submod_name for item in program.items]
        whole = self.dispatcher.cudagraph_keys[_FULL]
        captured = every if whole else list(program.source.submod_names)
        require_sizes_only(split_gm, captured)
        self._parameters = [node for node, _ in passed_inputs(entry, program)]
        # Of one execution; a change retires these graphs instead of reaching them.
        self.forward, self.weights = entry.now.function, by_path_of(entry.now.weights)
        copies = config.cudagraph_copy_inputs
        self.inputs = _static_inputs(shape, max(self.sizes), options, copies=copies)
        cut_inside = config.use_inductor_graph_partition
        # Inductor's own partitions leave out what is elsewhere.
        inside = () if cut_inside else captured
        self.graphs = StaticGraphs(
            capture_device(split_gm, inside, shape.dynamic[0].fake.device),
            address_policy=options.address_policy,
            check_addresses=options.check_addresses,
            mark_kernels=options.mark_kernels,
            memory_of=options.memory_of,
        )
        # Those that Inductor cut itself and ran so far, with what captures each.
        self.partitions: dict[Partition, CUDAGraphWrapper] | None = {} if cut_inside else None
        self.inputs.register(self.graphs.addresses)
        self.graphs.addresses.register_weights(self.weights)
        known = [self.weights[path] for path in shape.written_weights]
        self.dry_writes = DryWrites(self._is_own, list(self.weights.values()), known)
        self._wrapped = [self._wrap(submods, n) for n, submods in enumerate(program.submod_lists)]
        self._whole = [self._wrap_whole(number) for number in range(len(program.submod_lists))]
        self.replays: dict[Key, Replay] = {}
        pieces = self.dispatcher.cudagraph_keys[_PIECES]
        if cut_inside and pieces:
            # A run captures nothing, and meets the partitions.
            smallest = min(pieces, key=lambda each: each.num_tokens)
            with self.context_for(CUDAGraphMode.NONE, smallest):
                self.dummy(smallest)
            if not self.partitions:
                why = "Inductor made no partitions of this model's code"
                hint = "it makes them for GPUs only; without that option the graph is cut before"
                raise StaticGraphError(why, where="use_inductor_graph_partition", hint=hint)

    def static_inputs(self, size: int) -> dict[str, torch.Tensor]:
        """The buffers that graphs of a size read, by parameter; fewer rows are the head."""
        if not 0 < size <= max(self.sizes):
            why = "no graph has inputs of this size"
            hint = f"captured sizes: {', '.join(map(str, self.sizes))}"
            raise StaticGraphError(why, where=f"static_inputs({size})", hint=hint)
        return self.inputs.by_name(size)

    # --- what is captured --------------------------------------------------------------------------

    def _wrap(
        self, submods: Sequence[Callable[..., object]], number: int
    ) -> Sequence[Callable[..., object]]:
        """The pieces of one batch range, each captured by itself."""
        if self.partitions is not None:
            return submods  # they hold splitting ops; only the partitions inside are captured
        names, made = self._program.source.submod_names, []
        for index, (submod, name) in enumerate(zip(submods, names, strict=True)):
            written = written_inputs(self._program.backends[name].compiled_of()[0])
            made.append(self._piece(submod, index, len(submods), name + _of(number), written))
        return made

    def _piece(
        self,
        run: Callable[..., object],
        index: int,
        count: int,
        name: str,
        written: frozenset[int] = frozenset(),
    ) -> CUDAGraphWrapper:
        options = CUDAGraphOptions(index == 0, index > 0, index == count - 1, written)
        return CUDAGraphWrapper(run, None, _PIECES, options, self.graphs, name)

    def run_partition(self, partition: Partition, values: tuple[object, ...]) -> object:
        """Capture, replay or run a partition of Inductor's code, as the forward context says."""
        assert self.partitions is not None
        wrapper = self.partitions.get(partition)
        if wrapper is None:
            index, count = partition.index, partition.count
            wrapper = self._piece(partition.run, index, count, f"partition {index} of {count}")
            self.partitions[partition] = wrapper
        return wrapper(*values)

    def _wrap_whole(self, number: int) -> CUDAGraphWrapper:
        """The whole forward of one batch range; the pieces' own wrappers stand aside in it."""
        pieces = tuple(map(self.dry_writes.unwatched, self._wrapped[number]))
        run = partial(self._to_capture, __vllm_submods__=pieces)
        options = CUDAGraphOptions(weak_ref_output=True)
        name = "the whole forward" + _of(number)
        return CUDAGraphWrapper(run, None, _FULL, options, self.graphs, name)

    def _to_capture(self, *flat: object, **submods: object) -> object:
        """The forward; while it is captured, its statements tell what kernels stand for."""
        silent = self.graphs.unmarked or not self.graphs.is_open
        return (self.forward if silent else self._telling)(*flat, **submods)

    @cached_property
    def _telling(self) -> FunctionType:
        source, filename = self._program.source, self.forward.__code__.co_filename
        lines = source.lines if filename == filename_of(source.code) else {}
        names = {f"__vllm_submods__[{n}]": name for n, name in enumerate(source.submod_names)}
        return by_statement(self.forward, partial(_statement, lines, names))

    def _is_own(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` lies in a static input or a captured result."""
        context = current_forward_context()
        descriptor = None if context is None else context.batch_descriptor
        own = (ValueOrigin.PERSISTENT, ValueOrigin.CAPTURED)
        return self.graphs.addresses.classify(tensor, descriptor) in own

    def pieces_for(self, size: int) -> Sequence[Callable[..., object]]:
        """The wrapped pieces of a batch size, in order."""
        return self._wrapped[self._range_of(size)]

    def _range_of(self, size: int) -> int:
        table = self._program.range_table
        return 0 if table is None else table.index(size)

    # --- runs on dummy inputs ----------------------------------------------------------------------

    def dummy(self, descriptor: BatchDescriptor) -> object:
        """One forward on the static inputs; the context's mode says which wrapper acts."""
        size = descriptor.num_tokens
        if self.graphs.call_order is not None:
            self.graphs.call_order()
        if self.options.join is not None:
            self.options.join()
        flat, context = self._flat(self.inputs.views(size), size), current_forward_context()
        with torch.no_grad():
            if context is not None and self._is_blind(context) and self.graphs.is_open:
                # As it will be captured: what an operator does for the first time (load a kernel,
                # tune it) would make the capture invalid, and what it writes is seen here, to be
                # put back after the capture's own replay.
                real = replace(context, cudagraph_runtime_mode=CUDAGraphMode.NONE)
                with self.harmless(real, dry=False):
                    self._run(flat, size)
            with self.harmless(context):
                return self._run(flat, size)

    def _is_blind(self, context: ForwardContext) -> bool:
        """Whether nothing can be copied: while a GPU captures, and its replays run no Python."""
        return context.cudagraph_runtime_mode is _FULL and not self.graphs.platform.stand_in

    @contextmanager
    def harmless(self, context: ForwardContext | None, *, dry: bool = True) -> Iterator[None]:
        """A run on dummy inputs, of which ops are told but in full graphs, and is undone."""
        if context is not None and context.cudagraph_runtime_mode is not _FULL:
            context = replace(context, dry=dry)
        # Splitting ops that run inside Inductor's code can't be looked at.
        blind = self.partitions is not None or (context is not None and self._is_blind(context))
        writes = self.dry_writes.put_back(watched=not blind)
        with writes if self.options.put_back else nullcontext(), override_forward_context(context):
            yield

    def _run(self, flat: Sequence[object], size: int) -> object:
        inside = nullcontext() if self.partitions is None else partitions_taken_by(self)
        with inside:
            return self._whole[self._range_of(size)](*flat)

    def run_uncaptured(
        self, like: BatchDescriptor, tensors: Sequence[torch.Tensor], size: int
    ) -> Sequence[object]:
        """One forward on tensors of a batch of ``size``, otherwise ``like`` a captured one."""
        scope = self.context_for(CUDAGraphMode.NONE, replace(like, num_tokens=size))
        with scope, torch.no_grad(), self.harmless(current_forward_context()):
            results = self._run(self._flat(tensors, size), size)
            found = results if isinstance(results, (tuple, list)) else (results,)
            # Copies: a result may lie in memory that is put back.
            return [each.clone() if isinstance(each, torch.Tensor) else each for each in found]

    @contextmanager
    def without_traces(self, descriptor: BatchDescriptor) -> Iterator[None]:
        """Put back, after the block, what a run of a captured size beforehand wrote."""
        size = descriptor.num_tokens
        self.run_uncaptured(descriptor, self.inputs.views(size), size)
        with self.dry_writes.put_back(watched=False):
            yield
        self.dry_writes.forget()

    def _flat(self, tensors: Sequence[torch.Tensor], size: int) -> list[object]:
        flat: list[object] = [size] * len(self.shape.names)
        for each, tensor in zip(self.shape.staged, tensors, strict=True):
            flat[each.position] = tensor
        for position, value in self.shape.numbers.items():
            flat[position] = size if value is None else value
        for position, path in self.shape.weights.items():
            flat[position] = self.weights[path]
        return flat

    # --- what serves it ----------------------------------------------------------------------------

    def replay_of(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Callable[..., object]:
        """What serves a captured descriptor, after a replay that checks every address."""
        with self.context_for(mode, descriptor):
            self.dummy(descriptor)
        # Inductor's own code calls the replays of its partitions, so nothing is emitted for them.
        call = self._emit(mode, descriptor) if self.partitions is None or mode is _FULL else None
        if call is not None and not self.options.check_addresses:
            return call
        size = descriptor.num_tokens
        stage, flat = self.inputs.stager(size), self._flat(self.inputs.views(size), size)

        def through_wrappers(tensors: Sequence[torch.Tensor]) -> object:
            stage(tensors)
            outer = current_forward_context() or ForwardContext()
            inner = replace(outer, cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
            with override_forward_context(inner):
                return self._run(flat, size)

        return through_wrappers

    def _emit(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> Callable[..., object]:
        size, shape, program = descriptor.num_tokens, self.shape, self._program
        number, views = self._range_of(size), self.inputs.views(size)
        wrapped, pieces = self._wrapped[number], program.submod_lists[number]
        split_gm, source = program.split_gm, program.source
        if mode is _FULL:
            (split_gm, source), wrapped, pieces = self._whole_source, [self._whole[number]], []
        calls = [each.concrete_cudagraph_entries[descriptor] for each in wrapped]  # type: ignore[attr-defined]
        names = [parameter.name for parameter in source.module.entry.parameters]
        held = {row.name: self.weights[row.path] for row in source.module.bound}
        held |= {names[at]: self.weights[path] for at, path in shape.weights.items()}
        staged = tuple(names[each.position] for each in shape.staged)
        held |= dict(zip(staged, views, strict=True))
        numbers = {names[n]: size if v is None else v for n, v in shape.numbers.items()}
        facts = ReplayFacts(
            title=f"{mode.name} {descriptor.describe()}",
            tokens=size,
            policy=self.graphs.address_policy.value,
            staged=staged,
            sizes=numbers,
            places={name: Placement.of(tensor) for name, tensor in held.items()},
            pieces=tuple(map(facts_of, calls)),
            numbers=numbers_of(split_gm, sizes_of(self._parameters, self._flat(views, size))),
            banner=(f"model: {program.name}",),
        )
        stage = self.inputs.stager(size)
        made = make_replay(split_gm, source, facts, calls, pieces, stage, held)
        self.replays[mode, descriptor] = made
        return made.call

    @cached_property
    def _whole_source(self) -> tuple[torch.fx.GraphModule, StitchedSource]:
        return whole_forward(self._program.split_gm, self._program.source)


def _static_inputs(
    shape: BatchShape, maximum: int, options: CaptureOptions, *, copies: bool
) -> StaticInputs:
    """Persistent buffers for all tensor arguments; calls copy to them or pass their views."""
    for unknown in sorted(set(options.pads) - {each.name for each in shape.dynamic}):
        hint = f"inputs: {', '.join(each.name for each in shape.dynamic)}"
        raise BindError(f"no padded input {unknown!r}", where="pads", hint=hint)
    pads = {each.name: options.pads.get(each.name, 0) for each in shape.staged}
    specs = [InputSpec(e.name, e.dim, pads[e.name], e.written, not copies) for e in shape.staged]
    buffers = [new_buffer(e.name, e.sizes(maximum), e.fake) for e in shape.staged]
    return StaticInputs(specs, buffers, poison=options.poison, keeps_tails=copies)


def _statement(
    lines: Mapping[int, Origin], pieces: Mapping[str, str], line: int, called: str
) -> AbstractContextManager[None]:
    """What kernels are told that are captured at a line of the stitching source."""
    layer = lines.get(line, Origin()).module.replace("…", "...")  # a profiler's names are ASCII
    context = current_forward_context() or ForwardContext()
    batch, mode = context.batch_descriptor, context.cudagraph_runtime_mode
    graph = f"{mode.name} {batch.describe()}" if batch is not None else mode.name
    return kernels_of(pieces.get(called, called), layer, line, graph)
