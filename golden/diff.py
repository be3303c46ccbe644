"""Compares two emitted sources, in meaning and in text, without executing them.

Whether they mean the same is decided by one canonical form: local names by the order in which they are bound, constants by what
they are. What changed is told from paired statements; a difference that has no words of its own is said to be one.
"""

from __future__ import annotations

import ast
import copy
import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

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
MARKS = {"added": "+", "removed": "-", "changed": "~"}

Pairs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; ``kind`` is a key of `MARKS`, lines are 1-based."""

    group: str
    kind: str
    message: str
    function: str = ""  # "" for the entry
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
    """``pairs`` are positions in the entry functions; ``changes`` are in order of `GROUPS`."""

    before: Outline
    after: Outline
    changes: tuple[Change, ...] = ()
    pairs: Pairs = field(default_factory=list)

    @property
    def same_text(self) -> bool:
        return self.before.text == self.after.text

    @property
    def same_meaning(self) -> bool:
        """True if at most names, comments and layout differ."""
        return all(change.group in COSMETIC for change in self.changes)

    def by_group(self) -> dict[str, list[Change]]:
        """The changes under their headings, empty groups left out."""
        return {key: [*changes] for key, changes in groupby(self.changes, lambda each: each.group)}

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
    old, new = outline_of(before, before_name), outline_of(after, after_name)
    entry = _Function(old, new, old.entry, new.entry)
    if before == after:
        return SourceDiff(old, new, (), entry.pairs)
    shared = old.functions.keys() & new.functions.keys()
    inlined = [_Function(old, new, old.functions[n], new.functions[n], n) for n in sorted(shared)]
    changes = [change for each in (entry, *inlined) for change in each.changes()]
    changes += _module_changes(old, new)
    rows, rows_after = ([*side.tables.submods.values()] for side in (old, new))
    same = _meaning(old) == _meaning(new)
    same = same and (rows == rows_after or sorted(rows) != sorted(rows_after))
    if same:  # whatever the pairing made of it
        changes = [change for change in changes if change.group in COSMETIC]
        sides = ([*side.aliases, *side.functions] for side in (old, new))
        names = _renamed(zip(*sides, strict=True))
        changes += [Change("names", "changed", f"of the module: {names}")] if names else []
    changes += entry.other_code()
    if not same and all(change.group in COSMETIC for change in changes):
        message = "code differs in a way that only the text shows"
        changes.append(Change("module", "changed", message))
    if not changes:
        changes.append(Change("layout", "changed", "only comments and layout differ"))
    order = [*GROUPS]
    changes.sort(key=lambda change: (order.index(change.group), change.function))
    return SourceDiff(old, new, tuple(changes), entry.pairs)


# --- whether they mean the same ----------------------------------------------------------------------


def _constants(outline: Outline) -> dict[int, str]:
    """Index → description, numbered where several constants have the same one."""
    seen, names = Counter[str](), {}
    for index, description in sorted(outline.tables.consts.items()):
        seen[description] += 1
        number = f" #{seen[description]}" if seen[description] > 1 else ""
        names[index] = description + number
    return names


class _Rewrite(ast.NodeTransformer):
    """Constants by what they are, names as ``rename`` has them, deletions in order."""

    def __init__(self, outline: Outline, rename: Mapping[str, str]) -> None:
        self.constants, self.rename = _constants(outline), rename

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                if name == CONSTS and index in self.constants:
                    return ast.Name(f"{CONSTS}[{self.constants[index]}]", node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.rename.get(node.id, node.id), node.ctx)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        body: list[ast.stmt] = []
        for deletes, group in groupby(node.body, lambda stmt: isinstance(stmt, ast.Delete)):
            stmts = [*group]
            if deletes:
                targets = (each for stmt in stmts for each in stmt.targets)  # type: ignore[attr-defined]
                stmts = [ast.Delete(sorted(targets, key=ast.unparse))]
            body += stmts
        node.body = body
        return node


def _meaning(outline: Outline) -> list[str]:
    """The canonical form: what the tables hold, then each statement of the module."""
    numbers = {name: f"<{at}>" for at, name in enumerate([*outline.aliases, *outline.functions])}
    tables = outline.tables
    found = [outline.entry.name, str(tables.format_version), *sorted(tables.consts.values())]
    found += [f"{name}: {what}" for name, what in sorted(tables.bound.items())]
    for stmt in copy.deepcopy(outline.tree).body:
        rename = numbers
        if isinstance(stmt, ast.FunctionDef):
            stmt.name = ""
            params = {arg.arg for arg in ast.walk(stmt.args) if isinstance(arg, ast.arg)}
            names = (node for node in ast.walk(stmt) if isinstance(node, ast.Name))
            stored = (node.id for node in names if not isinstance(node.ctx, ast.Load))
            local = dict.fromkeys(name for name in stored if name not in params)
            rename = {name: new for name, new in numbers.items() if name not in params}
            rename |= {name: f"({at})" for at, name in enumerate(local)}
        found.append(ast.dump(_Rewrite(outline, rename).visit(stmt)))
    return found


# --- what changed ------------------------------------------------------------------------------------


def _module_changes(old: Outline, new: Outline) -> Iterator[Change]:
    ours, theirs = (_tables(side) for side in (old, new))
    for (group, noun), before in ours.items():
        yield from _table(group, noun, before, theirs[group, noun])
    consts, consts_after = old.tables.consts, new.tables.consts
    if consts != consts_after and sorted(consts.values()) == sorted(consts_after.values()):
        yield Change("names", "changed", "constants are numbered differently")
    if old.tables.banner != new.tables.banner:
        pairs = zip(old.tables.banner, new.tables.banner, strict=False)
        differ = "; ".join(f"{a} → {b}" for a, b in pairs if a != b)
        yield Change("provenance", "changed", f"the banner: {differ or 'other lines'}")


def _tables(side: Outline) -> dict[tuple[str, str], dict[str, str]]:
    """What a module holds beside its statements, by group and noun: name → text."""
    constants = {description: "" for description in _constants(side).values()}
    return {
        ("module", "name "): {
            name: _rewritten(value, side, {}) for name, value in side.aliases.items()
        },
        ("module", ""): {
            "format": str(side.tables.format_version),
            **dict.fromkeys(side.imports, ""),
        },
        ("functions", ""): {
            f"{each.name}({each.signature})": "" for each in side.functions.values()
        },
        ("constants", ""): constants,
        ("signature", "bound weight "): side.tables.bound,
    }


def _table(
    group: str, noun: str, before: Mapping[str, str], after: Mapping[str, str]
) -> Iterator[Change]:
    for key, value in before.items():
        said = f"{noun}{key} = {value}" if value else f"{noun}{key}"
        if key not in after:
            yield Change(group, "removed", f"{said} is gone")
        elif value != after[key]:
            yield Change(group, "changed", f"{noun}{key}: {value} → {after[key]}")
    for key, value in after.items():
        if key not in before:
            said = f"{noun}{key} = {value}" if value else f"{noun}{key}"
            yield Change(group, "added", said)


def _operands(step: Step, side: Outline, rename: Mapping[str, str]) -> list[str]:
    texts = ((keyword, _rewritten(each, side, rename)) for keyword, each in step.operands)
    return [f"{keyword}={text}" if keyword else text for keyword, text in texts]


def _rewritten(node: ast.AST | None, side: Outline, rename: Mapping[str, str]) -> str:
    if node is None:
        return ""
    return ast.unparse(_Rewrite(side, rename).visit(copy.deepcopy(node)))


@dataclass(slots=True)
class _Statement:
    """A statement as it is compared: values by the names that they have after."""

    step: Step
    callee: str
    target: str
    operands: list[str]
    digest: str  # of what a piece computes; "" where unknown

    def keys(self) -> Iterator[object]:
        """What it is recognised by, from exact to loose."""
        module = self.step.module_path
        callee = "" if self.step.kind == "piece" else self.callee
        yield self.step.kind, callee, module, self.digest, self.target, *self.operands
        yield self.step.kind, callee, module, self.digest
        yield self.step.kind, callee, module
        yield self.step.kind, module
        yield self.step.kind


def _align(before: Sequence[Sequence[object]], after: Sequence[Sequence[object]]) -> Pairs:
    """Pair statements in order by their first keys, others between them by the next ones."""
    if not (before and after and before[0]):
        return []
    pairs: Pairs = []
    firsts = ([keys[0] for keys in side] for side in (before, after))
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, *firsts, False).get_opcodes():
        if tag == "equal":
            pairs += zip(range(i1, i2), range(j1, j2), strict=True)
        else:
            rest = ([keys[1:] for keys in side] for side in (before[i1:i2], after[j1:j2]))
            pairs += [(i1 + i, j1 + j) for i, j in _align(*rest)]
    return pairs


@dataclass(slots=True)
class _Function:
    """One function on both sides; values are followed from statement to statement."""

    old_side: Outline
    new_side: Outline
    old: FunctionOutline
    new: FunctionOutline
    scope: str = ""
    pairs: Pairs = field(init=False)
    values: dict[str, str] = field(init=False)  # before → after
    steps: list[tuple[_Statement, _Statement]] = field(init=False)

    def __post_init__(self) -> None:
        renamed = dict(zip(self.old.parameters, self.new.parameters, strict=False))
        if len(self.old.parameters) != len(self.new.parameters) or {*renamed} == {
            *renamed.values()
        }:
            renamed = {}
        theirs = self._statements(self.new, self.new_side, {})
        ours = self._statements(self.old, self.old_side, renamed)
        self.pairs = _align(*([[*each.keys()] for each in side] for side in (ours, theirs)))
        self.values = {}
        for i, j in self.pairs:
            old, new = self.old.steps[i].results, self.new.steps[j].results
            by_place = len(old) == len(new) and {*old} != {*new}
            self.values |= dict(zip(old, new if by_place else old, strict=True))
        ours = self._statements(self.old, self.old_side, {**renamed, **self.values})
        self.steps = [(ours[i], theirs[j]) for i, j in self.pairs]

    @staticmethod
    def _statements(
        function: FunctionOutline, side: Outline, rename: Mapping[str, str]
    ) -> list[_Statement]:
        return [
            _Statement(
                step,
                rename.get(step.callee, step.callee),
                _rewritten(step.target, side, rename),
                _operands(step, side, rename),
                side.tables.digests.get(step.callee, "") if step.kind == "piece" else "",
            )
            for step in function.steps
        ]

    def _change(
        self, group: str, kind: str, message: str, old: Step | None = None, new: Step | None = None
    ) -> Change:
        lines = (None if step is None else step.line for step in (old, new))
        return Change(group, kind, message, self.scope, *lines)

    def changes(self) -> Iterator[Change]:
        if self.old.signature != self.new.signature:
            message = f"({self.old.signature}) → ({self.new.signature})"
            lines = self.old.line, self.new.line
            yield Change("signature", "changed", message, self.scope, *lines)
        if not self.scope and self.old.name != self.new.name:
            yield Change("signature", "changed", f"{self.old.name} is now {self.new.name}")
        for kind, steps, paired in (
            ("removed", self.old.steps, {i for i, _ in self.pairs}),
            ("added", self.new.steps, {j for _, j in self.pairs}),
        ):
            for at, step in enumerate(steps):
                if at not in paired:
                    gone = kind == "removed"
                    message = f"{step.kind} {_label(step)}{' is gone' if gone else ''}"
                    sides = (step, None) if gone else (None, step)
                    yield self._change(_group(step), kind, message, *sides)
        for old, new in self.steps:
            yield from self._statement(old, new)
        yield from self._pieces()
        yield from self._liveness()
        other = _renamed(self.values.items())
        if other:
            yield Change("names", "changed", f"of values: {other}", self.scope)
        differ = [pair for pair in self.steps if pair[0].step.comment != pair[1].step.comment]
        if differ:
            message = f"of {len(differ)} statement{'s' if differ[1:] else ''}"
            old, new = differ[0]
            yield self._change("provenance", "changed", message, old.step, new.step)

    def _statement(self, old: _Statement, new: _Statement) -> Iterator[Change]:
        steps = old.step, new.step
        kind, who, group = new.step.kind, _label(new.step), _group(new.step)
        if kind == "other" and old.step.text != new.step.text:
            message = f"{old.step.callee} reads differently"
            yield self._change("calls", "changed", message, *steps)
        elif kind != "piece" and old.callee != new.callee:
            message = f"{who} calls {new.callee} and not {old.callee}"
            yield self._change("calls", "changed", message, *steps)
        if old.target != new.target:
            message = f"{who} gives {new.target or 'nothing'} and not {old.target or 'nothing'}"
            yield self._change(group, "changed", message, *steps)
        if old.operands != new.operands:
            what = "signature" if kind == "return" else "arguments"
            message = f"{who}{self._other_operands(old, new)}"
            yield self._change(what, "changed", message, *steps)

    def _other_operands(self, old: _Statement, new: _Statement) -> str:
        # As the text before has them: a name that is known by its new one is not to be found there.
        rows = [*zip(_operands(old.step, self.old_side, {}), old.operands, strict=True)]
        if len(rows) != len(new.operands):
            ours, theirs = Counter(old.operands), Counter(new.operands)
            gone = [text for text, known in rows if known in ours - theirs]
            came = (theirs - ours).elements()
            parts = [
                f" {word} {', '.join(each)}"
                for word, each in (("no longer takes", gone), ("now takes", [*came]))
                if each
            ]
            return " and".join(parts)
        of = new.step.kind in ("piece", "call")
        found = [
            f"{f'argument {at}' if of else ''}: {was} → {now}"
            for at, ((was, known), now) in enumerate(zip(rows, new.operands, strict=True))
            if known != now
        ]
        return (", " if of else "") + "; ".join(found)

    def _pieces(self) -> Iterator[Change]:
        """Other names of pieces: a renumbering where the tables differ, else other code runs."""
        pairs = [(old.step, new.step) for old, new in self.steps if new.step.kind == "piece"]
        rows = ({*side.tables.submods.values()} for side in (self.old_side, self.new_side))
        if next(rows) != next(rows):
            other = _renamed((old.callee, new.callee) for old, new in pairs)
            if other:
                yield Change("names", "changed", f"of pieces: {other}", self.scope)
            return
        for old, new in pairs:
            if old.callee != new.callee:
                message = f"{new.callee} runs where {old.callee} ran"
                yield self._change("pieces", "changed", message, old, new)

    def other_code(self) -> Iterator[Change]:
        """Pieces that compute something else."""
        for old, new in self.steps:
            if old.digest and new.digest and old.digest != new.digest:
                message = f"{new.step.callee} computes something else"
                yield self._change("pieces", "changed", message, old.step, new.step)

    def _liveness(self) -> Iterator[Change]:
        partner = dict(self.pairs)
        parameters = {p: p for p in self.old.parameters if p in self.new.parameters}
        for name, new in (parameters | self.values).items():
            was, now = self.old.deaths.get(name), self.new.deaths.get(new)
            if (was is None and now is None) or (was is not None and partner.get(was, now) == now):
                continue
            places = [self._place(was, self.old), self._place(now, self.new)]
            if was is None:
                kind, message = "added", f"{new} is now deleted {places[1]}"
            elif now is None:
                kind, message = "removed", f"{name} is no longer deleted"
            else:
                kind, message = "changed", f"{new} is deleted {places[1]}, was {places[0]}"
            yield Change("liveness", kind, message, self.scope)

    @staticmethod
    def _place(at: int | None, function: FunctionOutline) -> str:
        if at is None or at < 0:
            return "at the start"
        return f"after {function.steps[at].callee or 'the statement'} in line {function.steps[at].line}"


# --- words -------------------------------------------------------------------------------------------


def _label(step: Step) -> str:
    names = ", ".join(step.results[:3])
    if step.kind == "return":
        return "the result"
    if step.kind == "value":
        return names or step.text
    return f"{step.callee} (gives {names})" if step.kind == "call" and names else step.callee


def _group(step: Step) -> str:
    return "pieces" if step.kind == "piece" else "calls"


def _renamed(pairs: Iterable[tuple[str, str]]) -> str:
    """``a → b, c → d and 7 more``."""
    other = [f"{old} → {new}" for old, new in pairs if old != new]
    return ", ".join(other[:6]) + (f" and {len(other) - 6} more" if other[6:] else "")
