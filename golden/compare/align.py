"""Which statement became which. In: the statements of one function before and after. Out: pairs of positions, and merges and splits of pieces.

Pieces have no names that survive a change of the cut, so they are recognised by the values that cross their boundary and by the
module that they come from. Nothing is judged here: what differs within a pair is for `diff` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import inf

from piecework.golden.compare.outline import Step

# Cells of one alignment table; a larger gap is aligned by kind and arity alone.
_MAX_CELLS = 60_000
_THRESHOLD = 1.5
# Neighbours on one side that are tried as parts of a merged piece.
_MAX_PARTS = 16

Pairs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Mark:
    """What a statement is recognised by: ``reads`` and ``binds`` are texts, free of indices that merely count.

    ``digest`` is what a piece computes, "" where that is not known.
    """

    kind: str
    callee: str
    reads: tuple[str, ...]
    binds: tuple[str, ...]
    module: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Join:
    """``parts`` (positions on one side) became ``whole`` (a position on the other)."""

    parts: tuple[int, ...]
    whole: int


def mark_of(step: Step, text: Callable[[Step], Sequence[str]]) -> Mark:
    """The mark of ``step``; ``text`` writes its arguments in a form that both sides share."""
    callee = "" if step.kind == "piece" else step.callee
    return Mark(step.kind, callee, tuple(text(step)), step.results, step.module_path)


def align(before: Sequence[Mark], after: Sequence[Mark]) -> Pairs:
    """Pair statements in order. Equal ones first, then the most similar ones in what is left between them."""
    pairs: Pairs = []
    for low_b, high_b, low_a, high_a in _gaps(before, after, pairs):
        pairs += [
            (low_b + i, low_a + j) for i, j in _align_gap(before[low_b:high_b], after[low_a:high_a])
        ]
    return sorted(pairs)


def _gaps(
    before: Sequence[Hashable], after: Sequence[Hashable], pairs: Pairs
) -> list[tuple[int, int, int, int]]:
    """Add equal statements to ``pairs``; return the ranges between them."""
    gaps: list[tuple[int, int, int, int]] = []
    matcher = SequenceMatcher(None, before, after, autojunk=False)
    for tag, low_b, high_b, low_a, high_a in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(range(low_b, high_b), range(low_a, high_a), strict=True)
        elif high_b > low_b and high_a > low_a:
            gaps.append((low_b, high_b, low_a, high_a))
    return gaps


def _align_gap(before: Sequence[Mark], after: Sequence[Mark]) -> Pairs:
    if len(before) * len(after) <= _MAX_CELLS:
        return _best_alignment(before, after)
    pairs: Pairs = []
    _gaps([_coarse(mark) for mark in before], [_coarse(mark) for mark in after], pairs)
    return pairs


def _coarse(mark: Mark) -> Hashable:
    return (mark.kind, mark.callee, len(mark.reads), len(mark.binds), mark.module, mark.digest)


def _best_alignment(before: Sequence[Mark], after: Sequence[Mark]) -> Pairs:
    """The in-order pairing with the greatest total similarity (Needleman-Wunsch without a gap penalty)."""
    rows, columns = len(before), len(after)
    scores = [[similarity(b, a) for a in after] for b in before]
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            skip = max(best[i + 1][j], best[i][j + 1])
            score = scores[i][j]
            paired = best[i + 1][j + 1] + score if score >= _THRESHOLD else 0.0
            best[i][j] = max(skip, paired)
    pairs: Pairs = []
    i = j = 0
    while i < rows and j < columns:
        score = scores[i][j]
        if score >= _THRESHOLD and best[i][j] == best[i + 1][j + 1] + score:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def similarity(before: Mark, after: Mark) -> float:
    """0 for statements that cannot be the same one; more the more they share.

    What a piece computes outweighs all else, so that the last piece stays the last one when a layer
    comes before it. The module path outweighs the values: an operator put in early shifts the names
    of all later values by one.
    """
    if before.kind != after.kind:
        return 0.0
    if before.kind == "return":
        return 12.0
    same = bool(before.digest) and before.digest == after.digest
    if not same and not _may_be_one_layer(before.module, after.module):
        return 0.0
    score = 1.0 if before.callee == after.callee else 0.0
    score += 12.0 if same else 0.0
    score += 3.0 * _share(before.binds, after.binds) + 1.5 * _share(before.reads, after.reads)
    if before.module and before.module == after.module:
        score += 6.0
    if (len(before.reads), len(before.binds)) == (len(after.reads), len(after.binds)):
        score += 0.5
    return score


def _may_be_one_layer(before: str, after: str) -> bool:
    """False if both say which layers they come from, as in ``layers.1.mlp … layers.2.norm``, and have none in common."""
    (first, last), (first_after, last_after) = _layers(before), _layers(after)
    # Where both go on to the end, or both begin at the start, the other end tells them apart.
    if last == last_after == inf and -inf not in (first, first_after):
        return first == first_after
    if first == first_after == -inf and inf not in (last, last_after):
        return last == last_after
    return first <= last_after and first_after <= last


def _layers(module: str) -> tuple[float, float]:
    """The first number in each end of ``module``; open on a side that has none."""
    ends = module.split(" … ")
    first, last = (
        next((int(part) for part in end.split(".") if part.isdecimal()), None)
        for end in (ends[0], ends[-1])
    )
    return (-inf if first is None else first), (inf if last is None else last)


def _share(before: tuple[str, ...], after: tuple[str, ...]) -> float:
    if not before and not after:
        return 0.0
    left, right = set(before), set(after)
    return len(left & right) / len(left | right)


def find_joins(before: Sequence[Mark], after: Sequence[Mark], pairs: Pairs) -> list[Join]:
    """Pieces of ``before`` that one piece of ``after`` took over; call it with the sides swapped for splits.

    Neighbours without a partner were taken over with a piece if the new one differs from that piece, takes all that the
    parts take from outside of them, gives nothing that they did not give, and gives something of the last one. A piece that
    was only left out brings values with it, its weights or its results, that then are missing.
    """
    pieces = [i for i, mark in enumerate(before) if mark.kind == "piece"]
    place = {position: number for number, position in enumerate(pieces)}
    paired = {i for i, _ in pairs}
    joins: list[Join] = []
    taken: set[int] = set()
    for i, j in pairs:
        if before[i].kind != "piece" or before[i] == after[j]:
            continue
        run = _free_run(pieces, place[i], paired | taken)
        for parts in _stretches(run, run.index(i)):
            if _took_over(before, parts, after[j], paired):
                taken.update(parts)
                joins.append(Join(parts, j))
                break
    return joins


def _stretches(run: list[int], at: int) -> Iterator[tuple[int, ...]]:
    """Contiguous stretches of ``run`` around ``at``, of two or more, longest first."""
    count = len(run)
    sizes = ((low, high) for low in range(at + 1) for high in range(at, count) if high > low)
    for low, high in sorted(sizes, key=lambda ends: ends[0] - ends[1]):
        yield tuple(run[low : high + 1])


def _took_over(
    before: Sequence[Mark], parts: tuple[int, ...], whole: Mark, paired: set[int]
) -> bool:
    given = {name for i in parts for name in before[i].binds}
    return (
        _outside_reads(before, parts, paired) <= set(whole.reads)
        and set(whole.binds) <= given
        and not set(whole.binds).isdisjoint(before[parts[-1]].binds)
    )


def _outside_reads(before: Sequence[Mark], parts: tuple[int, ...], paired: set[int]) -> set[str]:
    """What the parts read that neither they nor the statements that vanished between them make."""
    between = range(parts[0], parts[-1] + 1)
    made = {name for i in between if i in parts or i not in paired for name in before[i].binds}
    return {name for i in parts for name in before[i].reads} - made


def _free_run(pieces: list[int], at: int, used: set[int]) -> list[int]:
    """``pieces[at]`` with its neighbours on both sides for as long as they have no partner."""
    low = at
    while low > 0 and pieces[low - 1] not in used and at - low < _MAX_PARTS:
        low -= 1
    high = at
    while high + 1 < len(pieces) and pieces[high + 1] not in used and high - at < _MAX_PARTS:
        high += 1
    return pieces[low : high + 1]
