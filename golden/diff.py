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
from dataclasses import asdict, dataclass, field, replace
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
    entry = _Function(_Side(old, old.entry), _Side(new, new.entry))
    if before == after:
        return SourceDiff(old, new, (), entry.pairs)
    shared = sorted(old.functions.keys() & new.functions.keys())
    sides = ([_Side(each, each.functions[name]) for name in shared] for each in (old, new))
    inlined = [_Function(*each) for each in zip(*sides, shared, strict=True)]
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
            name: _Side(side, side.entry).text(value) for name, value in side.aliases.items()
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
    for key in {**before, **after}:
        was, now = before.get(key), after.get(key)
        said = " = ".join(filter(None, (f"{noun}{key}", was if now is None else now)))
        if now is None:
            yield Change(group, "removed", f"{said} is gone")
        elif was is None:
            yield Change(group, "added", said)
        elif was != now:
            yield Change(group, "changed", f"{noun}{key}: {was} → {now}")


@dataclass(slots=True)
class _Side:
    """A function as it is compared; ``rename`` has what its values are called on the other side."""

    outline: Outline
    function: FunctionOutline
    rename: Mapping[str, str] = field(default_factory=dict)

    def text(self, node: ast.AST) -> str:
        return ast.unparse(_Rewrite(self.outline, self.rename).visit(copy.deepcopy(node)))

    def target(self, step: Step) -> str:
        return "" if step.target is None else self.text(step.target)

    def callee(self, step: Step) -> str:
        return self.rename.get(step.callee, step.callee)

    def operands(self, step: Step) -> list[str]:
        return [
            f"{key}={self.text(node)}" if key else self.text(node) for key, node in step.operands
        ]

    def digest(self, step: Step) -> str:
        """Of what a piece computes; "" where unknown."""
        return self.outline.tables.digests.get(step.callee, "") if step.kind == "piece" else ""

    def keys(self, step: Step) -> list[object]:
        """What a statement is recognised by, from exact to loose."""
        kind, module, digest = step.kind, step.module_path, self.digest(step)
        callee = "" if kind == "piece" else self.callee(step)
        exact = (kind, callee, module, digest, self.target(step), *self.operands(step))
        return [exact, (kind, callee, module, digest), (kind, callee, module), (kind, module), kind]


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

    old: _Side
    new: _Side
    scope: str = ""
    pairs: Pairs = field(init=False)
    values: dict[str, str] = field(init=False)  # before → after
    steps: list[tuple[Step, Step]] = field(init=False)

    def __post_init__(self) -> None:
        old, new = self.old.function, self.new.function
        if len(old.parameters) == len(new.parameters) and {*old.parameters} != {*new.parameters}:
            self.old.rename = dict(zip(old.parameters, new.parameters, strict=True))
        keys = ([*map(side.keys, side.function.steps)] for side in (self.old, self.new))
        self.pairs = _align(*keys)
        self.steps = [(old.steps[i], new.steps[j]) for i, j in self.pairs]
        self.values = {}
        for one, other in self.steps:
            was, now = one.results, other.results
            by_place = len(was) == len(now) and {*was} != {*now}
            self.values |= dict(zip(was, now if by_place else was, strict=True))
        self.old.rename = {**self.old.rename, **self.values}

    def _change(
        self, group: str, kind: str, message: str, old: Step | None = None, new: Step | None = None
    ) -> Change:
        lines = (None if step is None else step.line for step in (old, new))
        return Change(group, kind, message, self.scope, *lines)

    def changes(self) -> Iterator[Change]:
        before, after = self.old.function, self.new.function
        if before.signature != after.signature:
            message = f"({before.signature}) → ({after.signature})"
            yield Change("signature", "changed", message, self.scope, before.line, after.line)
        if not self.scope and before.name != after.name:
            yield Change("signature", "changed", f"{before.name} is now {after.name}")
        for kind, steps, paired in (
            ("removed", before.steps, {i for i, _ in self.pairs}),
            ("added", after.steps, {j for _, j in self.pairs}),
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
        differ = [(old, new) for old, new in self.steps if old.comment != new.comment]
        if differ:
            message = f"of {len(differ)} statement{'s' if differ[1:] else ''}"
            yield self._change("provenance", "changed", message, *differ[0])

    def _statement(self, old: Step, new: Step) -> Iterator[Change]:
        kind, who, group = new.kind, _label(new), _group(new)
        callees = self.old.callee(old), self.new.callee(new)
        targets = self.old.target(old), self.new.target(new)
        if kind == "other" and old.text != new.text:
            yield self._change("calls", "changed", f"{old.callee} reads differently", old, new)
        elif kind != "piece" and callees[0] != callees[1]:
            message = f"{who} calls {callees[1]} and not {callees[0]}"
            yield self._change("calls", "changed", message, old, new)
        if targets[0] != targets[1]:
            message = f"{who} gives {targets[1] or 'nothing'} and not {targets[0] or 'nothing'}"
            yield self._change(group, "changed", message, old, new)
        ours, theirs = self.old.operands(old), self.new.operands(new)
        if ours != theirs:
            what = "signature" if kind == "return" else "arguments"
            # As the text before has them: a name that is known by its new one is not to be found there.
            written = replace(self.old, rename={}).operands(old)
            message = f"{who}{_other_operands(kind, [*zip(written, ours, strict=True)], theirs)}"
            yield self._change(what, "changed", message, old, new)

    def _pieces(self) -> Iterator[Change]:
        """Other names of pieces: a renumbering where the tables differ, else other code runs."""
        pairs = [(old, new) for old, new in self.steps if new.kind == "piece"]
        rows = ({*side.outline.tables.submods.values()} for side in (self.old, self.new))
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
            was, now = self.old.digest(old), self.new.digest(new)
            if was and now and was != now:
                message = f"{new.callee} computes something else"
                yield self._change("pieces", "changed", message, old, new)

    def _liveness(self) -> Iterator[Change]:
        partner = dict(self.pairs)
        before, after = self.old.function, self.new.function
        parameters = {p: p for p in before.parameters if p in after.parameters}
        for name, new in (parameters | self.values).items():
            was, now = before.deaths.get(name), after.deaths.get(new)
            if (was is None and now is None) or (was is not None and partner.get(was, now) == now):
                continue
            places = [_place(was, before), _place(now, after)]
            if was is None:
                kind, message = "added", f"{new} is now deleted {places[1]}"
            elif now is None:
                kind, message = "removed", f"{name} is no longer deleted"
            else:
                kind, message = "changed", f"{new} is deleted {places[1]}, was {places[0]}"
            yield Change("liveness", kind, message, self.scope)


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


def _place(at: int | None, function: FunctionOutline) -> str:
    if at is None or at < 0:
        return "at the start"
    return f"after {function.steps[at].callee or 'the statement'} in line {function.steps[at].line}"


def _other_operands(kind: str, rows: Sequence[tuple[str, str]], after: Sequence[str]) -> str:
    """How ``rows``, each as it was written and as it is compared, differ from those after."""
    if len(rows) != len(after):
        ours, theirs = Counter(known for _, known in rows), Counter(after)
        gone = [text for text, known in rows if known in ours - theirs]
        came = (theirs - ours).elements()
        changes = (("no longer takes", gone), ("now takes", [*came]))
        return " and".join(f" {word} {', '.join(each)}" for word, each in changes if each)
    of = kind in ("piece", "call")
    found = [
        f"{f'argument {at}' if of else ''}: {was} → {now}"
        for at, ((was, known), now) in enumerate(zip(rows, after, strict=True))
        if known != now
    ]
    return (", " if of else "") + "; ".join(found)


def _renamed(pairs: Iterable[tuple[str, str]]) -> str:
    """``a → b, c → d and 7 more``."""
    other = [f"{old} → {new}" for old, new in pairs if old != new]
    return ", ".join(other[:6]) + (f" and {len(other) - 6} more" if other[6:] else "")
