"""Whether batches may be padded: declared, or tried with random data and tails that spread."""

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import product

import torch
import torch.fx

from piecework.closeness import same_values
from piecework.codegen.graph.origin import source_line, value_of
from piecework.runtime import torch_compat
from piecework.runtime.graphs.plan.batch_shape import BatchShape, StagedInput
from piecework.runtime.graphs.stage.inputs import Number
from piecework.runtime.splitting_op import HOW_TO_DECLARE, registry
from piecework.runtime.torch_compat import tensors_in

Run = Callable[[Sequence[torch.Tensor], int], Sequence[object]]
# What takes a tensor for its shape, dtype and device alone, also as ``zeros_like``, ``new_zeros``.
_OF_SHAPE = ("empty", "zeros", "ones", "full")
_INDEXING = ("index", "gather", "scatter", "take", "getitem", "setitem", "embedding", "one_hot")
# Whole numbers that point at something whatever the floats are, or that do not come from them.
_POINT_INSIDE = (*_OF_SHAPE, "arg", "topk", "sort", "max", "min", "searchsorted", "bucketize")
# What a try is made of, None being random: whole numbers of the batch (0 and 1 where they are
# random); floating values behind it; whole numbers behind it. The first pads as calls do.
_TRIES = ((None, 0, 0), (0, math.nan, 1), (1, 1e4, 0), (None, -1e4, None))


def why_not_padded(
    split_gm: torch.fx.GraphModule,
    shape: BatchShape,
    pad: bool | None,
    attempt: Callable[[], str | None],
    *,
    survives: bool,
) -> str | None:
    """Why no batch may be padded; None if all may."""
    for number, rule in enumerate(shape.results):
        if rule.computed:
            return f"result {number}: its size is computed from the batch size"
    declared = {node: _declared(node) for node in _calls(split_gm)}
    if pad is None:
        shown = _mixing(declared, shape)
        if shown is not None:
            return shown
    elif "context" in declared.values():
        return None  # the operator would read another size than is tried, and the caller said so
    why = None if survives else _may_point_beyond(declared)
    if why is None:
        try:
            found = attempt()
        except Exception as error:  # noqa: BLE001 - a user's model, on data that it may refuse
            why = f"{type(error).__name__}: {error}"
        else:
            return None if found is None else f"{found} is another one in a padded run"
    text = f"padding could not be tried ({why}); pad=True says that rows are independent"
    return None if pad else text


def _mixing(declared: Mapping[torch.fx.Node, str | None], shape: BatchShape) -> str | None:
    """What forbids to pad where nobody said that rows are independent, as a try may miss it."""
    for node, rows in declared.items():
        if rows is None:
            return f"{_described(node)} does not say what it does with rows; {HOW_TO_DECLARE}"
        if rows != "context" and _loses_rows(node, shape.symbols):
            return f"{_described(node)} makes one value of all rows"
    if "context" in declared.values():
        return "an operator reads the batch's real size from the forward context: say pad=True"
    whole = (each.name for each in shape.staged if each.written and each.dim is None)
    if written := [*shape.written_weights, *whole]:
        return f"{written[0]} is written to, and would keep rows beyond the batch"
    return None


def _calls(split_gm: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """All calls of functions and methods in the submodules, and in higher-order operators."""
    for module in split_gm.modules():
        if isinstance(module, torch.fx.GraphModule) and module is not split_gm:
            yield from (n for n in module.graph.nodes if n.op in ("call_function", "call_method"))


def _declared(node: torch.fx.Node) -> str | None:
    """What an operator says of its rows; "" for torch's own, which the try looks at."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return "" if target.namespace in ("aten", "prims", "prim") else registry.rows_of(target)


def _loses_rows(node: torch.fx.Node, symbols: Collection[str]) -> bool:
    """Whether a tensor without rows is made of the values of one that has rows."""
    taken = [value_of(each) for each in node.all_input_nodes]
    if _name(node).removeprefix("new_").startswith(_OF_SHAPE) or (
        node.target is operator.getitem and not isinstance(taken[0], torch.Tensor)
    ):
        return False

    def has_rows(tensor: torch.Tensor) -> bool:
        return any(not set(torch_compat.symbols_in(n)).isdisjoint(symbols) for n in tensor.shape)

    return any(map(has_rows, tensors_in(taken))) and not all(
        map(has_rows, tensors_in(value_of(node)))
    )


def _may_point_beyond(nodes: Collection[torch.fx.Node]) -> str | None:
    """The operator for which made-up data may point beyond a table; None if there is none."""
    # Whole numbers that are drawn are 0 and 1; those that are made of floats can be any.
    for node in nodes:
        name = _name(node)
        taken = tensors_in([value_of(each) for each in node.all_input_nodes])
        floats = [each for each in taken if each.is_floating_point()]
        indexes = any(each in name for each in _INDEXING)
        makes = any(map(_is_whole, tensors_in(value_of(node)))) and not indexes
        if floats and makes and not name.removeprefix("new_").startswith(_POINT_INSIDE):
            return f"{_described(node)} makes whole numbers of floats"
        single = any(type(n) is int and n < 2 for each in floats for n in each.shape)
        if indexes and any(map(_is_whole, taken)) and single:
            return f"{_described(node)} may index a single row"
    return None


def _is_whole(tensor: torch.Tensor) -> bool:
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return not inexact and tensor.dtype is not torch.bool


def _name(node: torch.fx.Node) -> str:
    """``sum`` for ``torch.sum`` and ``Tensor.sum``; without an overload's name."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0]


def _described(node: torch.fx.Node) -> str:
    line = source_line(node)
    return f"{_name(node)} ({line})" if line else _name(node)


def padded_difference(
    shape: BatchShape,
    sizes: Sequence[int],
    pads: Mapping[str, Number],
    run: Run,
) -> str | None:
    """Which result of ``run`` changes where a small batch is padded, by ``pads``, if any."""
    chosen = _sizes_to_try(shape, sizes)
    found: list[str | None] = []
    for tried, (pair, kind) in enumerate(product(chosen, _TRIES)):  # all: each rank makes as many
        (count, padded), (whole, tail, whole_tail) = pair, kind
        rows = [_drawn(x, x.sizes(count), None, whole, seed=tried) for x in shape.staged]
        tails = []
        for each, own in zip(shape.staged, rows, strict=True):
            if each.dim is None:
                tails.append(own.clone())
                continue
            beyond = list(own.shape)
            beyond[each.dim] = padded - count
            if each.name in pads:  # what the caller pads with is said to be right
                more = own.new_full(beyond, pads[each.name])
            else:
                more = _drawn(each, beyond, tail, whole_tail, seed=1)
            tails.append(torch.cat([own, more], each.dim))
        alone, beside = run(rows, count), run(tails, padded)
        found.append(_difference(shape, count, (alone, rows), (beside, tails)))
    return next((each for each in found if each is not None), None)


def _difference(
    shape: BatchShape,
    count: int,
    alone: tuple[Sequence[object], Sequence[torch.Tensor]],
    padded: tuple[Sequence[object], Sequence[torch.Tensor]],
) -> str | None:
    for index, rule in enumerate(shape.results):
        if not rule.is_count and not same_values(
            alone[0][index], _front(padded[0][index], rule.dims, count)
        ):
            return f"result {index}"
    for number, each in enumerate(shape.staged):
        dims = () if each.dim is None else (each.dim,)
        if each.written and not same_values(
            alone[1][number], _front(padded[1][number], dims, count)
        ):
            return f"argument {each.name}, which is written to,"
    return None


def _sizes_to_try(shape: BatchShape, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """A captured size, from half as many rows, as what mixes them differs most, and one less."""
    for padded in sorted(sizes, key=lambda size: (size < 3, size)):
        counts = range(max(shape.low, 1), padded)
        orders = sorted(counts, key=lambda n: (n < 2, abs(n - padded // 2))), reversed(counts)
        found = [next((n for n in each if shape.refusal(n) is None), 0) for each in orders]
        if all(found):
            return [(count, padded) for count in found]
    return []


def _front(value: object, dims: Sequence[int], count: int) -> object:
    if isinstance(value, torch.Tensor):
        for dim in dims:
            value = value.narrow(dim, 0, count)
    return value


def _drawn(
    each: StagedInput, shape: Sequence[int], value: float | None, whole: int | None, *, seed: int
) -> torch.Tensor:
    """Numbers of an input's dtype: one of them everywhere, or random ones."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if not (each.fake.dtype.is_floating_point or each.fake.dtype.is_complex):
        drawn = (drawn > 0).float() if whole is None else drawn.fill_(whole)
    elif value is not None:
        drawn = drawn.fill_(value)
    return drawn.to(each.fake.device, each.fake.dtype)
