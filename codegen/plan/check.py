"""Checks of a plan before it is written. In: an `ir.Module`. Out: nothing, or an `EmitError` that names the statement.

The plan alone is checked here: that names, indices and functions fit together. Whether it says what the graph says is for `verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import assert_never

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.plan.liveness import definitions, operands, parts_of, uses
from piecework.codegen.plan.names import BUILTINS, CONSTS, SUBMODS, is_identifier
from piecework.codegen.plan.one_line import stmt_text
from piecework.errors import EmitError

#: Python nests at most twenty blocks.
MAX_REGIONS = 16


def check_ir(module: ir.Module, const_count: int, entry: str = ENTRY_NAME) -> None:
    """Check that every name is defined once, before its use and not after its ``del``; that nothing shadows; that
    indices are in range; that functions exist and get what they take.

    Args:
        entry: what the last function is called; ``execution_fn`` takes ``__vllm_submods__``, and no other one does.

    Raises:
        EmitError: the first thing that does not fit.
    """
    _ModuleCheck(module, const_count, entry).run()


class _ModuleCheck:
    def __init__(self, module: ir.Module, const_count: int, entry: str) -> None:
        self.module = module
        self.entry = entry
        self.const_count = const_count
        self.globals: set[str] = set()
        self.functions: dict[str, ir.Function] = {}

    def run(self) -> None:
        module = self.module
        for imported in module.imports:
            if not all(map(is_identifier, imported.split("."))):
                raise EmitError(f"import of {imported!a}, which is no dotted name")
            self.globals.add(imported.partition(".")[0])
        for alias in module.aliases:
            with _at(f"alias {alias.name}"):
                self._expression(alias.value, set(), set())
            self._define_global(alias.name)
        for name in (*(row.name for row in module.bound), *module.provided):
            self._define_global(name)
        for function in (*module.functions, module.entry):
            self._define_global(function.name)
            self._function(function)
            self.functions[function.name] = function
        takes = ", *, __vllm_submods__" * (self.entry == ENTRY_NAME)
        if module.entry.name != self.entry or module.entry.takes_submods != bool(takes):
            raise EmitError(f"the entry must be {self.entry}(...{takes})")
        if [spec.index for spec in module.const_specs] != list(range(self.const_count)):
            raise EmitError("the consts table does not number the constants as they are")

    def _define_global(self, name: str) -> None:
        if name in self.globals or name in BUILTINS or not is_identifier(name):
            raise EmitError(f"module-level name {name!a} is taken or not valid")
        if name.startswith("__"):
            raise EmitError(f"module-level name {name!a} is reserved")
        self.globals.add(name)

    def _function(self, function: ir.Function) -> None:
        live = {*(row.name for row in self.module.bound), *self.module.provided}
        ever: set[str] = set()
        with _at(function.name):
            for parameter in function.parameters:
                if parameter.default is not None:
                    self._expression(parameter.default, set(), set())
                self._define_parameter(parameter.name, live, ever)
            if not function.body:
                raise EmitError("a function must end with its only return")
        regions: list[frozenset[str]] = []  # the names that live where each open region began
        before: ir.Stmt | None = None
        must_return = function is self.module.entry or self.entry == ENTRY_NAME
        for number, stmt in enumerate(function.body, 1):
            try:
                self._region(stmt, before, live, regions)
                self._statement(stmt, function, live, ever)
                before = stmt
                returns = number == len(function.body) and (
                    must_return or isinstance(stmt, ir.Return)
                )
                if isinstance(stmt, ir.Return) != returns:
                    raise EmitError("a function must end with its only return")
            except EmitError as error:
                where = f"{function.name}: {stmt_text(stmt)[:200]}"
                raise EmitError(error.message, where=where) from None

    @staticmethod
    def _region(
        stmt: ir.Stmt, before: ir.Stmt | None, live: set[str], regions: list[frozenset[str]]
    ) -> None:
        """A region begins after the call that enters it, and can be left at any time: what that takes exists from its beginning."""
        if isinstance(stmt, ir.Try):
            entered = isinstance(before, ir.Assign) and not before.unpack
            if not entered or not isinstance(getattr(before, "value", None), ir.Call):
                raise EmitError("a region begins without a call that enters it")
            if len(regions) == MAX_REGIONS:
                raise EmitError(f"more than {MAX_REGIONS} regions are nested")
            regions.append(frozenset(live))
        elif isinstance(stmt, ir.Finally):
            if not regions:
                raise EmitError("a region ends that has not begun")
            if stmt.call.targets or not regions.pop().issuperset(uses(stmt)):
                raise EmitError(
                    "a region is left with a value that may not exist yet, or to get one"
                )
        elif isinstance(stmt, ir.Return) and regions:
            raise EmitError("a region does not end before the return")

    def _define_parameter(self, name: str, live: set[str], ever: set[str]) -> None:
        """Callers pass by name, so outside stitching source a parameter is called what it is: `_expression` sees that it hides nothing."""
        if self.entry == ENTRY_NAME or name in ever:
            self._define_local(name, live, ever)
        live.add(name)
        ever.add(name)

    def _define_local(self, name: str, live: set[str], ever: set[str]) -> None:
        if name in ever:
            raise EmitError(f"{name!a} is defined twice")
        if name in self.globals or name in BUILTINS or name.startswith("__"):
            raise EmitError(f"{name!a} shadows a name of the module")
        if not is_identifier(name):
            raise EmitError(f"{name!a} is no valid name for a value")
        live.add(name)
        ever.add(name)

    def _statement(
        self, stmt: ir.Stmt, function: ir.Function, live: set[str], ever: set[str]
    ) -> None:
        for expr in operands(stmt):
            self._expression(expr, live, ever)
        match stmt:
            case ir.Delete():
                for name in stmt.names:
                    if name not in live or name not in ever:
                        raise EmitError(f"del of {name!a}, which is not defined")
                    live.discard(name)
            case ir.If(body=body) | ir.With(body=body):
                for inner in body:
                    if definitions(inner) or isinstance(inner, (ir.Delete, ir.Try, ir.Finally)):
                        raise EmitError("a name or a region begins or ends inside a block")
                    self._statement(inner, function, live, ever)
            case ir.Assign():
                self._targets(stmt.targets, stmt.unpack)
            case ir.CallSubmod():
                if not 0 <= stmt.index < len(self.module.submod_names):
                    raise EmitError(f"no submodule {stmt.index}")
                self._passes(function.takes_submods)
                self._targets(stmt.targets, stmt.unpack)
            case ir.CallInlined():
                self._call_inlined(stmt, function)
            case ir.Try() | ir.Finally() | ir.Return():
                pass
            case _:
                assert_never(stmt)
        for name in definitions(stmt):
            self._define_local(name, live, ever)

    def _call_inlined(self, stmt: ir.CallInlined, function: ir.Function) -> None:
        callee = self.functions.get(stmt.function)
        if callee is None:
            raise EmitError(f"{stmt.function!a} is called before it is defined")
        if stmt.passes_submods != callee.takes_submods:
            raise EmitError("__vllm_submods__ is not passed as declared")
        self._passes(function.takes_submods or not stmt.passes_submods)
        if len(stmt.arguments.args) != len(callee.parameters) or stmt.arguments.kwargs:
            raise EmitError(f"{stmt.function!a} gets other arguments")
        self._targets(stmt.targets, stmt.unpack)

    @staticmethod
    def _passes(reachable: bool) -> None:
        if not reachable:
            raise EmitError("__vllm_submods__ is not a parameter of this function")

    @staticmethod
    def _targets(targets: tuple[str, ...], unpack: bool) -> None:
        if (unpack and not targets) or (not unpack and len(targets) > 1):
            raise EmitError("targets and unpacking do not fit together")

    def _expression(self, expr: ir.Expr, live: set[str], ever: set[str]) -> None:
        match expr:
            case ir.Name(name):
                if name not in live:
                    state = "after its del" if name in ever else "before it is defined"
                    raise EmitError(f"{name!a} is used {state}")
            case ir.Literal(value):
                if not is_inline_literal(value):
                    raise EmitError(f"a {type(value).__name__} has no literal form")
            case ir.Global(path):
                root = path.partition(".")[0]
                known = root in self.globals or root in BUILTINS
                if not known or root in ever or root in (SUBMODS, CONSTS):
                    raise EmitError(f"{path!a} is neither imported nor defined")
            case ir.Const(index):
                if not 0 <= index < self.const_count:
                    raise EmitError(f"no constant {index}")
            case ir.Attribute(name=name) if not is_identifier(name):
                raise EmitError(f"attribute {name!a} is no identifier")
            case ir.Call(ir.Attribute(value), arguments):  # a method may have any name
                self._expression(ir.Call(value, arguments), live, ever)
            case _:
                for part in parts_of(expr):
                    self._expression(part, live, ever)


@contextmanager
def _at(where: str) -> Iterator[None]:
    try:
        yield
    except EmitError as error:
        raise EmitError(error.message, where=where) from None
