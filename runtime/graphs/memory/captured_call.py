"""One callable captured for one batch shape, and replayed safely.

Wrappers decide when to capture. No address is trusted that nobody vouched for.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.device.contract import StaticGraph
from piecework.runtime.graphs.device.weak_ref import weak_ref_tensors
from piecework.runtime.graphs.memory.addresses import AddressPolicy, Placement, ValueOrigin
from piecework.runtime.graphs.memory.copies import StagedCopy, stage_fresh
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.torch_compat import flatten_tree, unflatten_tree

Runnable = Callable[..., object]

# Python values that are the same when they are equal; any other object must be the very same one.
_SCALARS = (bool, int, float, complex, str, bytes)


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What is captured, for whom.

    Attributes:
        collect_garbage: collect and hand back cached memory first (once per descriptor is enough).
        weak_output: let go of the output inside the capture (the last piece of a forward).
        mutated_args: leaves of the arguments that the callable changes in place.
    """

    name: str
    mode: CUDAGraphMode
    descriptor: BatchDescriptor
    collect_garbage: bool = True
    weak_output: bool = False
    mutated_args: frozenset[int] = frozenset()

    @property
    def where(self) -> str:
        return f"{self.name}, {self.mode.name} {self.descriptor.describe()}"


@dataclass(frozen=True, slots=True)
class InputSlot:
    """One leaf of the captured arguments: a tensor at its place, or a frozen Python value.

    Attributes:
        origin: who owns a tensor's memory; None for a Python value.
        name: the registered name of that memory, if any.
        placement: what a replay expects; None for a Python value.
        value: the Python value; None for a tensor.
    """

    origin: ValueOrigin | None
    name: str | None
    placement: Placement | None
    value: object

    def describe(self, index: int) -> str:
        if self.origin is None:
            return f"argument {index}"
        kind = self.origin.value if self.name is None else f"{self.origin.value} {self.name!r}"
        return f"argument {index} ({kind})"

    def mismatch(self, leaf: object, *, staged: bool) -> str | None:
        """Why ``leaf`` can't take this slot, or None; a ``staged`` one may lie elsewhere."""
        if self.placement is None:
            alike = type(self.value) is type(leaf) and type(leaf) in _SCALARS
            if self.value is leaf or (alike and self.value == leaf):
                return None
            found = "a tensor" if isinstance(leaf, torch.Tensor) else repr(leaf)
            return f"was {self.value!r}, is {found}"
        if not isinstance(leaf, torch.Tensor):
            return f"was a tensor, is a {type(leaf).__name__}"
        now = Placement.of(leaf)
        return None if staged and self.placement.same_layout(now) else self.placement.differs(now)


def _nothing_captured() -> None:
    raise StaticGraphError("nothing is captured here", hint="look at eager_reason")


@dataclass(slots=True)
class CapturedCall:
    """A captured callable with its inputs' slots, or the reason why it runs uncaptured.

    Attributes:
        graph: the static graph; None where the policy chose to run eagerly.
        output: the static output, weakly referenced.
        slots: the leaves of the arguments.
        copies: fresh inputs that are staged before each replay.
        eager_reason: why nothing was captured, if so.
        checked: the arguments of a replay were checked once.
        trusted: checked, and nothing has to be copied: a replay may skip looking at the arguments.
        replay: the graph's own replay, bound once; for a trusted call it is all there is to do.
        on_first_replay: told once, when the call is replayed after its capture.
        flat: the arguments are their own leaves.
    """

    request: CaptureRequest
    graph: StaticGraph | None
    output: object
    slots: tuple[InputSlot, ...]
    copies: tuple[StagedCopy, ...]
    eager_reason: str | None = None
    checked: bool = False
    trusted: bool = False
    always_check: bool = False
    replay: Callable[[], None] = _nothing_captured
    on_first_replay: Callable[[], None] = _nothing_captured
    flat: bool = False

    @classmethod
    def make(
        cls,
        runnable: Runnable,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        request: CaptureRequest,
        graphs: StaticGraphs,
    ) -> tuple[CapturedCall, object]:
        """Capture, replay once, and return the call with its output held strongly.

        The replay makes the output right, so that what follows in the same forward computes on real
        values.

        Raises:
            StaticGraphError: capturing is closed, the callable failed, an input is on another
                device, or a fresh one is refused.
        """
        graphs.require_open(request.where)
        graphs.require_unused(request.mode, request.descriptor, request.where)
        leaves, spec = flatten_tree((args, dict(kwargs)))
        slots = tuple(_slot(n, leaf, request, graphs) for n, leaf in enumerate(leaves))
        fresh = [i for i, slot in enumerate(slots) if slot.origin is ValueOrigin.FRESH]
        if fresh and graphs.address_policy is not AddressPolicy.COPY:
            what = slots[fresh[0]].describe(fresh[0])
            if graphs.address_policy is AddressPolicy.REFUSE:
                raise StaticGraphError(
                    f"{what} enters a captured piece, and nothing keeps its address",
                    where=request.where,
                    hint="let the splitting op write into an out-buffer, or use address policy "
                    "'copy' or 'eager'",
                )
            reason = f"{what} enters it"
            graphs.note_eager(request.name, request.mode, request.descriptor, reason)
            return cls(request, None, None, slots, (), reason), runnable(*args, **kwargs)
        memory = partial(graphs.staging_memory, (request.name, id(runnable)))
        before = graphs.staging_bytes
        copies, staged = stage_fresh(leaves, fresh, request.mutated_args, memory)
        static_args, static_kwargs = unflatten_tree(staged, spec)
        for copy in copies:
            copy.stage(leaves)
        added = graphs.staging_bytes - before
        graph, output = _record(runnable, static_args, static_kwargs, request, graphs, added)
        call = cls(
            request,
            graph,
            weak_ref_tensors(output),
            slots,
            copies,
            always_check=graphs.check_addresses,
            replay=graph.replay_function(),
            on_first_replay=partial(graphs.mark_in_use, request.mode, request.descriptor),
            flat=not kwargs and len(leaves) == len(args) and all(map(operator.is_, leaves, args)),
        )
        call._replay(leaves)
        tensors = [leaf for leaf in flatten_tree(call.output)[0] if isinstance(leaf, torch.Tensor)]
        graphs.addresses.register_captured(request.name, tensors, request.descriptor)
        return call, output

    def __call__(
        self, runnable: Runnable, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        """Replay for these arguments, or run ``runnable`` where the policy said so."""
        if self.graph is None:
            return runnable(*args, **kwargs)
        leaves = args if self.flat and self.checked else flatten_tree((args, dict(kwargs)))[0]
        if self.always_check or not self.checked:
            self.check(leaves)
            self.checked = True
            self.on_first_replay()
            self.trusted = not self.copies and not self.always_check
        self._replay(leaves)
        return self.output

    def _replay(self, leaves: Sequence[object]) -> None:
        for copy in self.copies:
            copy.stage(leaves)
        self.replay()
        for copy in self.copies:
            copy.bring_back(leaves)

    def check(self, leaves: Sequence[object]) -> None:
        """Raise a `StaticGraphError` that says which argument is not what was captured, if any."""
        if len(leaves) != len(self.slots):
            raise StaticGraphError(
                f"captured with {len(self.slots)} arguments, called with {len(leaves)}",
                where=self.request.where,
            )
        for index, (slot, leaf) in enumerate(zip(self.slots, leaves, strict=True)):
            difference = slot.mismatch(leaf, staged=slot.origin is ValueOrigin.FRESH)
            if difference is not None:
                raise StaticGraphError(
                    f"{slot.describe(index)} {difference}; a replay would read stale memory",
                    where=self.request.where,
                    hint="write new values in place, register the buffer, or capture again",
                )

    def reset(self) -> None:
        """Give the graph up."""
        if self.graph is not None:
            self.graph.reset()
        self.graph, self.output, self.trusted = None, None, False
        self.replay = _nothing_captured
        self.eager_reason = "the graph was reset"


def _slot(index: int, leaf: object, request: CaptureRequest, graphs: StaticGraphs) -> InputSlot:
    book, descriptor = graphs.addresses, request.descriptor
    if not isinstance(leaf, torch.Tensor):
        return InputSlot(None, None, None, leaf)
    if not graphs.platform.computes_on(leaf.device):
        raise StaticGraphError(
            f"argument {index} is on {leaf.device}, and the graph on {graphs.platform.device}: "
            "what is done with it would be done once, at the capture",
            where=request.where,
            hint="give the callable tensors of one device, or run it uncaptured",
        )
    origin = book.classify(leaf, descriptor)
    if origin is ValueOrigin.FRESH and isinstance(leaf, torch.nn.Parameter):
        # Parameters live as long as their module; the book holds this one from now on.
        origin = ValueOrigin.WEIGHT
        book.register_persistent(f"parameter {index}", leaf, origin)
    if leaf.numel() == 0:
        origin = ValueOrigin.PERSISTENT  # nothing is read from it, wherever it is
    return InputSlot(origin, book.name_of(leaf, descriptor), Placement.of(leaf), None)


def _record(
    runnable: Runnable,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    request: CaptureRequest,
    graphs: StaticGraphs,
    staged_bytes: int,
) -> tuple[StaticGraph, object]:
    named = torch.profiler.record_function(f"capture {request.where}")
    key = (request.name, request.mode, request.descriptor)
    with named, graphs.one_capture(*key, staged_bytes=staged_bytes) as graph:
        if request.collect_garbage:
            gc.collect(1 if graphs.in_phase else 2)  # a phase begins with a full collection
            graphs.platform.release_cached_memory()
        try:
            output = graph.capture(runnable, args, kwargs, weak_output=request.weak_output)
        except StaticGraphError as error:
            raise StaticGraphError(error.message, where=request.where, hint=error.hint) from error
        except Exception as error:
            raise StaticGraphError(
                f"the capture failed: {type(error).__name__}: {error}",
                where=request.where,
                hint="run this batch shape uncaptured to see whether the piece itself fails",
            ) from error
    return graph, output
