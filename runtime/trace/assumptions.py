"""What a trace assumed of its inputs: of each argument, symbols with ranges, and guards."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import (
    Assumption,
    FixedValue,
    FromConst,
    FromLeaf,
    FromSymbol,
    IntegerInput,
    Items,
    Leaf,
    Node,
    Parameter,
    Passed,
    SameObject,
    Size,
    Symbol,
    TensorInput,
    Tree,
    UnusedTensor,
    WatchedObject,
)
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.plan.size_text import RESERVED, size_text, symbols_in
from piecework.runtime import torch_compat
from piecework.runtime.trace.arguments import KIND, leaves_of, signature_of
from piecework.runtime.trace.inputs import Example
from piecework.runtime.watch.values import is_fixed

Assume = Callable[[int, object], Assumption]


class Assumptions:
    """The assumptions of one trace."""

    def __init__(
        self,
        fakes: Mapping[int, Any],
        wished: Mapping[str, str],
        example: Example,
        asks_grad: bool,
        asks_strides: bool,
    ) -> None:
        self._fakes, self._first = dict(fakes), example.first
        self._asks_grad, self._asks_strides = asks_grad, asks_strides
        tensors = (f.shape if isinstance(f, torch.Tensor) else (f,) for f in self._fakes.values())
        self._sizes = [size for sizes in tensors for size in sizes]
        found = {leaf: torch_compat.traced_item(fake) for leaf, fake in self._fakes.items()}
        self._items = {leaf: item for leaf, item in found.items() if item is not None}
        self._names = _names([*self._sizes, *self._items.values()], wished)

    def assume(self, index: int, example: object) -> Assumption:
        fake = self._fakes.get(index)
        if isinstance(example, torch.Tensor) and self._first[id(example)] != index:
            first = self._first[id(example)]
            return SameObject(first)
        if isinstance(fake, torch.Tensor):
            return self._tensor(index, fake, example)
        if isinstance(fake, torch.SymInt):
            text = self._size(fake)
            return FixedValue(text) if isinstance(text, int) else IntegerInput(text)
        if isinstance(example, torch.Tensor):
            return UnusedTensor(example.dtype, example.device, example.dim())
        return FixedValue(example) if is_fixed(example) else WatchedObject()

    def symbols(self) -> tuple[Symbol, ...]:
        """The symbols that sizes and integers are made of, with their ranges."""
        found: dict[str, Symbol] = {}
        for size in self._sizes:
            names = torch_compat.symbols_in(size)
            if len(names) == 1 and torch_compat.symbol_of(size) == names[0]:
                name = self._names[names[0]]
                found.setdefault(name, Symbol(name, *torch_compat.symbol_range(size)))
        return tuple(found.values())

    def names(self) -> dict[str, str]:
        return dict(self._names)

    def guards(self) -> tuple[str, ...]:
        """What the trace relied on beyond ranges, as Python text over the symbols' names."""
        ranged = {symbol for size in self._sizes if (symbol := torch_compat.symbol_of(size))}
        values = [*self._sizes, *self._items.values()]
        conditions = torch_compat.guards_on(values, self._names, ranged)
        return tuple(dict.fromkeys(size_text(each, self._names) for each in conditions))

    def _size(self, size: object) -> Size:
        found = torch_compat.traced_size(size)
        return found if isinstance(found, int) else size_text(found, self._names)

    def _item(self, index: int) -> float | str | None:
        """The value of a number on the CPU that the trace looked at, if something reads it."""
        if index not in self._items:
            return None
        value = torch_compat.traced_size(self._items[index])
        if isinstance(value, (int, float)):
            return value
        text = size_text(value, self._names)
        symbolic = (size for size in self._sizes if torch_compat.symbols_in(size))
        texts = (*self.guards(), *(str(self._size(size)) for size in symbolic))
        return text if any(symbols_in(text) & symbols_in(each) for each in texts) else None

    def passed(self, leaf: int, dim: int | None) -> Passed:
        """How the entry finds argument ``leaf``, or dimension ``dim`` of it."""
        if dim is None:
            return FromLeaf(leaf)
        symbol = torch_compat.symbol_of(self._fakes[leaf].shape[dim])
        if symbol in self._names:
            return FromSymbol(self._names[symbol])
        return FromLeaf(leaf, f".size({dim})")

    def layout(self, leaf: int, dim: int | None) -> Passed:
        """How the entry finds the stride of a dimension, the example's, or the offset (None)."""
        if dim is None:
            return FromLeaf(leaf, ".storage_offset()")
        stride = self._stride(self._fakes[leaf].stride(dim))
        assert isinstance(stride, int)
        return FromConst(stride)

    def _stride(self, stride: object) -> Size:
        """A stride over known sizes; a symbol of strides alone is the example's number."""
        hints = {symbol: str(n) for symbol, n in torch_compat.symbol_hints(stride).items()}
        found = torch_compat.traced_size(stride)
        text = str(found) if isinstance(found, int) else size_text(found, hints | self._names)
        return int(text) if text.isdecimal() else text

    def _tensor(self, index: int, fake: torch.Tensor, example: object) -> TensorInput:
        strides = None
        if self._asks_strides or not torch_compat.is_traced_contiguous(fake):
            strides = tuple(map(self._stride, fake.stride()))
        sizes = tuple(self._size(size) for size in fake.shape)
        grad = (
            example.requires_grad if self._asks_grad and isinstance(example, torch.Tensor) else None
        )
        item = self._item(index)
        return TensorInput(fake.dtype, fake.device, sizes, strides, type(example), grad, item)


def _names(values: Sequence[object], wished: Mapping[str, str]) -> dict[str, str]:
    """A name for each symbol: the wished one, or the next free of ``s0, s1, …``."""
    names: dict[str, str] = {}
    taken = set(wished.values()) | RESERVED
    for symbol in (each for value in values for each in torch_compat.symbols_in(value)):
        if symbol not in names:
            numbers = itertools.count(len(names))
            free = next(name for n in numbers if (name := f"s{n}") not in taken)
            wish = wished.get(symbol) or free
            names[symbol] = f"{wish}_" if wish in RESERVED else wish
            taken.add(names[symbol])
    return names


def parameters_of(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    assume: Assume,
) -> tuple[Parameter, ...]:
    """The model's parameters, each with what the trace assumed of its argument."""
    signature = signature_of(model) or _ANY_ARGUMENTS
    given = signature.bind(*args, **kwargs).arguments
    values: dict[int | str, object] = {**dict(enumerate(args)), **kwargs}
    counts = [len(pytree.tree_leaves(value)) for value in values.values()]
    first = dict(zip(values, itertools.accumulate(counts, initial=0), strict=False))

    def node(key: int | str, label: str) -> Node:
        return _node(values[key], label, itertools.count(first[key]), assume)

    found, positional = [], 0
    for parameter in signature.parameters.values():
        name, kind = parameter.name, KIND[parameter.kind]
        has_default = parameter.default is not inspect.Parameter.empty
        default = FixedValue(parameter.default) if has_default else None
        made: Node
        if kind == "*":
            count = len(given.get(name, ()))
            children = tuple(node(positional + i, f"{name}[{i}]") for i in range(count))
            made = Items(tuple, name, tuple(range(count)), children)
        elif kind == "**":
            keys = tuple(given.get(name, {}))
            made = Items(dict, name, keys, tuple(node(key, key) for key in keys))
        elif name in kwargs and kind != "/":
            made = node(name, name)
        elif name in given:
            made = node(positional, name)
            positional += 1
        else:
            made = Leaf(-1, name, FixedValue(parameter.default))
        found.append(Parameter(name, kind, made, default))
    return tuple(found)


#: What a callable without a readable signature takes.
_ANY_ARGUMENTS = inspect.signature(lambda *args, **kwargs: None)


def _node(value: object, label: str, numbers: Iterator[int], assume: Assume) -> Node:
    """The node for ``value``; its leaves take their numbers from ``numbers``."""
    kind = type(value)
    if kind in (list, tuple):
        keys: tuple[object, ...] = tuple(range(len(value)))  # type: ignore[arg-type]
    elif kind is dict and all(is_inline_literal(key) for key in value):  # type: ignore[attr-defined]
        keys = tuple(value)  # type: ignore[arg-type]
    else:
        structure = pytree.tree_structure(value)
        if structure.is_leaf():
            return Leaf(n := next(numbers), label, assume(n, value))
        found = zip(leaves_of(value), numbers, strict=False)
        leaves = tuple(Leaf(n, label + at, assume(n, leaf)) for (at, leaf), n in found)
        return Tree(label, structure, leaves)
    children = tuple(_node(value[k], f"{label}[{k!r}]", numbers, assume) for k in keys)  # type: ignore[index]
    return Items(kind, label, keys, children)
