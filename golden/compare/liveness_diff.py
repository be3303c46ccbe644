"""How long values live, before and after. In: two functions and the pairing of their statements. Out: changes of the group ``liveness``.

A value that dies with a statement that has no partner is not reported again: the statement's own change says it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from piecework.golden.compare.align import Pairs
from piecework.golden.compare.changes import Change
from piecework.golden.compare.outline import FunctionOutline, Step


def liveness_changes(
    before: FunctionOutline,
    after: FunctionOutline,
    pairs: Pairs,
    name_after: Callable[[str], str],
    scope: str,
) -> Iterator[Change]:
    """Compare deletions of the values that both functions have; ``name_after`` maps a name to its new one."""
    partner = dict(pairs)
    last_before, last_after = last_uses(before), last_uses(after)
    known = {*last_after, *(p.name for p in after.parameters)}
    for name in dict.fromkeys([*(p.name for p in before.parameters), *last_before]):
        new = name_after(name)
        if new not in known:
            continue
        dies, dies_after = before.deaths.get(name), after.deaths.get(new)
        if dies is None and dies_after is None:
            continue
        lines = _line(before, dies), _line(after, dies_after)
        if dies_after is None:
            yield Change("liveness", "removed", f"{new} is no longer deleted", scope, *lines)
        elif dies is None:
            where = _place(after, dies_after)
            yield Change("liveness", "added", f"{new} is now deleted {where}", scope, *lines)
        elif dies in partner:
            if partner[dies] != dies_after:
                word = "longer" if dies_after > partner[dies] else "shorter"
                was, now = _place(before, dies), _place(after, dies_after)
                message = f"{new} lives {word}: deleted {now}, was {was}"
                yield Change("liveness", "changed", message, scope, *lines)
        elif dies - last_before.get(name, dies) != dies_after - last_after.get(new, dies_after):
            message = f"{new} is deleted {_place(after, dies_after)}, not right after its last use"
            if dies_after == last_after.get(new):
                message = f"{new} is now deleted right after its last use"
            yield Change("liveness", "changed", message, scope, *lines)


def last_uses(function: FunctionOutline) -> dict[str, int]:
    """Map each value to the index of the last statement that binds or reads it."""
    last: dict[str, int] = {}
    for index, step in enumerate(function.steps):
        for name in (*step.results, *_reads(step)):
            last[name] = index
    return last


def _reads(step: Step) -> Iterator[str]:
    for argument in step.arguments:
        for node in ast.walk(argument.expr):
            if isinstance(node, ast.Name):
                yield node.id


def _line(function: FunctionOutline, index: int | None) -> int | None:
    if index is None or index < 0:
        return None
    return function.steps[index].line


def _place(function: FunctionOutline, index: int) -> str:
    if index < 0:
        return "at the start"
    step = function.steps[index]
    what = f"{step.callee}" if step.kind != "other" else "a statement"
    return f"after {what} in line {step.line}"
