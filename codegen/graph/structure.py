"""What makes two graphs the same program: a key that ignores names, and the literals on the way."""

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.fx
from torch.multiprocessing.reductions import StorageWeakRef

from piecework.codegen.graph.consts import DICT_TYPES, LIST_TYPES, NAMED_BY_TORCH, holds_node
from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.targets import function_path
from piecework.codegen.plan.literals import is_inline_literal


@dataclass(frozen=True, slots=True)
class Hole:
    """A literal left out of a key."""

    node: int  # its node's position
    ordinal: int  # its place among the node's literals
    argument: str
    value: object


@dataclass(frozen=True, slots=True)
class Structure:
    """Canonical form of a graph."""

    key: str  # identifies the program
    lines: tuple[str, ...]  # its readable form, one per node
    holes: tuple[Hole, ...]  # what was left open
    local: str = ""  # what of it only this process can tell


def structure_of(
    gm: torch.fx.GraphModule,
    *,
    open_literals: bool = False,
    describe_input: Callable[[torch.fx.Node], str] | None = None,
) -> Structure:
    """Canonical form of ``gm``."""
    writer = _Writer(gm, open_literals, describe_input)
    for node in gm.graph.nodes:
        writer.write(node)
    text = "\n".join(writer.lines)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Structure(digest, tuple(writer.lines), tuple(writer.holes), writer.local)


def call_text(gm: torch.fx.GraphModule, node: torch.fx.Node) -> str:
    """What one node of ``gm`` does, with its literals."""
    writer = _Writer(gm)
    writer.number.update({each: index for index, each in enumerate(node.all_input_nodes)})
    writer.write(node)
    return writer.lines[0]


class _Writer:
    def __init__(
        self,
        gm: torch.fx.GraphModule,
        open_literals: bool = False,
        describe_input: Callable[[torch.fx.Node], str] | None = None,
    ) -> None:
        self.gm = gm
        self.open_literals, self.describe_input = open_literals, describe_input
        self.lines: list[str] = []
        self.holes: list[Hole] = []
        self.local = ""
        self.number: dict[torch.fx.Node, int] = {}
        self._memory: dict[StorageWeakRef, int] = {}
        self._ordinal = 0
        self._open = open_literals

    def write(self, node: torch.fx.Node) -> None:
        number = self.number[node] = len(self.number)
        self._ordinal = 0
        # Literals that decide the form of a statement (an unpacked index, an attribute, a default) stay in the key.
        fixed = node.op == "placeholder" or node.target in (operator.getitem, getattr)
        self._open = self.open_literals and not fixed
        args = ", ".join(self._value(arg, number, str(i)) for i, arg in enumerate(node.args))
        kwargs = ", ".join(
            f"{key!a}={self._value(arg, number, key)}" for key, arg in node.kwargs.items()
        )
        target = self._target(node)
        if node.op == "placeholder" and self.describe_input is not None:
            made_of = self._made_of(value_of(node), number)
            target = self.describe_input(node) + made_of + self._sharing(node, number)
        # Results are unpacked by their number, so it is part of the program.
        result = value_of(node)
        arity = f" -> {len(result)}" if isinstance(result, (tuple, list)) else ""
        self.lines.append(f"%{number} {node.op} {target} ({args}) {{{kwargs}}}{arity}")

    def _made_of(self, value: object, number: int) -> str:
        """The inner tensors and settings of a tensor subclass, which shape and dtype don't tell."""
        apart = taken_apart(value)
        if apart is None:
            return ""
        inner, settings = apart
        parts = [f"{name}: {_signature(x)}{self._made_of(x, number)}" for name, x in inner.items()]
        # By the class itself, so that nothing is kept for a process in which it may do something else.
        return f" of {self._object(type(value))} {self._setting(settings, number)} {parts}"

    def _setting(self, value: object, number: int) -> str:
        """What a subclass says of itself."""
        if type(value) is dict:
            items = [f"{key!a}: {self._setting(each, number)}" for key, each in value.items()]
            return f"dict({', '.join(items)})"
        if type(value) in (list, tuple):
            items = [self._setting(each, number) for each in value]  # type: ignore[attr-defined]
            return f"{type(value).__name__}({', '.join(items)})"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            held = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
            return f"{self._object(type(value))} {self._setting(held, number)}"
        return self._value(value, number, "")

    def _sharing(self, node: torch.fx.Node, number: int) -> str:
        """Which earlier input lies in the same memory."""
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return ""
        first = self._memory.setdefault(StorageWeakRef(value.untyped_storage()), number)  # type: ignore[no-untyped-call]
        return "" if first == number else f" in the memory of %{first}"

    def _target(self, node: torch.fx.Node) -> str:
        if node.op == "call_function":
            path = function_path(node.target)
            if path is None:
                return self._object(node.target)
            # A function of the user's own may have another body in another process.
            if path.module not in (None, "operator", "math") and path.root != "torch":
                self.local = self.local or f"it calls the Python function {path.path}"
            return str(path.path)
        if node.op == "call_method":
            return ascii(node.target)
        if node.op in ("get_attr", "call_module"):
            return self._attribute(str(node.target))
        return ""

    def _attribute(self, target: str) -> str:
        value = attribute_of(self.gm, target)
        if isinstance(value, torch.fx.GraphModule):
            inner = structure_of(value, describe_input=input_signature)
            self.local = self.local or inner.local
            return f"graph {inner.key}"
        return self._object(value)

    def _object(self, value: object) -> str:
        # Identity within this process: equal keys must mean the same object.
        kind = type(value).__qualname__
        self.local = self.local or f"it holds {getattr(value, '__qualname__', None) or f'a {kind}'}"
        return f"{kind}@{id(value):x}"

    def _value(self, value: object, node: int, argument: str) -> str:
        def joined(items: Iterable[object]) -> str:
            return ", ".join(self._value(item, node, argument) for item in items)

        kind = type(value)
        match value:
            case torch.fx.Node():
                return f"%{self.number[value]}"
            case list() if kind in LIST_TYPES:
                return f"list({joined(value)})"
            case tuple() if kind is tuple:
                return f"tuple({joined(value)})"
            case dict() if kind in DICT_TYPES:
                pairs = [f"{joined([key])}: {joined([each])}" for key, each in value.items()]
                return f"dict({', '.join(pairs)})"
            case slice(start=start, stop=stop, step=step):
                return f"slice({joined((start, stop, step))})"
        inline = is_inline_literal(value)
        if inline and self._open and is_liftable(value):
            self.holes.append(Hole(node, self._ordinal, argument, value))
            self._ordinal += 1
            return f"<{kind.__name__}>"
        if inline or kind is float or isinstance(value, (*NAMED_BY_TORCH, torch.Size)):
            return f"{kind.__name__}:{value!a}"
        if isinstance(value, tuple) and hasattr(value, "_fields") and holds_node(value):
            return f"{self._object(kind)}({joined(value)})"
        return self._object(value)


def is_liftable(value: object) -> bool:
    """True for an inline literal that may become a parameter."""
    return value is not None and value is not Ellipsis


def attribute_of(gm: torch.nn.Module, target: str) -> object:
    """The attribute at the dotted path ``target``."""
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def new_placeholder(graph: torch.fx.Graph, name: str) -> torch.fx.Node:
    """A placeholder of ``graph`` whose parameter is called as its node is."""
    node = graph.create_node("placeholder", name, name=name)
    node.target = node.name
    return node


def input_signature(node: torch.fx.Node) -> str:
    """What a compiler may specialise on; symbols are shared by all pieces of one capture."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        number = value if isinstance(value, (int, torch.SymInt)) else ""
        return f"{type(value).__qualname__} {number}"
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return f"{_signature(value)} {static}"


def _signature(value: torch.Tensor) -> str:
    strided = value.layout == torch.strided
    place = (value.stride(), value.storage_offset()) if strided else (value.layout, 0)
    kind = (value.requires_grad, isinstance(value, torch.nn.Parameter))
    parts = (type(value).__qualname__, value.dtype, value.device, tuple(value.shape), *place, *kind)
    return " ".join(map(str, parts))


def taken_apart(tensor: object) -> tuple[dict[str, torch.Tensor], object] | None:
    """A tensor subclass's inner tensors by name, and its settings; None for a plain tensor."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return None
    names, settings = flatten(tensor)
    return {name: getattr(tensor, name) for name in names}, settings
