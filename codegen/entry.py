"""The function that users call, as source. In: what a trace assumed of its arguments and how its result is packed. Out: an `EntrySource` with `check_inputs` and the entry.

It decides nothing about the model: everything it writes was handed to it; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from piecework.codegen.checks import Require, entry_table
from piecework.codegen.entry_checks import CheckLines, modules_in, targets_text
from piecework.codegen.entry_plan import (
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
)
from piecework.codegen.entry_proof import prove_entry
from piecework.codegen.literals import is_inline_literal, literal_text
from piecework.codegen.names import BUILTINS, NameTable
from piecework.codegen.render import environment, format_source
from piecework.codegen.size_text import RESERVED

FORMAT_VERSION = 1
FUNCTION_NAME = "entry"
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
    "bound",
    "submods_for",
    "dynamo",
    "stance",
    "entry_in_stance",
    "entry_with_care",
    "explain_inputs",
    "explain_weights",
    "arguments_as_traced",
    "memory_apart",
    "same_kernels",
    "autocast_enabled",
    "dispatch_modes",
    "function_modes",
    "transforms",
    "flatten",
)


#: What ``bound`` holds, in order: a call takes all of it in one step, so that it never mixes two bindings.
HELD = ("execution_fn", "weights_as_bound", "fetch_weights")


def generate_entry(plan: EntryPlan) -> EntrySource:
    """Write ``plan`` as Python source.

    The module must be executed with the names of `PROVIDED` in its namespace, beside ``consts``.

    Raises:
        EmitError: the text is not Python, or does not say what ``plan`` says (a defect of piecework).
    """
    return _Writer(plan).write()


class _Writer:
    """State of one emission: names, constants and the lines of ``check_inputs``."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        reserved = {*PROVIDED, *HELD, *_USED, *RESERVED, "torch", "check_inputs", FUNCTION_NAME}
        if self._fetches_weights():
            reserved.add("weights")
        self.names = NameTable(frozenset(reserved), builtins=frozenset())
        self.parameters = {p.name: self.names.claim(p.name) for p in plan.parameters}
        # A parameter may have a builtin's name, which callers use; nothing else does.
        for name in BUILTINS:
            self.names.reserve(name)
        self.consts: dict[str, object] = {}
        self.checks = CheckLines(self.names, tuple(self.parameters.values()), self._const)
        self.leaves: Mapping[int, str] = self.checks.leaves
        self.symbols: Mapping[str, str] = self.checks.symbols

    def write(self) -> EntrySource:
        plan = self.plan
        lines = [
            line
            for step in entry_table(plan)
            if plan.checks or not isinstance(step, Require)
            for line in self.checks.lines(step)
        ]
        extras = self._extras()
        outputs = [self.names.claim(wish) for wish in plan.outputs]
        text = (
            environment()
            .get_template("entry.py.jinja")
            .render(
                format_version=FORMAT_VERSION,
                banner=plan.banner,
                imports=sorted({"torch", *modules_in([line.test for line in lines])}),
                parameters=self._signature(self.parameters),
                named_parameters=self._by_their_own_names(),
                inner=self.names.claim("entry_with_other_names"),
                renamed=self._forwarded({n: n for n in self.parameters}, self.parameters),
                check_parameters=", ".join(self.parameters.values()),
                forward=self._forwarded(self.parameters, {n: n for n in self.parameters}),
                steps=lines,
                checks=bool(lines or extras),
                extras=", ".join(extras),
                unpacked=f"{', '.join(extras)} = " if extras else "",
                held=", ".join(HELD),
                fetches_weights=self._fetches_weights(),
                binds=plan.binds and plan.checks,
                arguments=", ".join(self._arguments()),
                outputs=targets_text(outputs),
                result=self._packed(plan.result, outputs),
            )
        )
        code = format_source(text)
        prove_entry(code, plan, PROVIDED, self.consts)
        return EntrySource(code, self.consts)

    # --- the signature -----------------------------------------------------------------------------

    def _by_their_own_names(self) -> str:
        """The signature with the model's names for the parameters, where some of them had to be renamed; "" otherwise."""
        own = {name: name for name in self.parameters}
        return "" if own == self.parameters else self._signature(own)

    def _signature(self, names: Mapping[str, str]) -> str:
        parts: list[str] = []
        kinds = [p.kind for p in self.plan.parameters]
        for index, parameter in enumerate(self.plan.parameters):
            if parameter.kind == "k" and "*" not in kinds and "k" not in kinds[:index]:
                parts.append("*")
            name = names[parameter.name]
            prefix = parameter.kind if parameter.kind in ("*", "**") else ""
            parts.append(f"{prefix}{name}{self._default(parameter)}")
            if parameter.kind == "/" and kinds[index + 1 : index + 2] != ["/"]:
                parts.append("/")
        return ", ".join(parts)

    def _default(self, parameter: Parameter) -> str:
        if parameter.default is None:
            return ""
        value = parameter.default.value
        same = (name for name, known in self.consts.items() if known is value)
        name = "" if is_inline_literal(value) else next(same, "")
        return f"={name or self._known(f'default_{parameter.name}', value)}"

    def _known(self, wish: str, value: object) -> str:
        """A value that is no argument: in place, or under a name."""
        return str(literal_text(value)) if is_inline_literal(value) else self._const(wish, value)

    def _forwarded(self, values: Mapping[str, str], keywords: Mapping[str, str]) -> str:
        """The parameters, called ``values`` here, as arguments of a call whose keyword parameters are called ``keywords``."""
        parts = []
        for parameter in self.plan.parameters:
            name = values[parameter.name]
            match parameter.kind:
                case "k":
                    parts.append(f"{keywords[parameter.name]}={name}")
                case "*" | "**":
                    parts.append(f"{parameter.kind}{name}")
                case _:
                    parts.append(name)
        return ", ".join(parts)

    def _const(self, wish: str, value: object) -> str:
        name = self.names.claim(wish)
        self.consts[name] = value
        return str(name)

    # --- the entry -----------------------------------------------------------------------------------

    def _fetches_weights(self) -> bool:
        return any(isinstance(e, FromWeights) for e in self.plan.passed) or _has_weight(
            self.plan.result
        )

    def _extras(self) -> list[str]:
        """What ``check_inputs`` hands back: values that the entry uses and does not have as parameters."""
        passed = (*self.plan.passed, *(() if self.plan.batch is None else (self.plan.batch,)))
        used = {self._pass(each).partition(".")[0] for each in passed}
        used |= set(self._leaves_of(self.plan.result))
        return [name for name in self.checks.unpacked if name in used]

    def _leaves_of(self, packed: Packed) -> list[str]:
        match packed:
            case FromLeaf(index):
                return [self.leaves[index]]
            case FromItems(children=children) | FromCall(children=children):
                return [name for child in children for name in self._leaves_of(child)]
            case _:
                return []

    def _pass(self, value: Passed) -> str:
        match value:
            case FromLeaf(index):
                return self.leaves[index]
            case FromSymbol(name):
                return self.symbols[name]
            case FromSize(leaf, dim):
                return f"{self.leaves[leaf]}.size({dim})"
            case FromOffset(leaf):
                return f"{self.leaves[leaf]}.storage_offset()"
            case FromNumber(number):
                return str(literal_text(number))
            case FromWeights(index):
                return f"weights[{index}]"
            case _:
                assert_never(value)

    def _arguments(self) -> list[str]:
        arguments = [self._pass(each) for each in self.plan.passed]
        if self.plan.batch is not None:
            arguments.append(f"__vllm_submods__=submods_for({self._pass(self.plan.batch)})")
        return arguments

    def _packed(self, packed: Packed, outputs: Sequence[str]) -> str:
        match packed:
            case FromLeaf(index):
                return self.leaves[index]
            case FromOutput(index):
                return str(outputs[index])
            case FromWeights(index):
                return f"weights[{index}]"
            case FromConst(value):
                return self._known("fixed", value)
            case FromItems(kind, keys, children):
                items = [self._packed(child, outputs) for child in children]
                if kind is dict:
                    named = (self._known("key", key) for key in keys)
                    pairs = (f"{key}: {item}" for key, item in zip(named, items, strict=True))
                    return f"{{{', '.join(pairs)}}}"
                return f"[{', '.join(items)}]" if kind is list else _tuple(items)
            case FromCall(rebuild, context, type_name, children):
                function = self._const(f"rebuild_{type_name}", rebuild)
                about = self._const(f"context_{type_name}", context)
                parts = ", ".join(self._packed(child, outputs) for child in children)
                return f"{function}([{parts}], {about})"
            case _:
                assert_never(packed)


def _has_weight(packed: Packed) -> bool:
    children = packed.children if isinstance(packed, (FromItems, FromCall)) else ()
    return isinstance(packed, FromWeights) or any(map(_has_weight, children))


def _tuple(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
