"""What is true of two revisions of a model, from their graphs. In: stitched models. Out: calls in order with what they compute and take, and a judge of a diff's statements.

Nothing here reads digests, comments or alignment from emitted source: names stand for graph nodes, found by the order of calls and of their arguments.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.fx

import piecework
from piecework.golden.compare.changes import Change
from piecework.golden.compare.diff import SourceDiff
from piecework.golden.compare.outline import Step


@dataclass
class Call:
    """``work`` is what is computed, as text without names; ``operands`` are nodes or literals; ``gives`` are its results."""

    name: str
    is_piece: bool
    work: str
    ops: Counter[str]
    operands: list[object]
    gives: list[torch.fx.Node] = field(default_factory=list)


class Truth:
    """One revision: its ``calls``, the node behind each ``name`` of its source, and its parameters' shapes."""

    def __init__(self, stitched: piecework.StitchedModule, steps: tuple[Step, ...]) -> None:
        gm = stitched.split_gm
        self.calls: list[Call] = []
        self.producer: dict[torch.fx.Node, tuple[int, int]] = {}
        self.weights = {n: (str(p.dtype), tuple(p.shape)) for n, p in stitched.named_parameters()}
        by_node: dict[torch.fx.Node, int] = {}
        for node in gm.graph.nodes:
            if node.op == "call_module":
                by_node[node] = len(self.calls)
                self.calls.append(_call(node, getattr(gm, node.target)))
                if not _unpacked(node) and node.users:
                    self._gives(node, node, 0, by_node)
            elif node.target is operator.getitem:
                self._gives(node, node.args[0], node.args[1], by_node)
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        self.returned = list(output.args[0])
        self.inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.names: dict[str, torch.fx.Node] = {}
        body = [step for step in steps if step.kind in ("piece", "inlined")]
        assert [s.kind == "piece" for s in body] == [c.is_piece for c in self.calls]
        for step, call in zip(body, self.calls, strict=True):
            call.name = step.callee
            assert len(step.results) == len(call.gives) and len(step.arguments) == len(
                call.operands
            )
            for name, node in zip(step.results, call.gives, strict=True):
                self._name(name, node)
            for argument, operand in zip(step.arguments, call.operands, strict=True):
                if isinstance(operand, torch.fx.Node):
                    self._name(argument.text, operand)

    def _gives(self, node: torch.fx.Node, call: object, index: object, by_node: dict) -> None:  # type: ignore[type-arg]
        assert isinstance(index, int)
        number = by_node[call]
        self.producer[node] = (number, index)
        assert len(self.calls[number].gives) == index
        self.calls[number].gives.append(node)

    def _name(self, name: str, node: torch.fx.Node) -> None:
        assert self.names.setdefault(name, node) is node, f"{name} is two values"

    def last_use(self, node: torch.fx.Node) -> int:
        return max(i for i, call in enumerate(self.calls) if node in call.operands)


def _unpacked(node: torch.fx.Node) -> bool:
    return any(user.target is operator.getitem for user in node.users)


def _call(node: torch.fx.Node, submodule: torch.fx.GraphModule) -> Call:
    """A splitting submodule is the one call in it, with that call's arguments; a piece is a call of its own."""
    work, ops = _work(submodule)
    inside = [n for n in submodule.graph.nodes if n.op in ("call_function", "call_method")]
    outside = len(inside) == 1 and str(inside[0].target).startswith("revisions.")
    if not outside:
        return Call(str(node.target), True, work, ops, list(node.args))
    given = dict(zip(submodule.graph.find_nodes(op="placeholder"), node.args, strict=True))
    operands = [given.get(each, each) for each in inside[0].args]
    return Call("", False, str(inside[0].target), ops, operands)


def _work(gm: torch.fx.GraphModule) -> tuple[str, Counter[str]]:
    """The graph with nodes by their position, placeholders with dtype and shape (sizes by order of sight)."""
    number: dict[torch.fx.Node, str] = {}
    sizes: dict[str, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        number[node] = f"%{len(number)}"
        if node.op == "placeholder":
            value = node.meta.get("example_value", node.meta.get("val"))
            shape = (
                [
                    str(s) if isinstance(s, int) else sizes.setdefault(str(s), f"s{len(sizes)}")
                    for s in value.shape
                ]
                if isinstance(value, torch.Tensor)
                else []
            )
            lines.append(f"placeholder {getattr(value, 'dtype', type(value).__name__)} {shape}")
        elif "_assert_scalar" not in str(node.target):
            args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: number[n])
            lines.append(f"{node.op} {_target(node)} {args}")
    ops = Counter(_target(n) for n in gm.graph.nodes if n.op.startswith("call_"))
    return "\n".join(lines), ops


def _target(node: torch.fx.Node) -> str:
    return (
        node.target
        if isinstance(node.target, str)
        else f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"
    )


class Judge:
    """Checks every change of ``diff`` against both truths, and that nothing that is true of calls and arguments goes unsaid."""

    def __init__(
        self, before: piecework.StitchedModule, after: piecework.StitchedModule, diff: SourceDiff
    ) -> None:
        self.diff = diff
        self.before = Truth(before, diff.before.entry.steps)
        self.after = Truth(after, diff.after.entry.steps)
        numbers = [
            {
                i: n
                for n, i in enumerate(
                    i for i, s in enumerate(side.entry.steps) if s.kind in ("piece", "inlined")
                )
            }
            for side in (diff.before, diff.after)
        ]
        self.partner = {
            numbers[0][i]: numbers[1][j] for i, j in diff.entry.pairs if i in numbers[0]
        }
        self.lines = [
            {s.line: numbers[k][i] for i, s in enumerate(side.entry.steps) if i in numbers[k]}
            for k, side in enumerate((diff.before, diff.after))
        ]
        self.renamed = dict(self._of("signature", "another name in the model"))
        # Pieces and what they became part of: a value has the same name in both.
        self.parts = {
            (numbers[0][i], numbers[1][m.whole])
            for m in diff.entry.merges
            for i in m.parts
            if numbers[1][m.whole] != self.partner.get(numbers[0][i])
        }
        self.parts |= {
            (numbers[0][s.whole], numbers[1][j])
            for s in diff.entry.splits
            for j in s.parts
            if self.partner.get(numbers[0][s.whole]) != numbers[1][j]
        }
        joins = [*diff.entry.merges, *diff.entry.splits]
        self.joined = {numbers[0][i] for m in diff.entry.merges for i in m.parts if i in numbers[0]}
        self.joined |= {numbers[0][s.whole] for s in diff.entry.splits}
        assert len(joins) == sum(c.kind in ("merged", "split") for c in diff.changes)

    def _of(self, group: str, words: str) -> list[tuple[str, str]]:
        return [
            s
            for c in self.diff.changes
            if c.group == group and words in c.message
            for s in c.subjects
        ]

    # --- what corresponds, by the graphs and by which calls were paired --------------------------------

    def corresponds(self, left: object, right: object) -> bool:
        """Whether an operand before is the operand after: the same literal, input, weight, or result of calls that were paired."""
        if not isinstance(left, torch.fx.Node) or not isinstance(right, torch.fx.Node):
            return type(left) is type(right) and left == right
        one, other = self.before.producer.get(left), self.after.producer.get(right)
        if one is None or other is None:
            return one is other and self._input(left, "before") == self._input(right, "after")
        if (one[0], other[0]) in self.parts:
            return self._emitted(left, 0) == self._emitted(right, 1)
        return self.partner.get(one[0]) == other[0] and self._place(one) == other[1]

    def _emitted(self, node: torch.fx.Node, side: int) -> str:
        names = (self.before, self.after)[side].names
        return next((name for name, each in names.items() if each is node), "")

    def _place(self, value: tuple[int, int]) -> int | None:
        """The result after that stands for a result before: the same place if the work is the same, else the one with its stem."""
        call = self.before.calls[value[0]]
        now = self.after.calls[self.partner[value[0]]]
        if call.work == now.work or len(call.gives) == len(now.gives):
            return value[1]
        stem = _stem(call.gives[value[1]].name)
        stems = [_stem(node.name) for node in now.gives]
        return stems.index(stem) if stems.count(stem) == 1 else None

    def _input(self, node: torch.fx.Node, side: str) -> str:
        truth = self.before if side == "before" else self.after
        bound = (self.diff.before if side == "before" else self.diff.after).bound
        name = next((name for name, each in truth.names.items() if each is node), "")
        if name in bound:
            name = self.renamed.get(name, name) if side == "before" else name
            return f"weight {name}"
        inputs = [n for n in truth.inputs if n.name not in bound]
        return f"input {inputs.index(node)}"

    # --- the whole -------------------------------------------------------------------------------------

    def judge(self) -> int:
        """Raise AssertionError for the first statement that is not true; returns how many were judged."""
        self.pairing()
        for change in self.diff.changes:
            getattr(self, f"_{change.group}")(change)
        self.completeness()
        return len(self.diff.changes)

    def pairing(self) -> None:
        """Calls are paired with calls of their kind: what computes the same, or in one layer where weights say which."""
        for i, j in self.partner.items():
            one, other = self.before.calls[i], self.after.calls[j]
            assert one.is_piece == other.is_piece
            layers = [self._layers(one, "before"), self._layers(other, "after")]
            same = one.is_piece and one.work == other.work
            assert same or not all(layers) or layers[0] & layers[1], f"{one.name} of {layers}"

    def _layers(self, call: Call, side: str) -> set[str]:
        names = [
            self._input(o, side)
            for o in call.operands
            if isinstance(o, torch.fx.Node) and o.op == "placeholder"
        ]
        texts = [
            *(n.replace("weight ", "").replace("_", ".") for n in names),
            *(o for o in call.operands if isinstance(o, str)),
        ]
        return {text.split(".")[1] for text in texts if text.startswith("layers.")}

    def _paired(self, change: Change) -> tuple[Call, Call]:
        i, j = self.lines[0][change.before_line], self.lines[1][change.after_line]
        assert self.partner[i] == j, change
        return self.before.calls[i], self.after.calls[j]

    def _balance(self, name: str | None) -> None:
        """Calls before, less those said to be gone, more those said to be new, are the calls after."""
        said = [c for c in self.diff.changes if c.group in ("pieces", "calls")]
        old, new = (
            Counter(c.name if not c.is_piece else None for c in t.calls)
            for t in (self.before, self.after)
        )
        count = old[name]
        for change in said:
            piece = change.group == "pieces"
            for left, right in change.subjects if (name is None) == piece else ():
                if change.kind == "removed" and (piece or left == name):
                    count -= 1
                if change.kind == "added" and (piece or right == name):
                    count += 1
            if name is None and change.kind in ("merged", "split"):
                count += (len(change.subjects) - 1) * (1 if change.kind == "split" else -1)
        assert count == new[name], (name, count, new)

    # --- statements by group -----------------------------------------------------------------------------

    def _pieces(self, change: Change) -> None:
        pieces = [{c.name: c for c in t.calls if c.is_piece} for t in (self.before, self.after)]
        for left, right in change.subjects if "gives" not in change.message else ():
            assert not left or left in pieces[0], change
            assert not right or right in pieces[1], change
        if change.kind in ("removed", "added"):
            ((left, right),) = change.subjects
            call = pieces[0][left] if left else pieces[1][right]
            paired = self.partner if left else {j: i for i, j in self.partner.items()}
            assert (self.before if left else self.after).calls.index(call) not in paired, change
            self._balance(None)
        elif change.kind in ("merged", "split"):
            at = 0 if change.kind == "merged" else 1
            sides = [{subject[side] for subject in change.subjects} for side in (at, 1 - at)]
            assert len(sides[0]) == len(change.subjects) > len(sides[1]) == 1, change
            parts = sum((pieces[at][s[at]].ops for s in change.subjects), Counter())
            whole = pieces[1 - at][change.subjects[0][1 - at]].ops
            assert (
                parts
                - Counter(
                    {
                        o: n
                        for o, n in parts.items()
                        if "sym_size" in o
                        or o in ("_operator.ge", "_operator.eq")
                        or "assert" in o
                        or "empty_like" in o
                    }
                )
                <= whole
            ), (change, parts - whole)
        elif "something else" in change.message:
            for left, right in change.subjects:
                one, other = pieces[0][left], pieces[1][right]
                assert self.partner[self.before.calls.index(one)] == self.after.calls.index(other)
                assert one.work != other.work, change
        elif "gives" in change.message:
            one, other = self._paired(change)
            assert f"gives {len(other.gives)} result" in change.message
            assert f"was {len(one.gives)}: " in change.message and len(one.gives) != len(
                other.gives
            )
        else:
            raise AssertionError(f"not judged: {change}")

    def _calls(self, change: Change) -> None:
        assert change.kind in ("removed", "added"), change
        ((left, right),) = change.subjects
        self._balance(left or right)
        side, line, paired = (
            (0, change.before_line, self.partner)
            if left
            else (1, change.after_line, {j: i for i, j in self.partner.items()})
        )
        number = self.lines[side][line]
        assert number not in paired and (self.before, self.after)[side].calls[number].name == (
            left or right
        )

    def _arguments(self, change: Change) -> None:
        one, other = self._paired(change)
        gone, new = self._moved(one, other)
        if change.kind == "moved":
            assert not gone and not new and len(one.operands) == len(other.operands), change
            return
        if len(one.operands) == len(other.operands):
            pairs = zip(one.operands, other.operands, strict=True)
            other_now = [
                (self._text(a, 0), self._text(b, 1)) for a, b in pairs if not self.corresponds(a, b)
            ]
            assert sorted(change.subjects) == sorted(other_now), change
            return
        assert sorted(left for left, _ in change.subjects if left) == sorted(gone), (change, gone)
        assert sorted(right for _, right in change.subjects if right) == sorted(new), (change, new)

    def _moved(self, one: Call, other: Call) -> tuple[list[str], list[str]]:
        """Operands without a counterpart, before and after."""
        free = list(other.operands)
        gone = []
        for operand in one.operands:
            match = next(
                (k for k, each in enumerate(free) if self.corresponds(operand, each)), None
            )
            if match is None:
                gone.append(self._text(operand, 0))
            else:
                del free[match]
        return gone, [self._text(each, 1) for each in free]

    def _text(self, operand: object, side: int) -> str:
        if not isinstance(operand, torch.fx.Node):
            return repr(operand)
        names = (self.before, self.after)[side].names
        return next(name for name, node in names.items() if node is operand)

    def _signature(self, change: Change) -> None:
        old, new = self.before.weights, self.after.weights
        bound = (self.diff.before.bound, self.diff.after.bound)
        path = [{n: text.partition(" = ")[2] for n, text in side.items()} for side in bound]
        if "parameter" in change.message:
            words = change.message.split()
            names = [
                [n.name for n in t.inputs if n.name not in b]
                for t, b in zip((self.before, self.after), bound, strict=True)
            ]
            if change.kind in ("added", "removed"):
                there = [words[1] in side for side in names]
                assert there == [change.kind == "removed", change.kind == "added"], change
                return
            assert names[0].index(words[1]) == names[1].index(words[-1]), change
        elif "the result" in change.message:
            assert len(self.before.returned) != len(self.after.returned) or any(
                not self.corresponds(a, b)
                for a, b in zip(self.before.returned, self.after.returned, strict=True)
            ), change
        elif "another name" in change.message:
            for left, right in change.subjects:
                assert path[0][left] not in new and path[1][right] not in old
                assert old[path[0][left]] == new[path[1][right]]
        elif change.kind == "removed":
            assert change.subjects and all(path[0][left] not in new for left, _ in change.subjects)
        elif change.kind == "added":
            assert change.subjects and all(
                path[1][right] not in old for _, right in change.subjects
            )
        else:
            assert change.subjects
            for left, right in change.subjects:
                assert old[path[0][left]] != new[path[1][right]], change

    def _liveness(self, change: Change) -> None:
        name = change.message.split()[0]
        now = self.after.names[name]
        was = next(n for n in self.before.names.values() if self.corresponds(n, now))
        if change.kind in ("removed", "added"):
            # What is returned is not deleted.
            kept = [node in t.returned for node, t in ((was, self.before), (now, self.after))]
            assert kept == [change.kind == "added", change.kind == "removed"], change
            return
        assert change.kind == "changed" and "lives" in change.message, change
        left, right = self.before.last_use(was), self.after.last_use(now)
        assert left in self.partner
        longer = right > self.partner[left]
        assert (
            right != self.partner[left]
            and f"lives {'longer' if longer else 'shorter'}" in change.message
        )
        assert change.before_line in [k for k, n in self.lines[0].items() if n == left]
        assert change.after_line in [k for k, n in self.lines[1].items() if n == right]

    def _constants(self, change: Change) -> None:
        old, new = ({c.name for c in t.calls if not c.is_piece} for t in (self.before, self.after))
        name = change.message.removesuffix(" is gone").removeprefix("function ")
        assert (name in old, name in new) == (
            (True, False) if change.kind == "removed" else (False, True)
        )

    def _module(self, change: Change) -> None:
        old, new = ({c.name for c in t.calls if not c.is_piece} for t in (self.before, self.after))
        name = change.message.removeprefix("name ").partition(" ")[0]
        assert (name in old, name in new) == (
            (True, False) if change.kind == "removed" else (False, True)
        )

    def _names(self, change: Change) -> None:
        assert change.subjects, change
        for left, right in change.subjects:
            if "renumbered" in change.message:
                place = [
                    next(i for i, c in enumerate(t.calls) if c.is_piece and c.name == n)
                    for t, n in ((self.before, left), (self.after, right))
                ]
                assert self.partner[place[0]] == place[1]
                continue
            one, other = (
                self.before.producer[self.before.names[left]],
                self.after.producer[self.after.names[right]],
            )
            assert self.partner[one[0]] == other[0], change
            same = self.before.calls[one[0]].work == self.after.calls[other[0]].work
            assert same == ("renamed" in change.message), change
            if same:
                assert one[1] == other[1]

    def _provenance(self, change: Change) -> None:
        if "the banner" not in change.message:
            return
        for truth, side in ((self.before, self.diff.before), (self.after, self.diff.after)):
            pieces = sum(call.is_piece for call in truth.calls)
            assert any(line.startswith(f"pieces: {pieces}, ") for line in side.banner)

    # --- nothing unsaid --------------------------------------------------------------------------------

    def completeness(self) -> None:
        said = self._of("pieces", "something else")
        lines = {c.after_line for c in self.diff.changes if c.group == "arguments"}
        for i, j in self.partner.items():
            one, other = self.before.calls[i], self.after.calls[j]
            if i in self.joined:
                continue
            assert ((one.name, other.name) in said) == (one.is_piece and one.work != other.work), (
                one.name,
                other.name,
            )
            same = len(one.operands) == len(other.operands) and all(
                map(self.corresponds, one.operands, other.operands)
            )
            line = next(line for line, n in self.lines[1].items() if n == j)
            said_here = [
                c for c in self.diff.changes if c.group == "arguments" and c.after_line == line
            ]
            if len(one.operands) == len(other.operands) and not any(
                c.kind == "moved" for c in said_here
            ):
                other_now = [
                    not self.corresponds(a, b)
                    for a, b in zip(one.operands, other.operands, strict=True)
                ]
                said_of = sum(len(c.subjects) for c in said_here)
                assert said_of == sum(other_now), (one.name, said_here)
            assert (line in lines) != same or not self._differ_said(one, other), (
                one.name,
                other.name,
            )
        self._balance(None)
        for name in {c.name for t in (self.before, self.after) for c in t.calls if not c.is_piece}:
            self._balance(name)

    def _differ_said(self, one: Call, other: Call) -> bool:
        """Several arguments in another order say nothing where the count changed too; else each difference must be said."""
        return len(one.operands) == len(other.operands) or self._moved(one, other) != ([], [])


def _stem(name: str) -> str:
    head, _, tail = name.rpartition("_")
    return head if tail.isdigit() else name
