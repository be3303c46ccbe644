"""Proves that emitted text does what its graph does: both run on tokens, and each call of the text has to be the next one of the graph.

Python itself runs the text, made to record (`recording`). No operator is called and no submodule; what is imported is the modules that it names.
"""

from __future__ import annotations

import ast
import operator
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

import torch.fx

from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.names import CONSTS, SUBMODS
from piecework.codegen.proof import graph_run
from piecework.codegen.proof.graph_run import Event, GraphRun, Linkage, Sameness, Token
from piecework.codegen.proof.recording import RecordingText, parse_text
from piecework.errors import EmitError

_SIGNS: Mapping[str, Callable[..., object]] = {
    **{"Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv},
    **{"FloorDiv": operator.floordiv, "Mod": operator.mod, "Pow": operator.pow},
    **{"MatMult": operator.matmul, "LShift": operator.lshift, "RShift": operator.rshift},
    **{"BitAnd": operator.and_, "BitOr": operator.or_, "BitXor": operator.xor},
    **{"Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le},
    **{"Gt": operator.gt, "GtE": operator.ge, "USub": operator.neg, "UAdd": operator.pos},
    **{"Invert": operator.invert, "Not": operator.not_},
}
_FILE = "<proof>"


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of the statements of the text."""

    events: int
    statements: int


def prove(
    code: str, split_gm: torch.fx.GraphModule, linked: Linkage, *, tree: ast.Module | None = None
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order.

    Args:
        code: an emitted module, edited or not.
        split_gm: the stitching graph.
        linked: what the text's names stand for.
        tree: ``code``, parsed.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.
    """
    graph = graph_run.run_graph(split_gm, linked)
    run = TextRun(code, parse_text(code) if tree is None else tree, ENTRY_NAME, graph, linked)
    paths = linked.bound.items()
    run.define({name: graph.weights[path] for name, path in paths if path in graph.weights})
    run.check_signature(node for node, _ in graph.parameters)
    return run.prove([token for _, token in graph.parameters])


@dataclass(frozen=True, slots=True)
class _Submod:
    target: str


@dataclass(frozen=True, slots=True)
class _Item:
    """What stands before the brackets of an item."""

    run: TextRun
    line: int
    value: object

    def __getitem__(self, index: object) -> object:
        found = graph_run.picked(self.value, index)
        return found[0] if found else self.run.event(self.line, operator.getitem, self.value, index)


class TextRun:
    """Runs a text beside what its graph did."""

    def __init__(
        self, code: str, tree: ast.Module, entry: str, graph: GraphRun, linked: Linkage
    ) -> None:
        self.entry, self.graph, self.direct = entry, graph, linked.direct
        self.next = 0  # of the graph's events
        self.same = Sameness().same
        try:
            self.text = RecordingText(code, tree, entry)
            self._compiled = compile(self.text.tree, _FILE, "exec")
        except (RecursionError, MemoryError) as error:
            raise EmitError("the text is nested too deeply") from error
        if entry not in self.text.functions:
            raise EmitError(f"the text defines no function {entry}")
        self._submods = [_Submod(f"submod {name}") for name in linked.submod_names]
        self.module: dict[str, object] = {
            **{"__call__": self.called, "__method__": self.called_method},
            **{"__item__": partial(_Item, self), "__attribute__": self._attribute},
            **{"__sign__": self._sign, "__unpack__": self._unpack, CONSTS: [*linked.consts]},
        }

    def refuse(self, at: ast.AST | int, why: str) -> NoReturn:
        self.text.refuse(at, why)

    def define(self, held: Mapping[str, object]) -> None:
        """Run the module level, with ``held`` in it."""
        self.module.update(held)
        self._python(lambda: exec(self._compiled, self.module))

    def prove(self, tokens: Sequence[object]) -> Proof:
        """Check that the entry does with ``tokens`` what the graph does, and all of it."""
        function = self.text.functions[self.entry]
        entry: Any = self.module[self.entry]
        keywords = {SUBMODS: self._submods} if function.args.kwonlyargs else {}
        returned = self._python(lambda: entry(*tokens, **keywords))
        if self.next < len(self.graph.events):
            node = self.graph.events[self.next].node
            raise EmitError("the text ends before this node", where=node_where(node))
        if not self.same(self.graph.returned, returned):
            self.refuse(function.body[-1], "the text returns something else than the graph")
        return Proof(len(self.graph.events), self.text.statements)

    def _python(self, runs: Callable[[], object]) -> object:
        """What Python says of a text, with its line."""
        try:
            return runs()
        except EmitError:
            raise
        except RecursionError as error:
            raise EmitError("functions of the text call each other too deeply") from error
        except Exception as error:  # noqa: BLE001 - whatever a text does wrong
            frames = traceback.extract_tb(error.__traceback__)
            lines = [each.lineno or 0 for each in frames if each.filename == _FILE]
            self.refuse((lines or [0])[-1], f"the text fails where it runs: {error}")

    # --- what the text calls -----------------------------------------------------------------------

    def called(self, line: int, target: object, /, *args: object, **kwargs: object) -> object:
        """A call of a function."""
        if isinstance(target, FunctionType) and target.__globals__ is self.module:
            return target(*args, **kwargs)
        if isinstance(target, _Submod):
            target = target.target
        elif target is operator.getitem and len(args) == 2 and not kwargs:
            return _Item(self, line, args[0])[args[1]]
        elif graph_run.builds(target, kwargs):
            return target(*args)  # type: ignore[operator]
        return self.event(line, target, *args, **kwargs)

    def called_method(
        self, line: int, value: object, name: str, /, *args: object, **kwargs: object
    ) -> object:
        return self.event(line, f".{name}", value, *args, **kwargs)

    def _attribute(self, line: int, value: object, name: str) -> object:
        return self.event(line, getattr, value, name)

    def _sign(self, line: int, sign: str, *operands: object) -> object:
        return self.event(line, _SIGNS.get(sign), *operands)

    def _unpack(self, line: int, value: object, count: int) -> Sequence[object]:
        if isinstance(value, Token) and value.size == count:
            return [value.element(index) for index in range(count)]
        if type(value) in (tuple, list) and len(value) == count:  # type: ignore[arg-type]
            return value  # type: ignore[return-value]
        self.refuse(line, f"unpacks a result that is not known to have {count} elements")

    def event(self, line: int, target: object, /, *args: object, **kwargs: object) -> Token:
        """The result of the graph's next call, which has to be this one."""
        if self.next >= len(self.graph.events):
            self.refuse(line, "the text does something that the graph does not")
        event = self.graph.events[self.next]
        self.next += 1
        if event.target is not target and not self._is_target(event.target, target):
            self._differ(line, event, "a call of something else")
        if len(event.args) != len(args) or len(event.kwargs) != len(kwargs):
            self._differ(line, event, "another number of arguments")
        for place, (ours, theirs) in enumerate(zip(event.args, args, strict=True)):
            if ours is not theirs and not self.same(ours, theirs):
                self._differ(line, event, f"another argument {place}")
        for (name, ours), (key, theirs) in zip(event.kwargs.items(), kwargs.items(), strict=True):
            if name != key or not self.same(ours, theirs):
                self._differ(line, event, f"another argument {name!a}")
        if event.region == "opens" and line not in self.text.opening:
            self._differ(line, event, "the region that this opens is not closed in a finally")
        if event.region == "closes" and line not in self.text.closing:
            self._differ(line, event, "a region is closed outside of its finally")
        return event.result

    def _is_target(self, ours: object, theirs: object) -> bool:
        if isinstance(ours, str) or isinstance(theirs, str):
            return type(ours) is type(theirs) and ours == theirs
        try:
            return ours in self.direct and self.direct[ours] is theirs
        except TypeError:  # not hashable, so it has no other implementation
            return False

    def _differ(self, line: int, event: Event, what: str) -> NoReturn:
        raise EmitError(
            f"the text differs from the graph: {what}",
            where=f"{self.text.line_at(line)}; {node_where(event.node)}",
            hint="an edited file must still do what the graph does; a generated one that differs is a defect",
        )

    def check_signature(self, placeholders: Iterable[torch.fx.Node]) -> None:
        """Check that the entry's parameters are the placeholders, in kind and default."""
        given = self.text.functions[self.entry].args
        stars = [kind for kind, each in (("*", given.vararg), ("**", given.kwarg)) if each]
        kinds, nodes = ["" for _ in given.args] + stars, list(placeholders)
        if len(kinds) != len(nodes):
            raise EmitError(f"the text takes {len(kinds)} inputs and the graph {len(nodes)}")
        function: Any = self.module[self.entry]
        defaults = function.__defaults__ or ()
        first = len(given.args) - len(defaults)
        for number, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
            target = str(node.target)
            wanted = target[: len(target) - len(target.lstrip("*"))]
            expected = () if wanted else node.args[:1]
            found = defaults[number - first : number - first + 1] if number >= first else ()
            if kind != wanted or not Sameness().same(tuple(expected), found):
                where = node_where(node)
                raise EmitError(f"parameter {kind}{target} differs in kind or default", where=where)
