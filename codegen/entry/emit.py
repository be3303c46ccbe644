"""The function that users call, as source. In: what a trace assumed of its arguments and how its result is packed. Out: an `EntrySource` with `check_inputs` and the entry.

It decides nothing about the model: everything it writes was handed to it; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    Parameter,
    Passed,
    reads_weights,
)
from piecework.codegen.entry.proof import prove_entry
from piecework.codegen.entry.steps import Steps, forwarded
from piecework.codegen.plan import ir
from piecework.codegen.plan.check import check_ir
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.plan.names import BUILTINS, SUBMODS, NameTable
from piecework.codegen.plan.render import render
from piecework.codegen.plan.size_text import MODULES, RESERVED

FUNCTION_NAME = "entry"
CHECKS_NAME = "check_inputs"
#: Builtins that checks call or name, which no parameter may hide.
_USED = ("bytes", "complex", "dict", "id", "len", "list", "repr", "str", "tuple", "type")


@dataclass(frozen=True, slots=True)
class EntrySource:
    """The emitted entry.

    Attributes:
        code: the Python text, exactly what is executed.
        consts: name → value of the objects that the text mentions.
    """

    code: str
    consts: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.code


#: What the runtime puts into the entry's module, beside its constants.
PROVIDED = (
    *("bound", "submods_for", "dynamo", "stance", "same_kernels", "flatten", "memory_apart"),
    *("entry_in_stance", "entry_with_care", "explain_inputs", "explain_weights"),
    "explain_grad_mode",
    *("arguments_as_traced", "autocast_enabled", "dispatch_modes", "function_modes", "transforms"),
)


#: What ``bound`` holds, in order: a call takes all of it in one step, so that it never mixes two bindings.
HELD = ("execution_fn", "weights_as_bound", "fetch_weights", "count_call")


def generate_entry(plan: EntryPlan) -> EntrySource:
    """Write ``plan`` as Python source.

    The module must be executed with the names of `PROVIDED` in its namespace, beside ``consts``.

    Raises:
        EmitError: the text is not Python, or does not say what ``plan`` says (a defect of piecework).
    """
    lowering = _Lowering(plan)
    module = lowering.module()
    check_ir(module, 0, FUNCTION_NAME)
    code = render(module, "entry", plan.banner)
    prove_entry(code, plan, PROVIDED, lowering.consts)
    return EntrySource(code, lowering.consts)


class _Lowering:
    """The plan of one entry's text. It is its own `Words`: names are written as they are, values in place or under a name."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        reserved = {*PROVIDED, *HELD, *_USED, *RESERVED, "torch", CHECKS_NAME, FUNCTION_NAME}
        if reads_weights(plan):
            reserved.add("weights")
        self.names = NameTable(frozenset(reserved), builtins=frozenset())
        self.own = {p.name: self.names.claim(p.name) for p in plan.parameters}
        # A parameter may have a builtin's name, which callers use; nothing else does.
        for name in BUILTINS:
            self.names.reserve(name)
        self.consts: dict[str, object] = {}
        self.imports = {"torch"}
        self.parameters = tuple(map(ir.Name, self.own.values()))
        self.steps = Steps(self, self.parameters, lambda wish: ir.Name(self.names.claim(wish)))

    # --- words -----------------------------------------------------------------------------------

    def name(self, name: str) -> ir.Expr:
        self.imports |= {name} & MODULES.keys()
        return ir.Global(name)

    def attribute(self, value: ir.Expr, name: str) -> ir.Expr:
        if isinstance(value, ir.Global) and value.path.partition(".")[0] in self.imports:
            return ir.Global(f"{value.path}.{name}")
        return ir.Attribute(value, name)

    def value(self, value: object, wish: str = "") -> ir.Expr:
        if is_inline_literal(value):
            return ir.Literal(value)
        name = self.names.claim(wish)
        self.consts[name] = value
        return ir.Global(name)

    # --- the module ------------------------------------------------------------------------------

    def module(self) -> ir.Module:
        plan = self.plan
        checks, handed = self.steps.body(plan)
        functions: list[ir.Function] = []
        if checks:
            positional = tuple(ir.Parameter(name.id) for name in self.parameters)
            functions.append(ir.Function(CHECKS_NAME, positional, checks, False))
        outputs = [self.names.claim(wish) for wish in plan.outputs]
        renamed = [name for name, here in self.own.items() if name != here]
        name = self.names.claim("entry_with_other_names") if renamed else FUNCTION_NAME
        body = tuple(self._body(name, functions, handed, outputs))
        entry = ir.Function(name, self._signature(self.own), body, False)
        if renamed:
            functions.append(entry)
            body = (ir.Return(self._forward(name, self.own.values(), self.own)),)
            own = self._signature({name: name for name in self.own})
            entry = ir.Function(FUNCTION_NAME, own, body, False)
        provided = (*PROVIDED, *self.consts)
        return ir.Module(
            tuple(sorted(self.imports)), (), tuple(functions), entry, (), (), provided=provided
        )

    def _signature(self, names: Mapping[str, str]) -> tuple[ir.Parameter, ...]:
        return tuple(
            ir.Parameter(names[each.name], each.kind, self._default(each))
            for each in self.plan.parameters
        )

    def _default(self, parameter: Parameter) -> ir.Expr | None:
        if parameter.default is None:
            return None
        value = parameter.default.value
        known = (name for name, each in self.consts.items() if each is value)
        name = None if is_inline_literal(value) else next(known, None)
        return ir.Global(name) if name else self.value(value, f"default_{parameter.name}")

    def _forward(self, function: str, keywords: Iterable[str], values: Iterable[str]) -> ir.Expr:
        names = tuple(map(ir.Name, values))
        return forwarded(ir.Global(function), self.plan.parameters, names, tuple(keywords))

    # --- the entry -------------------------------------------------------------------------------

    def _body(
        self, own: str, checks: Sequence[object], handed: Sequence[ir.Name], outputs: Sequence[str]
    ) -> Iterator[ir.Stmt]:
        plan, say = self.plan, self.steps.say
        here = self.own.values()
        execution_fn, as_bound, fetch_weights, count_call = map(ir.Name, HELD)
        in_stance = ir.Return(self._forward("entry_in_stance", self.own, here))
        yield ir.If(say("dynamo._stance is not stance"), (in_stance,))
        again = ir.Return(self._forward(own, here, here))
        recording: ir.Stmt = ir.With(say("torch.no_grad()"), (again,))
        if plan.asks_grad_mode:
            recording = ir.Assign((), False, say("explain_grad_mode()"))
        yield ir.If(say("torch.is_grad_enabled()"), (recording,))
        modes = "autocast_enabled() or dispatch_modes() or function_modes() or transforms() or not same_kernels()"
        with_care = ir.Return(self._forward("entry_with_care", self.own, here))
        yield ir.If(say(modes), (with_care,))
        if checks:
            call = ir.Call(ir.Global(CHECKS_NAME), ir.Arguments(self.parameters))
            yield ir.Assign(tuple(name.id for name in handed), len(handed) > 1, call)
        note = ir.Origin(module="for all of this call, whatever is bound meanwhile")
        yield ir.Assign(HELD, True, say("bound"), note)
        if plan.binds and plan.checks:
            explained = ir.Assign((), False, say("explain_weights()"))
            yield ir.If(say("not X()", X=as_bound), (explained,))
        if reads_weights(plan):
            yield ir.Assign(("weights",), False, say("X()", X=fetch_weights))
        args = ir.Arguments(tuple(map(self._passed, plan.passed)))
        if plan.batch is not None:
            submods = say("submods_for(X)", X=self._passed(plan.batch))
            args = replace(args, kwargs=((SUBMODS, submods),))
        yield ir.Assign((), False, say("X()", X=count_call))
        yield ir.Assign(tuple(outputs), bool(outputs), ir.Call(execution_fn, args))
        yield ir.Return(self._packed(plan.result, outputs))

    def _passed(self, value: Passed) -> ir.Expr:
        say = self.steps.say
        match value:
            case FromLeaf(leaf):
                return self.steps.leaves[leaf]
            case FromSymbol(name):
                return self.steps.symbols[name]
            case FromSize(leaf, dim):
                return say("X.size(DIM)", X=self.steps.leaves[leaf], DIM=ir.Literal(dim))
            case FromOffset(leaf):
                return say("X.storage_offset()", X=self.steps.leaves[leaf])
            case FromNumber(number):
                return ir.Literal(number)
            case FromWeights(index):
                return ir.Item(ir.Name("weights"), ir.Literal(index))
            case _:
                assert_never(value)

    def _packed(self, packed: Packed, outputs: Sequence[str]) -> ir.Expr:
        match packed:
            case FromLeaf(index):
                return self.steps.leaves[index]
            case FromOutput(index):
                return ir.Name(outputs[index])
            case FromWeights(index):
                return ir.Item(ir.Name("weights"), ir.Literal(index))
            case FromConst(value):
                return self.value(value, "fixed")
            case FromItems(kind, keys, children):
                items = tuple(self._packed(child, outputs) for child in children)
                if kind is dict:
                    named = [self.value(key, "key") for key in keys]
                    return ir.DictExpr(tuple(zip(named, items, strict=True)))
                return ir.ListExpr(items) if kind is list else ir.TupleExpr(items)
            case FromCall(rebuild, context, type_name, children):
                function = self.value(rebuild, f"rebuild_{type_name}")
                about = self.value(context, f"context_{type_name}")
                parts = ir.ListExpr(tuple(self._packed(child, outputs) for child in children))
                return ir.Call(function, ir.Arguments((parts, about)))
            case _:
                assert_never(packed)
