"""Literals and constants of emitted source. In: Python values found in node arguments. Out: their text, and the consts table.

A value is written inline only if its exact type has a literal that evaluates back to it; nothing is ever written by a
user-defined ``repr``, and an FX node never becomes a constant.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Callable

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal, literal_text
from piecework.codegen.plan.names import CONSTS
from piecework.codegen.plan.one_line import tuple_text
from piecework.errors import UnsupportedNode

# CPython refuses 200 nested brackets; some are left for the statement around the argument.
MAX_NESTING = 60

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_TRACED = (torch.fx.Node, *_SIZES)

LIST_TYPES = (list, immutable_list)
DICT_TYPES = (dict, immutable_dict)


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
    """Write a node argument as Python; nodes in any nesting become what ``refer`` gives.

    Inline literals are passed to ``literal``, in order of evaluation; an ``index`` has slices as brackets write them.

    Raises:
        UnsupportedNode: an FX node hides inside an object that FX itself does not look into.
    """

    def convert(item: object, depth: int = 0) -> str:
        kind = type(item)
        if depth > MAX_NESTING:
            raise UnsupportedNode(
                f"an argument is nested more than {MAX_NESTING} levels deep, which Python's parser may refuse",
                where=where(),
                hint="flatten the container",
            )
        if isinstance(item, torch.fx.Node):
            return refer(item)
        inner = depth + 1
        if kind in LIST_TYPES:
            return f"[{', '.join(convert(each, inner) for each in item)}]"  # type: ignore[attr-defined]
        if kind is tuple:
            return tuple_text([convert(each, inner) for each in item])  # type: ignore[attr-defined]
        if kind in DICT_TYPES:
            pairs = item.items()  # type: ignore[attr-defined]
            if any(type(key) is not str and holds_node(key) for key, _ in pairs):
                raise UnsupportedNode(
                    "an FX node is the key of a dict, where FX does not look for nodes",
                    where=where(),
                    hint="build the dict in a function that the graph calls",
                )
            shown = (f"{convert(key, inner)}: {convert(each, inner)}" for key, each in pairs)
            return f"{{{', '.join(shown)}}}"
        if kind is slice:
            parts = (item.start, item.stop, item.step)  # type: ignore[attr-defined]
            return f"slice({', '.join(convert(part, inner) for part in parts)})"
        if is_inline_literal(item):
            return literal(item)
        hidden = _first_inside(item, _TRACED)
        if isinstance(hidden, _SIZES):
            raise UnsupportedNode(
                f"the size {hidden} of the trace is an argument; it would be that of the traced example for ever",
                where=where(),
                hint="pass the node that computes it (torch.ops.aten.sym_size.int)",
            )
        if hidden is not None and isinstance(item, tuple) and hasattr(item, "_fields"):
            function = consts.add(kind)
            return f"{function}({', '.join(convert(each, inner) for each in item)})"
        if hidden is not None:
            raise UnsupportedNode(
                f"a {kind.__name__} that contains an FX node can't be written as source",
                where=where(),
                hint="pass lists, tuples, dicts or slices of nodes",
            )
        return consts.add(item)

    def cut(item: object) -> str:
        if type(item) is not slice:
            return convert(item)
        start, stop, step = (
            "" if part is None else convert(part, 1) for part in (item.start, item.stop, item.step)
        )
        return f"{start}:{stop}" + (f":{step}" if step else "")

    if index and type(value) is tuple and len(value) > 1:
        return ", ".join(map(cut, value))
    return cut(value) if index else convert(value)


def holds_node(value: object) -> bool:
    """True if an FX node is reachable inside ``value`` through standard containers."""
    return _first_inside(value, (torch.fx.Node,)) is not None


def _first_inside(value: object, kinds: tuple[type, ...]) -> object | None:
    """An object of one of ``kinds`` that is reachable inside ``value`` through standard containers, or None."""
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
        elif isinstance(item, (dict, types.MappingProxyType)):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, slice):
            stack.extend((item.start, item.stop, item.step))
        elif isinstance(item, functools.partial):
            stack.extend((*item.args, *item.keywords.values()))
        elif isinstance(item, types.SimpleNamespace):
            stack.extend(vars(item).values())
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            stack.extend(getattr(item, f.name, None) for f in dataclasses.fields(item))
    return None


def describe(value: object) -> str:
    """One line about a constant for the consts table: no address, no time, nothing that varies by run."""
    if isinstance(value, torch.Tensor):
        return f"tensor {short_type(value)}"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return ascii(value)
    if isinstance(value, (float, complex)):
        return f"{type(value).__name__} {complex.__repr__(value) if isinstance(value, complex) else float.__repr__(value)}"
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
