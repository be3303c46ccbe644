"""What a compiler finds out about sizes while it compiles, as text, and put back; compiled code is right only where it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
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
    import sympy

    now, hints, old = known_sizes(env), _hints(env), list(before.ranges)
    if any(s in before.ranges and n > before.asserts.get(s, 0) for s, n in now.asserts.items()):
        return None
    conditions: list[Any] = [each for each in now.guards if each not in before.guards]
    for symbol in old:  # beyond guards: a size that it equals, a narrower range
        if now.replacements.get(symbol) != before.replacements.get(symbol):
            conditions.append(sympy.Eq(symbol, now.replacements[symbol], evaluate=False))
        new: Any = now.ranges.get(symbol)
        if new != before.ranges[symbol]:
            bounds = (sympy.Ge, new.lower), (sympy.Le, new.upper)
            conditions += [kind(symbol, n, evaluate=False) for kind, n in bounds if n.is_Integer]
    texts: dict[str, None] = {}
    for condition in conditions:
        if condition == True:  # noqa: E712 - sympy's
            continue
        if any(
            symbol not in before.ranges or symbol not in hints for symbol in condition.free_symbols
        ):
            return None
        text = sympy.srepr(condition)
        if _parse(text, {str(each): each for each in old}) != condition:
            return None
        texts[text] = None
    return tuple(texts)


def learn_again(env: Any, texts: Iterable[str]) -> bool:
    """Make ``env`` know conditions that `learned_since` gave for symbols of the same names, as guards."""
    symbols = {str(symbol): symbol for symbol in getattr(env, "var_to_range", {})}
    import sympy

    conditions, hints = [_parse(text, symbols) for text in texts], _hints(env)
    if not all(each is not None and each.xreplace(hints) == sympy.true for each in conditions):
        return False
    return all(bool(env.evaluate_expr(each)) for each in conditions)


def _hints(env: Any) -> dict[Any, Any]:
    return dict(getattr(env, "backed_var_to_val", {}))


def _parse(text: str, symbols: Mapping[str, object]) -> Any:
    """The condition that `sympy.srepr` wrote, with the symbols of another trace; None for any other text."""
    from sympy.logic.boolalg import Boolean

    names = dict.fromkeys(("Symbol", "Dummy"), lambda name, *_, **__: symbols[name])
    try:
        found = eval(text, {**_kinds(), **names})
    except Exception:  # noqa: BLE001 - the text may be anything
        return None
    return found if isinstance(found, Boolean) else None


@cache
def _kinds() -> dict[str, Any]:
    """What a condition may be made of: classes of sympy and of torch; relations are left as they are written."""
    import sympy
    from sympy.core.relational import Relational
    from torch.utils._sympy import functions

    found: dict[str, Any] = {"__builtins__": {}, "true": sympy.true}
    for name, kind in {**vars(sympy), **vars(functions)}.items():
        if isinstance(kind, type) and issubclass(kind, sympy.Basic):
            found[name] = partial(kind, evaluate=False) if issubclass(kind, Relational) else kind
    return found
