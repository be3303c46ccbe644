"""What became of the weights that a source binds. In: both tables and the weights that only have another name. Out: changes of the group ``signature``.

Many changes that are alike are one line: a layer's weights came or went, or all have another dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from piecework.golden.compare.changes import Change

# From this many alike changes on, they are one line.
_MANY = 2
_OF_A_LAYER = re.compile(r"\d+ bound weights of (\S+)(?: are gone)?")
_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")


def weight_changes(
    before: Mapping[str, str], after: Mapping[str, str], renamed: Mapping[str, str]
) -> Iterator[Change]:
    """Compare the bound names; ``renamed`` maps names before to names after."""
    yield from _renamed(before, after, renamed)
    now = set(renamed.values())
    gone = {
        name: text for name, text in before.items() if name not in after and name not in renamed
    }
    new = {name: text for name, text in after.items() if name not in before and name not in now}
    yield from _listed("removed", gone)
    yield from _changed({n: (before[n], after[n]) for n in before if n in after})
    yield from _listed("added", new)


def layer_of(change: Change) -> tuple[str, str] | None:
    """The layer whose weights all came or went by a change, and which of it."""
    found = _OF_A_LAYER.fullmatch(change.message)
    if change.group != "signature" or found is None:
        return None
    return found[1], "came" if change.kind == "added" else "is gone"


def _renamed(
    before: Mapping[str, str], after: Mapping[str, str], renamed: Mapping[str, str]
) -> Iterator[Change]:
    if not renamed:
        return
    shown = [
        f"{_path(before[old], old)} → {_path(after[new], new)}" for old, new in renamed.items()
    ]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    count = "1 bound weight has" if len(shown) == 1 else f"{len(shown)} bound weights have"
    message = f"{count} another name in the model: {', '.join(shown[:2])}{more}"
    yield Change("signature", "changed", message, subjects=tuple(renamed.items()))


def _listed(kind: str, weights: Mapping[str, str]) -> Iterator[Change]:
    """Weights that came or went, those of one layer together, or those at one place of many layers."""
    layers: dict[str, list[str]] = {}
    rest: list[str] = []
    for name, text in weights.items():
        layers.setdefault(_layer(_path(text, name)), []).append(name)
    for layer, names in layers.items():
        if layer and len(names) >= _MANY:
            message = f"{len(names)} bound weights of {layer}"
            message += " are gone" if kind == "removed" else ""
            yield Change("signature", kind, message, subjects=tuple(_sides(kind, n) for n in names))
            continue
        rest += names
    places: dict[tuple[str, str], list[str]] = {}
    for name in rest:
        value, _, path = weights[name].partition(" = ")
        places.setdefault((_NUMBERS.sub("*", path), value), []).append(name)
    for (place, value), names in places.items():
        if place and len(names) >= _MANY:
            message = f"{len(names)} bound weights {place} "
            message += "are gone" if kind == "removed" else f"= {value}"
            yield Change("signature", kind, message, subjects=tuple(_sides(kind, n) for n in names))
            continue
        for name in names:
            message = f"bound weight {name} " + (
                "is gone" if kind == "removed" else f"= {weights[name]}"
            )
            yield Change("signature", kind, message, subjects=(_sides(kind, name),))


def _changed(both: Mapping[str, tuple[str, str]]) -> Iterator[Change]:
    """Weights that are bound to something else; a dtype that is another one for many of them is one line."""
    dtypes: dict[tuple[str, str], list[str]] = {}
    for name, (old, new) in both.items():
        (one, bracket, rest), (other, _, rest_after) = old.partition("["), new.partition("[")
        if one != other and bracket and rest == rest_after:
            dtypes.setdefault((one, other), []).append(name)
    folded = {name for names in dtypes.values() if len(names) >= _MANY for name in names}
    for (one, other), names in dtypes.items():
        if len(names) >= _MANY:
            message = f"{len(names)} bound weights: {one} → {other}"
            yield Change("signature", "changed", message, subjects=tuple((n, n) for n in names))
    for name, (old, new) in both.items():
        if old != new and name not in folded:
            message = f"bound weight {name}: {old} → {new}"
            yield Change("signature", "changed", message, subjects=((name, name),))


def _sides(kind: str, name: str) -> tuple[str, str]:
    return (name, "") if kind == "removed" else ("", name)


def _path(description: str, name: str) -> str:
    """Where the model has the weight: ``layers.0.mlp.weight`` of ``f32[12, 8] = layers.0.mlp.weight``."""
    return description.partition(" = ")[2] or name


def _layer(path: str) -> str:
    """``layers.0`` of ``layers.0.mlp.weight``; "" where no part of it is a number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
