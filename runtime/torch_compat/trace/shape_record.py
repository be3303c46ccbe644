"""What a compiler finds out about sizes while it compiles; compiled code is right only there."""

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
    """All that ``env`` knows of its symbols, as text."""
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
    """The sizes of the example, by symbol; a compiler decides by them, and guards it."""
    overrides = getattr(env, "var_to_hint_override", {})
    return "\n".join(sorted(f"{k} = {v}" for k, v in (*_hints(env).items(), *overrides.items())))


def learned_since(env: Any, before: KnownSizes) -> tuple[Any, ...] | None:
    """The conditions that ``env`` did not know ``before``; None if on a size that data decides."""
    if env is None:
        return ()
    import sympy

    now, hints = known_sizes(env), _hints(env)
    if any(s in before.ranges and n > before.asserts.get(s, 0) for s, n in now.asserts.items()):
        return None
    found: list[Any] = [each for each in now.guards if each not in before.guards]
    for symbol in before.ranges:  # beyond guards: a size that it equals, a narrower range
        if now.replacements.get(symbol) != before.replacements.get(symbol):
            found.append(sympy.Eq(symbol, now.replacements[symbol], evaluate=False))
        new: Any = now.ranges.get(symbol)
        if new != before.ranges[symbol]:
            bounds = (sympy.Ge, new.lower), (sympy.Le, new.upper)
            found += [kind(symbol, n, evaluate=False) for kind, n in bounds if n.is_Integer]
    found = [each for each in dict.fromkeys(found) if each != True]  # noqa: E712 - sympy's
    symbols = {symbol for each in found for symbol in each.free_symbols}
    return tuple(found) if symbols <= before.ranges.keys() & hints.keys() else None


def learn_again(env: Any, conditions: Iterable[Any]) -> bool:
    """Make ``env`` know, as guards, what `learned_since` gave, if it holds of this example."""
    import sympy

    hints = _hints(env)
    if any(each.xreplace(hints) != sympy.true for each in conditions):
        return False
    return all(bool(env.evaluate_expr(each)) for each in conditions)


def _hints(env: Any) -> dict[Any, Any]:
    return dict(getattr(env, "backed_var_to_val", {}))
