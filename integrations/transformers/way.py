"""What a way to serve a decoder offers. In: a decoder that it took. Out: forwards of it, and the stitched modules behind them.

There are two: `FlatWay` and `WholeWay`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from torch import nn

from piecework.errors import CaptureError
from piecework.integrations.transformers.own.probe import Forward
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.folder import Place


class Way(Protocol):
    """One way to serve a decoder.

    Attributes:
        name: of the way.
        decoder: the module whose forward is replaced.
        forward: its original forward, bound.
        not_flat: why it is not served flat, if that was tried.
        as_it_is: calls that the model's own forward served, by the reason.
    """

    not_flat: CaptureError | None
    as_it_is: Counter[str]

    @property
    def name(self) -> str: ...

    @property
    def decoder(self) -> nn.Module: ...

    @property
    def forward(self) -> Forward: ...

    def serve(self, given: Mapping[str, object]) -> object:
        """One forward, its arguments by name."""

    def is_compiled(self, given: Mapping[str, object]) -> bool:
        """Whether calls like this one run what is compiled already."""

    def entry(self, name: str) -> StitchedModule:
        """The stitched module behind calls of a kind; raises `UsageError` where there is no such kind."""

    def modules(self) -> dict[str, StitchedModule]:
        """Those that are compiled, by the calls that they serve."""

    def save(self, place: Place, key_file: str | os.PathLike[str] | None) -> None:
        """Write an artifact of what is compiled; raises `ArtifactError` where something can't be told again in another process."""
