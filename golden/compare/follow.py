"""Which value became which. In: paired statements, or tables of weights. Out: maps from names before to names after; nothing is judged here.

A name says little by itself: an operator put in early shifts the numbers of all later ones, so that one name is of one layer before and of another after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from piecework.golden.compare.canonical import Canon
from piecework.golden.compare.outline import Step

_NUMBER = re.compile(r"_\d+$")


def same_work(before: Step, after: Step, canon: Canon, canon_after: Canon) -> bool | None:
    """Whether two paired statements compute the same of their operands; None where a piece's digest is not known."""
    if before.kind != "piece":
        return canon.callee(before) == after.callee
    one, other = canon.digests.get(before.callee), canon_after.digests.get(after.callee)
    return one == other if one and other else None


def results_after(old: Sequence[str], new: Sequence[str], same: bool | None) -> dict[str, str]:
    """Result before → result after of one pair of statements.

    Statements that do the same work give the same values in the same order. Of others, results are recognised by their names without
    the number, and what is left over by its place if as much is left on both sides.
    """
    in_place = same or [*map(_stem, old)] == [*map(_stem, new)]
    if len(old) == len(new) and (in_place or (same is None and set(old) != set(new))):
        return dict(zip(old, new, strict=True))
    found: dict[str, str] = {}
    for key in (str, _stem):
        free = [name for name in new if name not in found.values()]
        for name in old:
            if name not in found:
                match = next((each for each in free if key(each) == key(name)), None)
                if match is not None:
                    found[name] = match
                    free.remove(match)
    left = [name for name in old if name not in found]
    right = [name for name in new if name not in found.values()]
    return found | (dict(zip(left, right, strict=True)) if len(left) == len(right) else {})


def _stem(name: str) -> str:
    return _NUMBER.sub("", name)


def renamed_weights(
    before: Mapping[str, str],
    after: Mapping[str, str],
    pairs: Iterable[tuple[Step, Step]],
    canon: Canon,
    canon_after: Canon,
) -> dict[str, str]:
    """Weights that only have another name: gone on one side, new on the other, and taken at the same places by the same work.

    Where the work differs too, the last two words of the path must be the same. ``before`` and ``after`` say what each name is bound to.
    """
    found: dict[str, str] = {}
    refused: set[str] = set()
    for old, new in pairs:
        if len(old.arguments) != len(new.arguments):
            continue
        certain = same_work(old, new, canon, canon_after) is not False
        for one, other in zip(old.arguments, new.arguments, strict=True):
            name, now = one.text, other.text
            if name not in before or name in after or now not in after or now in before:
                continue
            alike = _kind(before[name]) == _kind(after[now])
            alike = alike and (certain or _end(before[name]) == _end(after[now]))
            if not alike or found.setdefault(name, now) != now:
                refused.add(name)
    taken = [found[name] for name in found if name not in refused]
    return {
        name: now for name, now in found.items() if name not in refused and taken.count(now) == 1
    }


def _kind(description: str) -> str:
    """``f32[12, 8]`` of ``f32[12, 8] = layers.0.mlp.weight``."""
    return description.partition(" = ")[0]


def _end(description: str) -> list[str]:
    return description.partition(" = ")[2].split(".")[-2:]
