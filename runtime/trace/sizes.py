"""Which sizes may differ in later calls, told to a trace by marks, and what is tried in turn."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.torch_compat import Mark, unbacked_mark
from piecework.runtime.trace.arguments import require_traceable, signature_of
from piecework.runtime.trace.dynamic_dims import DynamicDims, Marks, marks_for

Args = Sequence[object]
Kwargs = Mapping[str, object]
#: What ``torch.compile`` is told of dimensions that are not marked, and the marks of one trace.
Attempt = tuple[bool | None, Marks]
_log = logging.getLogger(__name__)


class SizePolicy:
    """Which dimensions are dynamic, for the first trace of a model and for those that follow."""

    dynamic: bool | None = None  # what ``torch.compile`` is told of dimensions that are not marked
    rows_in_one: bool = False  # the batch is the second dimension of ``[1, rows, …]``

    def every_size(self, args: Args, kwargs: Kwargs) -> Marks:
        """Marks for a trace that serves 0, 1 and every other size; none for no such trace."""
        return []

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> Marks:
        return []

    def may_differ(self, leaf: int, dim: int) -> bool:
        """Whether a dimension of the flattened argument ``leaf`` may differ between calls."""
        raise NotImplementedError

    def batch_alone(self, args: Args, kwargs: Kwargs) -> Marks | None:
        return None


class AllDimensions(SizePolicy):
    """Every dimension is dynamic; the first of each tensor is one that a batch has."""

    dynamic = True

    def every_size(self, args: Args, kwargs: Kwargs) -> Marks:
        """Equal sizes become one symbol; a first 1 beside larger ones is there to be broadcast."""
        tensors = _tensors(args, kwargs)
        largest = max((tensor.size(0) for tensor in tensors), default=0)
        return [(t, unbacked_mark(t, 0)) for t in tensors if t.size(0) != 1 or largest == 1]

    def may_differ(self, leaf: int, dim: int) -> bool:
        return True

    def batch_alone(self, args: Args, kwargs: Kwargs) -> Marks | None:
        tensors = _tensors(args, kwargs)
        others = any(size > 1 for tensor in tensors for size in tensor.shape[1:])
        return [(t, Mark("maybe", 0)) for t in tensors if t.size(0) > 1] if others else None


def _leaves(args: Args, kwargs: Kwargs) -> list[object]:
    return pytree.tree_leaves((tuple(args), dict(kwargs)))


def _tensors(args: Args, kwargs: Kwargs) -> list[torch.Tensor]:
    """The plain tensors with a dimension among the flattened arguments."""
    leaves = _leaves(args, kwargs)
    return [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim()]


class DeclaredDimensions(SizePolicy):
    """The dimensions that a decorator declares, or reads off annotations."""

    def __init__(self, dims: DynamicDims, forward: Callable[..., object]) -> None:
        self._dims = dims
        self._signature = inspect.signature(forward)
        self._found: set[tuple[int, int]] = set()

    def every_size(self, args: Args, kwargs: Kwargs) -> Marks:
        return self._marks(args, kwargs, DynamicShapesType.UNBACKED)

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> Marks:
        return self._marks(args, kwargs, DynamicShapesType.AUTO)

    def _marks(self, args: Args, kwargs: Kwargs, shapes: DynamicShapesType) -> Marks:
        arguments = self._signature.bind(*args, **kwargs).arguments
        marks = marks_for(self._dims, arguments, shapes)
        leaves = enumerate(_leaves(args, kwargs))
        self._found = {(i, m.dim) for i, leaf in leaves for t, m in marks if leaf is t}
        return marks

    def may_differ(self, leaf: int, dim: int) -> bool:
        return (leaf, dim) in self._found


class KeptMarks(SizePolicy):
    """The dimensions that somebody marked on the first example; later ones get the same marks."""

    def __init__(self, leaves: Sequence[object]) -> None:
        self._marks = {index: torch_compat.marks_of(leaf) for index, leaf in enumerate(leaves)}

    @property
    def any(self) -> bool:
        return any(self._marks.values())

    def larger_sizes(self, args: Args, kwargs: Kwargs) -> Marks:
        found: Marks = []
        for index, leaf in enumerate(_leaves(args, kwargs)):
            if not isinstance(leaf, torch.Tensor) or torch_compat.marks_of(leaf):
                continue
            for mark in self._marks.get(index, ()):
                if mark.dim < leaf.dim():
                    small = mark.kind == "dynamic" and leaf.size(mark.dim) < 2
                    found.append((leaf, replace(mark, kind="static") if small else mark))
        return found

    def may_differ(self, leaf: int, dim: int) -> bool:
        return any(mark.dim == dim and mark.kind != "static" for mark in self._marks.get(leaf, ()))


def attempts(
    args: Args, kwargs: Kwargs, sizes: SizePolicy | None, failures: Sequence[Exception]
) -> Iterator[Attempt]:
    """The ways to trace a model: for every size, for 2 and more, with the batch alone dynamic."""
    if sizes is None:
        yield None if any(map(torch_compat.marks_of, _leaves(args, kwargs))) else True, []
        return
    every = sizes.every_size(args, kwargs)
    if every:
        yield sizes.dynamic, every
        _log.info("not for every size at once: %s", failures[-1])
    yield sizes.dynamic, sizes.larger_sizes(args, kwargs)
    batch = sizes.batch_alone(args, kwargs)
    if batch is not None:
        _log.info("tried again with the batch alone dynamic: %s", failures[-1])
        yield None, batch


def require_fitting(model: Callable[..., object], args: Args, kwargs: Kwargs) -> None:
    """Raise `CaptureError` if the example doesn't fit the signature, or can't be traced."""
    signature = signature_of(model)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            why = f"the example arguments don't fit the model: {error}"
            hint = "pass what the model's forward takes"
            raise CaptureError(why, where=f"signature {signature}", hint=hint) from error
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            why = f"{type(module).__name__} has no weights before its first call"
            hint = "call the model once with the example arguments, then compile it"
            raise CaptureError(why, where=name, hint=hint)
    require_traceable(model, args, kwargs)
