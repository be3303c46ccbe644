"""Expressions over sizes as Python: torch's symbolic expressions become text."""

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
        case "Mul" | "Rational" | "Half":
            above, below = expr.as_numer_denom()
            if below != 1:  # what is an integer is divided as integers are
                sign = "//" if expr.is_integer else "/"
                return f"({_read(above, names)} {sign} {_read(below, names)})"
            number = int(expr.as_coeff_Mul(rational=True)[0])
            parts = [each for each in expr.as_ordered_factors() if not each.is_Rational]
            factors = [_read(each, names) for each in parts]
            if number == -1:
                factors[0] = f"(-{factors[0]})"
            elif number != 1:
                factors.insert(0, _number(number))
            return f"({' * '.join(factors)})"
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
