"""Sizes at cuts: a `torch.Size` can't cross one, so each dimension is read for itself."""

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
import torch.fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import Argument

from piecework.codegen.graph.origin import value_of

Sizes = Sequence[torch.fx.Node | int]

_SIZE_FUNCTIONS = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_size)


def is_size_read(node: torch.fx.Node) -> bool:
    """True if ``node`` reads a size of a tensor, whole or one dimension."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "stride")
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return len(node.args) == 2 and node.args[1] in ("shape", "ndim")
    return node.target in _SIZE_FUNCTIONS


def _reads_whole_shape(node: torch.fx.Node) -> bool:
    if node.op == "call_method" and node.target == "size":
        return (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")) is None
    return node.target is getattr and is_size_read(node) and node.args[1] == "shape"


def symbol_of(size: object) -> object:
    """The symbol that a size is; None if it is a number or computed."""
    return size.node.expr if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol else None


def decompose_sizes(graph: torch.fx.Graph) -> None:
    """Replace reads of whole shapes, and shapes put together, by their sizes, in place."""
    known = {None, *map(symbol_of, map(value_of, graph.find_nodes(op="placeholder")))}
    for node in list(graph.nodes):
        if _reads_whole_shape(node):
            sizes = _reads_of(graph, node)
            if sizes is None:
                continue
            _rewrite_users(graph, node, sizes)
            for read in (each for each in sizes if isinstance(each, torch.fx.Node)):
                # Pieces may need a size that only the data decides, and find it by its read.
                if not read.users and symbol_of(value_of(read)) in known:
                    graph.erase_node(read)
        elif node.op == "call_function" and node.target is torch.Size and not node.kwargs:
            parts = node.args[0] if node.args else ()
            if isinstance(parts, (list, tuple)):
                _rewrite_users(graph, node, [*parts])


def _reads_of(graph: torch.fx.Graph, node: torch.fx.Node) -> Sizes | None:
    """One read per dimension of what ``node`` reads whole, numbers where they are known."""
    tensor, *_ = node.all_input_nodes
    value, shape = value_of(tensor), value_of(node)
    if isinstance(value, torch.Tensor):
        shape = value.shape
    if not isinstance(shape, (tuple, list)):
        return None
    sizes: list[torch.fx.Node | int] = []
    with graph.inserting_before(node):
        for dim, size in enumerate(shape):
            fixed = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
            if type(fixed) is int:
                sizes.append(fixed)
                continue
            read = graph.call_function(torch.ops.aten.sym_size.int, (tensor, dim))
            read.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
            read.meta["example_value"] = size
            sizes.append(read)
    return sizes


def _rewrite_users(graph: torch.fx.Graph, node: torch.fx.Node, sizes: Sizes) -> None:
    """Give each user of a whole shape the sizes that it takes of it."""
    for user in list(node.users):
        picks = user.target is operator.getitem and user.args[0] is node
        index = user.args[1] if picks and user.all_input_nodes == [node] else None
        if isinstance(index, slice):
            _rewrite_users(graph, user, sizes[index])
        elif isinstance(index, int):
            for each in list(user.users):
                _swap(each, user, sizes[index])
            graph.erase_node(user)
        elif _takes_sizes(user, node):
            _swap(user, node, tuple(sizes))
        else:
            # It needs the torch.Size itself: have it again beside the user, so that the tensor or its sizes cross the cut instead.
            with graph.inserting_before(user):
                again = graph.node_copy(node)
            user.replace_input_with(node, again)
    if not node.users:
        graph.erase_node(node)


def _takes_sizes(user: torch.fx.Node, node: torch.fx.Node) -> bool:
    """True if ``user`` does the same with a plain tuple of sizes as with a `torch.Size`."""
    if user.op == "call_method":
        return user.args[0] is not node
    if user.op != "call_function":
        return user.op == "output"
    if isinstance(user.target, (OpOverload, OpOverloadPacket)):
        return True
    module = getattr(user.target, "__module__", None) or ""
    return module.partition(".")[0] in ("torch", "_operator")


def _swap(user: torch.fx.Node, old: torch.fx.Node, new: Argument) -> None:
    """Put ``new`` wherever ``user`` takes ``old``, in any nesting."""
    user.args = torch.fx.node.map_arg(user.args, lambda n: new if n is old else n)
    user.kwargs = torch.fx.node.map_arg(user.kwargs, lambda n: new if n is old else n)


#: Values of a piece → the symbols that what was asserted of them mentions.
Asserted = Callable[[Iterable[object]], Collection[object]]


class PieceSizes:
    """Finds the sizes that a compiled piece takes although none of its nodes reads them."""

    def __init__(
        self,
        graph: torch.fx.Graph,
        number_of: Mapping[torch.fx.Node, int],
        asserted: Asserted | None,
    ) -> None:
        self._number_of = number_of
        self._asserted = asserted
        self._given: dict[object, torch.fx.Node] = {}  # symbol → the placeholder that is its value
        self._computed: dict[object, torch.fx.Node] = {}  # symbol → the node that computes it
        for node in graph.nodes:
            symbol = symbol_of(value_of(node))
            if symbol is not None and node.op == "placeholder":
                self._given.setdefault(symbol, node)
            elif symbol is not None and node in number_of:
                self._computed.setdefault(symbol, node)

    def of(
        self, number: int, inputs: Collection[torch.fx.Node], members: Iterable[torch.fx.Node]
    ) -> list[torch.fx.Node]:
        """What piece ``number`` takes before everything else, in order of the graph."""
        if not self._given and not self._computed:
            return []
        # imports sympy, half a second
        from torch.fx.experimental.symbolic_shapes import free_symbols

        values = list(map(value_of, inputs))
        needed = set(free_symbols([each for each in values if isinstance(each, torch.Tensor)]))
        if self._asserted is not None:
            needed |= set(self._asserted([*values, *map(value_of, members)]))
        leading = [
            node for symbol, node in self._given.items() if symbol in needed or node in inputs
        ]
        # A compiler reads a symbol where it is a size of an input as it is.
        bound: set[object] = set()
        for value in values:
            sizes = value.shape if isinstance(value, torch.Tensor) else [value]
            bound.update(map(symbol_of, sizes))
        missing = needed - self._given.keys() - bound
        return leading + [
            node
            for symbol, node in self._computed.items()
            if symbol in missing and self._number_of[node] < number
        ]
