"""One persistent buffer: its memory as a tensor of any padded size, and checks of what fits it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from piecework.errors import ConfigError, InputError

Number = bool | int | float | complex


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What is declared about one staged input.

    Attributes:
        name: for errors, and in the address book.
        dim: its dynamic dimension; may be negative.
        pad: what fills the tail.
        written: what reads the buffer writes to it too, so that its tail is filled each time.
    """

    name: str
    dim: int = 0
    pad: Number = 0
    written: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """One persistent buffer, seen as (outer, padded, inner) for each padded size.

    A padded size uses the head of the memory densely, so that strides are those of a plain tensor
    of that shape and the address is the same for every size.
    """

    spec: InputSpec
    buffer: torch.Tensor
    dim: int
    pad: Number

    @classmethod
    def make(cls, spec: InputSpec, buffer: torch.Tensor, *, poison: bool) -> Slot:
        dim = dimension_of(spec, buffer)
        if not buffer.is_contiguous():
            raise ConfigError(
                f"a buffer must be contiguous; this one has strides {list(buffer.stride())}",
                where=f"input {spec.name}",
            )
        floats = buffer.is_floating_point() or buffer.is_complex()
        try:
            held = torch.tensor([spec.pad], dtype=buffer.dtype).item()
            fits = floats or held == spec.pad
        except (RuntimeError, TypeError, OverflowError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{spec.pad!r} can't be held by {buffer.dtype}",
                where=f"input {spec.name}",
                hint="declare a padding value of the input's own type",
            )
        pad = math.nan if poison and buffer.is_floating_point() else spec.pad
        return cls(spec, buffer, dim, pad)

    @property
    def maximum(self) -> int:
        return self.buffer.shape[self.dim]

    @property
    def outer(self) -> int:
        return math.prod(self.buffer.shape[: self.dim])

    @property
    def inner(self) -> int:
        return math.prod(self.buffer.shape[self.dim + 1 :])

    def view(self, padded: int) -> torch.Tensor:
        """The static tensor that a graph captured for ``padded`` reads."""
        if padded > self.maximum:
            raise InputError(
                f"can't be padded to {padded}; its buffer holds {self.maximum} in dimension {self.dim}",
                where=f"input {self.spec.name}",
                hint="allocate the buffers for the largest captured size",
            )
        shape = (*self.buffer.shape[: self.dim], padded, *self.buffer.shape[self.dim + 1 :])
        return self.buffer.view(-1)[: math.prod(shape)].view(shape)

    def check(self, tensor: torch.Tensor, padded: int) -> None:
        where = f"input {self.spec.name}"
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != self.buffer.dtype:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(f"is {found}, its buffer {self.buffer.dtype}", where=where)
        fixed = list(tensor.shape)
        fixed[self.dim : self.dim + 1] = [self.maximum] if self.dim < tensor.dim() else []
        if tensor.dim() != self.buffer.dim() or fixed != list(self.buffer.shape):
            raise InputError(
                f"has shape {list(tensor.shape)}, which does not fit its buffer "
                f"{list(self.buffer.shape)} (dimension {self.dim} may be smaller)",
                where=where,
            )
        count = tensor.shape[self.dim]
        if count > padded:
            raise InputError(
                f"has size {count} in dimension {self.dim}, more than the {padded} it is staged "
                f"for (the buffer holds {self.maximum})",
                where=where,
                hint="dispatch to a captured size of at least that, or run uncaptured",
            )


def dimension_of(spec: InputSpec, tensor: torch.Tensor) -> int:
    """The dynamic dimension of an input, counted from the front."""
    if not -tensor.dim() <= spec.dim < tensor.dim():
        raise ConfigError(
            f"dimension {spec.dim} of a tensor with {tensor.dim()} dimensions",
            where=f"input {spec.name}",
            hint="a staged input needs a dynamic dimension",
        )
    return spec.dim % tensor.dim()
