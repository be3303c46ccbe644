"""What emitted text does, read from the text alone. In: Python source of an emitted module. Out: its events in order, and what it returns.

The text is run abstractly, statement by statement, functions looked into where they are called; nothing of it is executed, and
nothing imported. Its grammar has been checked by `grammar`; what it may not do or mean is an `EmitError` that names the line.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.names import SUBMODS
from piecework.codegen.plan.render import flat_statements
from piecework.codegen.proof.trace import Bound, Element, Event, Input, Known, Linkage, Value
from piecework.codegen.proof.trace_expr import THE_SUBMODS, Expressions, Frame, Submods
from piecework.codegen.split.regions import Kind, entered_by, left_by
from piecework.errors import EmitError


@dataclass(slots=True)
class EntryParameter:
    name: str
    prefix: str
    default: Value | None


@dataclass(slots=True)
class TextTrace:
    """The events of the text, and its result; an event that is unpacked has ``parts``."""

    events: list[Event] = field(default_factory=list)
    parameters: list[EntryParameter] = field(default_factory=list)
    returned: Value = field(default_factory=lambda: Known(None))
    statements: int = 0


def trace_text(
    code: str,
    tree: ast.Module,
    linked: Linkage,
    *,
    lifetimes: bool,
) -> TextTrace:
    """Trace the module ``tree`` (parsed from ``code``) from the call of its entry.

    With ``lifetimes``, each local must be deleted in the statement after its last use, and parameters and results must not.

    Raises:
        EmitError: the text leaves the language, uses a name that is not defined at that point, or keeps one for too long.
    """
    return _TextTracer(code, linked, lifetimes).run(tree)


class _TextTracer:
    def __init__(self, code: str, linked: Linkage, lifetimes: bool) -> None:
        self.lifetimes = lifetimes
        self.module: dict[str, Value | ast.FunctionDef] = {
            name: Bound(path) for name, path in linked.bound.items()
        }
        self.expressions = Expressions(code, self.module, linked, self._call_function)
        self.defaults: dict[str, dict[str, Value]] = {}
        self.local_names: dict[str, frozenset[str]] = {}
        self.trace = TextTrace(self.expressions.events)
        self.active: list[str] = []
        # The call that opened a region, until the `try` after it; the kinds that are open; how many events were looked at.
        self.opened: Event | None = None
        self.regions: list[Kind] = []
        self.looked_at = 0

    def run(self, tree: ast.Module) -> TextTrace:
        for stmt in tree.body:
            self._module_statement(stmt)
            self.expressions.paths.clear()
        entry = self.module.get(ENTRY_NAME)
        if not isinstance(entry, ast.FunctionDef):
            raise EmitError(f"stitching source defines no function {ENTRY_NAME}")
        self.trace.returned = self._call_entry(entry)
        return self.trace

    def _error(self, node: ast.AST, why: str) -> EmitError:
        return self.expressions.error(node, why)

    # --- module level ----------------------------------------------------------------------------

    def _module_statement(self, stmt: ast.stmt) -> None:
        match stmt:
            case ast.Import(names=names):
                for each in names:
                    self._import(stmt, each.name)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                resolved = self.expressions.value(value)
                if not isinstance(resolved, Known) or self.trace.events:
                    raise self._error(stmt, "only paths and constants may be named at module level")
                self._bind(stmt, name, resolved)
            case ast.FunctionDef(name=name):
                self._define(stmt)
                self._bind(stmt, name, stmt)

    def _bind(self, stmt: ast.stmt, name: str, value: Value | ast.FunctionDef) -> None:
        if name in self.module:
            raise self._error(stmt, f"{name!a} is imported, held for a weight or defined already")
        self.module[name] = value

    def _import(self, stmt: ast.stmt, name: str) -> None:
        """The graph calls what it calls, so the modules of that are here; another one would be executed by importing it."""
        root = name.partition(".")[0]
        if name not in sys.modules or root not in sys.modules:
            raise self._error(stmt, f"import failed: nothing has imported {name} before")
        known = self.module.get(root)
        if known is None:
            self.module[root] = Known(sys.modules[root], is_global=True)
        elif not (isinstance(known, Known) and known.value is sys.modules[root]):
            raise self._error(stmt, f"{root!a} is held for a weight or defined already")

    def _define(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        named = arguments.args[len(arguments.args) - len(arguments.defaults) :]
        self.defaults[function.name] = {
            each.arg: self.expressions.value(default)
            for each, default in zip(named, arguments.defaults, strict=True)
        }
        if self.trace.events:
            raise self._error(function, "a default may not call anything")
        self.local_names[function.name] = _local_names(function)

    # --- functions -------------------------------------------------------------------------------

    def _call_entry(self, entry: ast.FunctionDef) -> Value:
        arguments = entry.args
        if [each.arg for each in arguments.kwonlyargs] != [SUBMODS]:
            raise self._error(entry, f"{ENTRY_NAME} must take {SUBMODS} as keyword")
        values: dict[str, Value | Submods] = {SUBMODS: THE_SUBMODS}
        named: list[tuple[str, str]] = [(each.arg, "") for each in arguments.args]
        named += [(arguments.vararg.arg, "*")] if arguments.vararg else []
        named += [(arguments.kwarg.arg, "**")] if arguments.kwarg else []
        for position, (name, prefix) in enumerate(named):
            values[name] = Input(position)
            default = None if prefix else self.defaults[ENTRY_NAME].get(name)
            self.trace.parameters.append(EntryParameter(name, prefix, default))
        return self._run(entry, values)

    def _call_function(self, call: ast.Call, function: ast.FunctionDef) -> Value:
        """Run a function of the module for one call of it; what takes ``__vllm_submods__`` is handed it by name."""
        arguments = function.args
        names = [each.arg for each in arguments.args]
        hands_on = [each for each in call.keywords if each.arg == SUBMODS]
        if any(not self._is_submods(each.value) for each in hands_on):
            raise self._error(call, f"{SUBMODS} must be handed on as itself")
        if len(hands_on) != len(arguments.kwonlyargs):
            raise self._error(call, f"{function.name} gets too few arguments, or too many")
        rest = [each for each in call.keywords if each.arg != SUBMODS]
        args, kwargs = self.expressions.arguments(
            ast.Call(call.func, call.args, rest, lineno=call.lineno) if hands_on else call
        )
        if arguments.vararg or arguments.kwarg or len(args) > len(names):
            raise self._error(call, f"{function.name} does not take these arguments")
        values: dict[str, Value | Submods] = dict(zip(names, args, strict=False))
        for name, value in kwargs:
            if name in values or name not in names:
                raise self._error(call, f"{function.name} does not take {name!a} here")
            values[name] = value
        for name, default in self.defaults[function.name].items():
            values.setdefault(name, default)
        if len(values) != len(names):
            raise self._error(call, f"{function.name} gets too few arguments")
        if hands_on:
            values[SUBMODS] = THE_SUBMODS
        return self._run(function, values)

    def _is_submods(self, node: ast.expr) -> bool:
        named = isinstance(node, ast.Name) and node.id == SUBMODS
        return named and self.expressions.frame.values.get(SUBMODS) is THE_SUBMODS

    def _run(self, function: ast.FunctionDef, values: dict[str, Value | Submods]) -> Value:
        if function.name in self.active:
            raise self._error(function, f"{function.name} calls itself")
        outer = self.expressions.frame
        frame = self.expressions.frame = Frame(self.local_names[function.name], values)
        self.active.append(function.name)
        body = function.body
        ends = isinstance(body[-1], ast.Return)
        self._run_block(body[:-1] if ends else body, frame)
        returned: Value = Known(None)
        last = body[-1]
        if isinstance(last, ast.Return):
            frame.statement += 1
            self.trace.statements += 1
            if last.value is not None:
                returned = self.expressions.value(last.value)
            self._note_regions()
            self._require_closed()
        self.active.pop()
        if self.lifetimes:
            self._check_lifetimes(function, frame)
        self.expressions.frame = outer
        return returned

    def _run_block(self, body: Sequence[ast.stmt], frame: Frame) -> None:
        """Run statements; one that opens a region is followed by the ``try`` that closes it."""
        for stmt in body:
            run = _RUN.get(type(stmt))
            if run is None:
                raise self._error(stmt, f"{type(stmt).__name__} is not part of emitted functions")
            if type(stmt) is not ast.Try:
                self._require_closed()
            run(self, stmt, frame)
            self._note_regions()
            if self.opened is not None and not _is_a_call(stmt):
                raise self._error(stmt, "a region is opened by something else than a call alone")
        self.trace.statements += len(body)
        self._require_closed()

    # --- regions ---------------------------------------------------------------------------------

    def _note_regions(self) -> None:
        """Look at what was done since the last look: note a region that was opened, and refuse one that was closed elsewhere.

        A setting may be set again inside of its region.
        """
        events = self.trace.events
        for event in events[self.looked_at :]:
            opens, closes = entered_by(event.target), left_by(event.target)
            kind = opens or closes
            if kind is None or event.kind != "call":
                continue
            if kind.is_setting and any(each is kind for each in self.regions):
                continue
            if opens is None or event is not events[-1]:
                raise self._left_open(event)
            self.opened = event
        self.looked_at = len(events)

    def _require_closed(self) -> None:
        if self.opened is not None:
            raise self._left_open(self.opened)

    def _left_open(self, event: Event) -> EmitError:
        kind = entered_by(event.target) or left_by(event.target)
        assert kind is not None
        return EmitError(
            f"a region of {kind.name} is not closed by `finally` right after it is opened, or is closed elsewhere",
            where=f"line {event.line}",
        )

    def _try(self, stmt: ast.Try, frame: Frame) -> None:
        """``try: ... finally: exit(...)`` after a call that entered: without an exception it is those calls one after another."""
        entered, self.opened = self.opened, None
        kind = None if entered is None else entered_by(entered.target)
        if entered is None or kind is None:
            raise self._error(stmt, "`try` does not follow a call that opens a region")
        before = dict(frame.values)
        self.regions.append(kind)
        if type(stmt.body[0]) is not ast.Pass:
            self._run_block(stmt.body, frame)
        self.regions.pop()
        last = stmt.finalbody[0]
        assert isinstance(last, ast.Expr)
        names = {node.id for node in ast.walk(last) if isinstance(node, ast.Name)}
        if any(frame.values.get(n) is not before.get(n) for n in names & frame.locals):
            raise self._error(last, "a region is closed with a value that may not exist yet")
        done = len(self.trace.events)
        self._expression(last, frame)
        self._require_exit(last, kind, entered, self.trace.events[done:])

    def _require_exit(
        self, last: ast.Expr, kind: Kind, entered: Event, events: Sequence[Event]
    ) -> None:
        """One call, of the function that closes this kind of region, with what the region was entered with."""
        event = events[0] if len(events) == 1 else None
        if event is None or event.kind != "call" or left_by(event.target) is not kind:
            raise self._error(last, f"`finally` does not close the region of {kind.name}")
        if kind.passes and not (event.args[:1] == (entered,) and len(event.args) == 1):
            raise self._error(last, f"`finally` closes another region of {kind.name}")
        self.looked_at = len(self.trace.events)

    def _check_lifetimes(self, function: ast.FunctionDef, frame: Frame) -> None:
        ends = function.body and isinstance(function.body[-1], ast.Return)
        returned = frame.statement if ends else -1
        for name in frame.deleted.keys() - frame.last_use.keys():
            raise self._error(function, f"parameter {name!a} is deleted by {function.name}")
        for name, last in frame.last_use.items():
            if last != returned and frame.deleted.get(name) != last:
                raise self._error(
                    function, f"{name!a} is not deleted right after its last use in {function.name}"
                )

    # --- statements of a function ----------------------------------------------------------------

    def _assign(self, stmt: ast.Assign, frame: Frame) -> None:
        frame.statement += 1
        value = self.expressions.statement_value(stmt.value)
        target = stmt.targets[0]
        if type(target) is ast.Name:
            frame.values[target.id] = value
            frame.last_use[target.id] = frame.statement
            return
        assert isinstance(target, ast.Tuple)
        names = [each.id for each in target.elts if isinstance(each, ast.Name)]
        if not names or len(set(names)) != len(names):
            raise self._error(stmt, "only distinct names can be unpacked to")
        for name, part in zip(names, self._unpack(stmt, value, len(names)), strict=True):
            frame.values[name] = part
            frame.last_use[name] = frame.statement

    def _unpack(self, stmt: ast.stmt, value: Value, count: int) -> tuple[Value, ...]:
        parts: tuple[Value, ...] | None = self.expressions.escapes.elements_of(value)
        if parts is None:
            if not isinstance(value, Event):
                raise self._error(stmt, "what is unpacked is not the result of a call")
            parts = value.parts = value.parts or tuple([Element(value) for _ in range(count)])
        if len(parts) != count:
            raise self._error(stmt, f"{len(parts)} elements are unpacked to {count} names")
        return parts

    def _expression(self, stmt: ast.Expr, frame: Frame) -> None:
        frame.statement += 1
        self.expressions.statement_value(stmt.value)

    def _delete(self, stmt: ast.Delete, frame: Frame) -> None:
        targets = stmt.targets
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts  # del (a, b), as long lists of names are written
        for target in targets:
            assert isinstance(target, ast.Name)
            if target.id not in frame.values or target.id == SUBMODS:
                raise self._error(stmt, f"{target.id!a} is deleted but not defined here")
            del frame.values[target.id]
            frame.deleted[target.id] = frame.statement


_RUN: dict[type[ast.stmt], Callable[..., None]] = {
    ast.Assign: _TextTracer._assign,
    ast.Expr: _TextTracer._expression,
    ast.Delete: _TextTracer._delete,
    ast.Try: _TextTracer._try,
}


def _is_a_call(stmt: ast.stmt) -> bool:
    """``call(...)`` or ``name = call(...)``: nothing is done after the call that could fail."""
    if isinstance(stmt, ast.Assign) and type(stmt.targets[0]) is not ast.Name:
        return False
    return isinstance(stmt, (ast.Assign, ast.Expr)) and type(stmt.value) is ast.Call


def _local_names(function: ast.FunctionDef) -> frozenset[str]:
    """The names that ``function`` binds, by the statements that emitted functions may have."""
    found = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
    for stmt in flat_statements(function.body):
        if isinstance(stmt, ast.Assign):
            target = stmt.targets[0]
            bound = target.elts if isinstance(target, ast.Tuple) else [target]
            found.update(each.id for each in bound if isinstance(each, ast.Name))
    return frozenset(found)
