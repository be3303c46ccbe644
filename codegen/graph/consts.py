"""Node arguments as text, and the consts table for what has no literal.

Nothing is ever written by a user's ``repr``, and an FX node never becomes a constant.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal, literal_text, tuple_text
from piecework.codegen.plan.names import CONSTS
from piecework.errors import UnsupportedNode

# CPython refuses 200 nested brackets; some are left for the statement around the argument.
MAX_NESTING = 60

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)

LIST_TYPES = (list, immutable_list)
DICT_TYPES = (dict, immutable_dict)
NAMED_BY_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


class ConstTable:
    """Collects constants in order of first use, deduplicated by identity."""

    def __init__(self) -> None:
        self._values: list[object] = []
        self._index: dict[int, int] = {}
        self._specs: list[ir.ConstSpec] = []

    def add(self, value: object, *, attribute: str | None = None) -> str:
        """How ``value`` is written from now on."""
        found = self._index.get(id(value))
        if found is None:
            found = len(self._values)
            self._values.append(value)  # keeps the value alive, so its id stays its own
            self._index[id(value)] = found
            self._specs.append(ir.ConstSpec(found, describe(value), attribute))
        return f"{CONSTS}[{found}]"

    @property
    def values(self) -> list[object]:
        return list(self._values)

    @property
    def specs(self) -> tuple[ir.ConstSpec, ...]:
        return tuple(self._specs)


def to_text(
    value: object,
    refer: Callable[[torch.fx.Node], str],
    consts: ConstTable,
    where: Callable[[], str],
    literal: Callable[[object], str] = literal_text,
    *,
    index: bool = False,
) -> str:
    """Write a node argument as Python; nodes in any nesting become what ``refer`` gives."""

    def joined(items: Iterable[object], depth: int) -> str:
        return ", ".join(convert(each, depth + 1) for each in items)

    def convert(item: object, depth: int = 0) -> str:
        kind = type(item)
        if depth > MAX_NESTING:
            raise UnsupportedNode(
                f"an argument is nested more than {MAX_NESTING} levels deep, which Python's parser may refuse",
                where=where(),
                hint="flatten the container",
            )
        match item:
            case torch.fx.Node():
                return refer(item)
            case list() if kind in LIST_TYPES:
                return f"[{joined(item, depth)}]"
            case tuple() if kind is tuple:
                return tuple_text([convert(each, depth + 1) for each in item])
            case dict() if kind in DICT_TYPES and not any(map(holds_node, item)):
                pairs = [(convert(k, depth + 1), convert(v, depth + 1)) for k, v in item.items()]
                return f"{{{', '.join(f'{key}: {value}' for key, value in pairs)}}}"
            case slice(start=start, stop=stop, step=step):
                return f"slice({joined((start, stop, step), depth)})"
        if is_inline_literal(item):
            return literal(item)
        hidden = _first_inside(item, (torch.fx.Node, *_SIZES))
        if hidden is None:
            return consts.add(item)
        if isinstance(hidden, _SIZES):
            raise UnsupportedNode(
                f"the size {hidden} of the trace is an argument; it would be that of the traced example for ever",
                where=where(),
                hint="pass the node that computes it (torch.ops.aten.sym_size.int)",
            )
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return f"{consts.add(kind)}({joined(item, depth)})"
        raise UnsupportedNode(
            f"a {kind.__name__} that contains an FX node can't be written as source",
            where=where(),
            hint="pass lists, tuples, slices of nodes, or dicts that have them as values",
        )

    def cut(item: object) -> str:
        if not isinstance(item, slice):
            return convert(item)
        ends = (item.start, item.stop, item.step)
        parts = ["" if each is None else convert(each, 1) for each in ends]
        return ":".join(parts if parts[2] else parts[:2])

    if index and type(value) is tuple and len(value) > 1:
        return ", ".join(map(cut, value))
    return cut(value) if index else convert(value)


def holds_node(value: object) -> bool:
    """True if an FX node is reachable inside ``value`` through standard containers."""
    return _first_inside(value, (torch.fx.Node,)) is not None


def _first_inside(value: object, kinds: tuple[type, ...]) -> object | None:
    """An object of one of ``kinds`` inside ``value``, in any nesting of containers; or None."""
    stack, seen = [value], set()
    while stack:
        item = stack.pop()
        if isinstance(item, kinds):
            return item
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (list, tuple, set, frozenset, collections.deque)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend((*item.keys(), *item.values()))
        elif isinstance(item, slice):
            stack.extend((item.start, item.stop, item.step))
        elif isinstance(item, functools.partial):
            stack.extend((*item.args, *item.keywords.values()))
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            stack.extend(getattr(item, f.name, None) for f in dataclasses.fields(item))
    return None


def describe(value: object) -> str:
    """One line about a constant for the consts table, without anything that varies by run."""
    if isinstance(value, torch.Tensor):
        return f"tensor {short_type(value)}"
    if isinstance(value, NAMED_BY_TORCH):
        return ascii(value)
    for base in (float, complex):
        if isinstance(value, base):
            return f"{type(value).__name__} {base.__repr__(value)}"
    if isinstance(value, torch.Size):
        return f"torch.Size of {len(value)} dimensions"
    if isinstance(value, type):
        return f"class {ascii(value.__qualname__)[1:-1]}"
    if isinstance(value, torch.nn.Module):
        return f"module {ascii(type(value).__name__)[1:-1]}"
    name = getattr(value, "__qualname__", None) or getattr(value, "name", None)
    kind = ascii(type(value).__qualname__)[1:-1]
    return f"{kind} {ascii(name)[1:-1]}" if isinstance(name, str) else kind


_SHORT_DTYPE = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def short_type(value: object, symbols: Callable[[object], str] = str) -> str:
    """``f32[4, s0, 64]`` for a tensor, ``int`` and the like for anything else."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    dtype = _SHORT_DTYPE.get(value.dtype) or str(value.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(symbols(size) for size in value.shape)}]"
