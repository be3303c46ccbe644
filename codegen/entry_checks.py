"""The emitted test of a call. In: the steps of an `entry_table`, one by one. Out: the lines of ``check_inputs``, and what values are called there.

This is one reading of the table; it decides nothing about what is checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import assert_never

import torch

from piecework.codegen import checks
from piecework.codegen.entry_plan import Size
from piecework.codegen.literals import is_inline_literal, literal_text
from piecework.codegen.names import NameTable
from piecework.codegen.size_text import MODULES, checked_text

_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")  # no attributes


@dataclass(frozen=True, slots=True)
class CheckLine:
    """An assignment, or a test after a comment."""

    comment: str = ""
    assign: str = ""
    test: str = ""


class CheckLines:
    """Writes steps, and remembers names.

    Args:
        names: gives out names.
        parameters: what the parameters are called.
        const: gives a value a name, near to a wished one.

    Attributes:
        leaves: flattened argument → its name.
        symbols: symbol → its name.
        unpacked: names that are no parameters.
    """

    def __init__(
        self, names: NameTable, parameters: Sequence[str], const: Callable[[str, object], str]
    ) -> None:
        self._names = names
        self._parameters = tuple(parameters)
        self._const = const
        self._labels: dict[int, str] = {}
        self._trees: dict[checks.Where, tuple[str, str]] = {}
        self._dims: dict[tuple[int, int], str] = {}
        self.leaves: dict[int, str] = {}
        self.symbols: dict[str, str] = {}
        self.unpacked: list[str] = []

    def lines(self, step: checks.Step) -> list[CheckLine]:
        """``step`` as text; none for a value that has a name already."""
        match step:
            case checks.Require(about, required):
                conditions = [text for check in required for text in self._conditions(check)]
                return [CheckLine(comment=about, test=" and ".join(conditions))]
            case checks.TakeLeaf(leaf, label, where):
                self._labels[leaf] = label
                path = self._path(where)
                if isinstance(where, checks.Whole):
                    self.leaves[leaf] = path
                    return []
                self.leaves[leaf] = name = self._unpack(label)
                return [CheckLine(assign=f"{name} = {path}")]
            case checks.TakeTree(where):
                path = self._path(where)
                names = self._trees[where] = self._names.claim("leaves"), self._names.claim(
                    "structure"
                )
                return [CheckLine(assign=f"{names[0]}, {names[1]} = flatten({path})")]
            case checks.TakeShape(leaf, symbols):
                targets = [self._dim(leaf, dim, symbol) for dim, symbol in enumerate(symbols)]
                return [CheckLine(assign=f"{targets_text(targets)}{self.leaves[leaf]}.shape")]
            case checks.TakeItem(leaf, symbol):
                self.symbols[symbol] = name = self._unpack(symbol)
                return [CheckLine(assign=f"{name} = {self.leaves[leaf]}.item()")]
            case checks.TakeInteger(leaf, symbol):
                self.symbols[symbol] = self.leaves[leaf]
                return []
            case _:
                assert_never(step)

    # --- names -----------------------------------------------------------------------------------

    def _unpack(self, wish: str) -> str:
        name: str = self._names.claim(wish)
        self.unpacked.append(name)
        return name

    def _dim(self, leaf: int, dim: int, symbol: str | None) -> str:
        if symbol is not None:
            self.symbols[symbol] = self._unpack(symbol)
            return self.symbols[symbol]
        self._dims[leaf, dim] = self._names.claim(f"{self._labels[leaf]}_{dim}")
        return self._dims[leaf, dim]

    def _path(self, where: checks.Where) -> str:
        match where:
            case checks.Whole(parameter):
                return str(self._parameters[parameter])
            case checks.Part(of, key):
                return f"{self._path(of)}[{literal_text(key)}]"
            case checks.Flat(of, number):
                return f"{self._trees[of][0]}[{number}]"
            case _:
                assert_never(where)

    def _renamed(self, text: str) -> str:
        """An expression over symbols, with the names that they have here."""
        return _WORD.sub(lambda word: self.symbols.get(word.group(), word.group()), text)

    def _equals(self, left: str, size: Size | float) -> str:
        if isinstance(size, str):
            return _grouped(checked_text(f"{left} == {self._renamed(size)}"))
        return f"{left} == {literal_text(size)}"

    # --- checks ----------------------------------------------------------------------------------

    def _conditions(self, check: checks.Check) -> tuple[str, ...]:
        if isinstance(check, checks.ContainerCheck):
            return self._container(check)
        if isinstance(check, checks.TensorCheck):
            return self._tensor(check, self.leaves[check.leaf])
        if isinstance(check, checks.NumberCheck):
            return (self._number(check, self.leaves[check.leaf]),)
        if isinstance(check, checks.PythonCheck):
            return self._python(check, self.leaves[check.leaf])
        if isinstance(check, checks.SymbolCheck):
            return (self._symbol(check),)
        match check:
            case checks.SameAs(leaf, other, _):
                return (f"{self.leaves[leaf]} is {self.leaves[other]}",)
            case checks.Distinct((one, other)):
                return (f"{self.leaves[one]} is not {self.leaves[other]}",)
            case checks.Distinct(leaves):
                numbers = ", ".join(f"id({self.leaves[leaf]})" for leaf in leaves)
                return (f"len({{{numbers}}}) == {len(leaves)}",)
            case checks.Apart(leaf, others):
                names = ", ".join(self.leaves[each] for each in (leaf, *others))
                return (f"memory_apart({names})",)
            case checks.AsTraced():
                return (f"arguments_as_traced({', '.join(self._parameters)})",)
            case _:
                assert_never(check)

    def _container(self, check: checks.ContainerCheck) -> tuple[str, ...]:
        path = self._path(check.where)
        match check:
            case checks.KindIs(kind=kind):
                return (f"type({path}) is {kind.__name__}",)
            case checks.KeysAre(kind=kind, keys=keys):
                named = keys if kind is dict else ()
                return (
                    f"len({path}) == {len(keys)}",
                    *(f"{literal_text(key)} in {path}" for key in named),
                )
            case checks.StructureIs(where=where, structure=structure):
                expected = self._const("expected_structure", structure)
                return (f"{self._trees[where][1]} == {expected}",)
            case _:
                assert_never(check)

    def _tensor(self, check: checks.TensorCheck, name: str) -> tuple[str, ...]:
        match check:
            case checks.ClassIs(kind=None):
                plain = f"type({name}) is torch.Tensor or type({name}) is torch.nn.Parameter"
                return (f"({plain})",)
            case checks.ClassIs(kind=kind):
                return (
                    f"type({name}) is torch.{'Tensor' if kind is torch.Tensor else 'nn.Parameter'}",
                )
            case checks.DtypeIs(dtype=dtype):
                return (f"{name}.dtype is {dtype}",)
            case checks.Strided():
                return (f"{name}.layout is torch.strided",)
            case checks.DeviceIs(device=device):
                return _device(name, device)
            case checks.RankIs(rank=rank):
                return (f"{name}.dim() == {rank}",)
            case checks.Contiguous():
                return (f"{name}.is_contiguous()",)
            case checks.NotNegated():
                return (f"not {name}.is_neg()",)
            case checks.NotConjugated():
                return (f"not {name}.is_conj()",)
            case checks.GradIs(requires_grad=requires_grad):
                return (f"{'' if requires_grad else 'not '}{name}.requires_grad",)
            case checks.ShapeIs(sizes=sizes):
                return (f"{name}.shape == ({', '.join(map(str, sizes))},)",)
            case _:
                assert_never(check)

    def _number(self, check: checks.NumberCheck, name: str) -> str:
        match check:
            case checks.SizeIs(leaf, dim, size):
                return self._equals(self._dims[leaf, dim], size)
            case checks.StrideIs(dim=dim, size=size):
                return self._equals(f"{name}.stride({dim})", size)
            case checks.ItemIs(value=value):
                return self._equals(f"{name}.item()", value)
            case checks.IntegerIs(size=size):
                return self._equals(name, size)
            case _:
                assert_never(check)

    def _python(self, check: checks.PythonCheck, name: str) -> tuple[str, ...]:
        match check:
            case checks.IsInteger():
                return (f"type({name}) is int",)
            case checks.ValueIs(value=value) if isinstance(value, (bool, NoneType, EllipsisType)):
                return (f"{name} is {literal_text(value)}",)
            case checks.ValueIs(value=value) if type(value) is float and not abs(value) > 0:
                # Two NaNs are unequal and the two zeros equal, where the model's code may tell zeros apart.
                return (f"type({name}) is float", f"repr({name}) == {literal_text(repr(value))}")
            case checks.ValueIs(value=value) if is_inline_literal(value):
                return (
                    f"type({name}) is {type(value).__name__}",
                    f"{name} == {literal_text(value)}",
                )
            case checks.ValueIs(leaf, value):
                expected = self._const(f"traced_{self._labels[leaf]}", value)
                same = f"type({name}) is type({expected}) and {name} == {expected}"
                return (f"({name} is {expected} or ({same}))",)
            case _:
                assert_never(check)

    def _symbol(self, check: checks.SymbolCheck) -> str:
        match check:
            case checks.InRange(symbol, low, None):
                return f"{self.symbols[symbol]} >= {low}"
            case checks.InRange(symbol, None, high):
                return f"{self.symbols[symbol]} <= {high}"
            case checks.InRange(symbol, low, high):
                return f"{low} <= {self.symbols[symbol]} <= {high}"
            case checks.Relation(text):
                return _grouped(checked_text(self._renamed(text)))
            case _:
                assert_never(check)


def modules_in(tests: Sequence[str]) -> set[str]:
    """The modules that tests need for relations between sizes."""
    return {word for text in tests for word in _WORD.findall(text) if word in MODULES}


def targets_text(names: Sequence[str]) -> str:
    """``a, b = `` or ``(a,) = ``, or nothing."""
    if not names:
        return ""
    return f"({names[0]},) = " if len(names) == 1 else f"{', '.join(names)} = "


def _grouped(text: str) -> str:
    return f"({text})" if " or " in text else text


def _device(name: str, device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return (f"{name}.is_cpu",)
    if device.type == "cuda":
        return f"{name}.is_cuda", f"{name}.get_device() == {device.index or 0}"
    return (f"{name}.device == torch.device({literal_text(str(device))})",)
