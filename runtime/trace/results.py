"""How a graph's outputs make the result, told by stand-ins in what Dynamo's code packed."""

import abc
import dataclasses
import enum
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.code_objects import HEAP_TYPE
from piecework.codegen.entry.plan import FromCall, FromConst, FromLeaf, FromOutput
from piecework.codegen.graph.origin import results_of
from piecework.errors import CaptureError
from piecework.runtime import torch_compat

#: Where a leaf of the result comes from; a tensor of the model is itself.
ResultLeaf = FromOutput | FromCall | FromLeaf | FromConst | torch.Tensor
_PLAIN = (torch.Tensor, float, str, bool, type(None))
_CONSTANTS = (int, float, complex, str, bytes, enum.Enum, type, torch.dtype, torch.device)


def sizes_from_graph(result):  # type: ignore[no-untyped-def]
    """``result`` with integers and texts computed, so that the graph gives them; Dynamo traces it.

    It would read an integer that has a place (an argument, ``x.shape``) there while it traces, once
    and for all. A sum with 0 is a value of the graph's own; one that the trace fixed stays fixed.
    """
    kind = type(result)
    if kind is int:
        return result + 0
    if kind is str:  # one made of an integer alone has the integer's place
        return result + ""
    if kind in _PLAIN:
        return result
    if kind is torch.Size:
        return torch.Size([sizes_from_graph(each) for each in result])
    if kind is tuple:
        return tuple([sizes_from_graph(each) for each in result])
    if kind is list:
        return [sizes_from_graph(each) for each in result]
    if kind is dict:
        return {key: sizes_from_graph(each) for key, each in result.items()}
    # Asked with getattr: Dynamo in torch 2.11 knows no hasattr of classes.
    if issubclass(kind, tuple) and getattr(kind, "_fields", None) is not None:
        return kind(*[sizes_from_graph(each) for each in result])
    if kind in pytree.SUPPORTED_NODES:
        return pytree.tree_map(sizes_from_graph, result, is_leaf=_is_size)
    if getattr(kind, "__dataclass_fields__", None) is not None:
        names = list(kind.__dataclass_fields__)
    elif _is_plain(kind):
        names = list(vars(result))
    else:
        return result
    for name in names:  # an instance that the model made
        value = getattr(result, name)
        if type(value) not in _PLAIN:
            object.__setattr__(result, name, sizes_from_graph(value))
    return result


def _is_size(value):  # type: ignore[no-untyped-def]
    return type(value) is torch.Size


# --- instances of the user's classes ---------------------------------------------------------------


class _Instance:
    """In place of an instance that pytree doesn't know: its attributes, which pytree sees into."""

    def __init__(self, kind: type, names: tuple[str, ...], values: list[object]) -> None:
        self.kind, self.names, self.values = kind, names, values


Alive = Callable[[], object]  # a weak reference
#: What a class has whose instances notice how they are made, or say themselves what they hold.
_OWN_WAYS = {"__getattribute__", "__setattr__", "__delattr__", "__del__", "__slots__"}


def _is_plain(kind: type) -> bool:
    """Whether an instance is what its dictionary holds, and Dynamo can list that."""
    *own, base = kind.__mro__
    return (
        torch_compat.lists_attributes()
        and type(kind) in (type, abc.ABCMeta)
        and kind.__module__.partition(".")[0] != "torch"
        and base is object
        and all(
            each.__flags__ & HEAP_TYPE and not any(each.__dict__.get(name) for name in _OWN_WAYS)
            for each in own
        )
    )


def let_dynamo_ask() -> None:
    """Let Dynamo ask `_is_plain` as it traces, and not look into it."""
    torch.compiler.assume_constant_result(_is_plain)


def opened(result: object) -> tuple[object, list[Alive]]:
    """``result`` with instances that pytree doesn't know made visible to it, and these."""
    found: dict[int, Alive] = {}

    def open_one(leaf: object) -> object:
        is_data = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
        if not is_data and not (hasattr(leaf, "__dict__") and _is_plain(type(leaf))):
            return leaf
        if id(leaf) in found:
            why = f"the model returns one {type(leaf).__qualname__} twice"
            raise CaptureError(why, hint="return it once, or tensors and numbers alone")
        found[id(leaf)] = weakref.ref(leaf) if type(leaf).__weakrefoffset__ else lambda: None
        fields = [each.name for each in dataclasses.fields(leaf)] if is_data else []
        held = [name for name in fields if hasattr(leaf, name)]
        names = tuple(dict.fromkeys([*held, *getattr(leaf, "__dict__", ())]))
        return _Instance(type(leaf), names, [open_all(getattr(leaf, name)) for name in names])

    def open_all(tree: object) -> object:
        return pytree.tree_map(open_one, tree, is_leaf=_is_size)

    return open_all(result), list(found.values())


def refuse_kept(made: Iterable[Alive]) -> None:
    """Refuse instances that live on once nobody has the result: they are not each call's own."""
    for kept in (each() for each in made):
        if kept is not None:
            why = f"the model returns a {type(kept).__qualname__} that forward did not make, or that refers to itself"
            raise CaptureError(why, hint="return what forward makes, or tensors and numbers alone")


def _instance(values: Iterable[object], context: tuple[type, tuple[str, ...]]) -> object:
    """An instance with these attributes; nothing of the class's own runs, as in the trace."""
    kind, names = context
    made: object = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(
    _Instance, lambda each: (each.values, (each.kind, each.names)), _instance
)


# --- stand-ins -------------------------------------------------------------------------------------


def _refuse(*_: object, **__: object) -> NoReturn:
    why = "the result holds something that Python computes from a number or a tensor of the graph: text, a dictionary's key, a comparison"
    hint = "return the number or the tensor itself, and compute the rest from what the stitched model returns"
    raise CaptureError(why, hint=hint)


# Dynamo's code that packs a result may do nothing with stand-ins but move them.
_MAKING = {"__new__", "__getnewargs__", "__getattribute__", "__doc__", "__sizeof__"}
_REFUSED = {n: _refuse for n in {**vars(int), **vars(float)} if n[:2] == "__" and n not in _MAKING}

_StandInInt: type[int] = type("_StandInInt", (int,), {**_REFUSED})
_StandInFloat: type[float] = type("_StandInFloat", (float,), {**_REFUSED, "index": None})


class _StandInTensor(torch.Tensor):
    """In place of a tensor that the graph returns."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        _refuse()


class _StandInScalar:
    """In place of an output of one float: Dynamo hands a float on as ``tensor.item()``."""

    __slots__ = ("_float",)

    def __init__(self, index: int) -> None:
        self._float = _StandInFloat(math.nan)
        self._float.index = index  # type: ignore[attr-defined]

    def item(self) -> float:
        return self._float


def stand_ins(gm: torch.fx.GraphModule) -> list[object]:
    """One distinguishable object per graph output, for Dynamo's code that packs the result."""
    found: list[object] = []
    for node in results_of(gm.graph):
        value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node
        if isinstance(value, (int, torch.SymInt)):
            found.append(_StandInInt(0))
        elif isinstance(value, (float, torch.SymFloat)):
            found.append(_StandInFloat(0.0))
        elif isinstance(value, torch.Tensor) and value.dtype is torch.float64 and not value.dim():
            found.append(_StandInScalar(len(found)))
        else:
            found.append(torch.empty(0).as_subclass(_StandInTensor))
    return found


def result_leaf(
    leaf: object,
    standing_in: Sequence[object],
    leaves: Sequence[object],
    held: Mapping[int, tuple[str, torch.Tensor]],
) -> ResultLeaf:
    """Where ``leaf`` comes from."""
    for kind, known in ((FromOutput, standing_in), (FromLeaf, leaves)):
        for index, each in enumerate(known):
            if leaf is each and (kind is FromOutput or isinstance(leaf, torch.Tensor)):
                return kind(index)
    if type(leaf) is _StandInFloat:
        output = FromOutput(leaf.index)  # type: ignore[attr-defined]
        return FromCall(_number, None, "number", (output,))
    if isinstance(leaf, torch.Tensor) and id(leaf) in held:
        return leaf
    if leaf is None or isinstance(leaf, _CONSTANTS):
        return FromConst(leaf)
    raise CaptureError(
        f"the model returns a {type(leaf).__qualname__}, which can't be rebuilt from the graph",
        hint="return tensors, numbers and None in tuples, lists, dicts, or classes registered with pytree's register_pytree_node",
    )


def _number(items: Sequence[torch.Tensor], _: object) -> object:
    return items[0].item()
