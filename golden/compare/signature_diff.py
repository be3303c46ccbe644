"""What callers of a function see change. In: two functions. Out: changes of the group ``signature``.

Parameters are compared by name; one that stands where another stood, alike in all else, was renamed. Bodies are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from piecework.golden.compare.changes import Change
from piecework.golden.compare.outline import FunctionOutline, Parameter


def renamed_parameters(before: FunctionOutline, after: FunctionOutline) -> dict[str, str]:
    """Old name → new name of parameters that kept their position, kind and default."""
    old_names = {p.name for p in before.parameters}
    new_names = {p.name for p in after.parameters}
    removed = [p for p in before.parameters if p.name not in new_names]
    added = [p for p in after.parameters if p.name not in old_names]
    if len(removed) != len(added):
        return {}
    return {
        old.name: new.name
        for old, new in zip(removed, added, strict=True)
        if (old.kind, old.default) == (new.kind, new.default)
        and before.parameters.index(old) == after.parameters.index(new)
    }


def signature_changes(
    before: FunctionOutline, after: FunctionOutline, renamed: Mapping[str, str], scope: str
) -> Iterator[Change]:
    """Compare name, decorators and parameters; ``scope`` is the name to report, "" for the entry function."""
    lines = (before.line, after.line)
    old = {renamed.get(p.name, p.name): p for p in before.parameters}
    new = {p.name: p for p in after.parameters}
    for name, now in renamed.items():
        yield Change("signature", "changed", f"parameter {name} is now called {now}", scope, *lines)
    for name, parameter in old.items():
        if name not in new:
            message = f"parameter {parameter.text} is gone"
            yield Change("signature", "removed", message, scope, *lines)
        elif (parameter.kind, parameter.default) != (new[name].kind, new[name].default):
            message = f"parameter {parameter.text} is now {_described(new[name])}"
            yield Change("signature", "changed", message, scope, *lines)
    for name, parameter in new.items():
        if name not in old:
            yield Change("signature", "added", f"parameter {parameter.text}", scope, *lines)
    if [name for name in old if name in new] != [name for name in new if name in old]:
        order = ", ".join(name for name in new if name in old)
        message = f"parameters are in another order: {order}"
        yield Change("signature", "moved", message, scope, *lines)
    # A function of the module that only got another name is reported where functions are paired.
    another_name = scope == "" and before.name != after.name
    if another_name or before.extras != after.extras:
        message = f"{_head(before)} is now {_head(after)}"
        yield Change("signature", "changed", message, scope, *lines)


def _head(function: FunctionOutline) -> str:
    return " ".join((function.name, *function.extras))


def _described(parameter: Parameter) -> str:
    note = {"keyword": " (by keyword only)", "/": " (by position only)"}.get(parameter.kind, "")
    return parameter.text + note
