"""Where the inputs of a captured piece live: in, tensors; out, whether each may be read at its address again, and what to do if not.

It never copies or captures anything; a tensor nobody vouched for is fresh.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.graphs.device.weak_ref import owns_plain_memory, plain_parts


class ValueOrigin(enum.Enum):
    """Who owns the memory of a value that enters a captured piece."""

    WEIGHT = "weight"
    PERSISTENT = "persistent buffer"
    CAPTURED = "output of an earlier captured piece"
    OUT_BUFFER = "out-buffer"
    FRESH = "fresh tensor"


class AddressPolicy(enum.Enum):
    """What becomes of a fresh tensor that enters a captured piece.

    COPY stages it into a static buffer, REFUSE makes the capture an error, EAGER runs that piece uncaptured.
    """

    COPY = "copy"
    REFUSE = "refuse"
    EAGER = "eager"

    @classmethod
    def parse(cls, value: AddressPolicy | str) -> AddressPolicy:
        """The policy of that name.

        Raises:
            ConfigError: there is none.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls(str(value).lower())
        except ValueError:
            names = ", ".join(policy.value for policy in cls)
            raise ConfigError(
                f"no address policy {value!r}", where="address_policy", hint=f"use one of {names}"
            ) from None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor is and how it is laid out; equal placements mean a replay reads the right memory.

    A tensor without elements has no address. ``turned`` tells lazy conjugation and negation, ``parts`` where the tensors of a
    subclass are.
    """

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    turned: tuple[bool, bool] = (False, False)
    parts: tuple[Placement, ...] = ()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Placement:
        if not owns_plain_memory(tensor) or tensor.numel() == 0:
            parts = () if owns_plain_memory(tensor) else plain_parts(tensor)
            inner = tuple(map(cls.of, parts))
            return cls(0, tensor.dtype, tuple(tensor.shape), (), parts=inner)
        turned = (tensor.is_conj(), tensor.is_neg())
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), turned)

    def same_layout(self, other: Placement) -> bool:
        """Whether only the address differs, if anything does."""
        return self == replace(other, address=self.address)

    def differs(self, other: Placement) -> str | None:
        """What is different, in words, or None."""
        if self == other:
            return None
        if self.same_layout(other):
            return "is at another address"
        return f"was {self.describe()}, is {other.describe()}"

    def describe(self) -> str:
        """The layout, in words."""
        bits = [word for word, on in zip(("conjugated", "negated"), self.turned, strict=True) if on]
        return " ".join(
            [*bits, f"{self.dtype} {list(self.shape)} with strides {list(self.stride)}"]
        )


@dataclass(frozen=True, slots=True)
class WeightChange:
    """One weight that is no longer what was captured."""

    name: str
    what: str


@dataclass(frozen=True, slots=True)
class _Region:
    """Memory that somebody vouches for; ``keep`` holds it, so that nothing else can move in."""

    name: str
    origin: ValueOrigin
    end: int
    keep: torch.UntypedStorage | None


@dataclass(eq=False)
class AddressBook:
    """Which memory stays where it is: weights and buffers for good, captured outputs per descriptor.

    Example:
        >>> book = AddressBook()
        >>> w = torch.ones(4)
        >>> book.register_weights({"w": w})
        >>> book.classify(w[1:]).value, book.classify(w + 1).value
        ('weight', 'fresh tensor')
    """

    _weights: dict[str, tuple[Placement, torch.Tensor]] = field(default_factory=dict)
    _weight_regions: dict[int, _Region] = field(default_factory=dict)
    _buffers: dict[int, _Region] = field(default_factory=dict)
    _captured: dict[BatchDescriptor, dict[int, _Region]] = field(default_factory=dict)

    def register_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Vouch for named weights; a later call with the same names replaces them."""
        for name, weight in weights.items():
            self._weights[name] = Placement.of(weight), weight.detach()
        self._weight_regions = {}
        for name, (_, tensor) in self._weights.items():
            self._enter(self._weight_regions, name, tensor, ValueOrigin.WEIGHT, keep=True)

    def register_persistent(
        self, name: str, tensor: torch.Tensor, origin: ValueOrigin = ValueOrigin.PERSISTENT
    ) -> None:
        """Vouch for a buffer that is allocated once and written in place (``OUT_BUFFER``: by splitting ops)."""
        if not plain_parts(tensor):
            raise StaticGraphError(
                f"a persistent buffer must be dense memory, not {tensor.layout} {type(tensor).__name__}",
                where=name,
            )
        self._enter(self._buffers, name, tensor, origin, keep=True)

    def register_captured(
        self, name: str, tensors: list[torch.Tensor], descriptor: BatchDescriptor
    ) -> None:
        """Vouch for the outputs of a piece captured for ``descriptor``, until it is forgotten."""
        regions = self._captured.setdefault(descriptor, {})
        for tensor in tensors:
            self._enter(regions, name, tensor, ValueOrigin.CAPTURED, keep=False)

    def forget_captured(self, descriptor: BatchDescriptor | None = None) -> None:
        """The outputs captured for ``descriptor`` (all of them by default) are no longer vouched for."""
        if descriptor is None:
            self._captured.clear()
        else:
            self._captured.pop(descriptor, None)

    def classify(
        self, tensor: torch.Tensor, descriptor: BatchDescriptor | None = None
    ) -> ValueOrigin:
        """Who owns the memory of ``tensor``, seen from a piece captured for ``descriptor``."""
        region = self._find(tensor, descriptor)
        return ValueOrigin.FRESH if region is None else region.origin

    def name_of(
        self, tensor: torch.Tensor, descriptor: BatchDescriptor | None = None
    ) -> str | None:
        """The name under which the memory of ``tensor`` was registered."""
        region = self._find(tensor, descriptor)
        return None if region is None else region.name

    def changed_weights(self, weights: Mapping[str, torch.Tensor]) -> list[WeightChange]:
        """Which registered weights are missing from ``weights``, moved, or laid out differently."""
        changes = []
        for name, (before, _) in self._weights.items():
            held = weights.get(name)
            difference = "is gone" if held is None else before.differs(Placement.of(held))
            if difference is not None:
                changes.append(WeightChange(name, difference))
        return changes

    def _find(self, tensor: torch.Tensor, descriptor: BatchDescriptor | None) -> _Region | None:
        if not owns_plain_memory(tensor):
            # Of a subclass, if somebody vouches for all that it holds.
            found = [self._find(part, descriptor) for part in plain_parts(tensor)]
            return found[0] if found and all(found) else None
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        captured = self._captured.get(descriptor, {}) if descriptor is not None else {}
        region = self._weight_regions.get(start) or self._buffers.get(start) or captured.get(start)
        return region if region is not None and start + storage.nbytes() <= region.end else None

    @staticmethod
    def _enter(
        regions: dict[int, _Region],
        name: str,
        tensor: torch.Tensor,
        origin: ValueOrigin,
        *,
        keep: bool,
    ) -> None:
        if not owns_plain_memory(tensor):
            for part in plain_parts(tensor):
                AddressBook._enter(regions, name, part, origin, keep=keep)
            return
        if tensor.untyped_storage().nbytes() == 0:
            return
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        end = start + storage.nbytes()
        known = regions.get(start)
        # Tied weights share memory: the first name stands for it.
        if known is None or known.end < end:
            regions[start] = _Region(name, origin, end, storage if keep else None)
