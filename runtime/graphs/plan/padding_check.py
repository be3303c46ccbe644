"""One try at padding. In: how a stitched graph depends on its batch size, and a way to run it. Out: what a padded batch changed although the analysis says that nothing does, or None.

A batch of random data runs alone, padded as declared, and padded with what spreads (NaN, and other numbers and truth values). It
captures nothing, and runs on tensors of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.fx

from piecework.codegen.graph.origin import nodes_of, value_of
from piecework.runtime import torch_compat
from piecework.runtime.graphs.plan.batch_shape import BatchShape, StagedInput
from piecework.runtime.graphs.stage.slots import Number

_log = logging.getLogger(__name__)
_POISON = math.nan
Run = Callable[[Sequence[torch.Tensor], int], Sequence[object]]

# By the last part of their names, whether called as functions or as methods.
_INDEXING = frozenset(
    {
        *(
            "getitem",
            "setitem",
            "index_select",
            "gather",
            "take",
            "take_along_dim",
            "embedding_bag",
        ),
        *("index_add", "index_copy", "index_fill", "index_put", "index_reduce", "one_hot"),
        *("scatter", "scatter_add", "scatter_reduce", "masked_scatter"),
    }
)
_EMBEDDING = "embedding"
# Whole numbers that point at something whatever the floats are, or that do not come from them.
_POINT_INSIDE = frozenset(
    {
        *("argmax", "argmin", "argsort", "topk", "sort", "max", "min", "searchsorted", "bucketize"),
        *("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"),
    }
)


def may_point_beyond(split_gm: torch.fx.GraphModule, names: Iterable[str]) -> str | None:
    """The value of the submodules ``names`` for which made-up data may point beyond a table; None if there is none.

    A CPU raises there; on a GPU it ends the process's use of the device. What is drawn are zeros and ones, so a table of two rows
    is safe; whole numbers that are made of floats can be any.
    """
    for name, node in nodes_of(split_gm, names):
        called = _called(node)
        given = [t for each in node.all_input_nodes for t in _tensors(each)]
        made = [t for t in _tensors(node) if _is_whole(t)]
        from_floats = made and any(each.is_floating_point() for each in given)
        if from_floats and called not in _POINT_INSIDE | _INDEXING | {_EMBEDDING}:
            return f"{node.name} of {name} makes whole numbers of floats"
        if any(map(_is_small, _indexed(node, called, given))):
            return f"{node.name} of {name} may index a single row"
    return None


def _indexed(node: torch.fx.Node, called: str, given: Sequence[torch.Tensor]) -> Sequence[object]:
    """The sizes that whole numbers among the operands may point beyond."""
    if called == _EMBEDDING:
        return [each.shape[0] for each in given if each.is_floating_point()]
    table = value_of(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else 0
    if called not in _INDEXING or not isinstance(table, torch.Tensor):
        return []
    if not any(map(_is_whole, given[1:])) and called != "one_hot":
        return []
    dim = node.args[1] if len(node.args) > 1 else None
    return [table.shape[dim]] if type(dim) is int and dim < table.dim() else list(table.shape)


def _called(node: torch.fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(target).partition(".")[0].rstrip("_") if node.op.startswith("call_") else ""


def _tensors(node: torch.fx.Node) -> list[torch.Tensor]:
    return [t for t in torch_compat.flatten_tree(value_of(node))[0] if isinstance(t, torch.Tensor)]


def _is_whole(tensor: torch.Tensor) -> bool:
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return not inexact and tensor.dtype is not torch.bool


def _is_small(size: object) -> bool:
    return type(size) is not int or size < 2


def padding_difference(
    shape: BatchShape,
    sizes: Sequence[int],
    others: Mapping[str, int],
    pads: Mapping[str, Number],
    run: Run,
) -> str | None:
    """What differs between a small batch alone and the same batch padded; None if nothing does, or if it can't be tried.

    Args:
        sizes: the captured sizes.
        others: the other sizes, by label.
        pads: what fills tails, by the input's name; 0 by default.
        run: runs the model uncaptured on the staged tensors of a batch of a size, and returns its flat results.
    """
    chosen = _sizes_to_try(shape, sizes, others)
    if chosen is None:
        return None
    try:
        found = _difference(shape, others, pads, *chosen, run)
    except Exception as error:  # noqa: BLE001
        _log.info("capture: padding was not tried (%s: %s)", type(error).__name__, error)
        return None
    if found is None:
        return None
    return f"{found} is another one in a padded run, although rows were said to stay apart"


def _difference(
    shape: BatchShape,
    others: Mapping[str, int],
    pads: Mapping[str, Number],
    count: int,
    padded: int,
    run: Run,
) -> str | None:
    rows = [_random(each, others, count) for each in shape.staged]
    alone = [each.clone(memory_format=torch.preserve_format) for each in rows]
    results, places = [run(alone, count)], [alone]
    for poison in (False, True):
        tails = [_POISON if poison else pads.get(each.name, 0) for each in shape.staged]
        inputs = [
            _with_tail(x, each, padded - count, tail)
            for x, each, tail in zip(rows, shape.staged, tails, strict=True)
        ]
        results.append(run(inputs, padded))
        places.append(inputs)
    for index, rule in enumerate(shape.results):
        if not rule.is_count and _differ(
            *(_front(each[index], rule.dims, count) for each in results)
        ):
            return f"result {index}"
    for number, each in enumerate(shape.staged):
        dims = () if each.dim is None else (each.dim,)
        if each.written and _differ(*(_front(place[number], dims, count) for place in places)):
            return f"argument {each.name}, which is written to,"
    return None


def _sizes_to_try(
    shape: BatchShape, sizes: Sequence[int], others: Mapping[str, int]
) -> tuple[int, int] | None:
    """A batch and a captured size that it is padded to, both small and, where there is a choice, above one."""
    for padded in sorted(sizes, key=lambda size: (size < 3, size)):
        for count in range(padded - 1, max(shape.low, 1) - 1, -1):
            if shape.refusal(count, others) is None:
                return count, padded
    return None


def _differ(alone: object, quiet: object, poisoned: object) -> bool:
    """Whether the tail is seen: exactly between equal sizes, up to rounding between different ones."""
    if not isinstance(alone, torch.Tensor):
        return quiet != poisoned or alone != quiet
    assert isinstance(quiet, torch.Tensor) and isinstance(poisoned, torch.Tensor)
    inexact = alone.is_floating_point() or alone.is_complex()
    if alone.shape != quiet.shape or quiet.shape != poisoned.shape:
        return True
    if not inexact:
        return not torch.equal(quiet, poisoned)
    return not (_close(quiet, poisoned) and _close(alone, quiet))


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to what another order of additions changes."""
    if one.numel() == 0:
        return True
    tolerance = (
        1e-3
        if one.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
        else 5e-2
    )
    one, other = (
        each.detach().to(torch.complex128 if each.is_complex() else torch.float64)
        for each in (one, other)
    )
    finite = torch.isfinite(one)
    if not torch.equal(finite, torch.isfinite(other)):
        return False
    scale = max(1.0, float(one[finite].abs().max()) if bool(finite.any()) else 1.0)
    return bool(((one - other)[finite].abs() <= tolerance * scale).all())


def _front(value: object, dims: Sequence[int], count: int) -> object:
    if isinstance(value, torch.Tensor):
        for dim in dims:
            value = value.narrow(dim, 0, count)
    return value


def _random(each: StagedInput, others: Mapping[str, int], count: int) -> torch.Tensor:
    """Random data; whole numbers are 0 and 1, which point at something wherever anything does."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(each.sizes(count, others), generator=generator)
    dtype = each.fake.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        drawn = drawn > 0
    return each.as_traced(drawn.to(each.fake.device, dtype))


def _with_tail(rows: torch.Tensor, each: StagedInput, more: int, fill: Number) -> torch.Tensor:
    """The rows with ``more`` behind them, in the layout of the trace."""
    if each.dim is None:
        return rows.clone(memory_format=torch.preserve_format)
    dim = each.in_memory.index(each.dim)
    plain = rows.permute(each.in_memory)
    shape = list(plain.shape)
    shape[dim] = more
    if fill is _POISON and not (plain.is_floating_point() or plain.is_complex()):
        fill = 1
    return each.as_traced(torch.cat([plain, plain.new_full(shape, fill)], dim))
