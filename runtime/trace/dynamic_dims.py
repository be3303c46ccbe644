"""Which dimensions of a forward's arguments are dynamic, by a declaration or all that holds tensors; marks last only as long as the trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    # parameter → dimensions; negative ones count from the end
    dynamic: Mapping[str, tuple[int, ...]]
    # parameter → dimensions without a hint; they win over ``dynamic``
    unbacked: Mapping[str, tuple[int, ...]]
    # the dimensions were given by name, so they must exist; inferred ones may be absent
    declared: bool


def dims_of(
    forward: Callable[..., object],
    dynamic: DimsByName | None = None,
    unbacked: DimsByName | None = None,
    *,
    owner: type | None = None,
) -> DynamicDims:
    """The dynamic dimensions of ``forward``: as declared, or the first one of each annotated parameter that the first call passes tensors for."""
    where = f"{owner.__qualname__}.forward" if owner is not None else forward.__qualname__
    parameters = dict(inspect.signature(forward).parameters)
    first = next(iter(parameters), None)
    unbound = forward is getattr(owner, "forward", None) or first == "self"
    if first is not None and unbound and not inspect.ismethod(forward):
        del parameters[first]
    if dynamic is None:
        chosen = {
            name: (0,)
            for name, each in parameters.items()
            if each.annotation is not each.empty and each.annotation not in _NO_TENSORS
        }
    else:
        chosen = _declared(dynamic, parameters, where, "dynamic_arg_dims")
    wanted = _declared(unbacked or {}, parameters, where, "mark_unbacked_dims")
    if not chosen and not wanted:
        what = "dynamic_arg_dims names no parameter"
        if dynamic is None:
            bare = [name for name, each in parameters.items() if each.annotation is each.empty]
            what = "no parameter is annotated as a tensor, so nothing is dynamic; parameters: "
            what += ", ".join(parameters) or "none"
            what += f"; without annotation: {', '.join(bare)}" if bare else ""
        raise ConfigError(
            what,
            where=where,
            hint="annotate tensor parameters with torch.Tensor, or pass dynamic_arg_dims={'x': 0}",
        )
    return DynamicDims(where, chosen, wanted, declared=dynamic is not None)


def _declared(
    dims: object, parameters: Mapping[str, object], where: str, argument: str
) -> dict[str, tuple[int, ...]]:
    if not isinstance(dims, Mapping):
        raise ConfigError(
            f"{argument} must map parameter names to dimensions; got a {type(dims).__qualname__}",
            where=where,
            hint=f"write {argument}={{'x': 0, 'y': [0, -1]}}",
        )
    unknown = [repr(name) for name in dims if name not in parameters]
    if unknown:
        raise ConfigError(
            f"{argument} names {', '.join(unknown)}, and forward has no such parameter",
            where=where,
            hint="parameters: " + (", ".join(parameters) or "none"),
        )
    found: dict[str, tuple[int, ...]] = {}
    for name, value in dims.items():
        several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        given = tuple(value) if several else (value,)
        if not given or any(type(each) is not int for each in given) or len({*given}) < len(given):
            raise ConfigError(
                f"{argument}[{name!r}] must be a dimension or a list of them, each once; got {value!r}",
                where=where,
                hint=f"{argument}={{{name!r}: 0}} is the first one",
            )
        found[name] = given
    return found


# --- marks on the first call's tensors -----------------------------------------------------------


@contextmanager
def marked(
    dims: DynamicDims,
    arguments: Mapping[str, object],
    shapes: DynamicShapesType = DynamicShapesType.BACKED,
) -> Iterator[None]:
    """Mark the dynamic dimensions of a call's arguments for the trace in the block; see `marks_for`."""
    with marks_on(marks_for(dims, arguments, shapes)):
        yield


def marks_for(
    dims: DynamicDims, arguments: Mapping[str, object], shapes: DynamicShapesType
) -> Marks:
    """The marks that dynamic dimensions of a call's arguments get.

    Under ``AUTO``, which serves other sizes by other traces, backed dimensions of 0 and 1 are left to be fixed.
    """
    found: dict[tuple[int, int], tuple[str, torch.Tensor, torch_compat.Mark]] = {}
    for table in (dims.dynamic, dims.unbacked):
        unbacked = table is dims.unbacked or shapes is DynamicShapesType.UNBACKED
        for name, wanted in table.items():
            argument, must = arguments.get(name), dims.declared or table is dims.unbacked
            leaves = [(name + at, x) for at, x in leaves_of(argument)]
            tensors = [(label, x) for label, x in leaves if isinstance(x, torch.Tensor)]
            if must and not tensors and not (argument is None or argument == () or argument == {}):
                raise ConfigError(
                    f"parameter {name} is declared dynamic, and the first call passes "
                    f"a {type(argument).__qualname__} without tensors",
                    where=dims.where,
                    hint="declare the parameters that tensors come in; register a class that holds some with torch's pytree, as "
                    "torch.utils._pytree.register_dataclass does",
                )
            for label, tensor in tensors:
                rank = tensor.dim()
                for dim in wanted:
                    if not -rank <= dim < rank:
                        if must:
                            raise ConfigError(
                                f"dimension {dim} of {label} is declared dynamic, and it has {rank} dimensions",
                                where=dims.where,
                            )
                        continue
                    mark = torch_compat.unbacked_mark(tensor, dim % rank)
                    if not unbacked:
                        fixed = shapes is DynamicShapesType.AUTO and tensor.size(dim) < 2
                        mark = torch_compat.Mark("static" if fixed else "dynamic", dim % rank)
                    found[id(tensor), mark.dim] = label, tensor, mark
    if not found:
        raise InputError(
            "the first call passes no tensor for a dynamic parameter",
            where=dims.where,
            hint="make the first call with tensors, or declare other dynamic_arg_dims",
        )
    for label, tensor, mark in found.values():
        small = tensor.size(mark.dim) < 2 and mark.kind == "dynamic"
        if small and shapes is DynamicShapesType.BACKED:
            raise InputError(
                f"argument {label} has size {tensor.size(mark.dim)} in dynamic dimension {mark.dim} at the first call, "
                "which a trace with backed shapes would fix",
                where=dims.where,
                hint="make the first call with size 2 or more, name the dimension in mark_unbacked_dims, or set "
                "dynamic_shapes_config.type to unbacked or backed_size_oblivious",
            )
    return [(tensor, mark) for _, tensor, mark in found.values()]


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
