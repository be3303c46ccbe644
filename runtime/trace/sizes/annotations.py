"""Which parameters of a ``forward`` hold tensors, by their annotations; those that are strings are evaluated."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_LEGACY = type(torch.FloatTensor)  # the type of torch.FloatTensor and its kin, which are no classes
_NO_CONTAINERS = (type, collections.abc.Callable)
_ALIAS = getattr(typing, "TypeAliasType", None)  # Python 3.12's ``type X = …``


@dataclass(frozen=True, slots=True)
class Reading:
    """What the annotations of one forward say.

    Attributes:
        annotated: parameters with an annotation.
        tensors: those that hold tensors.
        unknown: those whose annotation can't be evaluated at run time.
        containers: classes with tensors in annotated attributes.
    """

    annotated: frozenset[str]
    tensors: frozenset[str]
    unknown: frozenset[str]
    containers: tuple[type, ...]

    def counts(self, name: str) -> bool:
        return name in self.tensors or name in self.unknown


def read_annotations(forward: Callable[..., object], owner: type | None = None) -> Reading:
    """Read the annotations of ``forward``; strings are evaluated where it was defined.

    Args:
        forward: a function or method, also one wrapped with ``functools.wraps``.
        owner: its class, whose names and type parameters annotations may use.
    """
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    annotations = _annotations_of(function)
    scope = _Scope(_globals_of(function), _locals_of(function, owner))
    tensors, unknown = set(), set()
    for name, annotation in annotations.items():
        holds = scope.holds_tensors(annotation)
        if holds is None:
            unknown.add(name)
        elif holds:
            tensors.add(name)
    return Reading(
        frozenset(annotations), frozenset(tensors), frozenset(unknown), tuple(scope.containers)
    )


def _annotations_of(holder: object) -> dict[str, object]:
    """The annotations of a function or class as they are written, without the result's."""
    if sys.version_info >= (
        3,
        14,
    ):  # evaluated when asked for; names for type checkers only stay references
        from annotationlib import Format, get_annotations

        found = get_annotations(holder, format=Format.FORWARDREF)
    else:
        found = inspect.get_annotations(holder)  # type: ignore[arg-type]
    return {name: each for name, each in found.items() if name != "return"}


def _globals_of(function: object) -> dict[str, object]:
    return getattr(function, "__globals__", {})


def _locals_of(function: object, owner: type | None) -> dict[str, object]:
    """Names that a string in ``function`` may use besides globals: closed-over ones, the class's, type parameters."""
    found: dict[str, object] = {}
    for each in reversed(owner.__mro__ if owner is not None else ()):
        if each.__module__ == getattr(function, "__module__", None):
            found.update(vars(each))
            found[each.__name__] = each
    found |= {p.__name__: p for p in getattr(owner, "__type_params__", ())}
    found |= {p.__name__: p for p in getattr(function, "__type_params__", ())}
    code = getattr(function, "__code__", None)
    for name, cell in zip(
        getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False
    ):
        if name != "__class__" and _is_filled(cell):
            found[name] = cell.cell_contents
    return found


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


class _Scope:
    """Evaluates annotations in one scope and looks for tensors in them."""

    def __init__(self, names: dict[str, object], local_names: Mapping[str, object]) -> None:
        self._globals = names
        self._locals = dict(local_names)
        self._visited: dict[type, bool] = {}
        self.containers: list[type] = []

    def holds_tensors(self, annotation: object) -> bool | None:
        """Whether values of this annotation may hold tensors; None if a name in it is unknown."""
        resolved = self._resolve(annotation)
        if resolved is _UNKNOWN:
            return None
        if isinstance(resolved, _LEGACY):
            return True
        if isinstance(resolved, typing.TypeVar):
            bound = (resolved.__bound__, *resolved.__constraints__)
            return self._any(each for each in bound if each is not None)
        if isinstance(resolved, typing.NewType):
            return self.holds_tensors(resolved.__supertype__)
        if _ALIAS is not None and isinstance(resolved, _ALIAS):
            return self.holds_tensors(resolved.__value__)
        origin = typing.get_origin(resolved)
        if origin is not None:
            return self._generic(origin, typing.get_args(resolved))
        return isinstance(resolved, type) and self._class(resolved)

    def _resolve(self, annotation: object) -> object:
        """``annotation`` with strings in it evaluated."""
        holder = types.SimpleNamespace(__annotations__={"it": annotation}, __globals__={})
        try:
            hints = typing.get_type_hints(holder, self._globals, self._locals, include_extras=True)
        except (NameError, AttributeError, SyntaxError, TypeError):
            # A name for type checkers only, or syntax that this Python can't evaluate: nothing can be known.
            return _UNKNOWN
        return hints["it"]

    def _generic(self, origin: object, args: tuple[object, ...]) -> bool | None:
        if origin in _NO_CONTAINERS or origin is typing.Literal:
            return False
        if origin is typing.Annotated:
            return self.holds_tensors(args[0])
        if _ALIAS is not None and isinstance(origin, _ALIAS):
            return self._any((origin.__value__, *args))
        inner = self._any(arg for arg in args if arg is not Ellipsis)
        if isinstance(origin, type) and origin.__module__ not in ("builtins", "collections.abc"):
            own = self._class(origin, args_hold_tensors=bool(inner))
            return own or inner
        return inner

    def _any(self, annotations: typing.Iterable[object]) -> bool | None:
        answers = [self.holds_tensors(each) for each in annotations]
        return True if True in answers else None if None in answers else False

    def _class(self, kind: type, args_hold_tensors: bool = False) -> bool:
        if issubclass(kind, torch.Tensor):
            return True
        if kind not in self._visited:
            self._visited[kind] = False  # a class that holds itself
            self._visited[kind] = self._has_tensor_fields(kind, args_hold_tensors)
        return self._visited[kind]

    def _has_tensor_fields(self, kind: type, args_hold_tensors: bool) -> bool:
        if issubclass(kind, torch.nn.Module) or kind.__module__ in ("builtins", "typing"):
            return False
        found = False
        for each in kind.__mro__:
            module = sys.modules.get(each.__module__)
            scope = _Scope(vars(module) if module is not None else {}, vars(each))
            scope._locals = {**self._locals, **scope._locals}
            scope._visited, scope.containers = self._visited, self.containers
            fields = _annotations_of(each)
            if not fields and "__init__" in vars(each):
                fields = _annotations_of(inspect.unwrap(vars(each)["__init__"]))
            found = any([scope.holds_tensors(f) for f in fields.values()]) or found
            generic = any(isinstance(f, typing.TypeVar) for f in fields.values())
            found = found or (generic and args_hold_tensors)
        # isinstance can't be asked of a TypedDict, whose values are plain dicts, nor of every protocol.
        if found and not typing.is_typeddict(kind) and not getattr(kind, "_is_protocol", False):
            self.containers.append(kind)
        return found


_UNKNOWN = object()


# --- classes that hold tensors -------------------------------------------------------------------------


def register_containers(values: Sequence[object], classes: Sequence[type]) -> None:
    """Make the instances of ``classes`` in ``values`` visible to torch's pytree.

    A dataclass is its fields, another class its instance attributes by name. The registration stays for the process, as
    ``torch.utils._pytree.register_pytree_node`` has it: without it a call could not be told from another by its tensors.
    """
    if not classes:
        return
    pending = list(values)
    while pending:  # a registered class may hold others
        leaves = pytree.tree_leaves(pending)
        opaque = {type(leaf) for leaf in leaves if isinstance(leaf, tuple(classes))}
        pending = [leaf for leaf in leaves if type(leaf) in opaque]
        for each in opaque:
            _register(each)


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
    return tuple(sorted(vars(value)))
