"""Says which statement of a function became which: pairs of positions, and pieces that were merged or split.

Pieces have no names that survive a change of the cut, so they are recognised by what they compute, the values
that cross their boundary, and the module that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

_LARGEST = 60_000  # cells of one table; a larger gap between equal statements is aligned coarsely
_THRESHOLD = 1.5
_MOST_PARTS = 16

Pairs = list[tuple[int, int]]


class Mark(NamedTuple):
    """What a statement is recognised by; ``digest`` is what a piece computes, "" where unknown."""

    kind: str
    callee: str
    reads: tuple[str, ...]
    binds: tuple[str, ...]
    module: str
    digest: str = ""


class Join(NamedTuple):
    """``parts`` (positions on one side) became ``whole`` (a position on the other)."""

    parts: tuple[int, ...]
    whole: int


def align(before: Sequence[Mark], after: Sequence[Mark]) -> Pairs:
    """Pair statements in order: equal ones first, then the most similar ones between them."""
    pairs, gaps = _equal(before, after)
    for low, high, low_after, high_after in gaps:
        ours, theirs = before[low:high], after[low_after:high_after]
        if len(ours) * len(theirs) <= _LARGEST:
            found = _most_similar(ours, theirs)
        else:
            found, _ = _equal(*([_coarse(mark) for mark in side] for side in (ours, theirs)))
        pairs += [(low + i, low_after + j) for i, j in found]
    return sorted(pairs)


def _equal(
    before: Sequence[object], after: Sequence[object]
) -> tuple[Pairs, list[tuple[int, int, int, int]]]:
    """Equal statements, and the ranges between them that both sides have."""
    pairs: Pairs = []
    gaps = []
    for tag, *ends in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        low, high, low_after, high_after = ends
        if tag == "equal":
            pairs += zip(range(low, high), range(low_after, high_after), strict=True)
        elif high > low and high_after > low_after:
            gaps.append((low, high, low_after, high_after))
    return pairs, gaps


def _coarse(mark: Mark) -> object:
    return (mark.kind, mark.callee, len(mark.reads), len(mark.binds), mark.module, mark.digest)


def _most_similar(before: Sequence[Mark], after: Sequence[Mark]) -> Pairs:
    """The in-order pairing with the greatest total similarity."""
    scores = [[_similarity(b, a) for a in after] for b in before]
    best = [[0.0] * (len(after) + 1) for _ in range(len(before) + 1)]
    for i in range(len(before) - 1, -1, -1):
        for j in range(len(after) - 1, -1, -1):
            score = scores[i][j]
            paired = best[i + 1][j + 1] + score if score >= _THRESHOLD else 0.0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], paired)
    pairs: Pairs = []
    i = j = 0
    while i < len(before) and j < len(after):
        score = scores[i][j]
        if score >= _THRESHOLD and best[i][j] == best[i + 1][j + 1] + score:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _similarity(before: Mark, after: Mark) -> float:
    """0 for statements that can't be the same one. What a piece computes outweighs its module's path,
    and that the values: an operator put in early shifts the names of all later values by one."""
    if before.kind != after.kind:
        return 0.0
    same = bool(before.digest) and before.digest == after.digest
    ends = zip(before.module.split(" … "), after.module.split(" … "), strict=False)
    path = sum(3.0 for one, other in ends if one and one == other)
    if before.module and after.module and not path and not same:
        return 0.0
    score = path + (12.0 if same else 0.0) + (12.0 if before.kind == "return" else 0.0)
    score += 1.0 if before.callee == after.callee else 0.0
    score += 3.0 * _shared(before.binds, after.binds) + 1.5 * _shared(before.reads, after.reads)
    arity = (len(before.reads), len(before.binds)) == (len(after.reads), len(after.binds))
    return score + (0.5 if arity else 0.0)


def _shared(before: tuple[str, ...], after: tuple[str, ...]) -> float:
    either = {*before, *after}
    return len({*before} & {*after}) / len(either) if either else 0.0


def find_joins(before: Sequence[Mark], after: Sequence[Mark], pairs: Pairs) -> list[Join]:
    """Pieces of ``before`` that one piece of ``after`` took over; with the sides swapped, splits.

    The new one takes all that they take from outside, gives nothing that they did not give, and
    something of the last. A piece that was only left out leaves its weights or results missing.
    """
    pieces = [i for i, mark in enumerate(before) if mark.kind == "piece"]
    free = {*pieces} - {i for i, _ in pairs}
    joins: list[Join] = []
    for i, j in pairs:
        if before[i].kind != "piece" or before[i] == after[j]:
            continue
        for parts in _stretches(pieces, i, free):
            if _took_over(before, parts, after[j], {i for i, _ in pairs}):
                free -= {*parts}
                joins.append(Join(parts, j))
                break
    return joins


def _stretches(pieces: list[int], i: int, free: set[int]) -> Iterator[tuple[int, ...]]:
    """Neighbouring pieces around ``i``, two or more, all others of them free; longest first."""
    at = pieces.index(i)
    low = high = at
    while low > max(0, at - _MOST_PARTS) and pieces[low - 1] in free:
        low -= 1
    while high + 1 < min(len(pieces), at + _MOST_PARTS) and pieces[high + 1] in free:
        high += 1
    ends = [(a, b) for a in range(low, at + 1) for b in range(at, high + 1) if b > a]
    for first, last in sorted(ends, key=lambda pair: pair[0] - pair[1]):
        yield tuple(pieces[first : last + 1])


def _took_over(
    before: Sequence[Mark], parts: tuple[int, ...], whole: Mark, paired: set[int]
) -> bool:
    between = [i for i in range(parts[0], parts[-1] + 1) if i in parts or i not in paired]
    made = {name for i in between for name in before[i].binds}
    given = {name for i in parts for name in before[i].binds}
    taken = {name for i in parts for name in before[i].reads} - made
    binds = {*whole.binds}
    return taken <= {*whole.reads} and binds <= given and bool(binds & {*before[parts[-1]].binds})
