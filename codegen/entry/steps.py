"""What an entry checks of a call, as statements. In: an `EntryPlan`, by its `entry_table`. Out: statements of ``check_inputs``, and how values are called there.

This is the one reading of the table as Python. Names are given out by who asks: `emit` writes the text with them, and `proof`
reads the text back by what they mean. It decides nothing about what is checked.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from types import EllipsisType, NoneType
from typing import assert_never

import torch

from piecework.codegen.entry import checks
from piecework.codegen.entry.plan import (
    EntryPlan,
    FromLeaf,
    FromNumber,
    FromOffset,
    FromSize,
    FromSymbol,
    FromWeights,
    Passed,
    Size,
    leaves_of,
)
from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.plan.size_text import checked_text
from piecework.codegen.proof.read_ir import Words, flat, read_expression

_VALUE = "__value__"  # no symbol's name


class Steps:
    """Says steps, and remembers what values are called.

    Args:
        words: what names and values are written as, or mean.
        parameters: the parameters.
        fresh: gives out a name, near to a wished one.

    Attributes:
        leaves: flattened argument → what it is called.
        symbols: symbol → what it is called.
    """

    def __init__(
        self, words: Words, parameters: Sequence[ir.Name], fresh: Callable[[str], ir.Name]
    ) -> None:
        self.words = words
        self.parameters = tuple(parameters)
        self._fresh = fresh
        self._labels: dict[int, str] = {}
        self._trees: dict[checks.Where, tuple[ir.Name, ir.Name]] = {}
        self._dims: dict[tuple[int, int], ir.Name] = {}
        self.leaves: dict[int, ir.Expr] = {}
        self.symbols: dict[str, ir.Expr] = {}
        self._unpacked: list[ir.Name] = []  # those that are no parameters

    def say(self, text: str, **holes: ir.Expr) -> ir.Expr:
        """``text`` as an expression, in which ``holes`` stand for what they are given as."""
        return read_expression(_parsed(text), self.words, holes)

    def body(self, plan: EntryPlan) -> tuple[tuple[ir.Stmt, ...], tuple[ir.Name, ...]]:
        """All of ``check_inputs``, and what it hands back: names that the entry uses and has no parameters for."""
        body = [
            stmt
            for step in checks.entry_table(plan)
            if plan.checks or not isinstance(step, checks.Require)
            for stmt in self._statements(step)
        ]
        passed = plan.passed if plan.batch is None else (*plan.passed, plan.batch)
        used = {*map(self.origin, passed), *map(self.leaves.get, leaves_of(plan.result))}
        handed = tuple(name for name in self._unpacked if name in used)
        if handed:
            body.append(ir.Return(handed[0] if len(handed) == 1 else ir.TupleExpr(handed)))
        return tuple(body), handed

    def origin(self, value: Passed) -> ir.Expr | None:
        """What a passed value is taken from, of the arguments."""
        match value:
            case FromLeaf(leaf) | FromSize(leaf) | FromOffset(leaf):
                return self.leaves[leaf]
            case FromSymbol(name):
                return self.symbols[name]
            case FromNumber() | FromWeights():
                return None
            case _:
                assert_never(value)

    def _statements(self, step: checks.Step) -> Iterator[ir.Stmt]:
        """``step`` as statements; none for a value that has a name already."""
        match step:
            case checks.Require(about, required):
                conditions = [text for check in required for text in self._conditions(check)]
                refused = ir.Call(self.words.name("explain_inputs"), ir.Arguments(self.parameters))
                test = ir.Operation("not", (ir.Operation("and", tuple(flat("and", conditions))),))
                yield ir.If(test, (ir.Assign((), False, refused),), ir.Origin(module=about))
            case checks.TakeLeaf(leaf, label, where):
                self._labels[leaf] = label
                value = self._place(where)
                if isinstance(where, checks.Whole):
                    self.leaves[leaf] = value
                else:
                    self.leaves[leaf] = name = self._unpack(label)
                    yield ir.Assign((name.id,), False, value)
            case checks.TakeTree(where):
                value = self.say("flatten(X)", X=self._place(where))
                names = self._trees[where] = self._fresh("leaves"), self._fresh("structure")
                yield _unpacking(names, value)
            case checks.TakeShape(leaf, symbols):
                taken = [self._dim(leaf, dim, symbol) for dim, symbol in enumerate(symbols)]
                yield _unpacking(taken, self.say("X.shape", X=self.leaves[leaf]))
            case checks.TakeItem(leaf, symbol):
                self.symbols[symbol] = name = self._unpack(symbol)
                yield ir.Assign((name.id,), False, self.say("X.item()", X=self.leaves[leaf]))
            case checks.TakeInteger(leaf, symbol):
                self.symbols[symbol] = self.leaves[leaf]
            case _:
                assert_never(step)

    # --- names -----------------------------------------------------------------------------------

    def _unpack(self, wish: str) -> ir.Name:
        self._unpacked.append(self._fresh(wish))
        return self._unpacked[-1]

    def _dim(self, leaf: int, dim: int, symbol: str | None) -> ir.Name:
        if symbol is None:
            name = self._fresh(f"{self._labels[leaf]}_{dim}")
        else:
            self.symbols[symbol] = name = self._unpack(symbol)
        self._dims[leaf, dim] = name
        return name

    def _place(self, where: checks.Where) -> ir.Expr:
        match where:
            case checks.Whole(parameter):
                return self.parameters[parameter]
            case checks.Part(of, key):
                return ir.Item(self._place(of), self.words.value(key))
            case checks.Flat(of, number):
                return ir.Item(self._trees[of][0], self.words.value(number))
            case _:
                assert_never(where)

    # --- checks ----------------------------------------------------------------------------------

    def _conditions(self, check: checks.Check) -> tuple[ir.Expr, ...]:
        if isinstance(check, checks.ContainerCheck):
            return tuple(self._container(check))
        if isinstance(check, checks.TensorCheck):
            return (self._tensor(check, self.leaves[check.leaf]),)
        if isinstance(check, checks.NumberCheck):
            return (self._number(check, self.leaves[check.leaf]),)
        if isinstance(check, checks.PythonCheck):
            return (self._python(check, self.leaves[check.leaf]),)
        if isinstance(check, checks.SymbolCheck):
            return (self._symbol(check),)
        return (self._together(check),)

    def _container(self, check: checks.ContainerCheck) -> Iterator[ir.Expr]:
        value = self.words.value
        match check:
            case checks.KindIs(where, _, kind):
                yield self.say(f"type(X) is {kind.__name__}", X=self._place(where))
            case checks.KeysAre(where, _, kind, keys):
                place = self._place(where)
                yield self.say("len(X) == COUNT", X=place, COUNT=value(len(keys)))
                for key in keys if kind is dict else ():
                    yield self.say("KEY in X", KEY=value(key), X=place)
            case checks.StructureIs(where=where, structure=structure):
                expected = value(structure, "expected_structure")
                yield self.say("X == SPEC", X=self._trees[where][1], SPEC=expected)
            case _:
                assert_never(check)

    def _tensor(self, check: checks.TensorCheck, x: ir.Expr) -> ir.Expr:
        value = self.words.value
        match check:
            case checks.ClassIs(kind=None):
                return self.say("type(X) is torch.Tensor or type(X) is torch.nn.Parameter", X=x)
            case checks.ClassIs(kind=kind):
                name = "Tensor" if kind is torch.Tensor else "nn.Parameter"
                return self.say(f"type(X) is torch.{name}", X=x)
            case checks.DtypeIs(dtype=dtype):
                return self.say(f"X.dtype is {dtype}", X=x)
            case checks.Strided():
                return self.say("X.layout is torch.strided", X=x)
            case checks.DeviceIs(device=torch.device(type="cpu")):
                return self.say("X.is_cpu", X=x)
            case checks.DeviceIs(device=torch.device(type="cuda", index=index)):
                text = "X.is_cuda and X.get_device() == INDEX"
                return self.say(text, X=x, INDEX=value(index or 0))
            case checks.DeviceIs(device=device):
                return self.say("X.device == torch.device(NAME)", X=x, NAME=value(str(device)))
            case checks.RankIs(rank=rank):
                return self.say("X.dim() == RANK", X=x, RANK=value(rank))
            case checks.Contiguous():
                return self.say("X.is_contiguous()", X=x)
            case checks.NotNegated():
                return self.say("not X.is_neg()", X=x)
            case checks.NotConjugated():
                return self.say("not X.is_conj()", X=x)
            case checks.GradIs(requires_grad=True):
                return self.say("X.requires_grad", X=x)
            case checks.GradIs():
                return self.say("not X.requires_grad", X=x)
            case checks.ShapeIs(sizes=sizes):
                return self.say(
                    "X.shape == SIZES", X=x, SIZES=ir.TupleExpr(tuple(map(value, sizes)))
                )
            case _:
                assert_never(check)

    def _number(self, check: checks.NumberCheck, x: ir.Expr) -> ir.Expr:
        match check:
            case checks.SizeIs(leaf, dim, size):
                return self._equal(self._dims[leaf, dim], size)
            case checks.StrideIs(dim=dim, size=size):
                return self._equal(self.say("X.stride(DIM)", X=x, DIM=self.words.value(dim)), size)
            case checks.ItemIs(value=value):
                return self._equal(self.say("X.item()", X=x), value)
            case checks.IntegerIs(size=size):
                return self._equal(x, size)
            case _:
                assert_never(check)

    def _equal(self, x: ir.Expr, size: Size | float) -> ir.Expr:
        if isinstance(size, str):
            return self._relation(f"{_VALUE} == {size}", x)
        return self.say("X == NUMBER", X=x, NUMBER=self.words.value(size))

    def _relation(self, text: str, x: ir.Expr | None = None) -> ir.Expr:
        """A relation over symbols; it does not hold where it has no value."""
        holes = self.symbols if x is None else {**self.symbols, _VALUE: x}
        return self.say(checked_text(text), **holes)

    def _python(self, check: checks.PythonCheck, x: ir.Expr) -> ir.Expr:
        match check:
            case checks.IsInteger():
                return self.say("type(X) is int", X=x)
            case checks.ValueIs(leaf, value):
                known = self.words.value(value, f"traced_{self._labels[leaf]}")
                if check.is_object or isinstance(value, (bool, NoneType, EllipsisType)):
                    return self.say("X is VALUE", X=x, VALUE=known)
                if type(value) is float and not abs(value) > 0:
                    # Two NaNs are unequal and the two zeros equal, where the model's code may tell zeros apart.
                    shown = self.words.value(repr(value))
                    return self.say("type(X) is float and repr(X) == SHOWN", X=x, SHOWN=shown)
                if is_inline_literal(value):
                    text = f"type(X) is {type(value).__name__} and X == VALUE"
                else:
                    text = "X is VALUE or type(X) is type(VALUE) and X == VALUE"
                return self.say(text, X=x, VALUE=known)
            case _:
                assert_never(check)

    def _symbol(self, check: checks.SymbolCheck) -> ir.Expr:
        match check:
            case checks.InRange(symbol, low, high):
                text = (
                    "X <= HIGH"
                    if low is None
                    else "X >= LOW" if high is None else "LOW <= X <= HIGH"
                )
                limits = {"LOW": self.words.value(low), "HIGH": self.words.value(high)}
                return self.say(text, X=self.symbols[symbol], **limits)
            case checks.Relation(text):
                return self._relation(text)
            case _:
                assert_never(check)

    def _together(self, check: checks.TogetherCheck) -> ir.Expr:
        leaves = self.leaves
        match check:
            case checks.SameAs(leaf, other, _):
                return self.say("X is OTHER", X=leaves[leaf], OTHER=leaves[other])
            case checks.Distinct((one, other)):
                return self.say("X is not OTHER", X=leaves[one], OTHER=leaves[other])
            case checks.Distinct(every):
                numbers = ir.SetExpr(tuple(self.say("id(X)", X=leaves[leaf]) for leaf in every))
                return self.say(
                    "len(ALL) == COUNT", ALL=numbers, COUNT=self.words.value(len(every))
                )
            case checks.Apart(leaf, others):
                args = tuple(leaves[each] for each in (leaf, *others))
                return ir.Call(self.words.name("memory_apart"), ir.Arguments(args))
            case checks.AsTraced():
                return ir.Call(
                    self.words.name("arguments_as_traced"), ir.Arguments(self.parameters)
                )
            case _:
                assert_never(check)


@lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _unpacking(names: Sequence[ir.Name], value: ir.Expr) -> ir.Stmt:
    return ir.Assign(tuple(name.id for name in names), True, value)
