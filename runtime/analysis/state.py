"""Which dimensions of a value carry the batch. In: sizes with symbols. Out: `Rows`, the vocabulary of the rules.

*The first rows of a value do not depend on rows behind them*: with ``n`` real rows in a batch that is padded to ``m``, the part
of the value that belongs to the first ``n`` is what the unpadded batch would have given. Every rule keeps this true, or raises `Mixes`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from piecework.runtime import torch_compat


class Mixes(Exception):
    """A rule's answer: rows depend on rows behind them, or nobody knows that they don't."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of one value.

    Attributes:
        dims: dimension → how many blocks lie before the rows in it. A dimension of size ``a * n * b`` that lists ``n`` rows of ``b``
            elements ``a`` times over has ``a`` blocks; ``view(n * b, …)`` of ``(n, b, …)`` has one. Empty: the value is the same
            in a padded batch.
        mixed: why nothing is known; None otherwise.
        numbers: each element is the number of the row that it belongs to, as in ``arange(n)``.
    """

    dims: Mapping[int, object] = field(default_factory=dict)
    mixed: str | None = None
    numbers: bool = False

    def at(self, dim: int) -> bool:
        return dim in self.dims

    def moved(self, place: Mapping[int, int]) -> Rows:
        """The same rows after dimension ``d`` became ``place[d]``."""
        return Rows({place[d]: blocks for d, blocks in self.dims.items()})

    def unnumbered(self) -> Rows:
        return replace(self, numbers=False) if self.numbers else self

    def still_numbers(self, before: Rows) -> Rows:
        """These rows, where the elements are those of ``before``, in the same rows."""
        kept = before.numbers and len(self.dims) == 1 and set(self.dims.values()) == {1}
        return replace(self, numbers=kept)

    def shifted(self, by: int) -> Rows:
        return Rows({d + by: blocks for d, blocks in self.dims.items()})


SAME = Rows()


class Batch:
    """The symbols of the batch size, and what can be asked of sizes that hold them."""

    def __init__(self, symbols: Collection[str]) -> None:
        self.symbols = frozenset(symbols)

    def held_by(self, value: object) -> bool:
        """Whether a size, a shape or a tensor's shape holds the batch size."""
        return not self.symbols.isdisjoint(symbols_in(value))

    def dims_of(self, tensor: torch.Tensor) -> list[int]:
        return [dim for dim, size in enumerate(tensor.shape) if self.held_by(size)]

    def factor(self, size: object) -> object | None:
        """``c`` for a size of ``c * n``, where ``c`` is free of the batch size; None for any other size."""
        expr = torch_compat.size_expr(size)
        powers = expr.as_powers_dict() if hasattr(expr, "as_powers_dict") else {}
        found = [each for each in powers if str(each) in self.symbols]
        if len(found) != 1 or powers[found[0]] != 1:
            return None
        rest = expr / found[0]
        free = {str(each) for each in rest.free_symbols}
        return rest if self.symbols.isdisjoint(free) and is_whole(rest) else None

    def plain_rows(self, tensor: torch.Tensor) -> Rows:
        """What a tensor is whose rows nothing has touched: an argument, or memory that was just made.

        Raises:
            Mixes: a size is more than a multiple of the batch size.
        """
        dims = self.dims_of(tensor)
        for dim in dims:
            if self.factor(tensor.shape[dim]) is None:
                raise Mixes(f"a size of {tensor.shape[dim]} is computed from the batch size")
        return Rows(dict.fromkeys(dims, 1))


def is_whole(expr: Any) -> bool:  # sympy's expressions are untyped
    """Whether an expression is a product of whole numbers and symbols."""
    numerator, denominator = expr.as_numer_denom()
    return bool(denominator == 1 and not numerator.is_Add)


def symbols_in(value: object) -> Iterator[str]:
    """The symbols in a number, a shape, a tensor's shape, or any list of these."""
    if isinstance(value, torch.Tensor):
        value = tuple(value.shape)
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from symbols_in(each)
    else:
        yield from torch_compat.symbols_in(value)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)


def product(sizes: Iterable[object]) -> Any:
    """The product of sizes as an expression."""
    total = torch_compat.size_expr(1)
    for size in sizes:
        total = total * torch_compat.size_expr(size)
    return total


def union(*states: Rows) -> Rows:
    """Rows of all; dimensions that several have must have them in the same order.

    Raises:
        Mixes: they don't.
    """
    dims: dict[int, object] = {}
    for state in states:
        for dim, blocks in state.dims.items():
            if dims.setdefault(dim, blocks) != blocks:
                raise Mixes("meets the same rows in another order")
    return Rows(dims)


def same_sizes(tensors: Iterable[torch.Tensor], dims: Iterable[int]) -> bool:
    """Whether tensors have equal sizes in ``dims``."""
    listed = [
        tuple(torch_compat.size_expr(each.shape[dim]) for dim in sorted(dims)) for each in tensors
    ]
    return all(each == listed[0] for each in listed)
