"""Answers compared. In: what a contender and eager returned. Out: how they differ, or nothing.

Values are held to torch's tolerance for the dtype; what misses it may be twice as far from eager as stock is.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, is_dataclass

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call returned, and its arguments afterwards."""

    result: object
    arguments: object


def kept(result: object) -> object:
    """``result`` in memory of its own, strides kept."""
    return pytree.tree_map(_kept_leaf, result, is_leaf=_is_size)


def _kept_leaf(leaf: object) -> object:
    if type(leaf) is not torch.Tensor or leaf.layout is not torch.strided:
        return copy.deepcopy(leaf)
    if leaf.is_contiguous() or 0 in leaf.stride():
        return leaf.clone()
    made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return made.copy_(leaf)


def difference(
    got: Answer, expected: Answer, stock: Answer | None = None, strided: Collection[int] = ()
) -> str:
    """How ``got`` differs from ``expected``; "" if it doesn't.

    Args:
        stock: what `torch.compile` answered, as a yardstick for values.
        strided: numbers of the outputs whose strides have to be the same.
    """
    yardstick = None if stock is None else stock.result
    found = _tree_difference(got.result, expected.result, yardstick, strided, "output")
    return found or _tree_difference(got.arguments, expected.arguments, None, (), "argument")


def outputs_with_strides_of(got: Answer, expected: Answer) -> set[int]:
    """The numbers of the outputs that have the same strides in both."""
    leaves = (pytree.tree_leaves(each.result, _is_size) for each in (got, expected))
    pairs = zip(*leaves, strict=False)
    return {index for index, (one, two) in enumerate(pairs) if _same_strides(one, two)}


def _is_size(value: object) -> bool:
    """Whether ``value`` is a `torch.Size`, which pytree takes for a tuple."""
    return type(value) is torch.Size


def _same_strides(one: object, two: object) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)):
        return False
    strided = one.layout is two.layout is torch.strided
    return strided and one.shape == two.shape and one.stride() == two.stride()


def _tree_difference(
    got: object, expected: object, stock: object, strided: Collection[int], what: str
) -> str:
    ours, our_spec = pytree.tree_flatten(got, _is_size)
    theirs, their_spec = pytree.tree_flatten(expected, _is_size)
    if our_spec != their_spec:
        return f"structure {our_spec} instead of {their_spec}"[:300]
    yardsticks = pytree.tree_leaves(stock, _is_size)
    if len(yardsticks) != len(theirs):
        yardsticks = [None] * len(theirs)
    for index, (mine, wanted, yardstick) in enumerate(zip(ours, theirs, yardsticks, strict=True)):
        found = _leaf_difference(mine, wanted, yardstick, index in strided)
        if found:
            return f"{what} {index}: {found}"
    return ""


def _leaf_difference(got: object, wanted: object, stock: object, with_strides: bool) -> str:
    if type(got) is not type(wanted):
        return f"{type(got).__name__} instead of {type(wanted).__name__}"
    if _is_its_attributes(wanted):
        return _tree_difference(vars(got), vars(wanted), None, (), "field")
    if not isinstance(wanted, torch.Tensor):
        same = got == wanted or (got != got and wanted != wanted)
        return "" if same else f"{got!r} instead of {wanted!r}"
    assert isinstance(got, torch.Tensor)
    if (got.dtype, got.shape, got.layout) != (wanted.dtype, wanted.shape, wanted.layout):
        return f"{got.dtype} {tuple(got.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
    if with_strides and not _same_strides(got, wanted):
        return f"strides {got.stride()} instead of {wanted.stride()}"
    try:
        torch.testing.assert_close(got, wanted, equal_nan=True)
    except AssertionError as error:
        if _distance(got, wanted, float("inf")) <= 2 * _distance(stock, wanted, 0.0):
            return ""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:3])[:200]
    return ""


def _is_its_attributes(value: object) -> bool:
    """Whether two such values are compared by their attributes."""
    if isinstance(value, (type, torch.nn.Module)) or not hasattr(value, "__dict__"):
        return False
    return is_dataclass(value) or type(value).__eq__ is object.__eq__


def _distance(got: object, wanted: torch.Tensor, otherwise: float) -> float:
    """The largest difference; ``otherwise`` for what has none."""
    if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
        return otherwise
    if not wanted.numel() or not wanted.dtype.is_floating_point:
        return otherwise
    distance = float((got.double() - wanted.double()).abs().max())
    return distance if distance == distance else otherwise
