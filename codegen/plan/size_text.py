"""Expressions over sizes as Python: torch's symbolic expressions become text."""

from __future__ import annotations

import ast
import builtins
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from piecework.errors import EmitError

#: What texts may name besides the symbols: builtins, and the module that the emitted text imports.
FUNCTIONS = frozenset({"abs", "float", "int", "max", "min", "round"})
MODULES: Mapping[str, object] = MappingProxyType({"math": math})
RESERVED = FUNCTIONS | MODULES.keys()

_NAMESPACE = {"__builtins__": {name: getattr(builtins, name) for name in FUNCTIONS}, **MODULES}

# What is written as a call, with the arguments as they are.
_CALLS = {
    **dict.fromkeys(("floor", "FloorToInt"), "math.floor"),
    **dict.fromkeys(("ceiling", "CeilToInt"), "math.ceil"),
    "TruncToInt": "math.trunc",
    **dict.fromkeys(("RoundToInt", "RoundDecimal"), "round"),
    **{"ToFloat": "float", "Abs": "abs", "Max": "max", "Min": "min"},
    **{f"OpaqueUnaryFn_{name}": f"math.{name}" for name in ("sqrt", "exp", "log", "log2")},
}
# What is written with a sign between its operands.
_SIGNS = {
    **dict.fromkeys(("FloorDiv", "CleanDiv"), "//"),
    **dict.fromkeys(("Mod", "PythonMod"), "%"),
    **dict.fromkeys(("IntTrueDiv", "FloatTrueDiv"), "/"),
    **dict.fromkeys(("Pow", "PowByNatural", "FloatPow"), "**"),
    **{"LShift": "<<", "RShift": ">>", "BitwiseFn_bitwise_and": "&"},
    **{"BitwiseFn_bitwise_or": "|", "BitwiseFn_bitwise_xor": "^"},
    **dict.fromkeys(("Equality", "Eq"), "=="),
    **dict.fromkeys(("Unequality", "Ne"), "!="),
    **dict.fromkeys(("StrictLessThan", "Lt"), "<"),
    **dict.fromkeys(("LessThan", "Le"), "<="),
    **dict.fromkeys(("StrictGreaterThan", "Gt"), ">"),
    **dict.fromkeys(("GreaterThan", "Ge"), ">="),
}


def size_text(expr: object, names: Mapping[str, str]) -> str:
    """An expression or a relation as Python text over ``names`` (symbol → the name to write)."""
    return ast.unparse(ast.parse(_read(expr, names), mode="eval"))  # without needless brackets


def evaluate(text: str, values: Mapping[str, float]) -> object:
    """What a text made here computes for these values."""
    try:
        return eval(text, dict(_NAMESPACE), dict(values))
    except (ArithmeticError, ValueError):
        return None


def symbols_in(text: str) -> frozenset[str]:
    """The symbols that a text made here reads."""
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    return frozenset(names - RESERVED)


def _read(expr: Any, names: Mapping[str, str]) -> str:
    """``expr`` with brackets around everything."""
    kind = type(expr).__name__
    match kind:
        case "Symbol":
            name = names.get(str(expr))
            if name is None:
                raise EmitError(
                    f"a size depends on {expr}, which no argument tells",
                    hint="pass the size as an argument, or the tensor that has it",
                )
            return name
        case "Integer" | "Zero" | "One" | "NegativeOne":
            return _number(int(expr))
        case "Rational" | "Half":
            return f"({_number(int(expr.p))} / {_number(int(expr.q))})"
        case "Float":
            value = float(expr)
            if not math.isfinite(value):
                raise EmitError(f"a size is compared with {expr}, which has no literal")
            return _number(value)
        case "BooleanTrue" | "BooleanFalse":
            return str(bool(expr))
        case "Add":
            first, *others = expr.as_ordered_terms()
            text = _read(first, names)
            for each in others:
                negative = each.as_coeff_Mul()[0].is_negative
                text = f"({text} {'-' if negative else '+'} {_read(-each if negative else each, names)})"
            return text
        case "Mul":
            return _product(expr, names)
        case "Identity":
            return _read(expr.args[0], names)
    operands = [_read(each, names) for each in getattr(expr, "args", ())]
    match kind:
        case "CeilDiv":
            return f"(-((-{operands[0]}) // {operands[1]}))"
        case "Not":
            return f"(not {operands[0]})"
        case "And" | "Or":
            ordered = [_read(each, names) for each in sorted(expr.args, key=str)]
            return f"({f' {kind.lower()} '.join(ordered)})"
    if kind in _CALLS:
        return f"{_CALLS[kind]}({', '.join(operands)})"
    if kind in _SIGNS and len(operands) == 2:
        return f"({operands[0]} {_SIGNS[kind]} {operands[1]})"
    raise EmitError(
        f"a size is computed with {kind}, which has no source form: {expr}",
        hint="compute it inside a splitting op, or pass it as an argument",
    )


def _number(value: float) -> str:
    return f"({value!r})" if value < 0 else repr(value)


def _product(expr: Any, names: Mapping[str, str]) -> str:
    """Factors over divisors; what is an integer is divided as integers are."""
    above: list[str] = []
    below: list[str] = []
    negative = False
    for factor in expr.as_ordered_factors():  # -2 comes as two factors, -1 and 2
        if factor.is_Rational:
            negative ^= bool(factor.p < 0)
            above += [str(abs(int(factor.p)))] if abs(factor.p) != 1 else []
            below += [str(int(factor.q))] if factor.q != 1 else []
        elif factor.is_Pow and factor.exp.is_Integer and factor.exp < 0:
            below.append(_read(factor.base**-factor.exp, names))
        else:
            above.append(_read(factor, names))
    # Before a quotient the sign would belong to the first factor, which // would round with.
    if negative and above and not below:
        above[0] = f"(-{above[0]})"
    text = f"({' * '.join(above or ['1'])})"
    if not below:
        return text
    text = f"({(' // ' if expr.is_integer else ' / ').join([text, *below])})"
    return f"(-{text})" if negative else text
