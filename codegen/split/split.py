"""Cuts a graph at its splitting operators into a stitching graph and its pieces, in linear time."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.graph import CodeGen
from torch.multiprocessing.reductions import StorageWeakRef

from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.schemas import overloads_of
from piecework.codegen.graph.structure import attribute_of, new_placeholder
from piecework.codegen.split.blocks import block_starts
from piecework.codegen.split.regions import Regions, RegionWriter
from piecework.codegen.split.sizes import Asserted, PieceSizes, decompose_sizes, is_size_read
from piecework.codegen.split.splitting import SplitItem, SplittingOp, SplittingOps, names_of
from piecework.errors import SplitError, short_errors

MakeModule = Callable[[dict[str, object], torch.fx.Graph, str], torch.fx.GraphModule]


@short_errors
def split_graph(
    graph: torch.fx.GraphModule,
    splitting_ops: Iterable[SplittingOp],
    *,
    asserted: Asserted | None = None,
    blocks: Literal["found", "off"] | Sequence[str] = "off",
    module: MakeModule = torch.fx.GraphModule,
) -> tuple[torch.fx.GraphModule, list[SplitItem]]:
    """Cut ``graph`` at each call of a splitting operator; one that calls none, between blocks that are alike.

    Args:
        graph: a captured graph, one level (submodules of higher-order operators stay whole).
        splitting_ops: as ``"ns::op"`` (every overload), ``"ns::op.overload"``, operators or functions.
        asserted: the symbols of what the trace asserted of a piece's values; the piece takes them.
        blocks: those that are found, or the children of modules with these dotted names.
        module: makes a submodule of what it holds, its graph and a name.

    Returns:
        ``(split_gm, items)``: the stitching graph, which calls ``submod_0``, ``submod_1``, …, and the
        submodules in order. Compiled pieces return a tuple, and take the sizes of their inputs' shapes
        first; a splitting submodule returns its value, or None.

    Raises:
        SplitError: an operator's name is malformed, ``graph`` is none or takes a pytree, a value is
            used before it is defined, a state is left open or cut, or there are no such ``blocks``.

    Example:
        >>> split_gm, items = split_graph(gm, ["mylib::attention"])
        >>> [item.submod_name for item in items if not item.is_splitting_graph]
        ['submod_0', 'submod_2']
    """
    is_splitting = SplittingOps(splitting_ops)
    if not isinstance(graph, torch.fx.GraphModule):
        raise SplitError(
            f"graph must be a torch.fx.GraphModule; got a {type(graph).__qualname__}",
            hint="capture the model first, with torch.fx.symbolic_trace for one, or use piecework.compile",
        )
    if type(graph.graph._codegen) is not CodeGen:
        raise SplitError(
            "the graph takes its inputs as a pytree, which a stitching graph would not",
            where=type(graph.graph._codegen).__name__,
            hint="flatten it first: gm.graph.set_codegen(torch.fx.graph.CodeGen())",
        )
    work = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.graph.nodes:
        copies[node] = work.node_copy(node, lambda n: copies[n])
    decompose_sizes(work)
    regions = Regions(work)
    regions.refuse_cuts(filter(is_splitting, work.nodes))
    starts: set[torch.fx.Node] = set()
    if blocks != "off" and not any(map(is_splitting, work.nodes)):
        named = None if isinstance(blocks, str) else blocks
        starts = block_starts(graph, work, named, regions, lambda node: not _is_idle(node))
    partitions = _merge_idle(_assign(work, is_splitting, regions, starts))
    for number, partition in enumerate(partitions):
        partition.number = number
    return _build(work, partitions, regions, graph, asserted, module)


@dataclass(eq=False, slots=True)
class _Partition:
    splitting: bool
    nodes: list[torch.fx.Node] = field(default_factory=list)
    number: int = -1


def _assign(
    graph: torch.fx.Graph, is_splitting: SplittingOps, regions: Regions, starts: set[torch.fx.Node]
) -> list[_Partition]:
    """Give each computing node a partition, in one pass over the nodes."""
    partitions: list[_Partition] = []
    home: dict[torch.fx.Node, _Partition] = {}
    starting = False
    for node in graph.nodes:
        starting |= node in starts
        if node.op in ("placeholder", "output", "get_attr") or node in regions.borders:
            continue
        producer = node.args[0] if node.args else None
        if (
            isinstance(producer, torch.fx.Node)
            and producer in home
            and len(node.all_input_nodes) == 1  # an index that is computed may not exist yet there
            and (
                (node.target is operator.getitem and _returns_sequence(producer))
                or _WAIT in names_of(node)
            )
        ):
            partition = home[producer]
        else:
            splitting = is_splitting(node)
            if not partitions or partitions[-1].splitting != splitting or starting:
                partitions.append(_Partition(splitting))
                starting = False
            partition = partitions[-1]
        partition.nodes.append(node)
        home[node] = partition
    return partitions


# What a collective gave may not be copied, nor handed to captured code, before it is waited for.
_WAIT = "_c10d_functional::wait_tensor"


def _returns_sequence(node: torch.fx.Node) -> bool:
    """True if ``node`` yields a tuple or list, so that picking an element is not computation."""
    value = value_of(node)
    if value is not None:
        return isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    for overload in overloads_of(node.target)[:1]:
        returns = overload._schema.returns
        return len(returns) > 1 or (len(returns) == 1 and "List" in str(returns[0].type))
    return False


# --- pieces with nothing to launch ---------------------------------------------------------------

_ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
# Methods and functions that may view their argument: the recorded values say whether they do.
_VIEWS = frozenset(
    [
        *("alias", "as_strided", "chunk", "contiguous", "detach", "diagonal", "expand", "flatten"),
        *("expand_as", "getitem", "movedim", "moveaxis", "narrow", "permute", "reshape", "select"),
        *("reshape_as", "slice", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims"),
        *("t", "tensor_split", "transpose", "unbind", "unflatten", "unsafe_chunk", "unsafe_split"),
        *("unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view"),
    ]
)
# Where functions of integers live that do nothing but compute.
_PURE_MODULES = ("_operator", "math", "builtins", "torch")


def _is_idle(node: torch.fx.Node) -> bool:
    """True if ``node`` only allocates, views, reads a size, or computes with sizes."""
    if is_size_read(node) or _is_view(node) or allocates(node):
        return True
    if node.op != "call_function":
        return False
    owner = getattr(node.target, "__module__", None) or "torch"
    value = value_of(node)
    computes = isinstance(value, (int, torch.SymInt, torch.SymBool)) and owner in _PURE_MODULES
    sources = map(value_of, node.all_input_nodes)
    return computes and not any(isinstance(each, torch.Tensor) for each in sources)


def allocates(node: torch.fx.Node) -> bool:
    """True if ``node`` makes a tensor that holds anything."""
    if node.op == "call_method":
        return node.target in _ALLOCATIONS
    if node.op != "call_function":
        return False
    target: object = node.target
    owner = getattr(target, "__module__", None) or "torch"
    if isinstance(target, (OpOverload, OpOverloadPacket)) or owner.partition(".")[0] == "torch":
        return getattr(target, "__name__", "").partition(".")[0] in _ALLOCATIONS
    return False


def _is_view(node: torch.fx.Node) -> bool:
    """True if all that ``node`` gives lies in memory of its first argument."""
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    source = node.args[0]
    if name.partition(".")[0] not in _VIEWS or not isinstance(source, torch.fx.Node):
        return False
    viewed, given = _memory(value_of(source)), _memory(value_of(node))
    return viewed is not None and given is not None and given <= viewed


def _memory(value: object) -> set[StorageWeakRef] | None:
    """Where the tensors of ``value`` lie; None if there is anything else in it."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not values or not all(isinstance(each, torch.Tensor) for each in values):
        return None
    if any(each.layout is not torch.strided for each in values):
        return None
    try:
        return {StorageWeakRef(each.untyped_storage()) for each in values}  # type: ignore[no-untyped-call]
    except NotImplementedError:  # a tensor of a torch.func level
        return None


def _merge_idle(partitions: Sequence[_Partition]) -> list[_Partition]:
    """Put nodes that launch nothing where no piece is compiled or captured for them alone."""
    kept: list[_Partition] = []
    position: dict[torch.fx.Node, int] = {}  # of the partition that holds a node, in `kept`
    last_piece = -1
    waiting: list[torch.fx.Node] = []  # idle nodes before the first partition

    def keep(partition: _Partition) -> None:
        nonlocal last_piece
        kept.append(partition)
        last_piece = last_piece if partition.splitting else len(kept) - 1
        position.update(dict.fromkeys(partition.nodes, len(kept) - 1))

    for partition, idle in _with_runs(partitions):
        if idle and not kept:
            waiting += partition.nodes
            continue
        allocation = any(map(allocates, partition.nodes if idle else waiting))
        if idle:
            sources = (source for node in partition.nodes for source in node.all_input_nodes)
            ready = max((position.get(source, -1) for source in sources), default=-1)
            index = last_piece if last_piece >= max(ready, 0) else len(kept) - 1
            if not (allocation and kept[index].splitting):
                kept[index].nodes.extend(partition.nodes)
                position.update(dict.fromkeys(partition.nodes, index))
                continue
        elif partition.splitting and allocation:
            keep(_Partition(False, waiting))
        else:
            partition.nodes[:0] = waiting
        waiting = []
        keep(partition)
    return kept or list(partitions)


def _with_runs(partitions: Sequence[_Partition]) -> Iterator[tuple[_Partition, bool]]:
    """The partitions, and whether each is idle; one that was is cut at views of other memory."""
    for partition in partitions:
        if len(partitions) == 1 or partition.splitting or not all(map(_is_idle, partition.nodes)):
            yield partition, False
            continue
        here = set(partition.nodes)
        runs: list[_Partition] = []
        for node in partition.nodes:
            views = _views_another(node, here)
            if not runs or ((views or allocates(node)) and views != runs[-1].splitting):
                runs.append(_Partition(views))  # a piece could give a copy in place of a view
            runs[-1].nodes.append(node)
        yield from ((run, not run.splitting) for run in runs)


def _views_another(node: torch.fx.Node, here: set[torch.fx.Node]) -> bool:
    """True for a view of memory that none of the nodes ``here`` allocated."""
    while _is_view(node):
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        if source not in here:
            return True
        node = source
    return False


# --- building ------------------------------------------------------------------------------------


def _build(
    work: torch.fx.Graph,
    partitions: Sequence[_Partition],
    regions: Regions,
    gm: torch.fx.GraphModule,
    asserted: Asserted | None,
    module: MakeModule,
) -> tuple[torch.fx.GraphModule, list[SplitItem]]:
    home = {node: p for p in partitions for node in p.nodes}
    sizes = PieceSizes(work, {node: p.number for node, p in home.items()}, asserted)
    inputs = {partition: _inputs_of(partition, home, sizes) for partition in partitions}
    taken = {node for each in inputs.values() for node in each}
    stitching = torch.fx.Graph()
    attributes: dict[str, object] = {}
    # What each node of `gm` is called in the stitching graph.
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in work.find_nodes(op="placeholder"):
        values[node] = stitching.node_copy(node)
    items: list[SplitItem] = []
    for partition in partitions:
        name = f"submod_{partition.number}"
        outputs = [
            node
            for node in partition.nodes
            if node in taken or any(home.get(user) is not partition for user in node.users)
        ]
        piece = _build_piece(gm, partition, outputs, inputs[partition], regions, module)
        # A GraphModule that is there when the whole is made would be compiled to Python once more.
        attributes[name] = torch.nn.Module()
        call = stitching.call_module(name, tuple(values[n] for n in inputs[partition]))
        _unpack_call(stitching, call, partition, outputs, values)
        items.append(SplitItem(name, partition.number, partition.splitting, piece))
    output_node = work.output_node()
    for node in output_node.all_input_nodes:
        if node.op == "get_attr":
            values[node] = stitching.node_copy(node)
            attributes[str(node.target)] = attribute_of(gm, str(node.target))
    result = stitching.node_copy(output_node, lambda n: values[n])
    result.meta.update(output_node.meta)
    split_gm = torch.fx.GraphModule(attributes, stitching, type(gm).__name__)
    for item in items:
        split_gm.add_module(item.submod_name, item.graph)
    split_gm.meta.update(gm.meta)
    return split_gm, items


def _inputs_of(
    partition: _Partition, home: Mapping[torch.fx.Node, _Partition], sizes: PieceSizes
) -> list[torch.fx.Node]:
    """What a submodule takes, in order of first use."""
    inputs: dict[torch.fx.Node, None] = {}
    for node in partition.nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" or home.get(source) is partition:
                continue
            if source.op != "placeholder" and source not in home:
                raise SplitError("a node is used before it is defined", where=node_where(source))
            inputs[source] = None
    if partition.splitting:
        return list(inputs)
    leading = sizes.of(partition.number, inputs.keys(), partition.nodes)
    return list(dict.fromkeys(leading) | inputs)


def _build_piece(
    gm: torch.fx.GraphModule,
    partition: _Partition,
    outputs: list[torch.fx.Node],
    inputs: list[torch.fx.Node],
    regions: Regions,
    module: MakeModule,
) -> torch.fx.GraphModule:
    """Build one submodule."""
    graph = torch.fx.Graph()
    inside: dict[torch.fx.Node, torch.fx.Node] = {}
    attributes: dict[str, object] = {}
    for source in inputs:
        inside[source] = new_placeholder(graph, source.name)
        inside[source].meta.update(source.meta)
    for source in (source for node in partition.nodes for source in node.all_input_nodes):
        if source.op == "get_attr" and source not in inside:
            inside[source] = graph.node_copy(source)
            attributes[str(source.target)] = attribute_of(gm, str(source.target))
    writer = RegionWriter(regions, graph, splitting=partition.splitting)
    for node in partition.nodes:
        writer.move_to(node)
        inside[node] = graph.node_copy(node, lambda n: inside[n])
        if node.op == "call_module":
            attributes[str(node.target)] = attribute_of(gm, str(node.target))
    writer.close()
    returned = tuple(inside[node] for node in outputs)
    if not partition.splitting or len(returned) > 1:
        graph.output(returned)
    else:
        graph.output(returned[0] if returned else None)
    return module(attributes, graph, f"submod_{partition.number}")


def _unpack_call(
    stitching: torch.fx.Graph,
    call: torch.fx.Node,
    partition: _Partition,
    outputs: list[torch.fx.Node],
    values: dict[torch.fx.Node, torch.fx.Node],
) -> None:
    """Bind what ``call`` returns to the nodes that it stands for."""
    if partition.splitting and len(outputs) == 1:
        call.meta.update(outputs[0].meta)
        # A name that FX made of the function, and not of the user's variable, says nothing.
        node, *more = partition.nodes
        name = getattr(node.target, "__name__", "").partition(".")[0]
        if more or node.op != "call_function" or node.name.rstrip("_0123456789") != name:
            call._rename(outputs[0].name)
        values[outputs[0]] = call
        return
    call.meta["example_value"] = tuple(value_of(node) for node in outputs)
    for index, node in enumerate(outputs):
        element = stitching.call_function(operator.getitem, (call, index))
        element.meta.update(node.meta)
        element._rename(node.name)
        values[node] = element
