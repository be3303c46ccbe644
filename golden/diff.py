"""Compares two emitted sources, in meaning and in text, without executing them.

Whether they mean the same is decided by one canonical form: local names by the order in which they are bound,
constants by what they are. What changed is then told from paired statements, as well as that can be told; a
difference that has no words of its own is said to be one.
"""

from __future__ import annotations

import ast
import copy
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from piecework.golden.align import Join, Mark, Pairs, align, find_joins
from piecework.golden.outline import CONSTS, FunctionOutline, Outline, Step, outline_of

# In the order in which a reviewer wants them; the last ones cannot change what the source does.
GROUPS = {
    "signature": "Signature",
    "pieces": "Pieces",
    "calls": "Calls between pieces",
    "functions": "Inlined functions",
    "arguments": "Arguments",
    "constants": "Constants",
    "liveness": "Liveness",
    "module": "Module",
    "names": "Names and numbers",
    "provenance": "Comments",
    "layout": "Layout",
}
COSMETIC = frozenset({"names", "provenance", "layout"})
MARKS = {"added": "+", "removed": "-", "changed": "~", "merged": "⇉", "split": "⇇", "moved": "↕"}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: ``kind`` is a key of `MARKS`, lines are 1-based; ``function`` is "" for the entry."""

    group: str
    kind: str
    message: str
    function: str = ""
    before_line: int | None = None
    after_line: int | None = None

    @property
    def mark(self) -> str:
        return MARKS[self.kind]

    @property
    def lines(self) -> str:
        """``line 14 → 16``, as far as there is one."""
        if self.after_line is None:
            return "" if self.before_line is None else f"line {self.before_line} before"
        same = self.before_line in (None, self.after_line)
        return f"line {self.after_line}" if same else f"line {self.before_line} → {self.after_line}"


@dataclass(frozen=True, slots=True)
class SourceDiff:
    """``pairs``, ``merges`` and ``splits`` are positions in the entry functions; ``changes`` are in order of `GROUPS`."""

    before: Outline
    after: Outline
    changes: tuple[Change, ...] = ()
    pairs: Pairs = field(default_factory=list)
    merges: Sequence[Join] = ()
    splits: Sequence[Join] = ()

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
        """One line: ``signature: 1, pieces: 1``."""
        if self.same_text:
            return "identical"
        groups = self.by_group()
        if self.same_meaning:
            return f"same meaning; {' and '.join(GROUPS[key].lower() for key in groups)} differ"
        counts = {key: len(changes) for key, changes in groups.items() if key not in COSMETIC}
        return ", ".join(f"{GROUPS[key].lower()}: {count}" for key, count in counts.items())

    def unified(self, before: str = "before", after: str = "after", context: int = 3) -> str:
        """The textual difference in the unified format."""
        sides = self.before.text.splitlines(), self.after.text.splitlines()
        lines = difflib.unified_diff(*sides, before, after, lineterm="", n=context)
        return "".join(f"{line}\n" for line in lines)

    def as_json(self) -> dict[str, object]:
        return {
            "same_text": self.same_text,
            "same_meaning": self.same_meaning,
            "headline": self.headline,
            "changes": [asdict(change) for change in self.changes],
        }


def compare_sources(
    before: str, after: str, *, before_name: str = "before", after_name: str = "after"
) -> SourceDiff:
    """Compare two emitted sources.

    Raises:
        UsageError: one of them is not Python or defines no function; the message has its name.

    Example:
        >>> compare_sources(old, new).headline
        'pieces: 1, arguments: 2'
    """
    sides = outline_of(before, before_name), outline_of(after, after_name)
    return _Comparison(*sides).run()


# --- whether they mean the same ----------------------------------------------------------------------


def constant_names(outline: Outline) -> dict[int, str]:
    """Index → description, numbered where several constants have the same one."""
    consts = outline.tables.consts
    total, seen = Counter(consts.values()), Counter[str]()
    names: dict[int, str] = {}
    for index, description in sorted(consts.items()):
        seen[description] += 1
        number = f" #{seen[description]}" if total[description] > 1 else ""
        names[index] = description + number
    return names


class _Rewrite(ast.NodeTransformer):
    """Writes constants by what they are, and names as ``rename`` has them."""

    def __init__(self, constants: Mapping[int, str], rename: Mapping[str, str]) -> None:
        self.constants, self.rename = constants, rename

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                if name == CONSTS and index in self.constants:
                    return ast.Name(f"{CONSTS}[{self.constants[index]}]", node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.rename.get(node.id, node.id), node.ctx)


def _meanings(outline: Outline) -> dict[str, str]:
    """The canonical form of each function and, under "", of the rest of the module."""
    constants = constant_names(outline)
    found: dict[str, str] = {}
    numbers = {name: f"<{at}>" for at, name in enumerate([*outline.aliases, *outline.functions])}
    rest: list[ast.stmt] = []
    for stmt in copy.deepcopy(outline.tree).body:
        if not isinstance(stmt, ast.FunctionDef):
            rest.append(cast(ast.stmt, _Rewrite(constants, numbers).visit(stmt)))
            continue
        params = {arg.arg for arg in ast.walk(stmt.args) if isinstance(arg, ast.arg)}
        stored = (
            node.id
            for each in stmt.body
            for node in ast.walk(each)
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)
        )
        local = dict.fromkeys(name for name in stored if name not in params)
        rename = {name: new for name, new in numbers.items() if name not in params}
        rename |= {name: f"({at})" for at, name in enumerate(local)}
        name, stmt.name = stmt.name, ""
        found[name] = ast.dump(_Rewrite(constants, rename).visit(_one_del(stmt)))
        if name not in outline.functions:
            found[name] += name
    found[""] = "\n".join(map(ast.dump, rest))
    return found


def _one_del(function: ast.FunctionDef) -> ast.FunctionDef:
    """Neighbouring deletions are one, in the order of the names' first binding: their order has no meaning."""
    order: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            order.setdefault(node.id, len(order))
    body: list[ast.stmt] = []
    for stmt in function.body:
        if isinstance(stmt, ast.Delete) and body and isinstance(body[-1], ast.Delete):
            body[-1].targets += stmt.targets
        else:
            body.append(stmt)
    for stmt in body:
        if isinstance(stmt, ast.Delete):
            stmt.targets.sort(key=lambda each: order.get(ast.unparse(each), len(order)))
    function.body = body
    return function


# --- what changed ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Comparison:
    before: Outline
    after: Outline
    weights: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)  # functions and aliases

    def run(self) -> SourceDiff:
        before, after = self.before, self.after
        if before.text == after.text:
            pairs = [(i, i) for i in range(len(before.entry.steps))]
            return SourceDiff(before, after, pairs=pairs)
        ours, theirs = _meanings(before), _meanings(after)
        self._pair_names(ours, theirs)
        partner = {
            name: self.renamed.get(name, name)
            for name in before.functions
            if self.renamed.get(name, name) in after.functions
        }
        entry = self._function(before.entry, after.entry, "")
        inlined = [
            self._function(before.functions[name], after.functions[other], other)
            for name, other in partner.items()
        ]
        rows, rows_after = ([*side.tables.submods.values()] for side in (before, after))
        same = sorted(ours.values()) == sorted(theirs.values())
        same = same and (rows == rows_after or sorted(rows) != sorted(rows_after))
        changes = [change for each in (entry, *inlined) for change in each.changes()]
        if same:  # whatever the alignment made of it
            changes = [change for change in changes if change.group in COSMETIC]
        changes += self._computed(entry)
        changes += [*self._functions(partner), *self._constants(), *self._module()]
        said = any(change.group not in COSMETIC for change in changes)
        if not same and not said:
            message = "code differs in a way that only the text shows"
            changes.append(Change("module", "changed", message))
        if not changes:
            changes.append(Change("layout", "changed", "only comments and layout differ"))
        order = [*GROUPS]
        changes.sort(key=lambda change: (order.index(change.group), change.function))
        return SourceDiff(before, after, tuple(changes), entry.pairs, entry.merges, entry.splits)

    def _pair_names(self, ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
        """Functions and aliases that do what they did under another name."""
        for old, new, value, other in (
            (self.before.functions, self.after.functions, ours, theirs),
            (self.before.aliases, self.after.aliases, self.before.aliases, self.after.aliases),
        ):
            for name in old.keys() - new.keys():
                match = [n for n in new if n not in old and other[n] == value[name]]
                if match and match[0] not in self.renamed.values():
                    self.renamed[name] = match[0]

    def _function(
        self, before: FunctionOutline, after: FunctionOutline, scope: str
    ) -> _FunctionComparison:
        found = _FunctionComparison(self, before, after, scope)
        for i, j in found.pairs if not scope else ():
            old, new = before.steps[i].arguments, after.steps[j].arguments
            if len(old) == len(new):
                for (_, one), (_, other) in zip(old, new, strict=True):
                    self._same_weight(ast.unparse(one), ast.unparse(other))
        if self.weights and not scope:
            return _FunctionComparison(self, before, after, scope)
        return found

    def _same_weight(self, name: str, now: str) -> None:
        """A weight that is gone and one that is new are one if they are taken at the same place and alike."""
        old, new = self.before.tables.bound, self.after.tables.bound
        if name in old and name not in new and now in new and now not in old:
            one, other = (text.partition(" = ")[0] for text in (old[name], new[now]))
            if one == other and now not in self.weights.values():
                self.weights.setdefault(name, now)

    def _computed(self, entry: _FunctionComparison) -> Iterator[Change]:
        """Pieces that compute something else; those with the same change are one."""
        ours, theirs = self.before.tables.digests, self.after.tables.digests
        found: dict[tuple[str, str], list[tuple[Step, Step]]] = {}
        for old, new in entry.steps_of_pairs(joined=False):
            one, other = ours.get(old.callee), theirs.get(new.callee)
            if one and other and one != other:
                found.setdefault((one, other), []).append((old, new))
        for steps in found.values():
            old, new = steps[0]
            names = [step.callee for _, step in steps]
            who = f"{names[0]} … {names[-1]} ({len(names)} pieces)" if names[1:] else names[0]
            message = f"{who} {'compute' if names[1:] else 'computes'} something else"
            yield Change("pieces", "changed", message, "", old.line, new.line)

    def _functions(self, partner: Mapping[str, str]) -> Iterator[Change]:
        old, new = self.before.functions, self.after.functions
        for name in old.keys() - partner.keys():
            yield Change("functions", "removed", f"{name} is gone", name, old[name].line)
        for name in new.keys() - {*partner.values()}:
            message = f"{name}({', '.join(new[name].parameters.values())})"
            yield Change("functions", "added", message, name, None, new[name].line)
        for name, other in partner.items():
            if name != other:
                message = f"{name} is now called {other}"
                lines = old[name].line, new[other].line
                yield Change("names", "changed", message, other, *lines)

    def _constants(self) -> Iterator[Change]:
        ours, theirs = self.before.tables.consts, self.after.tables.consts
        old, new = Counter(ours.values()), Counter(theirs.values())
        for description in (old - new).elements():
            yield Change("constants", "removed", f"{description} is gone")
        for description in (new - old).elements():
            yield Change("constants", "added", description)
        if old == new and ours != theirs:
            yield Change("names", "changed", "constants are numbered differently")

    def _module(self) -> Iterator[Change]:
        before, after = self.before, self.after
        yield from _table("", dict.fromkeys(before.imports, ""), dict.fromkeys(after.imports, ""))
        ours, theirs = (
            {
                names.get(name, name): rewritten(ast.parse(value).body[0], constants, names)
                for name, value in side.aliases.items()
            }
            for side, names in ((before, self.renamed), (after, {}))
            for constants in (constant_names(side),)
        )
        yield from _table("name", ours, theirs)
        old, new = before.tables, after.tables
        if old.format_version != new.format_version:
            message = f"format {old.format_version} → {new.format_version}"
            yield Change("module", "changed", message)
        yield from _weights(old.bound, new.bound, self.weights)
        called = (
            {step.callee for f in (side.entry, *side.functions.values()) for step in f.steps}
            for side in (before, after)
        )
        if {*old.submods.values()} != {*new.submods.values()}:
            for kind, table, names in zip(("removed", "added"), (old, new), called, strict=True):
                for name in table.submods.values():
                    if name not in names:
                        yield Change("pieces", kind, f"{name} is listed and never called")
        if old.banner != new.banner:
            pairs = zip(old.banner, new.banner, strict=False)
            differ = "; ".join(f"{a} → {b}" for a, b in pairs if a != b)
            message = f"the banner: {differ}" if differ else "the banner differs"
            yield Change("provenance", "changed", message)


def rewritten(node: ast.AST, constants: Mapping[int, str], rename: Mapping[str, str]) -> str:
    return ast.unparse(_Rewrite(constants, rename).visit(copy.deepcopy(node)))


@dataclass(slots=True)
class _FunctionComparison:
    """One function on both sides; its values are followed from statement to statement, so that a renaming is one line."""

    whole: _Comparison
    before: FunctionOutline
    after: FunctionOutline
    scope: str
    rename: dict[str, str] = field(init=False)
    values: dict[str, str] = field(init=False)
    pairs: Pairs = field(init=False)
    merges: list[Join] = field(init=False)
    splits: list[Join] = field(init=False)

    def __post_init__(self) -> None:
        self.rename = {**self.whole.renamed, **self.whole.weights, **self._renamed_parameters()}
        theirs = [self._mark(step, self.whole.after, {}) for step in self.after.steps]
        ours = [self._mark(step, self.whole.before, self.rename) for step in self.before.steps]
        self.pairs = align(ours, theirs)
        self.values = self._followed()
        self.rename |= self.values
        # A name that another value has now is not that value.
        taken = {*self.values.values()} - {*self.values, *self.after.parameters}
        bound = {name for step in self.before.steps for name in step.results}
        self.rename |= {
            name: f"{name} (before)" for name in bound - {*self.values} if name in taken
        }
        ours = [self._mark(step, self.whole.before, self.rename) for step in self.before.steps]
        self.merges = find_joins(ours, theirs, self.pairs)
        self.splits = find_joins(theirs, ours, sorted((j, i) for i, j in self.pairs))

    def _renamed_parameters(self) -> dict[str, str]:
        ours, theirs = [*self.before.parameters], [*self.after.parameters]
        if len(ours) != len(theirs):
            return {}
        pairs = zip(ours, theirs, strict=True)
        return {a: b for a, b in pairs if a not in theirs and b not in ours}

    def _mark(self, step: Step, side: Outline, rename: Mapping[str, str]) -> Mark:
        callee = "" if step.kind == "piece" else rename.get(step.callee, step.callee)
        digest = side.tables.digests.get(step.callee, "") if step.kind == "piece" else ""
        binds = tuple(rename.get(name, name) for name in step.results)
        return Mark(
            step.kind, callee, self._texts(step, side, rename), binds, step.module_path, digest
        )

    def _texts(self, step: Step, side: Outline, rename: Mapping[str, str]) -> tuple[str, ...]:
        constants = constant_names(side) if CONSTS in step.text else {}
        return tuple(
            (f"{keyword}=" if keyword else "") + rewritten(operand, constants, rename)
            for keyword, operand in step.arguments
        )

    def _followed(self) -> dict[str, str]:
        """Value before → value after: by place in the results of paired statements, else by name."""
        found: dict[str, str] = {}
        for i, j in self.pairs:
            old, new = self.before.steps[i].results, self.after.steps[j].results
            if len(old) != len(new) or {*old} == {*new}:
                found |= {name: name for name in old if name in new}
            else:
                found |= dict(zip(old, new, strict=True))
        return found

    def steps_of_pairs(self, *, joined: bool = True) -> list[tuple[Step, Step]]:
        parts = {i for join in self.merges for i in join.parts}, {
            j for join in self.splits for j in join.parts
        }
        return [
            (self.before.steps[i], self.after.steps[j])
            for i, j in self.pairs
            if joined or not (i in parts[0] or j in parts[1])
        ]

    def changes(self) -> Iterator[Change]:
        yield from self._signature()
        yield from self._joins()
        yield from self._unpaired()
        for old, new in self.steps_of_pairs():
            yield from self._called(old, new)
        for old, new in self.steps_of_pairs(joined=False):
            yield from self._results(old, new)
            yield from self._arguments(old, new)
        yield from self._renumbered()
        yield from self._liveness()
        other = [f"{old} → {new}" for old, new in self.values.items() if old != new]
        if other:
            message = f"{_count(len(other), 'value')} renamed: {_some(other)}"
            yield Change("names", "changed", message, self.scope)
        differ = [pair for pair in self.steps_of_pairs() if pair[0].comment != pair[1].comment]
        if differ:
            message = f"comments differ on {_count(len(differ), 'statement')}"
            yield self._change("provenance", "changed", message, *differ[0])

    def _change(
        self, group: str, kind: str, message: str, before: Step | None, after: Step | None
    ) -> Change:
        lines = (None if step is None else step.line for step in (before, after))
        return Change(group, kind, message, self.scope, *lines)

    def _signature(self) -> Iterator[Change]:
        def change(kind: str, message: str) -> Change:
            lines = self.before.line, self.after.line
            return Change("signature", kind, message, self.scope, *lines)

        renamed, new = self._renamed_parameters(), self.after.parameters
        old = {renamed.get(name, name): text for name, text in self.before.parameters.items()}
        for name, now in renamed.items():
            yield change("changed", f"parameter {name} is now called {now}")
        for name, text in old.items():
            if name not in new:
                yield change("removed", f"parameter {text} is gone")
            elif text != new[name] and name not in renamed.values():
                yield change("changed", f"parameter {name} is now {new[name]}")
        for name in new.keys() - old.keys():
            yield change("added", f"parameter {new[name]}")
        if [name for name in old if name in new] != [name for name in new if name in old]:
            yield change("moved", f"parameters are in another order: {', '.join(new)}")
        if not self.scope and self.before.name != self.after.name:
            yield change("changed", f"{self.before.name} is now {self.after.name}")

    def _joins(self) -> Iterator[Change]:
        for join in self.merges:
            parts = [self.before.steps[i] for i in join.parts]
            whole = self.after.steps[join.whole]
            message = f"{_listed(parts)} became one: {whole.callee}"
            yield self._change("pieces", "merged", message, parts[0], whole)
        for join in self.splits:
            parts = [self.after.steps[j] for j in join.parts]
            whole = self.before.steps[join.whole]
            message = f"{whole.callee} became {len(parts)}: {_listed(parts)}"
            yield self._change("pieces", "split", message, whole, parts[0])

    def _unpaired(self) -> Iterator[Change]:
        said = {i for i, _ in self.pairs} | {i for join in self.merges for i in join.parts}
        said_after = {j for _, j in self.pairs} | {j for join in self.splits for j in join.parts}
        new = [step for j, step in enumerate(self.after.steps) if j not in said_after]
        marks = {
            id(step): self._mark(step, self.whole.after, {})._replace(module="") for step in new
        }
        for i, step in enumerate(self.before.steps):
            if i in said:
                continue
            mark = self._mark(step, self.whole.before, self.rename)._replace(module="")
            moved = next((other for other in new if marks[id(other)] == mark), None)
            if moved is None:
                message = f"{_NOUN.get(step.kind, 'statement')} {_label(step)} is gone"
                yield self._change(_group(step), "removed", message, step, None)
            else:
                new.remove(moved)
                message = f"{_label(step)} runs at another place"
                yield self._change(_group(step), "moved", message, step, moved)
        for step in new:
            message = f"{_NOUN.get(step.kind, 'statement')} {_label(step)}"
            yield self._change(_group(step), "added", message, None, step)

    def _called(self, old: Step, new: Step) -> Iterator[Change]:
        if old.kind == "other" and old.text != new.text:
            message = f"{old.text.partition(chr(10))[0]} reads differently"
            yield self._change("calls", "changed", message, old, new)
        elif old.kind != "piece" and self.rename.get(old.callee, old.callee) != new.callee:
            message = f"{_label(new)} calls {new.callee} and not {old.callee}"
            yield self._change("calls", "changed", message, old, new)

    def _results(self, old: Step, new: Step) -> Iterator[Change]:
        ours = tuple(self.rename.get(name, name) for name in old.results)
        if (ours, old.unpack) == (new.results, new.unpack):
            return
        was, now = _values(old), _values(new)
        if len(ours) != len(new.results):
            count = _count(len(new.results), "result")
            message = f"{_label(new)} gives {count}, was {len(ours)}: {was} → {now}"
        elif {*ours} == {*new.results} and old.unpack == new.unpack:
            message = f"{_label(new)} gives its results in another order: {', '.join(new.results)}"
        else:
            message = f"{_label(new)} gives {now} and not {was}"
        yield self._change(_group(new), "changed", message, old, new)

    def _arguments(self, old: Step, new: Step) -> Iterator[Change]:
        ours = self._texts(old, self.whole.before, self.rename)
        theirs = self._texts(new, self.whole.after, {})
        if ours == theirs:
            return
        group, who = (
            ("signature", "the result") if new.kind == "return" else ("arguments", _label(new))
        )
        # As the text before has them: a name that is known by its new one is not to be found there.
        written = self._texts(old, self.whole.before, {})
        if len(ours) > 1 and sorted(ours) == sorted(theirs):
            message = f"{who}: the same arguments in another order: {_some(theirs)}"
            yield self._change(group, "moved", message, old, new)
            return
        if len(ours) == len(theirs):
            changed = [
                (number, f"{was} → {now}")
                for number, (was, mine, now) in enumerate(zip(written, ours, theirs, strict=True))
                if mine != now
            ]
            number, first = changed[0]
            place = "" if new.kind == "return" else f", argument {number}"
            more = f"; {_some([text for _, text in changed[1:]])}" if changed[1:] else ""
            yield self._change(group, "changed", f"{who}{place}: {first}{more}", old, new)
            return
        gone = _without(zip(ours, written, strict=True), theirs)
        came = _without(zip(theirs, theirs, strict=True), ours)
        parts = [f"no longer takes {', '.join(gone)}"] if gone else []
        parts += [f"now takes {', '.join(came)}"] if came else []
        yield self._change(group, "changed", f"{who} {' and '.join(parts)}", old, new)

    def _renumbered(self) -> Iterator[Change]:
        """Other names of paired pieces: a renumbering where the tables differ, else other code runs."""
        pieces = [
            (old, new)
            for old, new in self.steps_of_pairs(joined=False)
            if old.kind == "piece" and old.callee != new.callee
        ]
        tables = self.whole.before.tables, self.whole.after.tables
        ours, theirs = ([*table.submods.values()] for table in tables)
        if pieces and ours != theirs and sorted(ours) != sorted(theirs):
            other = [f"{old.callee} → {new.callee}" for old, new in pieces]
            message = f"{_count(len(other), 'piece')} renumbered: {_some(other)}"
            yield Change("names", "changed", message, self.scope)
            return
        for old, new in pieces:
            message = f"{_label(new)} runs where {old.callee} ran"
            yield self._change("pieces", "changed", message, old, new)

    def _liveness(self) -> Iterator[Change]:
        partner = dict(self.pairs)
        for name, new in {
            p: p for p in self.before.parameters if p in self.after.parameters
        }.items():
            yield from self._death(name, new, partner)
        for name, new in self.values.items():
            yield from self._death(name, new, partner)

    def _death(self, name: str, new: str, partner: Mapping[int, int]) -> Iterator[Change]:
        was, now = self.before.deaths.get(name), self.after.deaths.get(new)
        lines = (
            None if at is None or at < 0 else side.steps[at].line
            for at, side in ((was, self.before), (now, self.after))
        )
        if was is None and now is not None:
            message = f"{new} is now deleted {_place(self.after, now)}"
            yield Change("liveness", "added", message, self.scope, *lines)
        elif was is not None and now is None:
            yield Change("liveness", "removed", f"{name} is no longer deleted", self.scope, *lines)
        elif was is not None and now is not None and partner.get(was, now) != now:
            word = "longer" if partner[was] < now else "shorter"
            places = f"{_place(self.after, now)}, was {_place(self.before, was)}"
            message = f"{new} lives {word}: deleted {places}"
            yield Change("liveness", "changed", message, self.scope, *lines)


# --- words -------------------------------------------------------------------------------------------

_NOUN = {"piece": "piece", "inlined": "call outside the pieces", "call": "statement"}


def _label(step: Step) -> str:
    if step.kind in ("piece", "inlined") or not step.results:
        return step.callee
    return f"{step.callee} (gives {', '.join(step.results[:3])})"


def _group(step: Step) -> str:
    return "pieces" if step.kind == "piece" else "calls"


def _values(step: Step) -> str:
    names = ", ".join(step.results)
    return f"({names})" if step.unpack else names or "nothing"


def _place(function: FunctionOutline, index: int) -> str:
    if index < 0:
        return "at the start"
    step = function.steps[index]
    return f"after {step.callee} in line {step.line}"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _some(texts: Sequence[str], most: int = 6) -> str:
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")


def _listed(steps: Sequence[Step]) -> str:
    *first, last = (step.callee for step in steps)
    return f"{', '.join(first)} and {last}" if first else last


def _without(texts: Iterable[tuple[str, str]], others: Iterable[str]) -> list[str]:
    """What is written for those texts that are not among ``others``, each counted."""
    left = Counter(others)
    found = []
    for text, written in texts:
        if left[text]:
            left[text] -= 1
        else:
            found.append(written)
    return found


def _table(noun: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for key, value in before.items():
        if key not in after:
            yield Change("module", "removed", f"{noun} {key} is gone".lstrip())
        elif value != after[key]:
            yield Change("module", "changed", f"{noun} {key}: {value} → {after[key]}")
    for key in after.keys() - before.keys():
        value = f" = {after[key]}" if after[key] else ""
        yield Change("module", "added", f"{noun} {key}{value}".lstrip())


def _weights(
    before: Mapping[str, str], after: Mapping[str, str], renamed: Mapping[str, str]
) -> Iterator[Change]:
    """Bound names that came, went, or hold something else; those of one layer are one line."""
    if renamed:
        other = [f"{old} → {new}" for old, new in renamed.items()]
        message = f"{_count(len(other), 'bound weight')} renamed: {_some(other, 2)}"
        yield Change("signature", "changed", message)
    for kind, word, ours, theirs, known in (
        ("removed", " is gone", before, after, renamed.keys()),
        ("added", "", after, before, renamed.values()),
    ):
        layers: dict[str, list[str]] = {}
        for name in ours:
            if name not in theirs and name not in known:
                layers.setdefault(_layer(ours[name].partition(" = ")[2]) or name, []).append(name)
        for layer, names in layers.items():
            what = f"{len(names)} bound weights of {layer}" if names[1:] else ours[names[0]]
            what = what if names[1:] else f"bound weight {names[0]} = {what}"
            yield Change("signature", kind, what + word)
    changed: dict[tuple[str, str], list[str]] = {}
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            dtypes = before[name].partition("[")[0], after[name].partition("[")[0]
            key = dtypes if dtypes[0] != dtypes[1] else (before[name], after[name])
            changed.setdefault(key, []).append(name)
    for (one, other), names in changed.items():
        who = f"{len(names)} bound weights" if names[1:] else f"bound weight {names[0]}"
        yield Change("signature", "changed", f"{who}: {one} → {other}")


def _layer(path: str) -> str:
    """``layers.0`` of ``layers.0.mlp.weight``; "" where no part of it is a number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
