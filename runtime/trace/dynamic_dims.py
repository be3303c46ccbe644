"""Which dimensions of a forward's arguments are dynamic; marks last only as long as the trace."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from piecework.errors import ConfigError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.trace.arguments import leaves_of

Dims = int | Sequence[int]
DimsByName = Mapping[str, Dims]
Marks = list[tuple[torch.Tensor, torch_compat.Mark]]
_NO_TENSORS = (int, float, bool, str, None, "int", "float", "bool", "str", "None")


@dataclass(frozen=True, slots=True)
class DynamicDims:
    """The dynamic dimensions of one ``forward``."""

    where: str  # the forward, for errors
    dynamic: Mapping[str, tuple[int, ...]]  # by parameter; negative ones count from the end
    unbacked: Mapping[str, tuple[int, ...]]  # those without a hint; they win over ``dynamic``
    declared: bool  # given by name, so that they must exist; inferred ones may be absent


def dims_of(
    forward: Callable[..., object],
    dynamic: DimsByName | None = None,
    unbacked: DimsByName | None = None,
    *,
    owner: type | None = None,
) -> DynamicDims:
    """Those of ``forward``: as declared, or the first one of each annotated parameter."""
    where = f"{owner.__qualname__}.forward" if owner is not None else forward.__qualname__
    parameters = dict(inspect.signature(forward).parameters)
    first = next(iter(parameters), None)
    unbound = forward is getattr(owner, "forward", None) or first == "self"
    if first is not None and unbound and not inspect.ismethod(forward):
        del parameters[first]
    wanted = _declared(unbacked or {}, parameters, where, "mark_unbacked_dims")
    annotations = {k: p.annotation for k, p in parameters.items() if p.annotation is not p.empty}
    chosen = {k: (0,) for k, each in annotations.items() if each not in _NO_TENSORS}
    if dynamic is not None:
        chosen = _declared(dynamic, parameters, where, "dynamic_arg_dims")
    if not chosen and not wanted:
        bare = ", ".join(name for name in parameters if name not in annotations) or "none"
        why = f"nothing is dynamic: no parameter is named, or annotated as a tensor; without annotation: {bare}"
        hint = "annotate tensor parameters with torch.Tensor, or pass dynamic_arg_dims={'x': 0}"
        raise ConfigError(why, where=where, hint=hint)
    return DynamicDims(where, chosen, wanted, declared=dynamic is not None)


def _declared(
    dims: object, parameters: Mapping[str, object], where: str, argument: str
) -> dict[str, tuple[int, ...]]:
    if not isinstance(dims, Mapping):
        why = f"{argument} must map parameter names to dimensions; got a {type(dims).__qualname__}"
        raise ConfigError(why, where=where, hint=f"write {argument}={{'x': 0, 'y': [0, -1]}}")
    found: dict[str, tuple[int, ...]] = {}
    for name, value in dims.items():
        if name not in parameters:
            why = f"{argument} names {name!r}, and forward has no such parameter"
            hint = "parameters: " + (", ".join(parameters) or "none")
            raise ConfigError(why, where=where, hint=hint)
        several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        given = tuple(value) if several else (value,)
        if not given or any(type(each) is not int for each in given) or len({*given}) < len(given):
            why = f"{argument}[{name!r}] must be a dimension or a list of them, each once; got {value!r}"
            raise ConfigError(why, where=where, hint=f"{argument}={{{name!r}: 0}} is the first one")
        found[name] = given
    return found


def marked(
    dims: DynamicDims,
    arguments: Mapping[str, object],
    shapes: DynamicShapesType = DynamicShapesType.BACKED,
) -> AbstractContextManager[None]:
    """Mark the dynamic dimensions of a call's arguments for the trace in the block."""
    return marks_on(marks_for(dims, arguments, shapes))


def marks_for(
    dims: DynamicDims, arguments: Mapping[str, object], shapes: DynamicShapesType
) -> Marks:
    """The marks of dynamic dimensions; under ``AUTO`` backed ones of 0 and 1 are fixed."""
    found: dict[tuple[int, int], tuple[torch.Tensor, torch_compat.Mark]] = {}
    for table, name in ((t, name) for t in (dims.unbacked, dims.dynamic) for name in t):
        argument, must = arguments.get(name), dims.declared or table is dims.unbacked
        backed = table is dims.dynamic and shapes is not DynamicShapesType.UNBACKED
        leaves = [(name + at, x) for at, x in leaves_of(argument)]
        tensors = [(label, x) for label, x in leaves if isinstance(x, torch.Tensor)]
        if must and not tensors and not (argument is None or argument == () or argument == {}):
            why = f"parameter {name} is declared dynamic, and the first call passes a {type(argument).__qualname__} without tensors"
            hint = "declare the parameters that tensors come in; register a class that holds some with torch's pytree"
            raise ConfigError(why, where=dims.where, hint=hint)
        for (label, tensor), dim in itertools.product(tensors, table[name]):
            rank = tensor.dim()
            if not -rank <= dim < rank:
                if must:
                    why = f"dimension {dim} of {label} is declared dynamic, and it has {rank} dimensions"
                    raise ConfigError(why, where=dims.where)
                continue
            mark = torch_compat.unbacked_mark(tensor, dim % rank)
            if backed and (id(tensor), mark.dim) not in found:
                small = tensor.size(dim) < 2
                if small and shapes is DynamicShapesType.BACKED:
                    raise InputError(
                        f"argument {label} has size {tensor.size(dim)} in dynamic dimension {mark.dim} at the first call, "
                        "which a trace with backed shapes would fix",
                        where=dims.where,
                        hint="make the first call with size 2 or more, name the dimension in mark_unbacked_dims, or set "
                        "dynamic_shapes_config.type to unbacked or backed_size_oblivious",
                    )
                fixed = small and shapes is DynamicShapesType.AUTO
                mark = torch_compat.Mark("static" if fixed else "dynamic", mark.dim)
            found.setdefault((id(tensor), mark.dim), (tensor, mark))
    if not found:
        why = "the first call passes no tensor for a dynamic parameter"
        hint = "make the first call with tensors, or declare other dynamic_arg_dims"
        raise InputError(why, where=dims.where, hint=hint)
    return list(found.values())


@contextmanager
def marks_on(marks: Marks) -> Iterator[None]:
    """Put marks on tensors for the block."""
    with unmarked_afterwards([tensor for tensor, _ in marks]):
        for tensor, mark in marks:
            mark.put_on(tensor)
        yield


@contextmanager
def unmarked_afterwards(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give tensors their Python attributes back after the block: marks are such attributes."""
    kept = [  # Dynamo adds to the sets and dicts of earlier marks in place
        (t, {k: v.copy() if type(v) in (set, dict) else v for k, v in vars(t).items()})
        for t in tensors
    ]
    try:
        yield
    finally:
        for tensor, attributes in kept:
            vars(tensor).clear()
            vars(tensor).update(attributes)
