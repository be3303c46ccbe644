"""Static stand-ins for tensors that move: replays read them instead of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.weak_ref import owns_plain_memory, view_of_storage
from piecework.runtime.graphs.memory.addresses import Placement

Memory = Callable[[int, int, torch.device], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StagedCopy:
    """The static buffer of one argument leaf.

    ``writes_back``: the piece changes it, so the caller's tensor is updated after a replay.
    """

    leaf: int
    static: torch.Tensor
    writes_back: bool

    def stage(self, leaves: Sequence[object]) -> None:
        """Copy the argument's present contents into the buffer."""
        self.static.copy_(self._source(leaves))

    def bring_back(self, leaves: Sequence[object]) -> None:
        """Copy what the piece wrote back into the caller's tensor."""
        if self.writes_back:
            self._source(leaves).copy_(self.static)

    def _source(self, leaves: Sequence[object]) -> torch.Tensor:
        """The argument as it is now, laid out as at capture (``copy_`` would broadcast)."""
        now = leaves[self.leaf]
        static = self.static
        if (
            isinstance(now, torch.Tensor)
            and now.shape == static.shape
            and now.stride() == static.stride()
            and now.dtype == static.dtype
        ):
            return now
        what = Placement.of(now).describe() if isinstance(now, torch.Tensor) else repr(now)
        raise StaticGraphError(
            f"argument {self.leaf} was captured as {Placement.of(static).describe()}, and is {what} now",
            hint="pad inputs to the captured shape before calling",
        )


def stage_fresh(
    leaves: list[object], fresh: Sequence[int], mutated: frozenset[int], memory: Memory
) -> tuple[tuple[StagedCopy, ...], list[object]]:
    """Static buffers for the leaves at ``fresh``, and the leaves with those in their place.

    Args:
        mutated: leaves that the callable changes.
        memory: gives the bytes of a buffer, from its number, its size and its device.

    Raises:
        StaticGraphError: a leaf is not dense memory, or is changed and shares memory with another.
    """
    staged = list(leaves)
    copies = []
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
        held = memory(number, (last + 1) * size, leaf.device).untyped_storage()
        before = int(leaf.storage_offset()) * size
        staged[index] = static = view_of_storage(held, like=leaf, byte_shift=before)
        copies.append(StagedCopy(index, static, index in mutated))
    return tuple(copies), staged


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may have one place, which ``copy_`` can't write."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += (size - 1) * stride
    return False
