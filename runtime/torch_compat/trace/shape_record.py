"""What a compiler finds out about sizes while it compiles, as text, and put back; compiled code is right only where it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KnownSizes:
    """What an environment knew at one time; guards in the order in which they were added."""

    guards: Mapping[object, None]
    ranges: Mapping[object, object]
    replacements: Mapping[object, object]
    asserts: Mapping[object, int]


def known_sizes(env: Any) -> KnownSizes:
    """What ``env`` knows now; nothing for None."""
    return KnownSizes(
        dict.fromkeys(guard.expr for guard in getattr(env, "guards", ())),
        dict(getattr(env, "var_to_range", {})),
        dict(getattr(env, "replacements", {})),
        {k: len(v) for k, v in getattr(env, "deferred_runtime_asserts", {}).items()},
    )


def sizes_text(env: Any) -> str:
    """All that ``env`` knows of its symbols, as text: guards, ranges, which are equal, what is asserted while running."""
    known = known_sizes(env)
    asserts = getattr(env, "deferred_runtime_asserts", {})
    lines = [
        *(f"guard {each}" for each in known.guards),
        *(f"{symbol} in {found}" for symbol, found in known.ranges.items()),
        *(f"{symbol} is {found}" for symbol, found in known.replacements.items()),
        *(f"{s} asserted {[str(e.expr) for e in each]}" for s, each in asserts.items()),
        *(f"{symbol} is a size" for symbol in getattr(env, "size_like", ())),
    ]
    return "\n".join(sorted(lines))


def hints_text(env: Any) -> str:
    """The sizes of the example inputs, by symbol; a compiler decides by them, and guards what it decided."""
    overrides = getattr(env, "var_to_hint_override", {})
    return "\n".join(sorted(f"{k} = {v}" for k, v in (*_hints(env).items(), *overrides.items())))


def learned_since(env: Any, before: KnownSizes) -> tuple[str, ...] | None:
    """The conditions that ``env`` knows and did not know ``before``, as text for `learn_again`.

    None where they can't be told: they concern a size that the data decides, or have no text.
    """
    if env is None:
        return ()
    now, hints = known_sizes(env), _hints(env)
    old = {symbol for symbol in before.ranges}
    if any(s in old and n > before.asserts.get(s, 0) for s, n in now.asserts.items()):
        return None
    conditions = [each for each in now.guards if each not in before.guards]
    for symbol in old:
        conditions += _of_symbol(symbol, now, before)
    texts: dict[str, None] = {}
    for condition in conditions:
        if condition in (True, _true()):
            continue
        if any(symbol not in old or symbol not in hints for symbol in condition.free_symbols):
            return None
        text = _text(condition, old)
        if text is None:
            return None
        texts[text] = None
    return tuple(texts)


def learn_again(env: Any, texts: Iterable[str]) -> bool:
    """Make ``env`` know conditions that `learned_since` gave for symbols of the same names, as guards.

    Returns:
        False, with nothing changed, if one does not hold for the example inputs.
    """
    symbols = {str(symbol): symbol for symbol in getattr(env, "var_to_range", {})}
    try:
        conditions = [_parse(text, symbols) for text in texts]
    except (KeyError, SyntaxError, TypeError, ValueError):
        return False
    hints = _hints(env)
    if not all(_is_condition(each) and each.xreplace(hints) == _true() for each in conditions):
        return False
    return all(bool(env.evaluate_expr(each)) for each in conditions)


def _of_symbol(symbol: object, now: KnownSizes, before: KnownSizes) -> list[Any]:
    """What became known of one symbol beyond guards: a narrower range, a size that it equals."""
    import sympy

    found: list[Any] = []
    if now.replacements.get(symbol) != before.replacements.get(symbol):
        found.append(sympy.Eq(symbol, now.replacements[symbol], evaluate=False))
    new, old = now.ranges.get(symbol), before.ranges[symbol]
    if new != old:
        lower, upper = new.lower, new.upper  # type: ignore[union-attr]
        found += [sympy.Ge(symbol, lower, evaluate=False)] if lower.is_Integer else []
        found += [sympy.Le(symbol, upper, evaluate=False)] if upper.is_Integer else []
    return found


def _hints(env: Any) -> dict[Any, Any]:
    return dict(getattr(env, "backed_var_to_val", {}))


def _is_condition(value: object) -> bool:
    from sympy.logic.boolalg import Boolean

    return isinstance(value, Boolean)


def _true() -> Any:
    import sympy

    return sympy.true


def _text(condition: Any, symbols: Iterable[object]) -> str | None:
    """A condition as calls by name; None if reading it back does not give the same."""
    import sympy

    text = sympy.srepr(condition)
    try:
        same = _parse(text, {str(each): each for each in symbols}) == condition
    except (KeyError, SyntaxError, TypeError, ValueError):
        return None
    return text if same else None


def _parse(text: str, symbols: Mapping[str, object]) -> Any:
    """What `sympy.srepr` wrote, with the symbols of another trace; nothing but classes of sympy and torch is called.

    Raises:
        KeyError: a symbol or a class is not known.
        SyntaxError, TypeError, ValueError: it is no such text.
    """
    return _built(ast.parse(text, mode="eval").body, symbols)


def _built(node: ast.AST, symbols: Mapping[str, object]) -> Any:
    import sympy
    from torch.utils._sympy import functions

    match node:
        case ast.Constant(value=bool() | int() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_built(operand, symbols)
        case ast.Name(id="true"):
            return sympy.true
        case ast.Call(func=ast.Name(id="Symbol" | "Dummy"), args=[ast.Constant(value=name), *_]):
            return symbols[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            kind = getattr(functions, name, None) or getattr(sympy, name, None)
            if not (isinstance(kind, type) and issubclass(kind, sympy.Basic)):
                raise KeyError(name)
            parts = [_built(each, symbols) for each in args]
            if issubclass(kind, (sympy.Number, sympy.core.relational.Relational)):
                return (
                    kind(*parts) if issubclass(kind, sympy.Number) else kind(*parts, evaluate=False)
                )
            return kind(*parts)
        case _:
            raise ValueError(f"not a condition: {ast.unparse(node)}")
