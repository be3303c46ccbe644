"""What emitted text does, read from the text alone. In: Python source of an emitted module. Out: its events in order, and what it returns.

The text is run abstractly, statement by statement, functions looked into where they are called; nothing of it is executed but its
imports. What is not in the small language of emitted modules is an `EmitError` that names the line.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from piecework.codegen.targets import ENTRY_NAME
from piecework.codegen.trace import Bound, Element, Event, Input, Known, Value
from piecework.codegen.trace_expr import SUBMODS, THE_SUBMODS, Expressions, Frame, Submods
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
    *,
    submod_names: Sequence[str],
    consts: Sequence[object],
    bound: Mapping[str, str],
    lifetimes: bool,
) -> TextTrace:
    """Trace the module ``tree`` (parsed from ``code``) from the call of its entry.

    With ``lifetimes``, each local must be deleted in the statement after its last use, and parameters and results must not.

    Raises:
        EmitError: the text leaves the language, uses a name that is not defined at that point, or keeps one for too long.
    """
    return _TextTracer(code, submod_names, consts, bound, lifetimes).run(tree)


class _TextTracer:
    def __init__(
        self,
        code: str,
        submod_names: Sequence[str],
        consts: Sequence[object],
        bound: Mapping[str, str],
        lifetimes: bool,
    ) -> None:
        self.lifetimes = lifetimes
        self.module: dict[str, Value | ast.FunctionDef] = {n: Bound(p) for n, p in bound.items()}
        self.expressions = Expressions(code, self.module, submod_names, consts, self._call_function)
        self.defaults: dict[str, dict[str, Value]] = {}
        self.local_names: dict[str, frozenset[str]] = {}
        self.trace = TextTrace(self.expressions.events)
        self.active: list[str] = []

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
                    if each.asname is not None:
                        raise self._error(stmt, "import ... as is not part of emitted modules")
                    try:
                        importlib.import_module(each.name)
                    except ImportError as error:
                        raise self._error(stmt, f"import failed: {error}") from error
                    root = each.name.partition(".")[0]
                    self.module[root] = Known(sys.modules[root], is_global=True)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                resolved = self.expressions.value(value)
                if not isinstance(resolved, Known) or self.trace.events:
                    raise self._error(stmt, "only paths and constants may be named at module level")
                self.module[name] = resolved
            case ast.FunctionDef(name=name):
                self._define(stmt)
                self.module[name] = stmt
            case _:
                raise self._error(stmt, f"{type(stmt).__name__} is not part of emitted modules")

    def _define(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        if function.decorator_list or arguments.posonlyargs or function.returns:
            raise self._error(
                function, "decorators and annotations are not part of emitted modules"
            )
        if any(each.arg != SUBMODS for each in arguments.kwonlyargs):
            raise self._error(function, f"the only keyword-only parameter is {SUBMODS}")
        if any(default is not None for default in arguments.kw_defaults):
            raise self._error(function, f"{SUBMODS} has no default")
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
        returned: Value = Known(None)
        body = function.body
        for number, stmt in enumerate(body, 1):
            run = _RUN.get(type(stmt))
            if run is not None:
                run(self, stmt, frame)
            elif isinstance(stmt, ast.Return):
                if number != len(body):
                    raise self._error(stmt, "statements follow the return")
                frame.statement += 1
                if stmt.value is not None:
                    returned = self.expressions.value(stmt.value)
            else:
                raise self._error(stmt, f"{type(stmt).__name__} is not part of emitted functions")
        self.trace.statements += len(body)
        self.active.pop()
        if self.lifetimes:
            self._check_lifetimes(function, frame)
        self.expressions.frame = outer
        return returned

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
        if len(stmt.targets) != 1:
            raise self._error(stmt, "only one target is assigned to")
        if type(target) is ast.Name:
            frame.values[target.id] = value
            frame.last_use[target.id] = frame.statement
            return
        elements: list[ast.expr] = target.elts if isinstance(target, ast.Tuple) else []
        names = [each.id for each in elements if isinstance(each, ast.Name)]
        if not names or len(names) != len(elements) or len(set(names)) != len(names):
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
            if not isinstance(target, ast.Name):
                raise self._error(stmt, "only names are deleted")
            if target.id not in frame.values or target.id == SUBMODS:
                raise self._error(stmt, f"{target.id!a} is deleted but not defined here")
            del frame.values[target.id]
            frame.deleted[target.id] = frame.statement


_RUN: dict[type[ast.stmt], Callable[..., None]] = {
    ast.Assign: _TextTracer._assign,
    ast.Expr: _TextTracer._expression,
    ast.Delete: _TextTracer._delete,
}


def _local_names(function: ast.FunctionDef) -> frozenset[str]:
    """The names that ``function`` binds, by the statements that emitted functions may have; others are refused later."""
    arguments = function.args
    found = {each.arg for each in (*arguments.args, *arguments.kwonlyargs)}
    found |= {each.arg for each in (arguments.vararg, arguments.kwarg) if each is not None}
    for stmt in function.body:
        if type(stmt) is ast.Assign:
            for target in stmt.targets:
                if type(target) is ast.Name:
                    found.add(target.id)
                elif isinstance(target, ast.Tuple):
                    found.update([each.id for each in target.elts if isinstance(each, ast.Name)])
    return frozenset(found)
