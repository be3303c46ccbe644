"""What the function behind a call does, as statements. In: an `EntryPlan`, by its `Steps`. Out: the functions of an entry's module.

As in `steps`, names are given out by who asks: `emit` writes the text with them, and `proof` reads the text back by what they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

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
    FromSymbol,
    FromWeights,
    Packed,
    Passed,
    reads_weights,
)
from piecework.codegen.entry.steps import Steps
from piecework.codegen.plan import ir
from piecework.codegen.plan.names import SUBMODS

FUNCTION_NAME = "entry"
CHECKS_NAME = "check_inputs"
#: What ``bound`` holds, in order: a call takes all of it in one step, so that it never mixes two bindings.
HELD = ("execution_fn", "weights_as_bound", "fetch_weights", "count_call")
_MODES = "autocast_enabled() or dispatch_modes() or function_modes() or transforms() or not same_kernels()"


def entry_functions(
    plan: EntryPlan,
    steps: Steps,
    bind: Callable[[str, bool], ir.Name],
    *,
    name: str,
    keywords: Sequence[str],
    users: Sequence[ir.Name],
) -> tuple[ir.Function, ...]:
    """The functions: ``check_inputs`` if there is anything to check or to unpack, the entry, and one more where parameters of it were renamed.

    Args:
        bind: names a value in the entry: ``(name, False)`` one that has this name already, ``(wish, True)`` a new one.
        name, keywords: what the function with the entry's statements is called, and its parameters.
        users: the parameters of the function that users call, if that is another one.
    """
    return tuple(_Entry(plan, steps, bind).functions(name, keywords, users))


class _Entry:
    def __init__(self, plan: EntryPlan, steps: Steps, bind: Callable[[str, bool], ir.Name]) -> None:
        self.plan, self.steps, self.bind = plan, steps, bind
        self.say, self.value = steps.say, steps.words.value
        self.handed: dict[ir.Expr, ir.Expr] = {}  # what the checks unpacked, by its name there
        self.weights: ir.Expr = ir.Name("")
        self.outputs: list[ir.Expr] = []

    def functions(
        self, name: str, keywords: Sequence[str], users: Sequence[ir.Name]
    ) -> Iterator[ir.Function]:
        own = self.steps.parameters
        checks, handed = self.steps.body(self.plan)
        if checks:
            parameters = tuple(ir.Parameter(each.id) for each in own)
            yield ir.Function(CHECKS_NAME, parameters, checks, False)
        again = self._call(ir.Global(name), own, keywords)
        body = tuple(self._statements(again, handed if checks else None))
        yield ir.Function(name, self._signature(own), body, False)
        if name != FUNCTION_NAME:
            forward = ir.Return(self._call(ir.Global(name), users, keywords))
            yield ir.Function(FUNCTION_NAME, self._signature(users), (forward,), False)

    def _signature(self, names: Sequence[ir.Name]) -> tuple[ir.Parameter, ...]:
        pairs = zip(names, self.plan.parameters, strict=True)
        return tuple(
            ir.Parameter(
                name.id,
                p.kind,
                None if p.default is None else self.value(p.default.value, f"default_{p.name}"),
            )
            for name, p in pairs
        )

    def _call(
        self, function: ir.Expr, values: Sequence[ir.Expr], keywords: Sequence[str]
    ) -> ir.Expr:
        """A call of ``function`` with all parameters, which are ``values`` here; its keyword parameters are called ``keywords``."""
        args: list[ir.Expr] = []
        named: list[tuple[str, ir.Expr]] = []
        for parameter, value, keyword in zip(self.plan.parameters, values, keywords, strict=True):
            match parameter.kind:
                case "k":
                    named.append((keyword, value))
                case "*" | "**":
                    args.append(ir.Star(parameter.kind, value))
                case _:
                    args.append(value)
        return ir.Call(function, ir.Arguments(tuple(args), tuple(named)))

    def _statements(self, again: ir.Expr, handed: Sequence[ir.Name] | None) -> Iterator[ir.Stmt]:
        """The entry's statements; ``again`` calls it as it was called, ``handed`` is what the checks hand on, None without any."""
        plan, say, bind = self.plan, self.say, self.bind
        own, users = self.steps.parameters, [each.name for each in plan.parameters]
        in_stance = ir.Return(self._call(say("entry_in_stance"), own, users))
        yield ir.If(say("dynamo._stance is not stance"), (in_stance,))
        told = ir.Call(say("tell_of_gradients"), ir.Arguments(own))
        recording: tuple[ir.Stmt, ...] = (
            ir.Assign((), False, told),
            ir.With(say("torch.no_grad()"), (ir.Return(again),)),
        )
        if plan.asks_grad_mode:
            recording = (ir.Assign((), False, say("explain_grad_mode()")),)
        yield ir.If(say("torch.is_grad_enabled()"), recording)
        with_care = ir.Return(self._call(say("entry_with_care"), own, users))
        yield ir.If(say(_MODES), (with_care,))
        if handed is not None:
            taken = [bind(name.id, False) for name in handed]
            self.handed.update(zip(handed, taken, strict=True))
            call = ir.Call(ir.Global(CHECKS_NAME), ir.Arguments(own))
            yield ir.Assign(tuple(name.id for name in taken), len(taken) > 1, call)
        held = execution_fn, as_bound, fetch_weights, count_call = [
            bind(name, False) for name in HELD
        ]
        note = ir.Origin(module="for all of this call, whatever is bound meanwhile")
        yield ir.Assign(tuple(name.id for name in held), True, say("bound"), note)
        if plan.binds and plan.checks:
            explained = ir.Assign((), False, say("explain_weights()"))
            yield ir.If(say("not X()", X=as_bound), (explained,))
        if reads_weights(plan):
            self.weights = weights = bind("weights", False)
            yield ir.Assign((weights.id,), False, say("X()", X=fetch_weights))
        passed = tuple(map(self._passed, plan.passed))
        named: tuple[tuple[str, ir.Expr], ...] = ()
        if plan.batch is not None:
            named = ((SUBMODS, say("submods_for(X)", X=self._passed(plan.batch))),)
        outputs = [bind(wish, True) for wish in plan.outputs]
        self.outputs += outputs
        yield ir.Assign((), False, say("X()", X=count_call))
        run = ir.Call(execution_fn, ir.Arguments(passed, named))
        yield ir.Assign(tuple(name.id for name in outputs), bool(outputs), run)
        yield ir.Return(self._packed(plan.result))

    def _here(self, taken: ir.Expr) -> ir.Expr:
        """What a parameter, or something that the checks unpacked, is called in the entry."""
        return self.handed.get(taken, taken)

    def _passed(self, value: Passed) -> ir.Expr:
        steps = self.steps
        match value:
            case FromLeaf(leaf):
                return self._here(steps.leaves[leaf])
            case FromSymbol(name):
                return self._here(steps.symbols[name])
            case FromSize(leaf, dim):
                tensor = self._here(steps.leaves[leaf])
                return self.say("X.size(DIM)", X=tensor, DIM=self.value(dim))
            case FromOffset(leaf):
                return self.say("X.storage_offset()", X=self._here(steps.leaves[leaf]))
            case FromNumber(number):
                return self.value(number)
            case FromWeights(index):
                return ir.Item(self.weights, self.value(index))
            case _:
                assert_never(value)

    def _packed(self, packed: Packed) -> ir.Expr:
        match packed:
            case FromLeaf() | FromWeights():
                return self._passed(packed)
            case FromOutput(index):
                return self.outputs[index]
            case FromConst(value):
                return self.value(value, "fixed")
            case FromItems(kind, keys, children):
                items = tuple(map(self._packed, children))
                if kind is dict:
                    named = [self.value(key, "key") for key in keys]
                    return ir.DictExpr(tuple(zip(named, items, strict=True)))
                return ir.ListExpr(items) if kind is list else ir.TupleExpr(items)
            case FromCall(rebuild, context, type_name, children):
                function = self.value(rebuild, f"rebuild_{type_name}")
                about = self.value(context, f"context_{type_name}")
                parts = ir.ListExpr(tuple(map(self._packed, children)))
                return ir.Call(function, ir.Arguments((parts, about)))
            case _:
                assert_never(packed)
