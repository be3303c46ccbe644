"""Static stand-ins for tensors that move: buffers that replays read instead of a call's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.weak_ref import owns_plain_memory, view_of_storage
from piecework.runtime.graphs.memory.addresses import Placement

# An offset in bytes that every element size divides.
_GRAIN = 16
Memory = Callable[[int, int, torch.device], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StagedMember:
    """One argument leaf of a buffer: its static view, and where it lies in what is copied."""

    leaf: int
    static: torch.Tensor
    shift: int

    def source(self, leaves: Sequence[object]) -> torch.Tensor:
        """The argument as it is now, laid out as at capture (``copy_`` would broadcast)."""
        now = leaves[self.leaf]
        static = self.static
        if (
            isinstance(now, torch.Tensor)
            and now.shape == static.shape
            and now.stride() == static.stride()
            and now.dtype == static.dtype
            and now.is_conj() == static.is_conj()
            and now.is_neg() == static.is_neg()
        ):
            return now
        what = Placement.of(now).describe() if isinstance(now, torch.Tensor) else repr(now)
        raise StaticGraphError(
            f"argument {self.leaf} was captured as {Placement.of(static).describe()}, and is {what} now",
            hint="pad inputs to the captured shape before calling",
        )


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """One static buffer for the argument leaves that share one storage.

    Attributes:
        members: the leaves, each with what replays read in its place.
        window: what is copied as bytes (overlap, several views); None for one plain tensor.
        writes_back: the piece changes it, so the caller's tensor is updated after a replay.
    """

    members: tuple[StagedMember, ...]
    window: torch.Tensor | None
    writes_back: bool

    def stage(self, leaves: Sequence[object]) -> None:
        """Copy the arguments' present contents into the buffer."""
        if self.window is None:
            self.members[0].static.copy_(self.members[0].source(leaves))
        else:
            self.window.copy_(self._outside(leaves, self.window))

    def bring_back(self, leaves: Sequence[object]) -> None:
        """Copy what the piece wrote back into the caller's tensors."""
        if not self.writes_back:
            return
        if self.window is None:
            self.members[0].source(leaves).copy_(self.members[0].static)
        else:
            self._outside(leaves, self.window).copy_(self.window)

    def _outside(self, leaves: Sequence[object], window: torch.Tensor) -> torch.Tensor:
        """The callers' bytes that correspond to the window."""
        found = {}
        for member in self.members:
            now = member.source(leaves)
            start = now.storage_offset() * now.element_size() - member.shift
            storage = now.untyped_storage()
            found[storage.data_ptr(), start] = storage
        if len(found) != 1:
            names = ", ".join(str(member.leaf) for member in self.members)
            raise StaticGraphError(
                f"arguments {names} shared memory at capture and don't in the same way now",
                hint="pass views of one tensor as at capture, or clone them before the piece",
            )
        [((_, start), storage)] = found.items()
        view = torch.empty(0, dtype=torch.uint8, device=window.device)
        return view.set_(storage, start, (window.numel(),), (1,))


def stage_fresh(
    leaves: list[object], fresh: Iterable[int], mutated: frozenset[int], memory: Memory
) -> tuple[tuple[StagedCopy, ...], list[object]]:
    """Static buffers for the leaves at ``fresh``, and the leaves with those in their place.

    Leaves that share a storage get one buffer, so that they alias in the graph as they do outside.

    Args:
        mutated: leaves that the callable changes.
        memory: gives the bytes of a buffer, from its number, its size and its device.
    """
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for index in fresh:
        leaf = leaves[index]
        if not isinstance(leaf, torch.Tensor) or not owns_plain_memory(leaf):
            raise StaticGraphError(
                f"argument {index} is not dense memory, so it can't be in a static buffer",
                hint="run this piece uncaptured",
            )
        groups.setdefault(leaf.untyped_storage().data_ptr(), []).append((index, leaf))
    staged = list(leaves)
    copies = []
    for number, group in enumerate(groups.values()):
        plain = len(group) == 1 and _is_plain(group[0][1])
        extents = [_extent(tensor) for _, tensor in group]
        begin, end = min(e[0] for e in extents), max(e[1] for e in extents)
        origin = begin if plain else begin // _GRAIN * _GRAIN
        held = memory(number, end - origin, group[0][1].device)
        members = []
        for (index, tensor), (first, _) in zip(group, extents, strict=True):
            view = view_of_storage(held.untyped_storage(), like=tensor, byte_shift=origin)
            members.append(StagedMember(index, view, first - begin))
            staged[index] = view
        window = None if plain else held[begin - origin : end - origin]
        writes_back = any(index in mutated for index, _ in group)
        copies.append(StagedCopy(tuple(members), window, writes_back))
    return tuple(copies), staged


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``copy_`` moves all of it: no gaps, and each element has a place of its own."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return not tensor.is_conj() and not tensor.is_neg()


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of ``tensor`` in its storage, and the byte after its last."""
    size = tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = int(tensor.storage_offset()) * size
    return begin, begin + (last + 1) * size
