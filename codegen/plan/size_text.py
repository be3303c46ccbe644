"""Expressions over sizes as Python. In: a symbolic expression of torch's (sympy). Out: text that computes the same, and the only names that such text may use.

The emitted checks, the explanation of a refused call and the check of captured sizes all read the same text in the same
namespace. What is not in the tables here is an `EmitError`, never a name that is missing at a call.
"""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from piecework.errors import EmitError

# How tightly a text binds, from the loosest.
(_TEST, _OR, _AND, _NOT, _COMPARE, _BITOR, _BITXOR, _BITAND, _SHIFT, _ADD, _MUL, _SIGN, _POWER, _ATOM) = range(14)  # fmt: skip

#: What texts may name besides the symbols: builtins, and the module that the emitted text imports.
FUNCTIONS = frozenset({"abs", "float", "int", "max", "min", "round"})
MODULES: Mapping[str, object] = MappingProxyType({"math": math})
RESERVED = FUNCTIONS | MODULES.keys()

_NAMESPACE = {"__builtins__": {name: getattr(builtins, name) for name in FUNCTIONS}, **MODULES}

# A text and how tightly it binds.
_Text = tuple[str, int]


def size_text(expr: object, names: Mapping[str, str]) -> str:
    """An expression or a relation as Python text over ``names`` (symbol → the name to write).

    Raises:
        EmitError: a function or a symbol in it has no text.

    Example:
        >>> size_text(expr, {"s77": "s0"})  # FloorDiv(s77, 2) + 1
        's0 // 2 + 1'
    """
    text, level = _Printer(names).text(expr)
    return _within(text, level, _OR)


def checked_text(text: str) -> str:
    """A relation made here as one that is False, instead of failing, where it would divide by zero or leave a function's domain."""
    conditions = dict.fromkeys(_domain(ast.parse(text, mode="eval").body))
    return " and ".join([*conditions, f"({text})" if " or " in text and conditions else text])


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


class _Printer:
    """Writes one expression."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def text(self, expr: Any) -> _Text:
        kind = type(expr).__name__
        write = _WRITE.get(kind)
        if write is not None:
            return write(self, expr)
        if kind in _CALLS:
            arguments = ", ".join(self.part(each, _TEST) for each in expr.args)
            return f"{_CALLS[kind]}({arguments})", _ATOM
        if kind in _OPERATORS:
            sign, level = _OPERATORS[kind]
            left, right = expr.args
            # Signs group to the left; a comparison beside another one would be a chain.
            first = level + (level == _COMPARE)
            return f"{self.part(left, first)} {sign} {self.part(right, level + 1)}", level
        raise EmitError(
            f"a size is computed with {kind}, which has no source form: {expr}",
            hint="compute it inside a splitting op, or pass it as an argument",
        )

    def part(self, expr: object, level: int) -> str:
        """``expr`` where something binds as tightly as ``level``."""
        return _within(*self.text(expr), level)

    # --- single kinds ------------------------------------------------------------------------------

    def symbol(self, expr: Any) -> _Text:
        name = self.names.get(str(expr))
        if name is None:
            raise EmitError(
                f"a size depends on {expr}, which no argument tells",
                hint="pass the size as an argument, or the tensor that has it",
            )
        return name, _ATOM

    def number(self, expr: Any) -> _Text:
        return _signed(str(int(expr)))

    def rational(self, expr: Any) -> _Text:
        return f"{expr.p} / {expr.q}", _MUL

    def real(self, expr: Any) -> _Text:
        value = float(expr)
        if not math.isfinite(value):
            raise EmitError(f"a size is compared with {value}, which has no literal")
        return _signed(repr(value))

    def truth(self, expr: Any) -> _Text:
        return str(bool(expr)), _ATOM

    def sum(self, expr: Any) -> _Text:
        first, *others = expr.as_ordered_terms()
        text = self.part(first, _ADD)
        for each in others:
            if each.as_coeff_Mul()[0].is_negative:
                text += f" - {self.part(-each, _ADD + 1)}"
            else:
                text += f" + {self.part(each, _ADD)}"
        return text, _ADD

    def product(self, expr: Any) -> _Text:
        """Factors over divisors; what is an integer is divided as integers are."""
        above: list[object] = []
        below: list[object] = []
        negative = False
        for factor in expr.as_ordered_factors():  # -2 comes as two factors, -1 and 2
            if factor.is_Rational:
                negative ^= bool(factor.p < 0)
                above += [abs(factor.p)] if abs(factor.p) != 1 else []
                below += [factor.q] if factor.q != 1 else []
            elif factor.is_Pow and factor.exp.is_Integer and factor.exp < 0:
                below.append(factor.base**-factor.exp)
            else:
                above.append(factor)
        text = " * ".join([self.operand(each) for each in above]) or "1"
        divide = "//" if expr.is_integer else "/"
        for each in below:
            text = f"{text} {divide} {self.operand(each)}"
        if not negative:
            return text, _MUL
        # Before a quotient the sign would belong to the first factor, which // would round with.
        return (f"-({text})", _SIGN) if below else (f"-{text}", _MUL)

    def operand(self, each: object) -> str:
        return str(each) if isinstance(each, int) else self.part(each, _SIGN)

    def power(self, expr: Any) -> _Text:
        base, exponent = expr.args
        return f"{self.part(base, _ATOM)} ** {self.part(exponent, _SIGN)}", _POWER

    def identity(self, expr: Any) -> _Text:
        return self.text(expr.args[0])

    def up(self, expr: Any) -> _Text:
        """The quotient, rounded up."""
        left, right = expr.args
        return f"-(-{self.part(left, _ATOM)} // {self.part(right, _SIGN)})", _SIGN

    def modular(self, expr: Any) -> _Text:
        base, divisor, modulus = expr.args
        quotient = f"{self.part(base, _MUL)} // {self.part(divisor, _SIGN)}"
        return f"{quotient} % {self.part(modulus, _SIGN)}", _MUL

    def truncated(self, expr: Any) -> _Text:
        return f"float(math.trunc({self.part(expr.args[0], _TEST)}))", _ATOM

    def logic(self, expr: Any) -> _Text:
        word, level = {"And": ("and", _AND), "Or": ("or", _OR)}[type(expr).__name__]
        parts = sorted(expr.args, key=str)
        return f" {word} ".join(self.part(each, level + 1) for each in parts), level

    def negation(self, expr: Any) -> _Text:
        return f"not {self.part(expr.args[0], _NOT)}", _NOT

    def choice(self, expr: Any) -> _Text:
        test, yes, no = expr.args
        return f"{self.part(yes, _OR)} if {self.part(test, _OR)} else {self.part(no, _TEST)}", _TEST


def _within(text: str, level: int, wanted: int) -> str:
    return text if level >= wanted else f"({text})"


def _signed(text: str) -> _Text:
    return text, _SIGN if text.startswith("-") else _ATOM


_WRITE: dict[str, Callable[[_Printer, Any], _Text]] = {
    "Symbol": _Printer.symbol,
    **dict.fromkeys(("Integer", "Zero", "One", "NegativeOne"), _Printer.number),
    **dict.fromkeys(("Rational", "Half"), _Printer.rational),
    "Float": _Printer.real,
    **dict.fromkeys(("BooleanTrue", "BooleanFalse"), _Printer.truth),
    "Add": _Printer.sum,
    "Mul": _Printer.product,
    **dict.fromkeys(("Pow", "PowByNatural", "FloatPow"), _Printer.power),
    "Identity": _Printer.identity,
    "CeilDiv": _Printer.up,
    "ModularIndexing": _Printer.modular,
    "TruncToFloat": _Printer.truncated,
    **dict.fromkeys(("And", "Or"), _Printer.logic),
    "Not": _Printer.negation,
    "Where": _Printer.choice,
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
    **{
        f"OpaqueUnaryFn_{name}": f"math.{name}"
        for name in (
            *("sqrt", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos", "atan"),
            *("exp", "log", "asinh", "log2"),
        )
    },
}
# Where some of those have a value at all.
_DOMAIN = {
    "sqrt": "{} >= 0",
    **dict.fromkeys(("log", "log2"), "{} > 0"),
    **dict.fromkeys(("asin", "acos"), "-1 <= {} <= 1"),
}
_OPERATORS = {
    **dict.fromkeys(("FloorDiv", "CleanDiv"), ("//", _MUL)),
    **dict.fromkeys(("Mod", "PythonMod"), ("%", _MUL)),
    **dict.fromkeys(("IntTrueDiv", "FloatTrueDiv"), ("/", _MUL)),
    "LShift": ("<<", _SHIFT),
    "RShift": (">>", _SHIFT),
    "BitwiseFn_bitwise_and": ("&", _BITAND),
    "BitwiseFn_bitwise_or": ("|", _BITOR),
    "BitwiseFn_bitwise_xor": ("^", _BITXOR),
    **dict.fromkeys(("Equality", "Eq"), ("==", _COMPARE)),
    **dict.fromkeys(("Unequality", "Ne"), ("!=", _COMPARE)),
    **dict.fromkeys(("StrictLessThan", "Lt"), ("<", _COMPARE)),
    **dict.fromkeys(("LessThan", "Le"), ("<=", _COMPARE)),
    **dict.fromkeys(("StrictGreaterThan", "Gt"), (">", _COMPARE)),
    **dict.fromkeys(("GreaterThan", "Ge"), (">=", _COMPARE)),
}
