"""The traced forward of a whole decoder: of tokens, masks and what a cache holds, all tensors.

Attention is part of the graph, which is cut between repeated blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache

from piecework.integrations.transformers.probe import Forward
from piecework.integrations.transformers.request import cache_state
from piecework.integrations.transformers.way import TracedForward
from piecework.runtime.trace.dynamic_dims import Marks
from piecework.runtime.trace.sizes import AllDimensions

Fields = dict[str, object]
Held = list[dict[str, object]]
#: Arguments of a call: tensors by name, and tables of them, such as a mask for each type of layer.
Given = dict[str, torch.Tensor | dict[str, torch.Tensor | None]]
#: Dtype and number of dimensions of a tensor; of a table those of its entries, by their keys.
Form = tuple[torch.dtype, int] | tuple[tuple[str, tuple[torch.dtype, int] | None], ...]


@dataclass(frozen=True, slots=True)
class CallKind:
    """What calls have in common that traces which differ in sizes alone can serve."""

    tensors: tuple[tuple[str, Form], ...]
    flags: tuple[tuple[str, object], ...]  # the other arguments
    cache: cache_state.CacheForm | None
    one: tuple[bool, bool]  # one sequence, one token of each: such have traces of their own
    implementation: str  # the attention function's name

    def describe(self) -> str:
        """In words, for reports."""
        names = ", ".join(name for name, _ in self.tensors)
        rows = "one sequence" if self.one[0] else "sequences"
        tokens = "one token each" if self.one[1] else "tokens"
        cache = "no cache" if self.cache is None else self.cache.kind.__name__
        empty = "" if self.cache is None or self.cache.is_filled else ", empty"
        return f"{rows} of {tokens}, {cache}{empty}: {names}"

    @property
    def is_step(self) -> bool:
        """Whether a call is one more token of sequences whose past is in a cache."""
        return self.one[1] and self.cache is not None and self.cache.is_filled


@dataclass(frozen=True, slots=True)
class Habits:
    """What running a decoder showed."""

    cache_name: str | None  # the argument and field that a KV cache is, if it takes one
    makes_cache: bool  # where none is given
    counts: frozenset[str]  # attributes of the cache's layers, integers that grow
    output_class: type
    is_pair: bool = False  # the cache is one of an encoder-decoder


@dataclass(slots=True)
class WholeCall:
    """One forward: its kind, its tensors by name, and its cache, taken apart."""

    kind: CallKind
    tensors: Given
    cache: Cache | None
    taken: cache_state.TakenApart | None

    def run(self, run: Forward, habits: Habits) -> Fields:
        """The output's fields, the cache among them if it is one."""
        leaves = [] if self.taken is None else self.taken.leaves
        fields, returned, held = run(self.tensors, leaves)  # type: ignore[misc]
        if self.cache is not None and self.taken is not None:
            cache_state.put_back(self.cache, self.taken, held)
        if returned and habits.cache_name is not None:
            fields[habits.cache_name] = self.cache
        return fields


class WholeForward(TracedForward):
    """The decoder's forward for one kind of call; ``held``: what the cache's layers have then."""

    def __init__(
        self,
        decoder: nn.Module,
        forward: Forward,
        kind: CallKind,
        cache_name: str | None,
        held: Sequence[str],
    ) -> None:
        super().__init__(decoder, forward)
        self._flags = dict(kind.flags)
        self._form = kind.cache
        self._cache_name = cache_name
        self.held = tuple(held)

    def forward(self, given: Given, leaves: Sequence[torch.Tensor]) -> tuple[Fields, bool, Held]:
        """The output's fields beside its cache, whether that is one of them, and what it holds."""
        arguments = {**given, **self._flags}
        cache = None
        if self._form is not None:
            cache = cache_state.rebuilt(self._form, leaves)
            arguments[self._cache_name] = cache
        fields = {}
        returned = False
        for name, value in self.output(**arguments).items():
            if cache is not None and value is cache:
                returned = True
            else:
                fields[name] = value
        return fields, returned, [] if cache is None else cache_state.held_by(cache, self.held)


class CallDimensions(AllDimensions):
    """Every size of a call may differ, and has a number behind it in a trace."""

    def every_size(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Marks:
        return []

    def batch_alone(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        return None  # with the batch alone dynamic, each length would be compiled anew
