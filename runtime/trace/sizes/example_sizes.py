"""Which sizes of example arguments may differ in later calls, told to a trace by marks on their dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch.utils import _pytree as pytree

from piecework.runtime import torch_compat
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.trace.sizes.dynamic_dims import (
    DynamicDims,
    marked,
    set_mark,
    unmarked_afterwards,
)

Args = Sequence[object]
Kwargs = Mapping[str, object]
Dims = frozenset[int]


class SizePolicy(Protocol):
    """Which dimensions are dynamic, for the first trace of a model and for those that follow.

    Attributes:
        dynamic: what ``torch.compile`` is told of dimensions that are not marked.
        rows_in_one: the batch is the second dimension of ``[1, rows, …]``; see `piecework.runtime.analysis.unbacked`.
    """

    dynamic: bool | None = None
    rows_in_one: bool = False

    def every_size(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[int]:
        """Marks for a trace that serves 0, 1 and every other size at once; yields how many there are."""

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[object]:
        """Marks for a trace that serves sizes of 2 and more, and 0 and 1 where these arguments have them."""

    def may_differ(self, leaf: int, dim: int) -> bool:
        """Whether the size of a dimension of the flattened argument ``leaf`` may differ between calls."""

    def narrower(self, args: Args, kwargs: Kwargs) -> SizePolicy | None:
        """What to try where these arguments' model can't be compiled with all that may differ; None if nothing is left out by it."""
        return None


class AllDimensions(SizePolicy):
    """Every dimension is dynamic; the first of each tensor is one that a batch has."""

    dynamic = True

    @contextmanager
    def every_size(self, args: Args, kwargs: Kwargs) -> Iterator[int]:
        """Equal sizes become one symbol. A first dimension of 1 beside larger ones is left alone: it is there to be broadcast."""
        tensors = _tensors(args, kwargs)
        largest = max((tensor.size(0) for tensor in tensors), default=0)
        chosen = [tensor for tensor in tensors if tensor.size(0) != 1 or largest == 1]
        with unmarked_afterwards(chosen):
            for tensor in chosen:
                set_mark(tensor, 0, unbacked=True)
            yield len(chosen)

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[object]:
        return nullcontext()

    def may_differ(self, leaf: int, dim: int) -> bool:
        return True

    def narrower(self, args: Args, kwargs: Kwargs) -> SizePolicy | None:
        tensors = _tensors(args, kwargs)
        return FirstDimensions() if any(size > 1 for t in tensors for size in t.shape[1:]) else None


class FirstDimensions(AllDimensions):
    """The first dimension of each tensor is dynamic, the others are as in the example."""

    dynamic = None

    @contextmanager
    def larger_sizes(self, args: Args, kwargs: Kwargs) -> Iterator[None]:
        chosen = [tensor for tensor in _tensors(args, kwargs) if tensor.size(0) > 1]
        with unmarked_afterwards(chosen):
            for tensor in chosen:  # a trace may fix it; whether that may be is judged afterwards
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            yield

    def narrower(self, args: Args, kwargs: Kwargs) -> SizePolicy | None:
        return None


def _tensors(args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """The plain tensors with a dimension among the flattened arguments."""
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim()]


class DeclaredDimensions(SizePolicy):
    """The dimensions that a decorator declares, or reads off annotations.

    Args:
        dims: what is dynamic, by parameter.
        forward: whose parameters these are.
    """

    def __init__(self, dims: DynamicDims, forward: Callable[..., object]) -> None:
        self._dims = dims
        self._signature = inspect.signature(forward)
        self._found: dict[int, Dims] = {}

    def every_size(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[int]:
        return self._marked(args, kwargs, DynamicShapesType.UNBACKED)

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[object]:
        return self._marked(args, kwargs, DynamicShapesType.AUTO)

    @contextmanager
    def _marked(self, args: Args, kwargs: Kwargs, shapes: DynamicShapesType) -> Iterator[int]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        with marked(self._dims, arguments, shapes) as marks:
            places: dict[int, set[int]] = {}
            for mark in marks:
                places.setdefault(id(mark.tensor), set()).add(mark.dim)
            leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
            self._found = {
                i: frozenset(places[id(leaf)])
                for i, leaf in enumerate(leaves)
                if id(leaf) in places
            }
            yield len(places)

    def may_differ(self, leaf: int, dim: int) -> bool:
        return dim in self._found.get(leaf, ())


class KeptMarks(SizePolicy):
    """The dimensions that somebody marked on the first example's tensors; later examples get the same marks.

    Args:
        leaves: the flattened arguments of the first example.
    """

    def __init__(self, leaves: Sequence[object]) -> None:
        self._marks = {index: torch_compat.marks_of(leaf) for index, leaf in enumerate(leaves)}

    @property
    def any(self) -> bool:
        return any(self._marks.values())

    def every_size(self, args: Args, kwargs: Kwargs) -> AbstractContextManager[int]:
        return nullcontext(0)

    @contextmanager
    def larger_sizes(self, args: Args, kwargs: Kwargs) -> Iterator[None]:
        """As they are on marked tensors; a dimension of 0 or 1 is fixed, for torch refuses it as dynamic."""
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        with unmarked_afterwards(list(tensors.values())):
            for index, tensor in tensors.items():
                if not torch_compat.marks_of(tensor):
                    for mark in self._marks.get(index, ()):
                        mark.put_on(tensor)
            yield

    def may_differ(self, leaf: int, dim: int) -> bool:
        return any(mark.dim == dim and mark.kind != "static" for mark in self._marks.get(leaf, ()))


def with_other_batch(
    args: Args, kwargs: Kwargs, sizes: Collection[int], avoid: Collection[int] = ()
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    """The arguments with another number in place of each of ``sizes``, wherever it is a first dimension.

    The new numbers are found nowhere in the example's shapes, nor in ``avoid``. Values are zeros.
    None if a tensor that would change is no plain and contiguous one.
    """
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    taken = {*avoid, *(size for tensor in tensors for size in tensor.shape)}
    instead: dict[int, int] = {}
    for size in sorted(sizes):
        instead[size] = next(n for n in range(size + 3, size + 4 + len(taken)) if n not in taken)
        taken.add(instead[size])
    made: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if tensor.dim() and tensor.size(0) in instead:
            if type(tensor) is not torch.Tensor or not tensor.is_contiguous():
                return None
            shape = (instead[tensor.size(0)], *tensor.shape[1:])
            zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            made.setdefault(id(tensor), zeros.requires_grad_(tensor.requires_grad))
    return pytree.tree_unflatten([made.get(id(leaf), leaf) for leaf in leaves], structure)  # type: ignore[return-value]
