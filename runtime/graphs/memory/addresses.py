"""Where the inputs of a captured piece live, and whether they may be read there again.

A tensor that nobody vouched for is fresh: the address policy says what becomes of it.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.graphs.device.contract import owns_plain_memory, plain_parts


class ValueOrigin(enum.Enum):
    """Who owns the memory of a value that enters a captured piece."""

    WEIGHT = "weight"
    PERSISTENT = "persistent buffer"
    CAPTURED = "output of an earlier captured piece"
    OUT_BUFFER = "out-buffer"
    FRESH = "fresh tensor"


class Policy(enum.Enum):
    """A choice by name."""

    @classmethod
    def parse(cls, value: Self | str) -> Self:
        """The policy of that name."""
        try:
            return cls(value.lower() if isinstance(value, str) else value)
        except ValueError:
            kind = cls.__name__.removesuffix("Policy").lower()
            names = ", ".join(policy.value for policy in cls)
            raise ConfigError(f"no {kind} policy {value!r}", hint=f"use one of {names}") from None


class AddressPolicy(Policy):
    """What becomes of a fresh tensor that enters a captured piece."""

    COPY = "copy"  # it is staged into a static buffer
    REFUSE = "refuse"  # the capture is an error
    EAGER = "eager"  # that piece runs uncaptured


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor is and how it is laid out; a replay reads right where it is equal."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    turned: tuple[bool, bool] = (False, False)  # lazily conjugated, negated
    parts: tuple[Self, ...] = ()  # the tensors that a subclass holds

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        shape, plain = tuple(tensor.shape), owns_plain_memory(tensor)
        if not plain or tensor.numel() == 0:  # no address of its own
            parts = () if plain else tuple(map(cls.of, plain_parts(tensor)))
            return cls(0, tensor.dtype, shape, (), parts=parts)
        turned = (tensor.is_conj(), tensor.is_neg())
        return cls(tensor.data_ptr(), tensor.dtype, shape, tensor.stride(), turned)

    def differs(self, other: Self) -> str | None:
        """What is different, in words, or None."""
        if self == other:
            return None
        if self == replace(other, address=self.address):
            return "is at another address"
        return f"was {self.describe()}, is {other.describe()}"

    def describe(self) -> str:
        """The layout, in words."""
        bits = [word for word, on in zip(("conjugated", "negated"), self.turned, strict=True) if on]
        layout = f"{self.dtype} {list(self.shape)} with strides {list(self.stride)}"
        return " ".join([*bits, layout])


@dataclass(frozen=True, slots=True)
class _Region:
    """Memory that somebody vouches for; ``keep`` holds it, so that nothing else can move in."""

    name: str
    origin: ValueOrigin
    end: int
    keep: torch.UntypedStorage | None


class AddressBook:
    """Which memory stays where it is: weights, buffers, and captured outputs per descriptor.

    Example:
        >>> book = AddressBook()
        >>> w = torch.ones(4)
        >>> book.register_weights({"w": w})
        >>> book.classify(w[1:]).value, book.classify(w + 1).value
        ('weight', 'fresh tensor')
    """

    def __init__(self) -> None:
        self._weights: dict[str, Placement] = {}
        self._regions: dict[int, _Region] = {}
        self._captured: dict[BatchDescriptor, dict[int, _Region]] = {}

    def register_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Vouch for named weights."""
        for name, weight in weights.items():
            self._weights[name] = Placement.of(weight)
            _enter(self._regions, name, weight, ValueOrigin.WEIGHT)

    def register_persistent(
        self, name: str, tensor: torch.Tensor, origin: ValueOrigin = ValueOrigin.PERSISTENT
    ) -> None:
        """Vouch for a buffer that is allocated once (``OUT_BUFFER``: splitting ops write to it)."""
        if not plain_parts(tensor):
            kind = f"{tensor.layout} {type(tensor).__name__}"
            text = f"a persistent buffer must be dense memory, not {kind}"
            raise StaticGraphError(text, where=name)
        _enter(self._regions, name, tensor, origin)

    def register_captured(
        self, name: str, tensors: list[torch.Tensor], descriptor: BatchDescriptor
    ) -> None:
        """Vouch for the outputs of a piece captured for ``descriptor``, until it is forgotten."""
        regions = self._captured.setdefault(descriptor, {})
        for tensor in tensors:
            _enter(regions, name, tensor, ValueOrigin.CAPTURED)

    def forget_captured(self, descriptor: BatchDescriptor | None = None) -> None:
        """Vouch no longer for the outputs captured for ``descriptor``, or for any."""
        for each in list(self._captured) if descriptor is None else [descriptor]:
            self._captured.pop(each, None)

    def classify(
        self, tensor: torch.Tensor, descriptor: BatchDescriptor | None = None
    ) -> ValueOrigin:
        """Who owns the memory of ``tensor``, seen from a piece captured for ``descriptor``."""
        return self.find(tensor, descriptor)[0]

    def find(
        self, tensor: torch.Tensor, descriptor: BatchDescriptor | None
    ) -> tuple[ValueOrigin, str | None]:
        """Who owns the memory of ``tensor``, and the name under which it was registered."""
        unknown = (ValueOrigin.FRESH, None)
        if not owns_plain_memory(tensor):
            # Of a subclass, if somebody vouches for all that it holds.
            found = [self.find(part, descriptor) for part in plain_parts(tensor)]
            return found[0] if found and unknown not in found else unknown
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        captured = self._captured.get(descriptor, {}) if descriptor is not None else {}
        region = self._regions.get(start) or captured.get(start)
        if region is None or start + storage.nbytes() > region.end:
            return unknown
        return region.origin, region.name

    def changed_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Which registered weights are missing, moved or laid out differently: name → how."""
        changes = {}
        for name, before in self._weights.items():
            held = weights.get(name)
            difference = "is gone" if held is None else before.differs(Placement.of(held))
            if difference is not None:
                changes[name] = difference
        return changes


def _enter(
    regions: dict[int, _Region], name: str, tensor: torch.Tensor, origin: ValueOrigin
) -> None:
    """Note where ``tensor`` lies; of tensors that share memory the first name stands for it."""
    for part in plain_parts(tensor):
        storage = part.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        known = regions.get(start)
        if start < end and (known is None or known.end < end):
            keep = None if origin is ValueOrigin.CAPTURED else storage
            regions[start] = _Region(name, origin, end, keep)
