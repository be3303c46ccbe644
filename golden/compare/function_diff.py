"""How one emitted function became another. In: two `FunctionOutline`s with their canons. Out: the paired statements and the changes.

Values that only got another name are followed through, so that one renaming is one line and not fifty. Text is never compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from piecework.golden.compare.align import Join, Pairs, align, find_joins
from piecework.golden.compare.canonical import Canon
from piecework.golden.compare.changes import Change, Subjects
from piecework.golden.compare.follow import results_after, same_work
from piecework.golden.compare.liveness_diff import liveness_changes
from piecework.golden.compare.outline import FunctionOutline, Step
from piecework.golden.compare.signature_diff import renamed_parameters, signature_changes

_NOUN = {"piece": "piece", "inlined": "call outside the pieces", "call": "statement"}


@dataclass(frozen=True, slots=True)
class FunctionDiff:
    """``pairs`` are positions of statements; ``merges`` have their whole after, ``splits`` have it before.

    ``certain`` is False if values cannot be followed by their names (one is bound twice, or two became one); then equal
    statements do not prove equal functions.
    """

    pairs: Pairs
    merges: tuple[Join, ...]
    splits: tuple[Join, ...]
    changes: tuple[Change, ...]
    certain: bool


def compare_functions(
    before: FunctionOutline, after: FunctionOutline, canon: Canon, canon_after: Canon, scope: str
) -> FunctionDiff:
    """Compare two functions; ``canon`` already maps the module-level names of the first to those of the second."""
    return _FunctionComparison(before, after, canon, canon_after, scope).run()


@dataclass(slots=True)
class _FunctionComparison:
    before: FunctionOutline
    after: FunctionOutline
    canon: Canon
    canon_after: Canon
    scope: str
    pairs: Pairs = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def run(self) -> FunctionDiff:
        parameters = renamed_parameters(self.before, self.after)
        signature = list(signature_changes(self.before, self.after, parameters, self.scope))
        self.renamed.update(parameters)
        self._rename(self.renamed)
        after_marks = [self.canon_after.mark(step) for step in self.after.steps]
        self.pairs = align([self.canon.mark(step) for step in self.before.steps], after_marks)
        self._follow_results()
        before_marks = [self.canon.mark(step) for step in self.before.steps]
        merges = find_joins(before_marks, after_marks, self.pairs)
        splits = find_joins(after_marks, before_marks, sorted((j, i) for i, j in self.pairs))
        changes = [
            *signature,
            *self._joins(merges, splits),
            *self._unpaired(merges, splits),
            *(change for i, j in self.pairs for change in self._pair(i, j, merges, splits)),
            *self._renumbered(merges, splits),
            *liveness_changes(self.before, self.after, self.pairs, self.canon.name, self.scope),
            *self._renamed_values(),
            *self._comments(),
        ]
        return FunctionDiff(
            self.pairs, tuple(merges), tuple(splits), tuple(changes), self._certain()
        )

    def _rename(self, more: dict[str, str]) -> None:
        self.canon = replace(self.canon, rename={**self.canon.rename, **more})

    def _change(
        self,
        group: str,
        kind: str,
        message: str,
        before: Step | None,
        after: Step | None,
        subjects: Subjects = (),
    ) -> Change:
        return Change(
            group,
            kind,
            message,
            self.scope,
            before.line if before is not None else None,
            after.line if after is not None else None,
            subjects,
        )

    def _certain(self) -> bool:
        bound = [_bound(function) for function in (self.before, self.after)]
        names = [self.canon.name(name) for name in bound[0]]
        return all(len(set(each)) == len(each) for each in (*bound, names))

    # --- values ------------------------------------------------------------------------------------

    def _follow_results(self) -> None:
        """Learn which value became which from the statements that were paired."""
        found: dict[str, str] = {}
        for i, j in self.pairs:
            before, after = self.before.steps[i], self.after.steps[j]
            same = same_work(before, after, self.canon, self.canon_after)
            results = results_after(before.results, after.results, same)
            other = {old: new for old, new in results.items() if old != new}
            (self.replaced if same is False else self.renamed).update(other)
            found.update(results)
        # A name that another value has now is not that value.
        taken = set(found.values()) - {
            *found,
            *self.renamed,
            *(p.name for p in self.after.parameters),
        }
        old = {name: f"{name} (before)" for name in _bound(self.before) if name in taken}
        self._rename({**found, **old})

    def _renamed_values(self) -> Iterator[Change]:
        parameters = {p.name for p in self.before.parameters}
        values = {k: v for k, v in self.renamed.items() if k not in parameters}
        for named, words in (
            (values, "renamed"),
            (self.replaced, "given by other code under another name"),
        ):
            if named:
                shown = ", ".join(f"{old} → {new}" for old, new in list(named.items())[:6])
                more = f" and {len(named) - 6} more" if len(named) > 6 else ""
                message = f"{_count(len(named), 'value')} {words}: {shown}{more}"
                yield Change("names", "changed", message, self.scope, subjects=tuple(named.items()))

    # --- statements ----------------------------------------------------------------------------------

    def _joins(self, merges: list[Join], splits: list[Join]) -> Iterator[Change]:
        for join in merges:
            parts = [self.before.steps[i] for i in join.parts]
            whole = self.after.steps[join.whole]
            message = f"{_listed(parts)} became one: {whole.callee}"
            names = tuple((part.callee, whole.callee) for part in parts)
            yield self._change("pieces", "merged", message, parts[0], whole, names)
        for join in splits:
            parts = [self.after.steps[j] for j in join.parts]
            whole = self.before.steps[join.whole]
            message = f"{whole.callee} became {len(parts)}: {_listed(parts)}"
            names = tuple((whole.callee, part.callee) for part in parts)
            yield self._change("pieces", "split", message, whole, parts[0], names)

    def _unpaired(self, merges: list[Join], splits: list[Join]) -> Iterator[Change]:
        said = {i for i, _ in self.pairs} | {i for join in merges for i in join.parts}
        said_after = {j for _, j in self.pairs} | {j for join in splits for j in join.parts}
        gone = [i for i in range(len(self.before.steps)) if i not in said]
        new = [j for j in range(len(self.after.steps)) if j not in said_after]
        for i in gone:
            step = self.before.steps[i]
            moved = next((j for j in new if self._same(step, self.after.steps[j])), None)
            if moved is not None:
                new.remove(moved)
                message = f"{label(step)} runs at another place"
                after = self.after.steps[moved]
                names = ((_subject(step), _subject(after)),)
                yield self._change(_group(step), "moved", message, step, after, names)
            else:
                message = f"{_NOUN.get(step.kind, 'statement')} {label(step)} is gone"
                names = ((_subject(step), ""),)
                yield self._change(_group(step), "removed", message, step, None, names)
        for j in new:
            step = self.after.steps[j]
            message = f"{_NOUN.get(step.kind, 'statement')} {label(step)}"
            yield self._change(_group(step), "added", message, None, step, (("", _subject(step)),))

    def _same(self, before: Step, after: Step) -> bool:
        old, new = self.canon.mark(before), self.canon_after.mark(after)
        return (old.kind, old.callee, old.reads, old.binds) == (
            new.kind,
            new.callee,
            new.reads,
            new.binds,
        )

    def _pair(self, i: int, j: int, merges: list[Join], splits: list[Join]) -> Iterator[Change]:
        before, after = self.before.steps[i], self.after.steps[j]
        joined = any(i in m.parts for m in merges) or any(j in s.parts for s in splits)
        if before.kind == "other" and before.text != after.text:
            message = f"{before.text.partition(chr(10))[0]} reads differently"
            yield self._change("calls", "changed", message, before, after)
        elif before.kind != "piece" and self.canon.callee(before) != after.callee:
            message = f"{label(after)} calls {after.callee} and not {before.callee}"
            yield self._change("calls", "changed", message, before, after)
        if joined:
            return  # said with the merge
        yield from self._results(before, after)
        yield from self._arguments(before, after)

    def _results(self, before: Step, after: Step) -> Iterator[Change]:
        old, new = self.canon.results(before), after.results
        if (old, before.unpack) == (new, after.unpack):
            return
        group = "pieces" if after.kind == "piece" else "calls"
        if set(old) == set(new) and before.unpack == after.unpack:
            message = f"{label(after)} gives its results in another order: {', '.join(new)}"
        elif len(old) != len(new):
            was, now = (_values(step.results, step.unpack) for step in (before, after))
            message = (
                f"{label(after)} gives {_count(len(new), 'result')}, was {len(old)}: {was} → {now}"
            )
        else:
            was, now = (_values(step.results, step.unpack) for step in (before, after))
            message = f"{label(after)} gives {now} and not {was}"
        names = ((", ".join(before.results), ", ".join(after.results)),)
        yield self._change(group, "changed", message, before, after, names)

    def _arguments(self, before: Step, after: Step) -> Iterator[Change]:
        old, new = self.canon.arguments(before), self.canon_after.arguments(after)
        if old == new:
            return
        # As the text before has it: there a name that is known by its new one now is not to be found.
        written = replace(self.canon, rename={}).arguments(before)
        group = "signature" if after.kind == "return" else "arguments"
        who = "the result" if after.kind == "return" else label(after)
        if len(old) == len(new):
            if sorted(old) == sorted(new) and len(old) > 1:
                order = ", ".join(new[:6]) + (", …" if new[6:] else "")
                message = f"{who}: the same arguments in another order: {order}"
                names = tuple(zip(written, new, strict=True))
                yield self._change(group, "moved", message, before, after, names)
                return
            changed = [
                (number, left, right)
                for number, (left, right) in enumerate(zip(written, new, strict=True))
                if old[number] != right
            ]
            names = tuple((left, right) for _, left, right in changed)
            yield self._change(group, "changed", _replaced(who, changed), before, after, names)
            return
        kept, added = Counter(old) & Counter(new), Counter(new) - Counter(old)
        removed = []
        for text, name in zip(written, old, strict=True):
            if not kept[name]:
                removed.append(text)
            kept[name] -= kept[name] > 0
        parts = [f"no longer takes {', '.join(removed)}"] if removed else []
        parts += [f"now takes {', '.join(added.elements())}"] if added else []
        names = (
            *((each, "") for each in removed),
            *(("", each) for each in added.elements()),
        )
        yield self._change(group, "changed", f"{who} {' and '.join(parts)}", before, after, names)

    # --- what only counts or comments ------------------------------------------------------------------

    def _renumbered(self, merges: list[Join], splits: list[Join]) -> Iterator[Change]:
        """Other submodule names of paired pieces: a renumbering if the order is kept, else other code runs."""
        said = {m.whole for m in merges}, {s.whole for s in splits}
        pieces = [
            (self.before.steps[i], self.after.steps[j], j in said[0] or i in said[1])
            for i, j in self.pairs
            if self.before.steps[i].kind == "piece"
        ]
        if self._only_renumbered({(old.callee, new.callee) for old, new, _ in pieces}):
            names = tuple(
                (old.callee, new.callee)
                for old, new, joined in pieces
                if old.callee != new.callee and not joined
            )
            if names:
                other = [f"{old} → {new}" for old, new in names]
                shown = ", ".join(other[:6]) + (f" and {len(other) - 6} more" if other[6:] else "")
                message = f"{_count(len(other), 'piece')} renumbered: {shown}"
                yield Change("names", "changed", message, self.scope, subjects=names)
            return
        for old, new, _ in pieces:
            if old.callee != new.callee:
                message = f"{label(new)} runs where {old.callee} ran"
                names = ((old.callee, new.callee),)
                yield self._change("pieces", "changed", message, old, new, names)

    def _only_renumbered(self, names: set[tuple[str, str]]) -> bool:
        """True if the tables differ and their common rows kept their order: a piece more or less shifts the numbers."""
        old, new = self.canon.submods, self.canon_after.submods
        if old == new or not all(left in old and right in new for left, right in names):
            return False
        places = sorted((old.index(left), new.index(right)) for left, right in names)
        steps = pairwise(places)
        return all(first[0] < next_[0] and first[1] < next_[1] for first, next_ in steps)

    def _comments(self) -> Iterator[Change]:
        differ = [
            (self.before.steps[i], self.after.steps[j])
            for i, j in self.pairs
            if self.before.steps[i].comment != self.after.steps[j].comment
        ]
        if differ:
            message = f"comments differ on {_count(len(differ), 'statement')}"
            yield self._change("provenance", "changed", message, *differ[0])


def _bound(function: FunctionOutline) -> list[str]:
    results = (name for step in function.steps for name in step.results)
    return [*(p.name for p in function.parameters), *results]


def label(step: Step) -> str:
    """How a statement is named in a sentence."""
    if step.kind == "piece":
        return step.callee
    if step.kind == "return":
        return "return"
    if step.kind == "other":
        return f"`{step.callee}`"
    return f"{step.callee} (gives {', '.join(step.results)})" if step.results else step.callee


def _subject(step: Step) -> str:
    """What a change of the whole statement speaks of: a piece, or what is called outside of them."""
    return step.text if step.kind == "other" else step.callee


def _group(step: Step) -> str:
    return {"piece": "pieces"}.get(step.kind, "calls")


def _values(names: tuple[str, ...], unpack: bool) -> str:
    if not names:
        return "nothing"
    return f"({', '.join(names)})" if unpack else ", ".join(names)


def _listed(steps: list[Step]) -> str:
    names = [step.callee for step in steps]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _replaced(who: str, changed: list[tuple[int, str, str]]) -> str:
    """What ``who`` takes, or the result is, in other places: ``(place, before, after)``."""
    shown = [
        f"{left} → {right}" + " (another value)" * (left == right) for _, left, right in changed
    ]
    if len(changed) > 1:
        more = f" and {len(shown) - 3} more" if shown[3:] else ""
        return f"{who}: {len(changed)} arguments are others: {', '.join(shown[:3])}{more}"
    place = "" if who == "the result" else f", argument {changed[0][0]}"
    return f"{who}{place}: {shown[0]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
