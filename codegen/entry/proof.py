"""Proof that the text of an entry says what its plan says. In: the text, its constants and the `EntryPlan`. Out: nothing, or an `EmitError` that names the line.

The text is read by `read_ir`, which knows nothing of how it was made; what it has to say is told once more, by what names mean,
and must be there statement by statement: each check in its order and none weaker, each argument, each result, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, zip_longest

from piecework.codegen.entry.body import CHECKS_NAME, entry_functions
from piecework.codegen.entry.plan import EntryPlan
from piecework.codegen.entry.steps import Steps
from piecework.codegen.plan import ir
from piecework.codegen.plan.size_text import MODULES
from piecework.codegen.proof.grammar import line_at
from piecework.codegen.proof.read_ir import (
    Meanings,
    ReadFunction,
    ReadModule,
    bound_name,
    parameter_name,
    read_entry,
)
from piecework.errors import EmitError


def prove_entry(
    code: str, plan: EntryPlan, provided: Sequence[str], consts: Mapping[str, object]
) -> None:
    """Check that ``code`` is the entry of ``plan``: no check left out, changed, weakened or moved, nothing passed or returned but what the plan says.

    Args:
        provided: names that the runtime puts into the module.
        consts: names and values that come with the text.

    Raises:
        EmitError: it is not; names the line.
    """
    _Proof(code, plan, read_entry(code, provided, consts)).run()


class _Proof:
    def __init__(self, code: str, plan: EntryPlan, module: ReadModule) -> None:
        self.code = code
        self.plan = plan
        self.module = module
        self.words = Meanings(
            module.names | {name: ir.Const(id(MODULES[name])) for name in MODULES}
        )
        self.parameters = tuple(map(parameter_name, range(len(plan.parameters))))
        numbers = count()
        self.steps = Steps(self.words, self.parameters, lambda _: bound_name(next(numbers)))

    def run(self) -> None:
        plan, functions = self.plan, self.module.functions
        names = [each.function.name for each in functions]
        own = functions[names[:1] == [CHECKS_NAME] :][:1]
        if not own:
            raise EmitError("the text of the entry has no entry")
        bound = count()
        expected = entry_functions(
            plan,
            self.steps,
            lambda *_: bound_name(next(bound)),
            name=own[0].function.name,
            keywords=own[0].parameters,
            users=self.parameters,
        )
        if len(functions) != len(expected):
            raise EmitError(f"the text of the entry has {len(functions)} functions")
        if self.module.imports != tuple(sorted({"torch", *self.words.asked & MODULES.keys()})):
            found = ", ".join(self.module.imports) or "nothing"
            raise EmitError(f"the entry's text imports {found}")
        for read, function in zip(functions, expected, strict=True):
            self._compare(read, function)
        if functions[-1].parameters != tuple(each.name for each in plan.parameters):
            raise self._error(functions[-1].line, "the entry has other parameters than the model")

    def _compare(self, read: ReadFunction, expected: ir.Function) -> None:
        line, found = read.line, read.function
        if found.name != expected.name:
            raise self._error(line, f"this function is not {expected.name}")
        if found.parameters != expected.parameters:
            raise self._error(line, "a parameter or its default is not the model's")
        for line, said, stmt in zip_longest(read.lines, found.body, expected.body):
            if said is None or stmt is None or said != _plain(stmt):
                raise self._error(line or read.line, "the text of the entry differs from its plan")

    def _error(self, line: int, why: str) -> EmitError:
        return EmitError(
            why,
            where=line_at(self.code, line),
            hint="please report this with the model that was compiled",
        )


def _plain(stmt: ir.Stmt) -> ir.Stmt:
    """``stmt`` as it reads: without a comment, and one condition is no conjunction."""
    match stmt:
        case ir.If(ir.Operation("not", (ir.Operation("and", (only,)),)), body):
            return ir.If(ir.Operation("not", (only,)), body)
        case ir.If(test, body):
            return ir.If(test, body)
        case ir.Assign(targets, unpack, value):
            return ir.Assign(targets, unpack, value)
        case _:
            return stmt
