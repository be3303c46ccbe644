"""Which trace of a model is tried after which: the one that would serve most sizes first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.trace.inputs import dynamic_wish, require_traceable, signature_of
from piecework.runtime.trace.one_trace import Attempt, numbers_of
from piecework.runtime.trace.sizes.example_sizes import SizePolicy, with_other_batch
from piecework.runtime.watch.reachable import tensors_of

_log = logging.getLogger(__name__)


def attempts(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    sizes: SizePolicy | None,
    failures: Sequence[Exception],
) -> Iterator[Attempt]:
    """The ways in which ``model`` is traced, one after another until what one of them gives is compiled.

    A trace for every size comes first; where it fails, or can't be compiled, one for sizes of 2 and more (or the
    example's 0 or 1). Where neither will do, fewer dimensions are dynamic, if the policy has a narrower one.

    Args:
        args, kwargs: example arguments; any pytree of tensors, numbers and None.
        sizes: which dimensions are dynamic. None: all of the tensor arguments, unless some are marked
            (``torch._dynamo.mark_dynamic``, ``mark_unbacked``, ``mark_static``), then those.
        failures: why attempts failed; whoever makes them adds to it.

    Raises:
        CaptureError: the example arguments don't fit the model's signature, or hold something that can't be traced.
    """
    _require_fitting(model, args, kwargs)
    if sizes is None:
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        yield Attempt(args, kwargs, dynamic_wish(leaves, None))
        return
    yield from _of_policy(model, args, kwargs, sizes, failures)
    narrower = sizes.narrower(args, kwargs)
    if narrower is not None:
        _log.info("tried again with the batch alone dynamic: %s", failures[-1])
        yield from _of_policy(model, args, kwargs, narrower, failures)


def _of_policy(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    sizes: SizePolicy,
    failures: Sequence[Exception],
) -> Iterator[Attempt]:
    """For every size at once, then for sizes of 2 and more, of another batch where the example's would be fixed."""
    dynamic = sizes.dynamic
    with sizes.every_size(args, kwargs) as marked:
        pass
    if marked:
        yield Attempt(args, kwargs, dynamic, partial(sizes.every_size, args, kwargs))
        _log.info("not for every size at once: %s", failures[-1])
    larger = partial(sizes.larger_sizes, args, kwargs)
    yield Attempt(args, kwargs, dynamic, larger, partial(_require_free_batch, sizes))
    fixed = failures[-1]
    if not isinstance(fixed, BatchWasFixed):
        return
    weights = {size for _, tensor in tensors_of(model).values() for size in tensor.shape}
    others = with_other_batch(args, kwargs, fixed.sizes, avoid=weights)
    if others is not None:
        check = partial(_require_free_and_serving, sizes, pytree.tree_leaves((args, kwargs)))
        yield Attempt(*others, dynamic, partial(sizes.larger_sizes, *others), check)
    yield Attempt(args, kwargs, dynamic, larger)


class BatchWasFixed(CaptureError):
    """A trace that fixed the first dimension of an argument, which the example's size may have caused."""

    def __init__(self, sizes: frozenset[int]) -> None:
        super().__init__(f"the trace fixed a first dimension to {sorted(sizes)}")
        self.sizes = sizes


def _require_free_batch(policy: SizePolicy, fakes: Mapping[int, object]) -> None:
    sizes = [
        each.shape[0]
        for leaf, each in fakes.items()
        if isinstance(each, torch.Tensor) and each.dim() and policy.may_differ(leaf, 0)
    ]
    fixed = frozenset(int(n) for n in sizes if torch_compat.symbol_of(n) is None and n > 1)
    if fixed:
        raise BatchWasFixed(fixed)


def _require_free_and_serving(
    policy: SizePolicy, leaves: Sequence[object], fakes: Mapping[int, object]
) -> None:
    """Raise if a trace with other sizes would not serve the arguments that it was made for."""
    _require_free_batch(policy, fakes)
    values = numbers_of(leaves, fakes)
    tensors = (fake for fake in fakes.values() if isinstance(fake, torch.Tensor))
    broken = torch_compat.broken_guard([n for each in tensors for n in each.shape], values)
    if broken:
        raise CaptureError(f"the model's code decides by the example's sizes: {broken}")


def _require_fitting(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> None:
    """Raise if the example arguments don't fit the model's signature, or hold something that can't be traced."""
    signature = signature_of(model)
    if signature is not None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CaptureError(
                f"the example arguments don't fit the model: {error}",
                where=f"signature {signature}",
                hint="pass what the model's forward takes",
            ) from error
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise CaptureError(
                f"{type(module).__name__} has no weights before its first call",
                where=name,
                hint="call the model once with the example arguments, then compile it",
            )
    require_traceable(model, args, kwargs)
