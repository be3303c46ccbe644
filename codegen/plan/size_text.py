"""Expressions over sizes as Python. In: a symbolic expression of torch's (sympy). Out: text that computes the same, and the only names that such text may use.

The emitted checks, the explanation of a refused call and the check of captured sizes all read the same text in the same
namespace. What is not in the tables here is an `EmitError`, never a name that is missing at a call.
"""

from __future__ import annotations

import ast
import builtins
import math
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from piecework.errors import EmitError

#: What texts may name besides the symbols: builtins, and the module that the emitted text imports.
FUNCTIONS = frozenset({"abs", "float", "int", "max", "min", "round"})
MODULES: Mapping[str, object] = MappingProxyType({"math": math})
RESERVED = FUNCTIONS | MODULES.keys()

_NAMESPACE = {"__builtins__": {name: getattr(builtins, name) for name in FUNCTIONS}, **MODULES}


def size_text(expr: object, names: Mapping[str, str]) -> str:
    """An expression or a relation as Python text over ``names`` (symbol → the name to write).

    Raises:
        EmitError: a function or a symbol in it has no text.

    Example:
        >>> size_text(expr, {"s77": "s0"})  # FloorDiv(s77, 2) + 1
        's0 // 2 + 1'
    """
    found = _Reader(names).read(expr)
    return ast.unparse(found)


def checked_text(text: str) -> str:
    """A relation made here as one that is False, instead of failing, where it would divide by zero or leave a function's domain."""
    conditions = dict.fromkeys(_domain(ast.parse(text, mode="eval").body))
    return " and ".join([*conditions, f"({text})" if " or " in text and conditions else text])


def renamed(text: str, names: Mapping[str, str]) -> str:
    """``text`` with other names for its symbols."""
    pattern = r"(?<![\w.])[A-Za-z_]\w*"
    return re.sub(pattern, lambda found: names.get(found.group(), found.group()), text)


def _domain(node: ast.AST) -> Iterator[str]:
    """What must hold for ``node`` to have a value, innermost first."""
    for child in ast.iter_child_nodes(node):
        yield from _domain(child)
    match node:
        case ast.BinOp(
            op=ast.Div() | ast.FloorDiv() | ast.Mod(), right=ast.Constant(value)
        ) if value:
            return
        case ast.BinOp(op=ast.Div() | ast.FloorDiv() | ast.Mod(), right=right):
            yield f"{_operand(right)} != 0"
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            if not (isinstance(right, ast.Constant) and type(right.value) is int):
                yield f"{_operand(left)} > 0"
        case ast.BinOp(op=ast.LShift() | ast.RShift(), right=right):
            yield f"{_operand(right)} >= 0"
        case ast.Call(func=ast.Attribute(attr=name), args=[argument]) if name in _DOMAIN:
            yield _DOMAIN[name].format(_operand(argument))


def _operand(node: ast.AST) -> str:
    text = ast.unparse(node)
    return text if isinstance(node, (ast.Name, ast.Constant, ast.Call)) else f"({text})"


def evaluate(text: str, values: Mapping[str, float]) -> object:
    """What a text made here computes for these values; None where it has no value, such as a division by zero."""
    try:
        return eval(text, dict(_NAMESPACE), dict(values))
    except (ArithmeticError, ValueError):
        return None


def symbols_in(text: str) -> frozenset[str]:
    """The symbols that a text made here reads."""
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    return frozenset(names - RESERVED)


class _Reader:
    """Makes one of torch's expressions one of Python's."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def read(self, expr: Any) -> ast.expr:
        kind = type(expr).__name__
        read = _READ.get(kind)
        if read is not None:
            return read(self, expr)
        if kind in _CALLS:
            return _call(_CALLS[kind], *map(self.read, expr.args))
        if kind in _SIGNS:
            return _operation(_SIGNS[kind], *map(self.read, expr.args))
        raise EmitError(
            f"a size is computed with {kind}, which has no source form: {expr}",
            hint="compute it inside a splitting op, or pass it as an argument",
        )

    def symbol(self, expr: Any) -> ast.expr:
        name = self.names.get(str(expr))
        if name is None:
            raise EmitError(
                f"a size depends on {expr}, which no argument tells",
                hint="pass the size as an argument, or the tensor that has it",
            )
        return ast.Name(name)

    def number(self, expr: Any) -> ast.expr:
        return _number(int(expr))

    def rational(self, expr: Any) -> ast.expr:
        return _operation("/", _number(int(expr.p)), _number(int(expr.q)))

    def real(self, expr: Any) -> ast.expr:
        value = float(expr)
        if not math.isfinite(value):
            raise EmitError(f"a size is compared with {value}, which has no literal")
        return _number(value)

    def truth(self, expr: Any) -> ast.expr:
        return ast.Constant(bool(expr))

    def sum(self, expr: Any) -> ast.expr:
        first, *others = expr.as_ordered_terms()
        found = self.read(first)
        for each in others:
            negative = each.as_coeff_Mul()[0].is_negative
            found = _operation(
                "-" if negative else "+", found, self.read(-each if negative else each)
            )
        return found

    def product(self, expr: Any) -> ast.expr:
        """Factors over divisors; what is an integer is divided as integers are."""
        above: list[ast.expr] = []
        below: list[ast.expr] = []
        negative = False
        for factor in expr.as_ordered_factors():  # -2 comes as two factors, -1 and 2
            if factor.is_Rational:
                negative ^= bool(factor.p < 0)
                above += [_number(abs(int(factor.p)))] if abs(factor.p) != 1 else []
                below += [_number(int(factor.q))] if factor.q != 1 else []
            elif factor.is_Pow and factor.exp.is_Integer and factor.exp < 0:
                below.append(self.read(factor.base**-factor.exp))
            else:
                above.append(self.read(factor))
        # Before a quotient the sign would belong to the first factor, which // would round with.
        if negative and above and not below:
            above[0] = _operation("-", above[0])
        found = _operation("*", *above) if len(above) > 1 else (*above, ast.Constant(1))[0]
        if not below:
            return found
        found = _operation("//" if expr.is_integer else "/", found, *below)
        return _operation("-", found) if negative else found

    def identity(self, expr: Any) -> ast.expr:
        return self.read(expr.args[0])

    def up(self, expr: Any) -> ast.expr:
        """The quotient, rounded up."""
        left, right = map(self.read, expr.args)
        return _operation("-", _operation("//", _operation("-", left), right))

    def logic(self, expr: Any) -> ast.expr:
        word = {"And": "and", "Or": "or"}[type(expr).__name__]
        return _operation(word, *map(self.read, sorted(expr.args, key=str)))


def _number(value: float) -> ast.expr:
    found = ast.Constant(abs(value))
    return _operation("-", found) if value < 0 else found


def _operation(sign: str, *operands: ast.expr) -> ast.expr:
    """Operands with a sign before or between them."""
    first, *rest = operands
    kind = _KINDS[sign]
    if issubclass(kind, ast.boolop):
        return ast.BoolOp(kind(), list(operands))
    if issubclass(kind, ast.cmpop):
        return ast.Compare(first, [kind()], rest)
    if not rest:
        return ast.UnaryOp(ast.Not() if sign == "not" else ast.USub(), first)
    assert issubclass(kind, ast.operator)
    for each in rest:
        first = ast.BinOp(first, kind(), each)
    return first


_KINDS: dict[str, type[ast.AST]] = {
    **{"and": ast.And, "or": ast.Or, "not": ast.Not},
    **{"==": ast.Eq, "!=": ast.NotEq, "<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE},
    **{"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "%": ast.Mod},
    **{"**": ast.Pow, "<<": ast.LShift, ">>": ast.RShift},
    **{"&": ast.BitAnd, "|": ast.BitOr, "^": ast.BitXor},
}


def _call(function: str, *arguments: ast.expr) -> ast.expr:
    path: ast.expr = ast.Name(function.split(".", maxsplit=1)[0])
    for part in function.split(".")[1:]:
        path = ast.Attribute(path, part)
    return ast.Call(path, list(arguments), [])


_READ: dict[str, Callable[[_Reader, Any], ast.expr]] = {
    "Symbol": _Reader.symbol,
    **dict.fromkeys(("Integer", "Zero", "One", "NegativeOne"), _Reader.number),
    **dict.fromkeys(("Rational", "Half"), _Reader.rational),
    "Float": _Reader.real,
    **dict.fromkeys(("BooleanTrue", "BooleanFalse"), _Reader.truth),
    "Add": _Reader.sum,
    "Mul": _Reader.product,
    "Identity": _Reader.identity,
    "CeilDiv": _Reader.up,
    **dict.fromkeys(("And", "Or"), _Reader.logic),
}
# What is written as a call, with the arguments as they are.
_CALLS = {
    **dict.fromkeys(("floor", "FloorToInt"), "math.floor"),
    **dict.fromkeys(("ceiling", "CeilToInt"), "math.ceil"),
    "TruncToInt": "math.trunc",
    **dict.fromkeys(("RoundToInt", "RoundDecimal"), "round"),
    "ToFloat": "float",
    "Abs": "abs",
    "Max": "max",
    "Min": "min",
    **{f"OpaqueUnaryFn_{name}": f"math.{name}" for name in ("sqrt", "exp", "log", "log2")},
}
# Where some of those have a value at all.
_DOMAIN = {
    "sqrt": "{} >= 0",
    **dict.fromkeys(("log", "log2"), "{} > 0"),
}
# What is written with a sign before or between its operands.
_SIGNS = {
    **dict.fromkeys(("FloorDiv", "CleanDiv"), "//"),
    **dict.fromkeys(("Mod", "PythonMod"), "%"),
    **dict.fromkeys(("IntTrueDiv", "FloatTrueDiv"), "/"),
    **dict.fromkeys(("Pow", "PowByNatural", "FloatPow"), "**"),
    "LShift": "<<",
    "RShift": ">>",
    "BitwiseFn_bitwise_and": "&",
    "BitwiseFn_bitwise_or": "|",
    "BitwiseFn_bitwise_xor": "^",
    **dict.fromkeys(("Equality", "Eq"), "=="),
    **dict.fromkeys(("Unequality", "Ne"), "!="),
    **dict.fromkeys(("StrictLessThan", "Lt"), "<"),
    **dict.fromkeys(("LessThan", "Le"), "<="),
    **dict.fromkeys(("StrictGreaterThan", "Gt"), ">"),
    **dict.fromkeys(("GreaterThan", "Ge"), ">="),
    "Not": "not",
}
