"""What changed between two emitted sources, in meaning and in text. In: two texts. Out: a `SourceDiff`.

The texts are parsed and compared, never executed. If code differs in a way that has no word of its own, the diff says so instead of
calling the sources equal.
"""

from __future__ import annotations

import ast
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from piecework.golden.compare.align import align
from piecework.golden.compare.canonical import Canon, constant_names
from piecework.golden.compare.changes import COSMETIC, GROUPS, Change
from piecework.golden.compare.follow import renamed_weights
from piecework.golden.compare.function_diff import FunctionDiff, compare_functions
from piecework.golden.compare.outline import FunctionOutline, Outline, Step, outline_of
from piecework.golden.compare.piece_code import Calls, calls_by_piece, difference
from piecework.golden.compare.weights_diff import layer_of, weight_changes


@dataclass(frozen=True, slots=True)
class SourceDiff:
    """``entry`` has the paired statements of the entry functions, for pictures; ``changes`` are in order of `GROUPS`."""

    before: Outline
    after: Outline
    entry: FunctionDiff
    changes: tuple[Change, ...]

    @property
    def same_text(self) -> bool:
        return self.before.text == self.after.text

    @property
    def same_meaning(self) -> bool:
        """True if at most names, comments and layout differ."""
        return all(change.group in COSMETIC for change in self.changes)

    def by_group(self) -> dict[str, tuple[Change, ...]]:
        """The changes under their headings, empty groups left out."""
        found = {key: tuple(c for c in self.changes if c.group == key) for key in GROUPS}
        return {key: changes for key, changes in found.items() if changes}

    @property
    def headline(self) -> str:
        """One line: ``layer layers.3 came; signature: 1, pieces: 1``."""
        if self.same_text:
            return "identical"
        if self.same_meaning:
            words = [GROUPS[key].lower() for key in self.by_group()]
            return f"same meaning; {' and '.join(words)} differ"
        counts = Counter(c.group for c in self.changes if c.group not in COSMETIC)
        found = (layer_of(change) for change in self.changes)
        layers = [f"layer {layer} {became}; " for layer, became in filter(None, found)]
        named = "".join(layers) if len(layers) < 3 else f"{len(layers)} layers came or went; "
        groups = (f"{GROUPS[key].lower()}: {counts[key]}" for key in GROUPS if counts[key])
        return named + ", ".join(groups)

    def unified(self, before: str = "before", after: str = "after", context: int = 3) -> str:
        """The textual difference in the unified format."""
        lines = difflib.unified_diff(
            self.before.text.splitlines(),
            self.after.text.splitlines(),
            before,
            after,
            lineterm="",
            n=context,
        )
        return "".join(f"{line}\n" for line in lines)

    def as_json(self) -> dict[str, object]:
        return {
            "same_text": self.same_text,
            "same_meaning": self.same_meaning,
            "headline": self.headline,
            "changes": [change.as_json() for change in self.changes],
        }


def compare_sources(
    before: str,
    after: str,
    *,
    before_name: str = "before",
    after_name: str = "after",
    graphs: tuple[str, str] = ("", ""),
) -> SourceDiff:
    """Compare two emitted sources; ``graphs`` are their graphs as printed, where they are at hand, to say how pieces differ.

    Raises:
        UsageError: one of them is not Python or defines no function; the message has its name.

    Example:
        >>> compare_sources(old, new).headline
        'pieces: 1, arguments: 2'
    """
    left, right = outline_of(before, before_name), outline_of(after, after_name)
    return _Comparison(left, right, *map(calls_by_piece, graphs)).run()


class _Comparison:
    def __init__(self, before: Outline, after: Outline, calls: Calls, calls_after: Calls) -> None:
        self.before = before
        self.after = after
        self.calls, self.calls_after = calls, calls_after
        self.canon, self.canon_after = (
            Canon(constant_names(side), tuple(side.submods.values()), digests=side.digests)
            for side in (before, after)
        )
        self.weights: dict[str, str] = {}

    def run(self) -> SourceDiff:
        partner = self._pair_functions()
        renamed = {old: new for old, new in partner.items() if old != new}
        renamed |= _renamed_by_value(self.before.aliases, self.after.aliases)
        self.canon = replace(self.canon, rename=renamed)
        entry = self._entry()
        self.weights = renamed_weights(
            self.before.bound, self.after.bound, self._steps(entry), self.canon, self.canon_after
        )
        if self.weights:
            self.canon = replace(self.canon, rename={**renamed, **self.weights})
            entry = self._entry()
        inlined = {
            name: compare_functions(
                self.before.functions[name],
                self.after.functions[other],
                self.canon,
                self.canon_after,
                other,
            )
            for name, other in partner.items()
        }
        certain = all(found.certain for found in (entry, *inlined.values()))
        changes = [
            *entry.changes,
            *(change for found in inlined.values() for change in found.changes),
            *self._computed(entry),
            *self._inlined(partner),
            *self._constants(),
            *self._module(),
            *self._comments(),
        ]
        said = any(change.group not in COSMETIC for change in changes)
        if self.before.text != self.after.text and not said and not (changes and certain):
            changes.append(self._unnamed())
        order = {group: position for position, group in enumerate(GROUPS)}
        changes.sort(key=lambda change: (order[change.group], change.function))
        return SourceDiff(self.before, self.after, entry, tuple(changes))

    def _entry(self) -> FunctionDiff:
        return compare_functions(
            self.before.entry, self.after.entry, self.canon, self.canon_after, ""
        )

    def _steps(self, entry: FunctionDiff) -> list[tuple[Step, Step]]:
        return [(self.before.entry.steps[i], self.after.entry.steps[j]) for i, j in entry.pairs]

    # --- functions of the module ---------------------------------------------------------------

    def _pair_functions(self) -> dict[str, str]:
        """Functions by name, and the others by what they do."""
        old, new = self.before.functions, self.after.functions
        partner = {name: name for name in old if name in new}
        left = [name for name in old if name not in partner]
        right = [name for name in new if name not in partner]
        for name in left:
            best = max(right, key=lambda other: self._likeness(old[name], new[other]), default=None)
            if best is not None and self._likeness(old[name], new[best]) >= 0.5:
                partner[name] = best
                right.remove(best)
        return partner

    def _likeness(self, before: FunctionOutline, after: FunctionOutline) -> float:
        pairs = align(
            [self.canon.mark(step) for step in before.steps],
            [self.canon_after.mark(step) for step in after.steps],
        )
        called = [(i, j) for i, j in pairs if before.steps[i].callee == after.steps[j].callee]
        return len(called) / max(len(before.steps), len(after.steps), 1)

    def _inlined(self, partner: Mapping[str, str]) -> Iterator[Change]:
        old, new = self.before.functions, self.after.functions
        for name in old.keys() - partner.keys():
            yield Change("functions", "removed", f"{name} is gone", name, old[name].line, None)
        for name in new.keys() - set(partner.values()):
            message = f"{name}({', '.join(p.text for p in new[name].parameters)})"
            yield Change("functions", "added", message, name, None, new[name].line)
        for name, other in partner.items():
            if name != other:
                message = f"{name} is now called {other}"
                lines = old[name].line, new[other].line
                yield Change("names", "changed", message, other, *lines)

    def _computed(self, entry: FunctionDiff) -> Iterator[Change]:
        """Pieces that compute something else; those with the same change are one. Of merged and split ones that is said already."""
        joined = {id(self.after.entry.steps[join.whole]) for join in entry.merges}
        joined |= {id(self.before.entry.steps[join.whole]) for join in entry.splits}
        found: dict[tuple[str, str], list[tuple[Step, Step]]] = {}
        for old, new in self._steps(entry):
            one, other = self.before.digests.get(old.callee), self.after.digests.get(new.callee)
            if one and other and one != other and not {id(old), id(new)} & joined:
                found.setdefault((one, other), []).append((old, new))
        for (one, other), steps in found.items():
            old, first = steps[0]
            names = _named([new.callee for _, new in steps], [*self.after.submods.values()])
            count = f"({len(steps)} pieces) compute" if steps[1:] else "computes"
            message = f"{names} {count} something else: {one} → {other}"
            sides = self.calls.get(old.callee), self.calls_after.get(first.callee)
            if sides[0] is not None and sides[1] is not None and (how := difference(*sides)):
                message += f" ({how})"
            subjects = tuple((was.callee, now.callee) for was, now in steps)
            yield Change("pieces", "changed", message, "", old.line, first.line, subjects)

    # --- tables and the rest of the module -------------------------------------------------------

    def _constants(self) -> Iterator[Change]:
        old, new = Counter(self.before.consts.values()), Counter(self.after.consts.values())
        for description in (old - new).elements():
            yield Change("constants", "removed", f"{description} is gone")
        for description in (new - old).elements():
            yield Change("constants", "added", description)
        if old == new and self.before.consts != self.after.consts:
            yield Change("names", "changed", "constants are numbered differently")

    def _module(self) -> Iterator[Change]:
        before, after = self.before, self.after
        yield from _table(
            "module", "", dict.fromkeys(before.imports, ""), dict.fromkeys(after.imports, "")
        )
        rename = self.canon.rename
        old = {rename.get(n, n): self.canon.source(v) for n, v in before.aliases.items()}
        new = {name: self.canon_after.source(value) for name, value in after.aliases.items()}
        yield from _table("module", "name", old, new)
        yield from weight_changes(before.bound, after.bound, self.weights)
        if before.format_version != after.format_version:
            message = f"format {before.format_version} → {after.format_version}"
            yield Change("module", "changed", message)
        if before.statements != after.statements:
            yield Change("module", "changed", "other statements of the module differ")
        if set(before.submods.values()) != set(after.submods.values()):
            yield from self._uncalled()

    def _uncalled(self) -> Iterator[Change]:
        """Rows of the submodule table that nothing calls: only an edited file has them."""
        for side, kind in ((self.before, "removed"), (self.after, "added")):
            functions = (side.entry, *side.functions.values())
            called = {step.callee for function in functions for step in function.steps}
            for name in side.submods.values():
                if name not in called:
                    yield Change("pieces", kind, f"{name} is listed and never called")

    def _comments(self) -> Iterator[Change]:
        old, new = self.before.banner, self.after.banner
        if len(old) != len(new):
            yield Change("provenance", "changed", "the banner differs")
        elif old != new:
            differ = [f"{a} → {b}" for a, b in zip(old, new, strict=True) if a != b]
            yield Change("provenance", "changed", f"the banner: {'; '.join(differ)}")

    def _unnamed(self) -> Change:
        """The texts differ and nothing was found: comments and layout, or code that the comparison has no word for."""
        if ast.dump(ast.parse(self.before.text)) == ast.dump(ast.parse(self.after.text)):
            return Change("layout", "changed", "only comments and layout differ")
        return Change("module", "changed", "code differs in a way that only the text shows")


def _named(names: list[str], table: list[str]) -> str:
    """``first … last`` for neighbours in ``table``, else a list."""
    places = [table.index(name) for name in names]
    if len(names) > 1 and places == [*range(places[0], places[0] + len(places))]:
        return f"{names[0]} … {names[-1]}"
    more = f" and {len(names) - 4} more" if names[4:] else ""
    return ", ".join(names[:4]) + more


def _renamed_by_value(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Aliases that kept their value and got another name."""
    gone = {value: name for name, value in before.items() if name not in after}
    return {
        gone[value]: name for name, value in after.items() if name not in before and value in gone
    }


def _table(
    group: str, noun: str, before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[Change]:
    for key in before:
        if key not in after:
            yield Change(group, "removed", f"{noun} {key} is gone".lstrip())
        elif before[key] != after[key]:
            yield Change(group, "changed", f"{noun} {key}: {before[key]} → {after[key]}")
    for key in after:
        if key not in before:
            value = f" = {after[key]}" if after[key] else ""
            yield Change(group, "added", f"{noun} {key}{value}".lstrip())
