"""A callable that is captured per batch shape, and replayed from addresses that are vouched for."""

import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import ForwardContext, current_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs.device.contract import (
    Args,
    Kwargs,
    Run,
    StaticGraph,
    owns_plain_memory,
    view_of_storage,
    weak_ref_tensors,
)
from piecework.runtime.graphs.memory.addresses import AddressPolicy, Placement, ValueOrigin
from piecework.runtime.graphs.memory.owner import CaptureRecord, StaticGraphs
from piecework.runtime.torch_compat import flatten_tree, tensors_in, unflatten_tree

_log = logging.getLogger(__name__)
# Python values that are the same when they are equal; any other object must be the very same one.
_SCALARS = (bool, int, float, complex, str, bytes)


@dataclass(frozen=True, slots=True)
class CUDAGraphOptions:
    """How one wrapper captures."""

    debug_log_enable: bool = True  # log each capture of this wrapper
    gc_disable: bool = False  # don't collect garbage first; only the first piece needs to
    weak_ref_output: bool = False  # let go of the output inside the capture, as no piece reads it
    mutated_args: frozenset[int] = frozenset()  # leaves that the callable changes in place


@dataclass(frozen=True, slots=True)
class InputSlot:
    """One leaf of the captured arguments: a tensor at its ``placement``, or a Python ``value``."""

    index: int
    origin: ValueOrigin | None = None
    name: str | None = None
    placement: Placement | None = None
    value: object = None
    static: torch.Tensor | None = None  # what a fresh tensor is copied into before each replay
    writes_back: bool = False  # it is updated from there afterwards, as the piece changes it

    def describe(self) -> str:
        if self.origin is None:
            return f"argument {self.index}"
        kind = self.origin.value if self.name is None else f"{self.origin.value} {self.name!r}"
        return f"argument {self.index} ({kind})"

    def mismatch(self, leaf: object) -> str | None:
        """Why ``leaf`` can't take this slot, or None."""
        if self.placement is None:
            alike = type(self.value) is type(leaf) and type(leaf) in _SCALARS
            if self.value is leaf or (alike and self.value == leaf):
                return None
            found = "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)
            return f"was {self.value!r}, is {found}"
        if not isinstance(leaf, torch.Tensor):
            return f"was a tensor, is a {type(leaf).__name__}"
        # Whatever is staged may lie anywhere, and `source` looks at its layout.
        return None if self.static is not None else self.placement.differs(Placement.of(leaf))

    def source(self, leaves: Sequence[object]) -> torch.Tensor:
        """A staged argument as it is now, laid out as at capture (``copy_`` would broadcast)."""
        now, static = leaves[self.index], self.static
        assert static is not None
        layout = (static.shape, static.stride(), static.dtype)
        if isinstance(now, torch.Tensor) and (now.shape, now.stride(), now.dtype) == layout:
            return now
        what = Placement.of(now).describe() if isinstance(now, torch.Tensor) else repr(now)
        raise StaticGraphError(
            f"argument {self.index} was captured as {Placement.of(static).describe()}, and is "
            f"{what} now",
            hint="pad inputs to the captured shape before calling",
        )


def _nothing_captured() -> None:
    raise StaticGraphError("nothing is captured here", hint="look at eager_reason")


@dataclass(eq=False, slots=True)
class CUDAGraphEntry:
    """One batch shape of a callable: its graph and input slots, once it is captured."""

    batch_descriptor: BatchDescriptor
    num_finished_warmup: int = 0
    record: CaptureRecord | None = None  # None before the capture
    graph: StaticGraph | None = None  # None also where the address policy lets it run eagerly
    output: object = None  # static, weakly referenced
    slots: tuple[InputSlot, ...] = ()
    copies: tuple[InputSlot, ...] = ()  # those that are staged
    replay: Callable[[], None] = _nothing_captured  # the graph's own
    flat: bool = False  # the arguments are their own leaves
    checked: bool = False  # a replay's arguments were
    trusted: bool = False  # checked, and nothing has to be copied: ``replay`` is all there is to do

    def capture(
        self,
        runnable: Run,
        args: Args,
        kwargs: Kwargs,
        record: CaptureRecord,
        options: CUDAGraphOptions,
        graphs: StaticGraphs,
    ) -> object:
        """Capture, replay once for what follows in the forward, and return the output."""
        graphs.require_open(record)
        leaves, spec = flatten_tree((args, dict(kwargs)))
        slots = [_slot(n, leaf, record, graphs) for n, leaf in enumerate(leaves)]
        fresh = [i for i, slot in enumerate(slots) if slot.origin is ValueOrigin.FRESH]
        if fresh and graphs.address_policy is AddressPolicy.REFUSE:
            raise StaticGraphError(
                f"{slots[fresh[0]].describe()} enters a captured piece, and nothing keeps its address",
                where=record.where,
                hint="let the splitting op write into an out-buffer, or use address policy "
                "'copy' or 'eager'",
            )
        if fresh and graphs.address_policy is AddressPolicy.EAGER:
            self.record = replace(record, eager_reason=f"{slots[fresh[0]].describe()} enters it")
            graphs.records.append(self.record)
            return runnable(*args, **kwargs)
        before = graphs.staging_bytes
        piece = (record.name, id(runnable))
        buffers = _buffers_for(leaves, fresh, options.mutated_args, graphs, piece)
        for n, buffer in buffers.items():
            slots[n] = replace(slots[n], static=buffer, writes_back=n in options.mutated_args)
            buffer.copy_(slots[n].source(leaves))
        held = [buffers.get(n, leaf) for n, leaf in enumerate(leaves)]
        static_args, static_kwargs = unflatten_tree(held, spec)
        record = replace(record, staged_bytes=graphs.staging_bytes - before)
        weak = options.weak_ref_output
        with graphs.one_capture(record, collects=not options.gc_disable) as graph:
            output = graph.capture(runnable, static_args, static_kwargs, weak_output=weak)
        self.graph, self.output = graph, weak_ref_tensors(output)
        self.slots, self.copies = tuple(slots), tuple(slots[n] for n in buffers)
        self.replay = graph.replay_function()
        self.flat = not kwargs and len(leaves) == len(args) and all(map(operator.is_, leaves, args))
        self._replay(leaves)
        tensors = tensors_in(self.output)
        graphs.addresses.register_captured(record.name, tensors, record.descriptor)
        self.record = record  # now it serves
        return output

    def run(self, runnable: Run, args: Args, kwargs: Kwargs, graphs: StaticGraphs) -> object:
        """Replay for these arguments, or run ``runnable`` where the policy said so."""
        if self.graph is None:
            return runnable(*args, **kwargs)
        leaves = args if self.flat and self.checked else flatten_tree((args, dict(kwargs)))[0]
        if graphs.check_addresses or not self.checked:
            self._check(leaves)
            self.checked = True
            graphs.in_use.add(self.record.key)  # type: ignore[union-attr]
            self.trusted = not self.copies and not graphs.check_addresses
        self._replay(leaves)
        return self.output

    def _replay(self, leaves: Sequence[object]) -> None:
        for slot in self.copies:
            slot.static.copy_(slot.source(leaves))  # type: ignore[union-attr]
        self.replay()
        for slot in self.copies:
            if slot.writes_back:
                slot.source(leaves).copy_(slot.static)  # type: ignore[arg-type]

    def _check(self, leaves: Sequence[object]) -> None:
        where = self.record.where  # type: ignore[union-attr]
        if len(leaves) != len(self.slots):
            text = f"captured with {len(self.slots)} arguments, called with {len(leaves)}"
            raise StaticGraphError(text, where=where)
        for slot, leaf in zip(self.slots, leaves, strict=True):
            difference = slot.mismatch(leaf)
            if difference is not None:
                why = f"{slot.describe()} {difference}; a replay would read stale memory"
                hint = "write new values in place, register the buffer, or capture again"
                raise StaticGraphError(why, where=where, hint=hint)

    def reset(self) -> None:
        """Give up what was captured."""
        graph, self.graph, self.record, self.output = self.graph, None, None, None
        self.checked = self.trusted = False
        self.replay, self.num_finished_warmup = _nothing_captured, 0
        if graph is not None:
            graph.reset()


def _slot(index: int, leaf: object, record: CaptureRecord, graphs: StaticGraphs) -> InputSlot:
    book, descriptor = graphs.addresses, record.descriptor
    if not isinstance(leaf, torch.Tensor):
        return InputSlot(index, value=leaf)
    if not graphs.platform.computes_on(leaf.device):
        raise StaticGraphError(
            f"argument {index} is on {leaf.device}, and the graph on {graphs.platform.device}: "
            "what is done with it would be done once, at the capture",
            where=record.where,
            hint="give the callable tensors of one device, or run it uncaptured",
        )
    origin, name = book.find(leaf, descriptor)
    if origin is ValueOrigin.FRESH and isinstance(leaf, torch.nn.Parameter):
        # Parameters live as long as their module; the book holds this one from now on.
        origin, name = ValueOrigin.WEIGHT, f"parameter {index}"
        book.register_persistent(name, leaf, origin)
    if leaf.numel() == 0:
        origin = ValueOrigin.PERSISTENT  # nothing is read from it, wherever it is
    return InputSlot(index, origin, name, Placement.of(leaf))


def _buffers_for(
    leaves: list[object],
    fresh: Sequence[int],
    mutated: frozenset[int],
    graphs: StaticGraphs,
    piece: object,
) -> dict[int, torch.Tensor]:
    """A static buffer for each leaf at ``fresh``, which is to be dense and, if changed, alone."""
    buffers: dict[int, torch.Tensor] = {}
    owners: dict[int, list[int]] = {}
    for number, index in enumerate(fresh):
        leaf = leaves[index]
        if not isinstance(leaf, torch.Tensor) or not owns_plain_memory(leaf) or _overlaps(leaf):
            raise StaticGraphError(
                f"argument {index} is not dense memory, so it can't be in a static buffer",
                hint="make it contiguous before the piece, or run this piece uncaptured",
            )
        sharing = owners.setdefault(leaf.untyped_storage().data_ptr(), [])
        sharing.append(index)
        if len(sharing) > 1 and not mutated.isdisjoint(sharing):
            raise StaticGraphError(
                f"arguments {sharing[0]} and {index} share memory that the piece changes, and "
                "would have a static buffer each",
                hint="clone one before the piece, or use address policy 'eager'",
            )
        size = leaf.element_size()
        last = sum((n - 1) * step for n, step in zip(leaf.shape, leaf.stride(), strict=True))
        held = graphs.staging_memory((piece, number), (last + 1) * size, leaf.device)
        before = int(leaf.storage_offset()) * size
        buffers[index] = view_of_storage(held.untyped_storage(), like=leaf, byte_shift=before)
    return buffers


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may have one place, which ``copy_`` can't write."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += (size - 1) * stride
    return False


@dataclass(eq=False)
class CUDAGraphWrapper:
    """Runs ``runnable`` as a static graph whenever the context's mode is this wrapper's mode.

    Else it runs ``runnable``. Wrappers nest: a FULL one around pieces with PIECEWISE ones.

    Args:
        runnable: any callable over tensors; its output may be any pytree.
        config: gives ``cudagraph_num_of_warmups``; None means no warm-up.
        runtime_mode: PIECEWISE or FULL.
        cudagraph_options: how to capture.
        graphs: the owner of pool and capture phase; by default a private, lazy one on the device of
            the first tensor argument.
        name: what errors and reports call it.

    Example:
        >>> from piecework.runtime.batch.forward_context import set_forward_context
        >>> graphs = StaticGraphs("cpu")
        >>> x = torch.zeros(2)
        >>> graphs.addresses.register_persistent("x", x)
        >>> double = CUDAGraphWrapper(lambda x: x * 2, None, CUDAGraphMode.FULL, graphs=graphs)
        >>> mode = dict(cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=BatchDescriptor(2))
        >>> with graphs.capturing(), set_forward_context(**mode):
        ...     _ = double(x)
        >>> with set_forward_context(**mode):
        ...     double(x.fill_(3)).tolist()
        [6.0, 6.0]
    """

    runnable: Run
    config: CompilationConfig | None
    runtime_mode: CUDAGraphMode
    cudagraph_options: CUDAGraphOptions = field(default_factory=CUDAGraphOptions)
    graphs: StaticGraphs | None = None
    name: str = "model"
    concrete_cudagraph_entries: dict[BatchDescriptor, CUDAGraphEntry] = field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        if self.runtime_mode not in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
            why = f"a wrapper captures in mode PIECEWISE or FULL, not {self.runtime_mode}"
            raise ConfigError(why, where=self.name, hint="don't wrap what is never captured")
        if self.graphs is not None:
            self.graphs.register(self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        context = current_forward_context()
        if (
            context is None
            or context.cudagraph_runtime_mode is not self.runtime_mode
            or context.skip_cuda_graphs
        ):
            shape = None if context is None else context.batch_descriptor
            if shape is not None and self.graphs is not None and self.graphs.is_open:
                self._entry(shape).num_finished_warmup += 1
            return self.runnable(*args, **kwargs)
        entry = self.concrete_cudagraph_entries.get(context.batch_descriptor)
        if self.graphs is not None and self.graphs.others_capture():
            return self.runnable(*args, **kwargs)
        if self.graphs is None or entry is None or entry.record is None:
            return self._warm_up_or_capture(context, args, kwargs)
        if entry.trusted:
            entry.replay()
            return entry.output
        return entry.run(self.runnable, args, kwargs, self.graphs)

    def unwrap(self) -> Run:
        return self.runnable

    def _entry(self, descriptor: BatchDescriptor) -> CUDAGraphEntry:
        return self.concrete_cudagraph_entries.setdefault(descriptor, CUDAGraphEntry(descriptor))

    def _warm_up_or_capture(self, context: ForwardContext, args: Args, kwargs: Kwargs) -> object:
        descriptor = context.batch_descriptor
        if descriptor is None:
            raise StaticGraphError(
                f"the forward context asks for mode {self.runtime_mode.name} without a batch descriptor",
                where=self.name,
                hint="pass batch_descriptor to set_forward_context, as the dispatcher returned it",
            )
        if self.graphs is None:
            devices = (each.device for each in tensors_in((args, kwargs)))
            self.graphs = StaticGraphs(next(devices, torch.device("cpu")), lazy=True)
            self.graphs.register(self)
        graphs, options = self.graphs, self.cudagraph_options
        warmups = 0 if self.config is None else self.config.cudagraph_num_of_warmups
        entry = self._entry(descriptor)
        if graphs.is_open and entry.num_finished_warmup < warmups:
            entry.num_finished_warmup += 1
            return self.runnable(*args, **kwargs)
        record = CaptureRecord(self.name, self.runtime_mode, descriptor)
        output = entry.capture(self.runnable, args, kwargs, record, options, graphs)
        if options.debug_log_enable and not graphs.in_phase:
            _log.debug("captured %s", record.where)
        return output

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        if mode is self.runtime_mode:
            entry = self.concrete_cudagraph_entries.pop(descriptor, None)
            if entry is not None:
                entry.reset()

    def clear_graphs(self) -> None:
        with ExitStack() as every:
            for descriptor in list(self.concrete_cudagraph_entries):
                every.callback(self.discard, self.runtime_mode, descriptor)


def wrap_with_cudagraph_if_needed(
    piecewise_backend: Callable[..., object],
    config: CompilationConfig,
    is_first_graph: bool,
    is_last_graph: bool,
    *,
    graphs: StaticGraphs,
    name: str = "piece",
    mutated_args: frozenset[int] = frozenset(),
) -> Callable[..., object]:
    """The piece itself, or a PIECEWISE wrapper around it where the mode captures pieces."""
    if not config.cudagraph_mode.requires_piecewise_compilation():
        return piecewise_backend
    options = CUDAGraphOptions(is_first_graph, not is_first_graph, is_last_graph, mutated_args)
    mode = CUDAGraphMode.PIECEWISE
    return CUDAGraphWrapper(piecewise_backend, config, mode, options, graphs, name)
