"""Which dimensions of a forward's arguments are dynamic, by a declaration or all that holds tensors; marks last only as long as the trace."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.errors import ConfigError, InputError
from piecework.runtime import torch_compat
from piecework.runtime.config.groups import DynamicShapesType
from piecework.runtime.trace.inputs import leaves_of

Dims = int | Sequence[int]
DimsByName = Mapping[str, Dims]
_NO_TENSORS = (int, float, bool, str, None, "int", "float", "bool", "str", "None")


@dataclass(frozen=True, slots=True)
class DynamicDims:
    """The dynamic dimensions of one ``forward``.

    Attributes:
        where: the forward, for errors.
        dynamic: parameter → dimensions; negative ones count from the end.
        unbacked: parameter → dimensions without a hint; they win over ``dynamic``.
        declared: the dimensions were given by name, so they must exist; inferred ones may be absent.
    """

    where: str
    dynamic: Mapping[str, tuple[int, ...]]
    unbacked: Mapping[str, tuple[int, ...]]
    declared: bool


def dims_of(
    forward: Callable[..., object],
    dynamic: DimsByName | None = None,
    unbacked: DimsByName | None = None,
    *,
    owner: type | None = None,
) -> DynamicDims:
    """The dynamic dimensions of ``forward``: as declared, or the first one of each annotated parameter that the first call passes tensors for.

    Args:
        forward: a function or method.
        dynamic: parameter → one dimension or several.
        unbacked: the same for dimensions without a hint, in addition.
        owner: the class that ``forward`` belongs to.

    Raises:
        ConfigError: a name is no parameter, a dimension is no int, or nothing is declared or annotated.
    """
    where = f"{owner.__qualname__}.forward" if owner is not None else forward.__qualname__
    parameters = _parameters_of(forward, owner)
    if dynamic is None:
        chosen: dict[str, tuple[int, ...]] = {
            name: (0,) for name, each in parameters.items() if _may_hold_tensors(each)
        }
        if not chosen and not unbacked:
            raise _nothing_dynamic(where, parameters)
    else:
        chosen = _declared(dynamic, parameters, where, "dynamic_arg_dims")
        if not chosen and not unbacked:
            raise ConfigError(
                "dynamic_arg_dims names no parameter", where=where, hint="leave it out to infer"
            )
    return DynamicDims(
        where,
        chosen,
        _declared(unbacked or {}, parameters, where, "mark_unbacked_dims"),
        declared=dynamic is not None,
    )


def _may_hold_tensors(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is not parameter.empty and parameter.annotation not in _NO_TENSORS


def _parameters_of(
    forward: Callable[..., object], owner: type | None
) -> dict[str, inspect.Parameter]:
    """The parameters of ``forward`` by name, without the instance's."""
    found = dict(inspect.signature(forward).parameters)
    first = next(iter(found), None)
    unbound = forward is getattr(owner, "forward", None) or first == "self"
    if first is not None and unbound and not inspect.ismethod(forward):
        del found[first]
    return found


def _nothing_dynamic(where: str, parameters: Mapping[str, inspect.Parameter]) -> ConfigError:
    listed = ", ".join(parameters) or "none"
    bare = [name for name, each in parameters.items() if each.annotation is each.empty]
    has = "has" if len(bare) == 1 else "have"
    reason = f"; {', '.join(bare)} {has} no annotation" if bare else ""
    return ConfigError(
        f"no parameter is annotated as a tensor, so nothing is dynamic; parameters: {listed}{reason}",
        where=where,
        hint=f"annotate tensor parameters with torch.Tensor, or pass dynamic_arg_dims={{{next(iter(bare or parameters), 'x')!r}: 0}}",
    )


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
    return {name: _as_dims(value, name, where, argument) for name, value in dims.items()}


def _as_dims(value: object, name: str, where: str, argument: str) -> tuple[int, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    dims = tuple(value) if several else (value,)  # type: ignore[arg-type,var-annotated]
    if not dims or any(type(each) is not int for each in dims):
        raise ConfigError(
            f"{argument}[{name!r}] must be a dimension or a list of them; got {value!r}",
            where=where,
            hint=f"{argument}={{{name!r}: 0}} is the first one",
        )
    if len(set(dims)) != len(dims):
        raise ConfigError(f"{argument}[{name!r}] repeats a dimension: {value!r}", where=where)
    return tuple(each for each in dims if isinstance(each, int))


# --- marks on the first call's tensors -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mark:
    tensor: torch.Tensor
    dim: int
    label: str
    unbacked: bool


@contextmanager
def marked(
    dims: DynamicDims,
    arguments: Mapping[str, object],
    shapes: DynamicShapesType = DynamicShapesType.BACKED,
) -> Iterator[list[Mark]]:
    """Mark the dynamic dimensions of a call's arguments for the trace in the block; yields the marks.

    Unbacked dimensions of one size share one symbol. Under ``AUTO``, which serves other sizes by other traces, backed dimensions
    of 0 and 1 are left to be fixed.

    Args:
        dims: what is dynamic.
        arguments: parameter → argument, as ``inspect.Signature.bind`` gives them.
        shapes: how dynamic dimensions are represented.

    Raises:
        ConfigError: a declared dimension is out of range, or its argument holds no tensor.
        InputError: nothing dynamic is passed, or a backed dimension has size 0 or 1, which a trace would fix.
    """
    marks = _marks(dims, arguments, shapes is DynamicShapesType.UNBACKED)
    if not marks:
        raise InputError(
            "the first call passes no tensor for a dynamic parameter",
            where=dims.where,
            hint="make the first call with tensors, or declare other dynamic_arg_dims",
        )
    if shapes is DynamicShapesType.BACKED:
        _require_two(dims, marks)
    with unmarked_afterwards([mark.tensor for mark in marks]):
        for mark in marks:
            small = mark.tensor.size(mark.dim) < 2 and not mark.unbacked
            if not (small and shapes is DynamicShapesType.AUTO):
                set_mark(mark.tensor, mark.dim, unbacked=mark.unbacked)
        yield marks


def set_mark(tensor: torch.Tensor, dim: int, *, unbacked: bool) -> None:
    """Mark one dimension; unbacked dimensions of equal size become one symbol."""
    if unbacked:
        torch_compat.mark_unbacked(tensor, dim, shape_id=f"size_{tensor.size(dim)}")
    else:
        torch._dynamo.mark_dynamic(tensor, dim)


@contextmanager
def unmarked_afterwards(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Give tensors their Python attributes back after the block: marks are such attributes."""
    before = [(tensor, dict(vars(tensor))) for tensor in tensors]
    kept = [(tensor, {k: _copied(v) for k, v in found.items()}) for tensor, found in before]
    try:
        yield
    finally:
        for tensor, attributes in kept:
            vars(tensor).clear()
            vars(tensor).update(attributes)


def _copied(value: object) -> object:
    """Dynamo adds to the sets and dicts of earlier marks in place."""
    return value.copy() if type(value) in (set, dict) else value  # type: ignore[attr-defined]


def _marks(dims: DynamicDims, arguments: Mapping[str, object], all_unbacked: bool) -> list[Mark]:
    _register_holders([arguments.get(name) for name in (*dims.dynamic, *dims.unbacked)])
    found: dict[tuple[int, int], Mark] = {}
    for unbacked, table in ((False, dims.dynamic), (True, dims.unbacked)):
        for name, wanted in table.items():
            argument = arguments.get(name)
            tensors = _tensors_in(argument, name)
            must = dims.declared or unbacked
            if must and not tensors and not _is_absent(argument):
                raise ConfigError(
                    f"parameter {name} is declared dynamic, and the first call passes "
                    f"a {type(argument).__qualname__} without tensors",
                    where=dims.where,
                    hint="declare the parameters that tensors come in",
                )
            for label, tensor in tensors:
                for dim in _in_range(dims.where, label, tensor, wanted, must):
                    key = (id(tensor), dim)
                    found[key] = Mark(tensor, dim, label, unbacked or all_unbacked)
    return list(found.values())


def _is_absent(argument: object) -> bool:
    return argument is None or argument == () or argument == {}


def _in_range(
    where: str, label: str, tensor: torch.Tensor, dims: tuple[int, ...], must: bool
) -> list[int]:
    rank = tensor.dim()
    beyond = [dim for dim in dims if not -rank <= dim < rank]
    if beyond and must:
        raise ConfigError(
            f"dimension {beyond[0]} of {label} is declared dynamic, and it has {rank} dimensions",
            where=where,
            hint=f"use {-rank} to {rank - 1}" if rank else "a tensor without dimensions has none",
        )
    positive = [dim % rank for dim in dims if dim not in beyond]
    if len(set(positive)) != len(positive):
        raise ConfigError(f"two declared dimensions of {label} are the same one", where=where)
    return positive


def _require_two(dims: DynamicDims, marks: Sequence[Mark]) -> None:
    for mark in marks:
        size = mark.tensor.size(mark.dim)
        if size < 2 and not mark.unbacked:
            raise InputError(
                f"argument {mark.label} has size {size} in dynamic dimension {mark.dim} at the first call, "
                "which a trace with backed shapes would fix",
                where=dims.where,
                hint="make the first call with size 2 or more, name the dimension in mark_unbacked_dims, or set "
                "dynamic_shapes_config.type to unbacked or backed_size_oblivious",
            )


def _tensors_in(value: object, name: str) -> list[tuple[str, torch.Tensor]]:
    """The tensors in ``value`` with their paths, such as ``hidden.tensors['h']``."""
    if isinstance(value, torch.Tensor):  # the common case, also for tensor subclasses
        return [(name, value)]
    return [
        (name + suffix, leaf) for suffix, leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)
    ]


# --- classes that hold tensors -------------------------------------------------------------------------


def _register_holders(values: list[object]) -> None:
    """Make objects with tensors among their attributes visible to torch's pytree: a dataclass is its fields, another object its attributes.

    The registration stays for the process: without it a call could not be told from another by its tensors.
    """
    while values:  # a registered class may hold others
        leaves = pytree.tree_leaves(values)
        kinds = {type(leaf) for leaf in leaves if _holds_tensors(leaf)}
        values = [leaf for leaf in leaves if type(leaf) in kinds]
        for kind in kinds:
            _register(kind)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, (torch.Tensor, torch.nn.Module, type)) or callable(value):
        return False
    held = [getattr(value, name) for name in _attribute_names(value)]
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(held))


def _register(kind: type) -> None:
    def children(value: object) -> tuple[list[object], tuple[str, ...]]:
        names = _attribute_names(value)
        return [getattr(value, name) for name in names], names

    def with_keys(value: object) -> tuple[list[tuple[Any, object]], tuple[str, ...]]:
        found, names = children(value)
        return list(zip(map(pytree.GetAttrKey, names), found, strict=True)), names

    def rebuilt(found: Iterable[object], names: tuple[str, ...]) -> object:
        value: object = object.__new__(kind)
        for name, child in zip(names, found, strict=True):
            object.__setattr__(value, name, child)
        return value

    pytree.register_pytree_node(
        kind,
        children,
        rebuilt,
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=with_keys,
    )


def _attribute_names(value: object) -> tuple[str, ...]:
    if dataclasses.is_dataclass(value):
        return tuple(f.name for f in dataclasses.fields(value) if hasattr(value, f.name))
    return tuple(sorted(getattr(value, "__dict__", ())))
