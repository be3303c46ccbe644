"""Writes the function that users call: ``check_inputs``, and the entry that packs the result."""

import re
from collections.abc import Iterator, Sequence
from typing import assert_never

from piecework.codegen.entry import plan as entry
from piecework.codegen.entry.checks import EntryTable, Names
from piecework.codegen.entry.source import FUNCTION_NAME, EntrySource
from piecework.codegen.plan.ir import Function, Module, Origin, Parameter, Statement
from piecework.codegen.plan.literals import KINDS, targets_text, tuple_text
from piecework.codegen.plan.names import BUILTINS, SUBMODS
from piecework.codegen.plan.render import render
from piecework.codegen.plan.size_text import MODULES, RESERVED

CHECKS_NAME = "check_inputs"
#: What ``bound`` holds, in order: a call takes all of it in one step, so that it never mixes two bindings.
HELD = ("execution_fn", "weights_as_bound", "fetch_weights", "count_call")
_MODES = "autocast_enabled() or dispatch_modes() or function_modes() or transforms() or not same_kernels()"

#: Builtins that checks call or name, which no parameter may hide.
_USED = (
    *("dict", "id", "len", "list", "range", "repr", "tuple", "type"),
    *(kind.__name__ for kind in KINDS),
)

#: What the runtime puts into the entry's module, beside its constants.
PROVIDED = (
    *("bound", "submods_for", "dynamo", "stance", "same_kernels", "flatten", "memory_apart"),
    *("entry_in_stance", "entry_with_care", "explain_inputs", "explain_weights"),
    *("explain_grad_mode", "entry_without_gradients"),
    *("arguments_as_traced", "autocast_enabled", "dispatch_modes", "function_modes", "transforms"),
    *("held_tensors", "held_spans", "memory_outside"),
)


def generate_entry(plan: entry.EntryPlan) -> EntrySource:
    """Write ``plan`` as Python source."""
    made = _Entry(plan)
    *functions, last = made.functions()
    text = " ".join(stmt.text for each in (*functions, last) for stmt in each.body)
    used = {name for name in MODULES if re.search(rf"\b{name}\.", text)}
    module = Module(tuple(sorted({"torch", *used})), last, tuple(functions))
    return EntrySource(render(module, "entry", plan.banner), made.names.consts)


def entry_table(plan: entry.EntryPlan) -> EntryTable:
    """The table that the entry of ``plan`` is written from, with the same names."""
    return _Entry(plan).table


class _Entry:
    """The functions of one entry."""

    def __init__(self, plan: entry.EntryPlan) -> None:
        self.plan = plan
        reserved = {*PROVIDED, *HELD, *_USED, *RESERVED, "torch", CHECKS_NAME, FUNCTION_NAME}
        if entry.reads_weights(plan):
            reserved.add("weights")
        self.names = Names(frozenset(reserved))
        self.own = tuple(self.names.claim(each.name) for each in plan.parameters)
        # A parameter may have a builtin's name, which callers use; nothing else does.
        for name in BUILTINS:
            self.names.reserve(name)
        self.table = EntryTable(plan, self.names, self.own)

    def functions(self) -> Iterator[Function]:
        """``check_inputs`` if there is any, the entry, and one with its users' names."""
        users = tuple(each.name for each in self.plan.parameters)
        name = FUNCTION_NAME
        if users != self.own:
            name = self.names.claim("entry_with_other_names")
        handed = self._handed()
        checks = tuple(self._check_statements(handed))
        if checks:
            yield Function(CHECKS_NAME, tuple(map(Parameter, self.own)), checks)
        body = tuple(self._statements(name, users, handed if checks else None))
        yield Function(name, self._signature(self.own), body)
        if name != FUNCTION_NAME:
            again = Statement(f"return {self._call(name, users, self.own)}", "return")
            yield Function(FUNCTION_NAME, self._signature(users), (again,))

    def _signature(self, names: Sequence[str]) -> tuple[Parameter, ...]:
        defaults = [
            None if p.default is None else self.names.value(p.default.value, f"default_{p.name}")
            for p in self.plan.parameters
        ]
        kinds = [each.kind for each in self.plan.parameters]
        return tuple(map(Parameter, names, kinds, defaults))

    def _call(self, function: str, values: Sequence[str], keywords: Sequence[str]) -> str:
        """A call of ``function`` with the parameters' ``values``."""
        parts = []
        for parameter, value, keyword in zip(self.plan.parameters, values, keywords, strict=True):
            stars = parameter.kind if parameter.kind in ("*", "**") else ""
            parts.append(f"{keyword}={value}" if parameter.kind == "k" else f"{stars}{value}")
        return f"{function}({', '.join(parts)})"

    def _handed(self) -> tuple[str, ...]:
        """What the checks hand back: names that the entry uses and has no parameters for."""
        plan, table = self.plan, self.table
        passed = plan.passed if plan.batch is None else (*plan.passed, plan.batch)
        used = {table.symbols[each.name] for each in passed if isinstance(each, entry.FromSymbol)}
        parts = (*passed, *entry.parts_of(plan.result))
        used |= {table.leaves[each.index] for each in parts if isinstance(each, entry.FromLeaf)}
        return tuple(name for name in table.unpacked if name in used)

    def _check_statements(self, handed: Sequence[str]) -> Iterator[Statement]:
        refused = f"explain_inputs({', '.join(self.own)})"
        for step in self.table.steps:
            if isinstance(step, str):
                yield Statement(step)
            elif self.plan.checks:
                test = " and ".join(_grouped(each.text) for each in step.checks)
                test = f"({test})" if " " in test else test
                yield Statement(f"if not {test}:\n    {refused}", origin=Origin(module=step.about))
        if handed:
            one = handed[0] if len(handed) == 1 else tuple_text(handed)
            yield Statement(f"return {one}", "return")

    def _statements(
        self, name: str, users: Sequence[str], handed: Sequence[str] | None
    ) -> Iterator[Statement]:
        """The statements of the entry; ``handed`` is what the checks hand on, None without any."""
        plan, own = self.plan, self.own
        every = ", ".join(own)
        in_stance = self._call("entry_in_stance", own, users)
        yield Statement(f"if dynamo._stance is not stance:\n    return {in_stance}")
        recording = f"return {self._call('entry_without_gradients', own, users)}"
        if plan.asks_grad_mode:
            recording = "explain_grad_mode()"
        yield Statement(f"if torch.is_grad_enabled():\n    {recording}")
        yield Statement(f"if {_MODES}:\n    return {self._call('entry_with_care', own, users)}")
        if handed is not None:
            targets = targets_text(tuple(handed), len(handed) > 1)
            yield Statement(f"{targets}{CHECKS_NAME}({every})")
        note = Origin(module="for all of this call, whatever is bound meanwhile")
        yield Statement(f"{', '.join(HELD)} = bound", origin=note)
        if plan.binds and plan.checks:
            yield Statement("if not weights_as_bound():\n    explain_weights()")
        if entry.reads_weights(plan):
            yield Statement("weights = fetch_weights()")
        passed = [*map(self._passed, plan.passed)]
        if plan.batch is not None:
            passed.append(f"{SUBMODS}=submods_for({self._passed(plan.batch)})")
        self.outputs = tuple(map(self.names.claim, plan.outputs))
        yield Statement("count_call()")
        run = f"execution_fn({', '.join(passed)})"
        yield Statement(targets_text(self.outputs, True) + run)
        yield Statement(f"return {self._packed(plan.result)}", "return")

    def _passed(self, value: entry.Passed) -> str:
        match value:
            case entry.FromLeaf(index, read):
                return self.table.leaves[index] + read
            case entry.FromSymbol(name):
                return self.table.symbols[name]
            case entry.FromConst(fixed):
                return self.names.value(fixed, "fixed")
            case entry.FromWeights(index):
                return f"weights[{index}]"
            case _:
                assert_never(value)

    def _packed(self, packed: entry.Packed) -> str:
        match packed:
            case entry.FromLeaf() | entry.FromWeights() | entry.FromConst():
                return self._passed(packed)
            case entry.FromOutput(index):
                return self.outputs[index]
            case entry.FromItems(kind, keys, children):
                items = [*map(self._packed, children)]
                if kind is dict:
                    named = [self.names.value(key, "key") for key in keys]
                    pairs = zip(named, items, strict=True)
                    return f"{{{', '.join(f'{key}: {item}' for key, item in pairs)}}}"
                return f"[{', '.join(items)}]" if kind is list else tuple_text(items)
            case entry.FromCall(rebuild, context, type_name, children):
                function = self.names.value(rebuild, f"rebuild_{type_name}")
                about = self.names.value(context, f"context_{type_name}")
                return f"{function}([{', '.join(map(self._packed, children))}], {about})"
            case _:
                assert_never(packed)


def _grouped(text: str) -> str:
    """A condition beside others that have to hold too."""
    return f"({text})" if " or " in text and not text.startswith("(") else text
