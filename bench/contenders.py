"""The ways to run one model that are compared.

All of them but `eager` and `stock` run the same compiled pieces; nothing here is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.fx

from piecework.codegen import LowerOptions, generate_source
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.errors import PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.trace.inputs import Argument, GraphInput, Size
from piecework.runtime.watch.weights import Weight

Call = Callable[[torch.Tensor], torch.Tensor]
Piece = Callable[..., Sequence[object]]


def dynamic(example: torch.Tensor, *, unbacked: bool) -> torch.Tensor:
    """``example`` with its batch marked so that one trace serves batch 1 as well."""
    if unbacked:
        torch._dynamo.decorators.mark_unbacked(example, 0)
    return example


def traced_once(compiled: Call, example: torch.Tensor, unbacked: bool) -> Call:
    """``compiled``, after its first call."""
    compiled(dynamic(example.clone(), unbacked=unbacked))
    return compiled


class FlatGraph:
    """The stitching graph of a stitched module.

    Args:
        batch: that is measured; where batch sizes have compiled forms of their own, its.
    """

    def __init__(self, stitched: StitchedModule, batch: int) -> None:
        self.stitched = stitched
        self.sources = stitched.traces[0].entry.inputs
        table = stitched.program.range_table
        self.public = stitched.program.callables(None if table is None else table.find(batch))
        self.pieces = {piece.name for piece in stitched.pieces}
        gm = stitched.split_gm
        modules = {
            name: PieceModule(self.public[name]) if name in self.pieces else gm.get_submodule(name)
            for name in (str(node.target) for node in gm.graph.find_nodes(op="call_module"))
        }
        self.split_gm = torch.fx.GraphModule(modules, gm.graph)

    def inputs(self, *arguments: torch.Tensor) -> list[object]:
        """Weights, sizes and the arguments, in the order of the graph."""

        def value(source: GraphInput) -> object:
            match source:
                case Weight(tensor=tensor):
                    return tensor
                case Size(leaf=leaf, dim=dim):
                    return arguments[leaf].size(dim)
                case Argument(leaf=leaf):
                    return arguments[leaf]

        return [value(source) for source in self.sources]


class PieceModule(torch.nn.Module):
    """A function as the graph calls it."""

    def __init__(self, function: Piece) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object) -> Sequence[object]:
        return self.function(*args)


# --- 5: conventional piecewise compilation ------------------------------------------------------------


def by_range(runnable: Piece, size_at: int | None) -> Piece:
    """A piece that looks its range up in every call, as the field's piecewise backends do."""
    runnables = {(0, 1 << 30): runnable}

    def piece(*args: object) -> Sequence[object]:
        size = 1 if size_at is None else args[size_at]
        for (start, end), each in runnables.items():
            if start <= size <= end:  # type: ignore[operator]
                return each(*args)
        raise PieceworkError(f"no range holds {size}")

    return piece


def conventional(
    model: torch.nn.Module,
    example: torch.Tensor,
    operator: str,
    *,
    unbacked: bool,
    config: CompilationConfig | None = None,
    wrapped: Callable[[dict[str, Piece]], dict[str, Piece]] = lambda pieces: pieces,
) -> Call:
    """Dynamo's guards, generated code, a look-up and public artifact per piece, the dispatcher.

    Args:
        wrapped: what becomes of the pieces before they are called.
    """

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        made = PieceworkBackend(config, "conventional", splitting_ops=[operator]).prepare(gm)
        source = generate_source(made.split_gm, LowerOptions(submods=list(made.backends)))
        pieces = {
            name: by_range(piece.runnable_for(None), next(iter(piece.sym_shape_indices), None))
            for name, piece in made.backends.items()
        }
        return compile_execution_fn(
            source.code, wrapped(pieces), source.submod_names, source.consts
        )

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    return traced_once(compiled, example, unbacked)


# --- 6: the limit ---------------------------------------------------------------------------------------


def limit(graph: FlatGraph, operator: str, body: Callable[..., None]) -> Call:
    """The same kernels and the op's raw function in a straight line."""

    def call(node: torch.fx.Node, text: Mapping[torch.fx.Node, str]) -> list[str]:
        return [f"op({', '.join(op_texts(graph.split_gm, node, operator, text))})"]

    lines, values = straight_lines(graph, {"x": torch.zeros(2, dtype=torch.int64)}, call)
    return straight("x", ["s0 = x.size(0)", *lines], {"op": body, **values})  # type: ignore[return-value]


def straight(
    parameters: str,
    lines: Sequence[str],
    values: Mapping[str, object],
    as_locals: bool | None = None,
) -> Callable[..., object]:
    """A function of these lines; ``values`` are its locals while CPython has short names for them."""
    text = "".join(f"    {line}\n" for line in lines)
    short = len(values) < 250 if as_locals is None else as_locals
    held = [f"{name}={name}" for name in values if short]
    scope = dict(values)
    exec(f"def straight({', '.join([parameters, *held])}):\n{text}", scope)
    return scope["straight"]  # type: ignore[return-value]


def straight_lines(
    graph: FlatGraph,
    arguments: Mapping[str, torch.Tensor],
    call: Callable[[torch.fx.Node, dict[torch.fx.Node, str]], list[str]],
) -> tuple[list[str], dict[str, object]]:
    """The graph as statements, and what they hold.

    Args:
        arguments: the arguments' names, with an example of each; sizes are called ``s0``.
        call: the statements for a splitting op.
    """
    values: dict[str, object] = {}
    text: dict[torch.fx.Node, str] = {}
    placeholders = graph.split_gm.graph.find_nodes(op="placeholder")
    given = graph.inputs(*arguments.values())
    for index, (node, value) in enumerate(zip(placeholders, given, strict=True)):
        name = next((name for name, each in arguments.items() if each is value), None)
        if name is not None:
            text[node] = name
        elif isinstance(value, torch.Tensor):
            text[node] = f"w{index}"
            values[f"w{index}"] = value
        else:
            text[node] = "s0"
    lines: list[str] = []
    for node in graph.split_gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in graph.pieces:
            lines.append(_piece_line(node, graph, text, values))
        elif node.op == "call_module":
            lines += call(node, text)
        elif node.op == "output":
            lines.append(f"return {text[node.args[0][0]]}")
    locals_ = [name for name in text.values() if name not in (*values, *arguments, "s0")]
    return _freeing(lines, locals_), values


def _freeing(lines: Sequence[str], locals_: Sequence[str]) -> list[str]:
    """``lines`` with each local deleted after the last line that reads it."""
    words = [set(re.findall(r"\w+", line)) for line in lines]
    last = {name: max(i for i, found in enumerate(words) if name in found) for name in locals_}
    freeing: list[str] = []
    for index, line in enumerate(lines):
        freeing.append(line)
        dead = [name for name in locals_ if last[name] == index]
        if dead and index + 1 < len(lines):
            freeing.append(f"del {', '.join(dead)}")
    return freeing


def _piece_line(
    node: torch.fx.Node, graph: FlatGraph, text: dict[torch.fx.Node, str], values: dict[str, object]
) -> str:
    name = str(node.target)
    piece = graph.stitched.split_gm.get_submodule(name)
    outputs = len(piece.graph.output_node().args[0])  # type: ignore[union-attr]
    inputs = len(piece.graph.find_nodes(op="placeholder"))  # type: ignore[union-attr]
    artifact = graph.public[name]
    call, reason = torch_compat.direct_entry(artifact, inputs, outputs, vouched=True)
    if call is None:
        raise PieceworkError(f"{name} shows no inner function: {reason}")
    values[f"call_{name}"] = call
    targets = [f"{name}_{i}" for i in range(outputs)]
    for user in node.users:
        text[user] = targets[user.args[1]]  # type: ignore[index]
    arguments = ", ".join(text[arg] for arg in node.args)  # type: ignore[index]
    return f"{', '.join(targets)}{',' if outputs == 1 else ''} = call_{name}([{arguments}])"


def op_operands(gm: torch.fx.GraphModule, node: torch.fx.Node, operator: str) -> list[object]:
    """The operator's arguments, as its submodule passes them: nodes of ``gm``, and constants."""
    submod = gm.get_submodule(str(node.target))
    inner = dict(zip(submod.graph.find_nodes(op="placeholder"), node.args, strict=True))  # type: ignore[union-attr]
    namespace, _, name = operator.partition("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    (call,) = submod.graph.find_nodes(op="call_function", target=overload)  # type: ignore[union-attr]
    values = [*call.args, *call.kwargs.values()]
    return [inner[each] if isinstance(each, torch.fx.Node) else each for each in values]


def op_texts(
    gm: torch.fx.GraphModule,
    node: torch.fx.Node,
    operator: str,
    text: Mapping[torch.fx.Node, str],
) -> list[str]:
    """The same, as they are written in a line."""
    operands = op_operands(gm, node, operator)
    return [text[each] if isinstance(each, torch.fx.Node) else repr(each) for each in operands]
