"""The function that users call, as source. In: what a trace assumed of its arguments and how its result is packed. Out: an `EntrySource` with `check_inputs` and the entry.

It decides nothing about the model: everything it writes was handed to it; nothing is executed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import torch

from piecework.codegen.consts import is_inline_literal
from piecework.codegen.entry_plan import (
    EntryPlan,
    FixedValue,
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
    IntegerInput,
    Items,
    Leaf,
    Node,
    Packed,
    Parameter,
    Passed,
    SameObject,
    Size,
    TensorInput,
    Tree,
    UnusedTensor,
    WatchedObject,
)
from piecework.codegen.free_names import require_names
from piecework.codegen.layout import literal_text
from piecework.codegen.names import BUILTINS, NameTable
from piecework.codegen.render import environment, format_source
from piecework.codegen.size_text import MODULES, RESERVED, checked_text

_WORD = re.compile(r"(?<![\w.])[A-Za-z_]\w*")  # no attributes

FORMAT_VERSION = 1
FUNCTION_NAME = "entry"
_USED = ("id", "len", "repr", "type")  # builtins that checks call


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
        EmitError: the text is not Python (a defect of piecework).
    """
    return _Writer(plan).write()


class _Writer:
    """State of one emission: names, constants and the lines of ``check_inputs``."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        reserved = {*PROVIDED, *HELD, *_USED, *RESERVED, "torch", "check_inputs", FUNCTION_NAME}
        self.names = NameTable(frozenset(reserved), builtins=frozenset())
        self.parameters = {p.name: self.names.claim(p.name) for p in plan.parameters}
        for (
            name
        ) in (
            BUILTINS
        ):  # a parameter may have a builtin's name, which callers use; nothing else does
            self.names.reserve(name)
        self.consts: dict[str, object] = {}
        self.leaves: dict[int, str] = {}
        self.symbols: dict[str, str] = {}
        self.unpacked: list[str] = []
        self.steps: list[dict[str, object]] = []
        self.late: list[str] = []
        self.tensors: list[str] = []
        self.same: list[tuple[str, str, SameObject]] = []

    def write(self) -> EntrySource:
        plan = self.plan
        for parameter in plan.parameters:
            self._node(parameter.node, self.parameters[parameter.name])
        self._symbol_conditions()
        self._identity_conditions()
        self._apart_conditions()
        if plan.watches_arguments:
            everything = ", ".join(self.parameters.values())
            comment = "what else the trace read of the arguments"
            self._require(comment, [f"arguments_as_traced({everything})"])
        extras = self._extras()
        outputs = [self.names.claim(wish) for wish in plan.outputs]
        text = (
            environment()
            .get_template("entry.py.jinja")
            .render(
                format_version=FORMAT_VERSION,
                banner=plan.banner,
                imports=self._imports(),
                parameters=self._signature(self.parameters),
                named_parameters=self._by_their_own_names(),
                inner=self.names.claim("entry_with_other_names"),
                renamed=self._forwarded({n: n for n in self.parameters}, self.parameters),
                check_parameters=", ".join(self.parameters.values()),
                forward=self._forwarded(self.parameters, {n: n for n in self.parameters}),
                steps=self.steps if plan.checks else [s for s in self.steps if s["assign"]],
                checks=bool(plan.checks or extras),
                explains=plan.checks,
                extras=", ".join(extras),
                unpacked=f"{', '.join(extras)} = " if extras else "",
                held=", ".join(HELD),
                fetches_weights=self._fetches_weights(),
                binds=plan.binds and plan.checks,
                arguments=", ".join(self._arguments()),
                outputs=_targets(outputs),
                result=self._packed(plan.result, outputs),
            )
        )
        code = format_source(text)
        require_names(code, (*PROVIDED, *self.consts), "the entry")
        return EntrySource(code, self.consts)

    def _imports(self) -> list[str]:
        """``torch``, and what the relations between sizes need."""
        words = {word for step in self.steps for word in _WORD.findall(str(step["test"]))}
        return sorted({"torch", *(words & MODULES.keys())})

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
            default = "" if parameter.default is None else f"={self._value(parameter)}"
            parts.append(f"{prefix}{name}{default}")
            if parameter.kind == "/" and kinds[index + 1 : index + 2] != ["/"]:
                parts.append("/")
        return ", ".join(parts)

    def _value(self, parameter: Parameter) -> str:
        assert parameter.default is not None
        value = parameter.default.value
        if is_inline_literal(value):
            return str(literal_text(value))
        for name, known in self.consts.items():
            if known is value:
                return name
        return self._const(f"default_{parameter.name}", value)

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

    # --- check_inputs --------------------------------------------------------------------------------

    def _require(self, comment: str, conditions: Sequence[str]) -> None:
        if conditions:
            test = " and ".join(conditions)
            self.steps.append({"comment": comment, "assign": "", "test": test})

    def _assign(self, text: str) -> None:
        self.steps.append({"comment": "", "assign": text, "test": ""})

    def _node(self, node: Node, path: str) -> None:
        match node:
            case Leaf():
                self._leaf(node, path)
            case Items():
                self._items(node, path)
            case Tree():
                leaves = self.names.claim("leaves")
                structure = self.names.claim("structure")
                expected = self._const("expected_structure", node.structure)
                self._assign(f"{leaves}, {structure} = flatten({path})")
                self._require(
                    f"{node.label}: of the traced structure", [f"{structure} == {expected}"]
                )
                for number, child in enumerate(node.children):
                    self._leaf(child, f"{leaves}[{number}]")
            case _:
                assert_never(node)

    def _items(self, node: Items, path: str) -> None:
        conditions = [f"type({path}) is {node.kind.__name__}", f"len({path}) == {len(node.keys)}"]
        if node.kind is dict:
            conditions += [f"{literal_text(key)} in {path}" for key in node.keys]
        self._require(f"{node.label}: a {node.kind.__name__} of {len(node.keys)}", conditions)
        for key, child in zip(node.keys, node.children, strict=True):
            self._node(child, f"{path}[{literal_text(key)}]")

    def _leaf(self, leaf: Leaf, path: str) -> None:
        if not path.isidentifier():
            name = self.names.claim(leaf.label)
            self._assign(f"{name} = {path}")
            self.unpacked.append(name)
            path = name
        self.leaves[leaf.index] = path
        match leaf.assumption:
            case TensorInput():
                self._tensor(leaf.label, path, leaf.assumption)
            case UnusedTensor(dtype, device, rank):
                comment = f"{leaf.label}: not read by the model"
                self.tensors.append(path)
                self._require(comment, [_A_TENSOR.format(path), *_kind(path, dtype, device, rank)])
            case SameObject():
                self.same.append((leaf.label, path, leaf.assumption))
            case IntegerInput(symbol):
                self.symbols.setdefault(symbol, path)
                self._require(f"{leaf.label}: an integer", [f"type({path}) is int"])
            case FixedValue(value):
                self._fixed(leaf.label, path, value)
            case WatchedObject():
                pass
            case _:
                assert_never(leaf.assumption)

    def _fixed(self, label: str, path: str, value: object) -> None:
        comment = f"{label}: fixed by the trace"
        if value is None or isinstance(value, bool):
            self._require(comment, [f"{path} is {value}"])
        elif isinstance(value, float) and (value != value or value == 0):
            # Two NaNs are unequal and the two zeros equal, where the model's code may tell zeros apart.
            self._require(comment, [f"type({path}) is float", f'repr({path}) == "{value!r}"'])
        elif is_inline_literal(value):
            kind = type(value).__name__
            self._require(comment, [f"type({path}) is {kind}", f"{path} == {literal_text(value)}"])
        else:
            expected = self._const(f"traced_{label}", value)
            same = f"type({path}) is type({expected}) and {path} == {expected}"
            self._require(comment, [f"({path} is {expected} or ({same}))"])

    def _tensor(self, label: str, path: str, tensor: TensorInput) -> None:
        self.tensors.append(path)
        named = "Tensor" if tensor.kind is torch.Tensor else "nn.Parameter"
        conditions = [f"type({path}) is torch.{named}"]
        conditions += _kind(path, tensor.dtype, tensor.device, len(tensor.sizes))
        layout = "contiguous" if tensor.strides is None else "strided as traced"
        comment = f"{label}: {_short(tensor)} on {tensor.device}, {layout}"
        if tensor.strides is None:
            conditions.append(f"{path}.is_contiguous()")
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            conditions.append(f"not {path}.is_neg()")
            if tensor.requires_grad is not None:
                conditions.append(f"{'' if tensor.requires_grad else 'not '}{path}.requires_grad")
        if tensor.dtype.is_complex:
            conditions.append(f"not {path}.is_conj()")
        if tensor.sizes and all(type(size) is int for size in tensor.sizes):
            conditions.append(f"{path}.shape == ({', '.join(map(str, tensor.sizes))},)")
            self._require(comment, conditions)
        else:
            self._require(comment, conditions)
            self._sizes(label, path, tensor.sizes)
        self._item(label, path, tensor.item)
        for dim, stride in enumerate(tensor.strides or ()):
            self.late.append(f"{path}.stride({dim}) == {self._size(stride)}")

    def _item(self, label: str, path: str, item: float | str | None) -> None:
        """The value of a single number, where the trace looked at it."""
        if item is None:
            return
        if not isinstance(item, str):
            self._require(f"{label}: its value", [f"{path}.item() == {literal_text(item)}"])
        elif item.isidentifier() and item not in self.symbols:
            self.symbols[item] = self.names.claim(item)
            self._assign(f"{self.symbols[item]} = {path}.item()")
        else:
            self.late.append(f"{path}.item() == {item}")  # its symbols are known in the end

    def _sizes(self, label: str, path: str, sizes: Sequence[Size]) -> None:
        """Unpack the shape; a symbol seen for the first time is defined by it, all else is compared."""
        known = {symbol.name for symbol in self.plan.symbols}
        targets: list[str] = []
        conditions: list[str] = []
        for dim, size in enumerate(sizes):
            if isinstance(size, str) and size in known and size not in self.symbols:
                self.symbols[size] = self.names.claim(size)
                self.unpacked.append(self.symbols[size])
                targets.append(self.symbols[size])
                continue
            targets.append(self.names.claim(f"{label}_{dim}"))
            if isinstance(size, int) or size in self.symbols:
                conditions.append(f"{targets[-1]} == {self._size(size)}")
            else:
                self.late.append(f"{targets[-1]} == {size}")  # its symbols are known in the end
        if targets:
            self._assign(f"{_targets(targets)}{path}.shape")
        self._require("", conditions)

    def _size(self, size: Size) -> str:
        return str(size) if isinstance(size, int) else self._renamed(size)

    def _renamed(self, text: str) -> str:
        """An expression over symbols, with the names that they have here."""
        return _WORD.sub(lambda word: self.symbols.get(word.group(), word.group()), text)

    def _symbol_conditions(self) -> None:
        ranges: list[str] = []
        for symbol in self.plan.symbols:
            name = self.symbols.get(symbol.name)
            if name is None:
                continue
            if symbol.low is not None and symbol.high is not None:
                ranges.append(f"{symbol.low} <= {name} <= {symbol.high}")
            elif symbol.low is not None:
                ranges.append(f"{name} >= {symbol.low}")
            elif symbol.high is not None:
                ranges.append(f"{name} <= {symbol.high}")
        self._require("sizes that the trace allows", ranges)
        texts = (checked_text(self._renamed(text)) for text in (*self.late, *self.plan.guards))
        relations = [f"({text})" if " or " in text else text for text in texts]
        self._require("relations that the trace relied on", relations)

    def _identity_conditions(self) -> None:
        """Tensors that were one are one, and others are others: the model's code may ask with ``is``."""
        for label, path, same in self.same:
            comment = f"{label}: the same tensor as {same.label}"
            self._require(comment, [f"{path} is {self.leaves[same.index]}"])
        names = self.tensors
        if len(names) == 2:
            self._require("two tensors", [f"{names[0]} is not {names[1]}"])
        elif len(names) > 2:
            numbers = ", ".join(f"id({name})" for name in names)
            self._require(f"{len(names)} tensors", [f"len({{{numbers}}}) == {len(names)}"])

    def _apart_conditions(self) -> None:
        for written, others in self.plan.apart:
            names = ", ".join(self.leaves[leaf] for leaf in (written, *others))
            comment = f"{self.leaves[written]}: written, so no other argument may share its memory"
            self._require(comment, [f"memory_apart({names})"])

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
        return [name for name in self.unpacked if name in used]

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
            case FromNumber(value):
                return str(value)
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
                if is_inline_literal(value):
                    return str(literal_text(value))
                return self._const("fixed", value)
            case FromItems(kind, keys, children):
                return _container(kind, keys, [self._packed(child, outputs) for child in children])
            case FromCall(rebuild, context, type_name, children):
                function = self._const(f"rebuild_{type_name}", rebuild)
                about = self._const(f"context_{type_name}", context)
                items = ", ".join(self._packed(child, outputs) for child in children)
                return f"{function}([{items}], {about})"
            case _:
                assert_never(packed)


def _has_weight(packed: Packed) -> bool:
    children = packed.children if isinstance(packed, (FromItems, FromCall)) else ()
    return isinstance(packed, FromWeights) or any(map(_has_weight, children))


def _short(tensor: TensorInput) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(map(str, tensor.sizes))}]"


_A_TENSOR = "(type({0}) is torch.Tensor or type({0}) is torch.nn.Parameter)"


def _kind(path: str, dtype: torch.dtype, device: torch.device, rank: int) -> list[str]:
    conditions = [f"{path}.dtype is {dtype}", f"{path}.layout is torch.strided"]
    if device.type == "cpu":
        conditions.append(f"{path}.is_cpu")
    elif device.type == "cuda":
        conditions.append(f"{path}.is_cuda and {path}.get_device() == {device.index or 0}")
    else:
        conditions.append(f"{path}.device == torch.device({str(device)!a})")
    conditions.append(f"{path}.dim() == {rank}")
    return conditions


def _targets(names: Sequence[str]) -> str:
    """``a, b = `` or ``(a,) = ``, or nothing."""
    if not names:
        return ""
    return f"({names[0]},) = " if len(names) == 1 else f"{', '.join(names)} = "


def _container(kind: type, keys: Sequence[object], items: Sequence[str]) -> str:
    if kind is dict:
        pairs = (f"{literal_text(key)}: {item}" for key, item in zip(keys, items, strict=True))
        return f"{{{', '.join(pairs)}}}"
    if kind is list:
        return f"[{', '.join(items)}]"
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
