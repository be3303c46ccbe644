"""The function that users call, as source. In: what a trace assumed of its arguments and how its result is packed. Out: an `EntrySource` with `check_inputs` and the entry.

It decides nothing about the model: everything it writes was handed to it; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from piecework.codegen.entry.body import CHECKS_NAME, FUNCTION_NAME, HELD, entry_functions
from piecework.codegen.entry.plan import EntryPlan, reads_weights
from piecework.codegen.entry.proof import prove_entry
from piecework.codegen.entry.steps import Steps
from piecework.codegen.plan import ir
from piecework.codegen.plan.check import check_ir
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.plan.names import BUILTINS, NameTable
from piecework.codegen.plan.render import render
from piecework.codegen.plan.size_text import MODULES, RESERVED

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
    *("explain_grad_mode", "tell_of_gradients"),
    *("arguments_as_traced", "autocast_enabled", "dispatch_modes", "function_modes", "transforms"),
)


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
        known = (name for name, each in self.consts.items() if each is value)
        name = next(known, None) or self.names.claim(wish)
        self.consts[name] = value
        return ir.Global(name)

    # --- the module ------------------------------------------------------------------------------

    def module(self) -> ir.Module:
        users = tuple(map(ir.Name, self.own))
        name = FUNCTION_NAME
        if users != self.parameters:
            name = self.names.claim("entry_with_other_names")
        *functions, entry = entry_functions(
            self.plan,
            self.steps,
            lambda name, new: ir.Name(self.names.claim(name) if new else name),
            name=name,
            keywords=tuple(self.own.values()),
            users=users,
        )
        provided = (*PROVIDED, *self.consts)
        return ir.Module(
            tuple(sorted(self.imports)), (), tuple(functions), entry, (), (), provided=provided
        )
