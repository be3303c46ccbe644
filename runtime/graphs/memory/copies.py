"""Static stand-ins for tensors that move: in, the arguments of a capture; out, buffers that replays read instead.

It never stages a tensor that somebody vouched for, and it never changes how tensors overlap or are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.weak_ref import owns_plain_memory, view_of_storage

# An offset in bytes that every element size divides.
_GRAIN = 16


@dataclass(frozen=True, slots=True)
class StagedMember:
    """One argument leaf of a buffer: its static view, and where it lies in the bytes that are copied."""

    leaf: int
    static: torch.Tensor
    shift: int

    def source(self, leaves: Sequence[object]) -> torch.Tensor:
        """The argument as it is now, checked to be laid out as at capture (``copy_`` would broadcast)."""
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
        what = f"{now.dtype} {list(now.shape)}" if isinstance(now, torch.Tensor) else repr(now)
        raise StaticGraphError(
            f"argument {self.leaf} was captured as {static.dtype} {list(static.shape)} with strides "
            f"{list(static.stride())}, and is {what} now",
            hint="pad inputs to the captured shape before calling",
        )


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """One static buffer for the argument leaves that share one storage.

    Attributes:
        members: the leaves, each with what replays read in its place.
        window: the bytes to copy, where they must be copied as bytes (overlap, several views); None for one
            plain tensor.
        writes_back: the piece changes it in place, so the caller's tensor is updated after a replay.
    """

    members: tuple[StagedMember, ...]
    window: torch.Tensor | None
    writes_back: bool

    def stage(self, leaves: Sequence[object]) -> None:
        """Copy the arguments' present contents into the static buffer.

        Raises:
            StaticGraphError: they are not laid out, or don't overlap, as at capture.
        """
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
        found = set()
        for member in self.members:
            now = member.source(leaves)
            start = now.storage_offset() * now.element_size() - member.shift
            found.add((now.untyped_storage().data_ptr(), start))
        if len(found) != 1:
            names = ", ".join(str(member.leaf) for member in self.members)
            raise StaticGraphError(
                f"arguments {names} shared memory at capture and don't in the same way now",
                hint="pass views of one tensor as at capture, or clone them before the piece",
            )
        _, start = found.pop()
        storage = self.members[0].source(leaves).untyped_storage()
        view = torch.empty(0, dtype=torch.uint8, device=window.device)
        return view.set_(storage, start, (window.numel(),), (1,))


Memory = Callable[[int, int, torch.device], torch.Tensor]


def stage_fresh(
    leaves: list[object],
    fresh: Iterable[int],
    mutated: frozenset[int] = frozenset(),
    memory: Memory | None = None,
) -> tuple[tuple[StagedCopy, ...], list[object]]:
    """Static buffers for the leaves at ``fresh``, and the leaves with those in their place.

    Leaves that share a storage get one buffer, so that they alias in the graph as they do outside.

    Args:
        memory: gives the bytes of a buffer, from its number, its size and its device; new ones by default.

    Raises:
        StaticGraphError: a fresh leaf is not dense memory.
    """
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for index in fresh:
        leaf = leaves[index]
        if not isinstance(leaf, torch.Tensor) or not owns_plain_memory(leaf):
            raise StaticGraphError(
                f"argument {index} is not dense memory, so it can't be copied into a static buffer",
                hint="run this piece uncaptured",
            )
        groups.setdefault(leaf.untyped_storage().data_ptr(), []).append((index, leaf))
    staged = list(leaves)
    copies = []
    for members in groups.values():
        writes_back = any(index in mutated for index, _ in members)
        copies.append(
            _stage_group(members, staged, writes_back, partial(memory or _new, len(copies)))
        )
    return tuple(copies), staged


def _new(number: int, nbytes: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _stage_group(
    group: list[tuple[int, torch.Tensor]],
    staged: list[object],
    writes_back: bool,
    memory_for: Callable[[int, torch.device], torch.Tensor],
) -> StagedCopy:
    index, first = group[0]
    if len(group) == 1 and _is_plain(first):
        storage = memory_for(first.nbytes, first.device).untyped_storage()
        before = int(first.storage_offset()) * first.element_size()
        static = view_of_storage(storage, like=first, byte_shift=before)
        staged[index] = static
        return StagedCopy((StagedMember(index, static, 0),), None, writes_back)
    extents = [_extent(tensor) for _, tensor in group]
    begin, end = min(e[0] for e in extents), max(e[1] for e in extents)
    aligned = begin // _GRAIN * _GRAIN
    members = []
    with torch.inference_mode(False):
        memory = memory_for(end - aligned, first.device)
        for (index, tensor), (own_begin, _) in zip(group, extents, strict=True):
            view = view_of_storage(memory.untyped_storage(), like=tensor, byte_shift=aligned)
            members.append(StagedMember(index, view, own_begin - begin))
            staged[index] = view
    return StagedCopy(tuple(members), memory[begin - aligned : end - aligned], writes_back)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether each element has its own place and the tensor has no gaps, so that ``copy_`` moves all of it."""
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
