"""Proof that the text of an entry says what its plan says. In: the text, its constants and the `EntryPlan`. Out: nothing, or an `EmitError` that names the line.

The text is read by `read_ir`, which knows nothing of how it was made; what it has to say is told here once more, by what names mean,
and must be there statement by statement: each check in its order and none weaker, each argument, each result, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count, zip_longest

from piecework.codegen.entry.plan import (
    EntryPlan,
    FromCall,
    FromConst,
    FromItems,
    FromLeaf,
    FromNumber,
    FromOffset,
    FromOutput,
    FromSize,
    FromWeights,
    Packed,
    Passed,
    reads_weights,
)
from piecework.codegen.entry.steps import Steps, forwarded
from piecework.codegen.plan import ir
from piecework.codegen.plan.names import SUBMODS
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

_MODES = "autocast_enabled() or dispatch_modes() or function_modes() or transforms() or not same_kernels()"


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
        checks, handed = self.steps.body(plan)
        if self.module.imports != tuple(sorted({"torch", *self.words.asked & MODULES.keys()})):
            found = ", ".join(self.module.imports) or "nothing"
            raise EmitError(f"the entry's text imports {found}")
        kinds = [(each.kind, each.default) for each in plan.parameters]
        signature = tuple(
            ir.Parameter(
                name.id, kind, None if default is None else self.words.value(default.value)
            )
            for name, (kind, default) in zip(self.parameters, kinds, strict=True)
        )
        positional = tuple(ir.Parameter(name.id) for name in self.parameters)
        expected = [ir.Function("check_inputs", positional, checks, False)] * bool(checks)
        others = len(functions) - len(expected) - 1
        own = functions[len(expected) :][:1]
        if others not in (0, 1):
            raise EmitError(f"the text of the entry has {len(functions)} functions")
        name = own[0].function.name if others else "entry"
        body = tuple(self._body(own[0], handed, checked=bool(checks)))
        expected.append(ir.Function(name, signature, body, False))
        if others:  # one more has the model's names for its parameters
            again = ir.Return(self._call(ir.Global(name), own[0].parameters))
            expected.append(ir.Function("entry", signature, (again,), False))
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

    def _call(self, function: ir.Expr, keywords: Sequence[str]) -> ir.Expr:
        """The call of ``function`` with all parameters, as they are passed by users."""
        return forwarded(function, self.plan.parameters, self.parameters, keywords)

    # --- the entry -------------------------------------------------------------------------------

    def _body(
        self, own: ReadFunction, handed: Sequence[ir.Name], *, checked: bool
    ) -> Iterator[ir.Stmt]:
        plan, say = self.plan, self.steps.say
        users = [each.name for each in plan.parameters]
        in_stance = ir.Return(self._call(say("entry_in_stance"), users))
        yield ir.If(say("dynamo._stance is not stance"), (in_stance,))
        again = ir.Return(self._call(ir.Global(own.function.name), own.parameters))
        recording: ir.Stmt = ir.With(say("torch.no_grad()"), (again,))
        if plan.asks_grad_mode:
            recording = ir.Assign((), False, say("explain_grad_mode()"))
        yield ir.If(say("torch.is_grad_enabled()"), (recording,))
        yield ir.If(say(_MODES), (ir.Return(self._call(say("entry_with_care"), users)),))
        bound = map(bound_name, count())
        here: dict[ir.Expr, ir.Expr] = {each: each for each in self.parameters}
        if checked:
            here |= {form: next(bound) for form in handed}
            call = ir.Call(ir.Global("check_inputs"), ir.Arguments(self.parameters))
            targets = tuple(name.id for form in handed if isinstance(name := here[form], ir.Name))
            yield ir.Assign(targets, len(handed) > 1, call)
        held = [next(bound) for _ in range(4)]
        execution_fn, weights_as_bound, fetch_weights, count_call = held
        yield ir.Assign(tuple(each.id for each in held), True, say("bound"))
        if plan.binds and plan.checks:
            unbound = ir.Assign((), False, say("explain_weights()"))
            yield ir.If(say("not X()", X=weights_as_bound), (unbound,))
        weights = execution_fn
        if reads_weights(plan):
            weights = next(bound)
            yield ir.Assign((weights.id,), False, say("X()", X=fetch_weights))
        args = tuple(self._passed(each, here, weights) for each in plan.passed)
        named: tuple[tuple[str, ir.Expr], ...] = ()
        if plan.batch is not None:
            size = self._passed(plan.batch, here, weights)
            named = ((SUBMODS, say("submods_for(X)", X=size)),)
        outputs = [next(bound) for _ in plan.outputs]
        run = ir.Call(execution_fn, ir.Arguments(args, named))
        yield ir.Assign((), False, say("X()", X=count_call))
        yield ir.Assign(tuple(each.id for each in outputs), bool(outputs), run)
        yield ir.Return(self._packed(plan.result, here, weights, outputs))

    def _passed(self, value: Passed, here: Mapping[ir.Expr, ir.Expr], weights: ir.Expr) -> ir.Expr:
        if isinstance(value, FromNumber):
            return self.words.value(value.value)
        if isinstance(value, FromWeights):
            return ir.Item(weights, self.words.value(value.index))
        origin = self.steps.origin(value)
        assert origin is not None
        match value:
            case FromSize(dim=dim):
                return self.steps.say("X.size(DIM)", X=here[origin], DIM=self.words.value(dim))
            case FromOffset():
                return self.steps.say("X.storage_offset()", X=here[origin])
            case _:
                return here[origin]

    def _packed(
        self,
        packed: Packed,
        here: Mapping[ir.Expr, ir.Expr],
        weights: ir.Expr,
        outputs: Sequence[ir.Expr],
    ) -> ir.Expr:
        match packed:
            case FromLeaf(index):
                return here[self.steps.leaves[index]]
            case FromOutput(index):
                return outputs[index]
            case FromWeights(index):
                return ir.Item(weights, self.words.value(index))
            case FromConst(value):
                return self.words.value(value)
            case FromItems() | FromCall():
                children = packed.children
        items = tuple(self._packed(each, here, weights, outputs) for each in children)
        if isinstance(packed, FromCall):
            args = ir.ListExpr(items), self.words.value(packed.context)
            return ir.Call(self.words.value(packed.rebuild), ir.Arguments(args))
        if packed.kind is dict:
            return ir.DictExpr(tuple(zip(map(self.words.value, packed.keys), items, strict=True)))
        return ir.ListExpr(items) if packed.kind is list else ir.TupleExpr(items)


def _plain(stmt: ir.Stmt) -> ir.Stmt:
    """``stmt`` as it reads: without a comment, and one condition is no conjunction."""
    match stmt:
        case ir.If(ir.Operation("not", (ir.Operation("and", (only,)),)), body):
            return ir.If(ir.Operation("not", (only,)), body)
        case ir.If(test, body):
            return ir.If(test, body)
        case _:
            return stmt
