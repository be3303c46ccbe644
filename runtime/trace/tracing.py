"""From a model to one graph. In: a callable and example arguments. Out: a `Capture`, of a trace that serves as many sizes as can be had.

Which trace is tried after which is settled here; `piecework.runtime.trace.one_trace` makes each of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError, PieceCompileError
from piecework.runtime import torch_compat
from piecework.runtime.bind.reachable import tensors_of
from piecework.runtime.trace.inputs import GraphInput, dynamic_wish, require_traceable, signature_of
from piecework.runtime.trace.one_trace import Capture, Check, GraphCompiler, Tracer, numbers_of
from piecework.runtime.trace.shared import RepeatedLayers
from piecework.runtime.trace.sizes.example_sizes import SizePolicy, with_other_batch

_log = logging.getLogger(__name__)


def capture(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    compile_graph: GraphCompiler,
    *,
    dynamic: bool | None = None,
    sizes: SizePolicy | None = None,
    repeated: RepeatedLayers | None = None,
    settle: bool = False,
) -> Capture:
    """Trace ``model`` and hand its graph to ``compile_graph`` while Dynamo's tracing context is open.

    Args:
        model: a module or function; weights are the tensors that it holds.
        args, kwargs: example arguments; any pytree of tensors, numbers and None.
        compile_graph: called with the graph and where its inputs come from; again if what it made of the first graph can't be used.
        dynamic: without ``sizes``: which dimensions become symbols. None takes all dimensions of the tensor arguments unless some are
            marked (``torch._dynamo.mark_dynamic``, ``mark_unbacked``, ``mark_static``), then only those.
        sizes: which dimensions are dynamic. A trace that serves every size at once comes first; where it fails, or ``compile_graph``
            raises a `CaptureError` of it or a compiler asks for a size's number, one that serves sizes of 2 and more (or the example's 0 or 1). No size is fixed
            because the example's happens to equal another number. Where neither can be traced and compiled, fewer dimensions are
            dynamic, if the policy has a narrower one.
        repeated: which layers may share one trace; None: each is traced.
        settle: where all that the forward writes are plain attributes of modules, set to constants, set them as the first call
            would, and trace what the next one does.

    Raises:
        CaptureError: a graph break, no tensor operation, state that the forward changes in Python, an error of the model's
            own, or an input or output that cannot be traced back.
    """
    _require_fitting(model, args, kwargs)
    layers = RepeatedLayers() if repeated is None else repeated
    tracer = Tracer(model, compile_graph, layers)
    if sizes is None:
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        wish = dynamic_wish(leaves, dynamic)
        return tracer.once(args, kwargs, wish, settle=settle)
    wide = False

    def compile_noting(graph: torch.fx.GraphModule, inputs: tuple[GraphInput, ...]) -> None:
        nonlocal wide
        wide = wide or _has_other_sizes(graph)
        compile_graph(graph, inputs)

    try:
        return _capture_freely(Tracer(model, compile_noting, layers), args, kwargs, sizes, settle)
    except (CaptureError, PieceCompileError) as error:
        narrower = sizes.narrower(args, kwargs)
        if narrower is None or (isinstance(error, PieceCompileError) and not wide):
            raise
        _log.info("tried again with the batch alone dynamic: %s", error)
        try:
            return _capture_freely(tracer, args, kwargs, narrower, settle)
        except (CaptureError, PieceCompileError) as again:
            _log.info("not traced with the batch alone dynamic: %s", again)
            raise error from error.__cause__


def _has_other_sizes(graph: torch.fx.GraphModule) -> bool:
    """Whether a size of an input that is no first dimension is a symbol."""
    values = (node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder"))
    sizes = (size for v in values if isinstance(v, torch.Tensor) for size in v.shape[1:])
    return any(torch_compat.symbols_of(size) for size in sizes)


def _capture_freely(
    tracer: Tracer,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    sizes: SizePolicy,
    settle: bool,
) -> Capture:
    """Trace for every size at once, else for sizes of 2 and more, of other example sizes where these would be fixed."""
    try:
        with sizes.every_size(args, kwargs) as marked:
            if marked:
                return tracer.once(args, kwargs, sizes.dynamic, settle=settle)
    except CaptureError as error:
        _log.info("not traced for every size at once: %s", error)
    except PieceCompileError as error:
        if not torch_compat.data_dependent(error):
            raise
        _log.info("not compiled for every size at once: %s", error)
    once = partial(_capture_larger, tracer, sizes)
    try:
        return once(args, kwargs, partial(_require_free_batch, sizes), settle=settle)
    except _FixedBatch as fixed:
        weights = {size for _, tensor in tensors_of(tracer.model).values() for size in tensor.shape}
        others = with_other_batch(args, kwargs, fixed.sizes, avoid=weights)
    if others is not None:
        try:
            leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
            return once(*others, partial(_require_free_and_serving, sizes, leaves))
        except CaptureError as error:
            _log.info("the batch size is fixed: %s", error)
    return once(args, kwargs, settle=settle)


def _capture_larger(
    tracer: Tracer,
    sizes: SizePolicy,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    check: Check | None = None,
    *,
    settle: bool = False,
) -> Capture:
    with sizes.larger_sizes(args, kwargs):
        return tracer.once(args, kwargs, sizes.dynamic, check, settle=settle)


class _FixedBatch(CaptureError):
    """A trace that fixed the first dimension of an argument, which the example's size may have caused."""

    def __init__(self, sizes: frozenset[int]) -> None:
        super().__init__(f"the trace fixed a first dimension to {sorted(sizes)}")
        self.sizes = sizes


def _require_free_batch(
    policy: SizePolicy, gm: torch.fx.GraphModule, fakes: Mapping[int, object]
) -> None:
    sizes = [
        each.shape[0]
        for leaf, each in fakes.items()
        if isinstance(each, torch.Tensor) and each.dim() and policy.may_differ(leaf, 0)
    ]
    fixed = frozenset(int(n) for n in sizes if torch_compat.symbol_of(n) is None and n > 1)
    if fixed:
        raise _FixedBatch(fixed)


def _require_free_and_serving(
    policy: SizePolicy,
    leaves: Sequence[object],
    gm: torch.fx.GraphModule,
    fakes: Mapping[int, object],
) -> None:
    """Raise if a trace with other sizes would not serve the arguments that it was made for."""
    _require_free_batch(policy, gm, fakes)
    values = numbers_of(leaves, fakes)
    tensors = (fake for fake in fakes.values() if isinstance(fake, torch.Tensor))
    sizes = [size for fake in tensors for size in fake.shape]
    for text, _, holds in torch_compat.recorded_guards(sizes):
        if holds(values) is False:
            raise CaptureError(f"the model's code decides by the example's sizes: {text}")


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
    require_traceable(model, args, kwargs)
