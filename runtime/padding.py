"""What padding reaches. In: a captured graph and the symbol of its batch size. Out: for each value that the graph returns, why a padded batch would change it, or that nothing found would.

It reads shapes, schemas and names of operators, and runs nothing. What an operator of one's own does to its rows can't be read: a
splitting op is trusted to keep rows apart, or to know the batch's real size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.origin import source_line, value_of
from piecework.runtime import torch_compat

# Operators that take sizes; anything else computes with a number that it is given.
_TAKES_SIZES = frozenset((
    "arange", "as_strided", "broadcast_to", "chunk", "empty", "empty_strided", "expand", "expand_as", "full", "getitem",
    "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "ones", "rand", "randn", "repeat", "reshape", "resize",
    "select", "setitem", "slice", "split", "split_with_sizes", "tensor_split", "unflatten", "view", "view_as", "zeros",
))  # fmt: skip
# Operators that take a tensor for its shape, dtype or device only.
_READS_NO_DATA = frozenset((
    "dim", "empty_like", "full_like", "getattr", "is_contiguous", "new_empty", "new_full", "new_ones", "new_tensor",
    "new_zeros", "numel", "ones_like", "rand_like", "size", "stride", "sym_numel", "sym_size", "sym_stride", "zeros_like",
))  # fmt: skip
# Operators that let rows ahead see rows behind along a dimension: at which place they take it, and which one else.
_ALONG: Mapping[str, tuple[int, object]] = {
    "argsort": (1, -1), "flip": (1, None), "log_softmax": (1, -1), "normalize": (2, 1), "roll": (2, None),
    "softmax": (1, -1), "sort": (1, -1),
}  # fmt: skip
_PRODUCTS = frozenset(("matmul", "mm", "bmm"))
_RESHAPES = frozenset(("flatten", "reshape", "unflatten", "view"))


@dataclass(frozen=True, slots=True)
class _State:
    """What one value is made of.

    Attributes:
        rows: it depends on the data of the batch.
        count: it depends on the batch size as a number.
        mixed: why rows of it depend on rows behind them, or on the padded size.
    """

    rows: bool = False
    count: bool = False
    mixed: str | None = None

    def __or__(self, other: _State) -> _State:
        return _State(self.rows or other.rows, self.count or other.count, self.mixed or other.mixed)


_NOTHING = _State()


def padding_changes(
    graph: torch.fx.GraphModule, symbols: Collection[str], written: Iterable[str] = ()
) -> tuple[str | None, ...]:
    """Why a padded batch would change each result, or None for those that nothing found would change.

    Found are: a reduction over the batch, the batch size used as a number, a product or an operator along the batch dimension,
    and a value that loses it otherwise, with everything computed from one.

    Args:
        graph: flat, with fake values.
        symbols: torch's symbols of the batch size.
        written: placeholders that the graph writes to; they are results too, after the others.
    """
    walk = _Walk(graph, frozenset(symbols))
    placeholders = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            placeholders[node.name] = node
        if node.op == "output":
            returned = node.args[0]
            results = returned if isinstance(returned, (list, tuple)) else [returned]
            results = [*results, *(placeholders[name] for name in written)]
            return tuple(
                walk.state(each).mixed if isinstance(each, torch.fx.Node) else None
                for each in results
            )
        walk.visit(node)
    return ()


class _Walk:
    """States of values and of the memory that they lie in, in the order of execution."""

    def __init__(self, graph: torch.fx.GraphModule, symbols: frozenset[str]) -> None:
        self.graph, self.symbols = graph, symbols
        self.states: dict[torch.fx.Node, _State] = {}
        self.memory: dict[int, _State] = {}

    def state(self, node: torch.fx.Node) -> _State:
        found = self.states.get(node, _NOTHING)
        for each in _tensors(value_of(node)):
            found = found | self.memory.get(torch_compat.storage_id(each), _NOTHING)
        return found

    def visit(self, node: torch.fx.Node) -> None:
        if node.op == "output":
            return
        value = value_of(node)
        if node.op in ("placeholder", "get_attr"):
            held = self._holds_batch(value)
            is_tensor = isinstance(value, torch.Tensor)
            self.states[node] = _State(rows=held and is_tensor, count=held and not is_tensor)
            return
        inputs = _NOTHING
        for each in node.all_input_nodes:
            inputs = inputs | self.state(each)
        found = self.states[node] = self._result(node, value, inputs)
        for each in _written(node):
            for tensor in _tensors(value_of(each)):
                key = torch_compat.storage_id(tensor)
                # What is written to stays as good or bad as it was, and gets what is written.
                late = _State(found.rows or inputs.rows, False, found.mixed or inputs.mixed)
                self.memory[key] = self.memory.get(key, _NOTHING) | late

    def _result(self, node: torch.fx.Node, value: object, inputs: _State) -> _State:
        name, tensors = operator_name(node), _tensors(value)
        if name in _READS_NO_DATA:
            inputs = _State(count=inputs.count)
        if not tensors:
            reads = inputs.rows and isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))
            mixed = f"{_told(node, name)} makes a number of it" if reads else None
            return _State(
                inputs.rows, inputs.count or self._holds_batch(value), inputs.mixed or mixed
            )
        mixed = inputs.mixed or self._inside(node)
        if mixed is None and inputs.count and not self._takes_sizes(node, name):
            mixed = f"{_told(node, name)} uses the batch size as a number"
        if mixed is None and inputs.rows:
            mixed = self._mixing(node, name, tensors)
        return _State(inputs.rows or any(map(self._holds_batch, tensors)), False, mixed)

    def _inside(self, node: torch.fx.Node) -> str | None:
        """What mixes rows in the graphs that a higher-order operator runs, whatever its inputs are."""
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            return None
        for each in node.all_input_nodes:
            body = getattr(self.graph, str(each.target), None) if each.op == "get_attr" else None
            if isinstance(body, torch.fx.GraphModule):
                walk = _Walk(body, self.symbols)
                for step in body.graph.nodes:
                    walk.visit(step)
                reasons = (state.mixed for state in (*walk.states.values(), *walk.memory.values()))
                found = next((reason for reason in reasons if reason is not None), None)
                if found is not None:
                    return found
        return None

    def _takes_sizes(self, node: torch.fx.Node, name: str) -> bool:
        if _is_own(node) or isinstance(node.target, torch._ops.HigherOrderOperator):
            return True
        if name == "arange":  # positions from 0 are right for every row; from elsewhere they move
            return len(node.args) < 2 and "start" not in node.kwargs
        if name in ("full", "new_full"):
            fill = node.args[-1] if len(node.args) > 1 else node.kwargs.get("fill_value")
            return not (isinstance(fill, torch.fx.Node) and self.state(fill).count)
        return name in _TAKES_SIZES

    def _mixing(
        self, node: torch.fx.Node, name: str, tensors: Sequence[torch.Tensor]
    ) -> str | None:
        if not all(self._holds_batch(each) or _is_empty(each) for each in tensors):
            return f"{_told(node, name)} takes all rows together"
        operands = [e for each in node.all_input_nodes for e in _tensors(value_of(each))]
        if name in _ALONG and operands and self._is_along(node, name, operands[0]):
            return f"{_told(node, name)} works along the batch"
        if name in _PRODUCTS and len(operands) == 2 and self._sums_rows(operands[1]):
            return f"{_told(node, name)} takes the product over the batch"
        if name == "scaled_dot_product_attention" and len(operands) > 1:
            causal = node.kwargs.get("is_causal", node.args[5] if len(node.args) > 5 else False)
            if causal is not True and self._holds_batch(operands[1].shape[-2]):
                return f"{_told(node, name)} attends over the batch"
        if name in _RESHAPES and operands and not self._keeps_rows(operands[0], tensors[0]):
            return f"{_told(node, name)} deals rows out anew"
        return None

    def _sums_rows(self, right: torch.Tensor) -> bool:
        return self._holds_batch(right.shape[max(0, right.dim() - 2)])

    def _is_along(self, node: torch.fx.Node, name: str, operand: torch.Tensor) -> bool:
        at, otherwise = _ALONG[name]
        given = node.kwargs.get("dim", node.kwargs.get("dims"))
        if given is None and len(node.args) > at:
            given = node.args[at:] if name == "flip" else node.args[at]
        dims = list(_flat(otherwise if given is None else given))
        if None in dims:  # over the flattened tensor
            return True
        return any(isinstance(d, int) and self._holds_batch(operand.shape[d]) for d in dims)

    def _keeps_rows(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether row i is still row i: what lies before the batch dimension has the same size."""
        places = [self._batch_dim(each) for each in (before, after)]
        if None in places:
            return True
        first, second = (
            _product(each.shape[:at]) for each, at in zip((before, after), places, strict=True)
        )
        return torch_compat.statically_equal(first, second)

    def _batch_dim(self, tensor: torch.Tensor) -> int | None:
        """The dimension that is the batch size and nothing else."""
        dims = [d for d, n in enumerate(tensor.shape) if torch_compat.symbol_of(n) in self.symbols]
        return dims[0] if len(dims) == 1 else None

    def _holds_batch(self, value: object) -> bool:
        sizes = value.shape if isinstance(value, torch.Tensor) else _flat(value)
        return any(not self.symbols.isdisjoint(torch_compat.symbols_of(size)) for size in sizes)


def operator_name(node: torch.fx.Node) -> str:
    """The bare name of what a node calls: ``add`` for ``aten.add_.Tensor``, ``operator.iadd`` and the method ``add_``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.rpartition("::")[2]
    elif isinstance(target, str):
        name = target
    else:
        name = str(getattr(target, "__name__", target))
    return name.strip("_")


def _is_own(node: torch.fx.Node) -> bool:
    """Whether the operator is somebody's own, not torch's."""
    name = getattr(node.target, "_qualified_op_name", None) or getattr(
        getattr(node.target, "_schema", None), "name", ""
    )
    return "::" in name and not name.startswith(("aten::", "prims::", "prim::"))


def _written(node: torch.fx.Node) -> tuple[torch.fx.Node, ...]:
    """Inputs of a node that it may write to."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, "default", None) or getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        found = []
        for index, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = node.args[index] if index < len(node.args) else None
                found.append(node.kwargs.get(argument.name, given))
        return tuple(node_ for each in found for node_ in _nodes_in(each))
    name = target if isinstance(target, str) else str(getattr(target, "__name__", ""))
    out = _nodes_in(node.kwargs.get("out"))
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = getattr(target, "__module__", "") == "_operator" and name.startswith("i")
    if (in_place or augmented or name == "setitem") and node.all_input_nodes:
        return (*_nodes_in(node.args[:1]), *out)
    return out


def _nodes_in(value: object) -> tuple[torch.fx.Node, ...]:
    found: list[torch.fx.Node] = []
    torch.fx.node.map_arg(value, found.append)  # type: ignore[arg-type]
    return tuple(found)


def _tensors(value: object) -> tuple[torch.Tensor, ...]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (list, tuple)):
        return tuple(tensor for each in value for tensor in _tensors(each))
    return ()


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _product(sizes: Iterable[object]) -> object:
    total: object = 1
    for size in sizes:
        total = total * size  # type: ignore[operator]
    return total


def _told(node: torch.fx.Node, name: str) -> str:
    line = source_line(node)
    return f"{name} ({line})" if line else name
