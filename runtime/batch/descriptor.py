"""What a batch is, and the key of one captured batch shape."""

from collections.abc import Hashable
from dataclasses import dataclass

from piecework.runtime.batch.mode import CUDAGraphMode

Axes = tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True, slots=True)
class BatchDescriptor:
    """One batch shape that a static graph is captured for.

    Attributes:
        num_tokens: tokens in the (padded) batch.
        num_reqs: requests in it, for a full graph, which holds attention; None for pieces.
        uniform: every request has the same number of query tokens (a decode batch).
        has_lora, num_active_loras: adapters are active, and for how many kernels are launched.
        extra: further axes, as sorted (name, value) pairs: ``max_query_len``, ``num_ubatches``, …
    """

    num_tokens: int
    num_reqs: int | None = None
    uniform: bool = False
    has_lora: bool = False
    num_active_loras: int = 0
    extra: Axes = ()

    def describe(self) -> str:
        """A short text for reports and errors, only what differs from the default.

        Example:
            >>> BatchDescriptor(8, uniform=True).describe()
            'tokens=8 uniform'
        """
        parts = [f"tokens={self.num_tokens}"]
        if self.num_reqs is not None:
            parts.append(f"reqs={self.num_reqs}")
        if self.uniform:
            parts.append("uniform")
        if self.has_lora:
            parts.append(f"loras={self.num_active_loras}")
        parts += [f"{name}={value}" for name, value in self.extra]
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class BatchKind:
    """What kind of batch a call is, as far as only the caller knows it."""

    uniform_decode: bool = False  # every request has the same number of query tokens
    has_lora: bool = False
    num_active_loras: int = 0
    axes: Axes = ()  # values of the extra axes, as (name, value) pairs
    invalid_modes: frozenset[CUDAGraphMode] = frozenset()  # modes that this batch can't run in
    query_len: int | None = None  # tokens of each request of a uniform batch; the widest by default


Key = tuple[CUDAGraphMode, BatchDescriptor]
PLAIN = BatchKind()
"""A batch of which nothing is known but its size."""
