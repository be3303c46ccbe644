"""What a compiler of pieces must offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.fx

from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig


@dataclass(frozen=True, slots=True)
class CompiledPiece:
    """What a compiler returns.

    Attributes:
        runnable: takes the piece's inputs positionally and returns a tuple or list of its outputs.
        artifact: the compiler's own object, for serialisation; None if there is nothing to keep.
        direct: does the same with less around it, for plain tensors without modes; None if nothing
            does.
        indirect_because: why there is no ``direct``.
        strict_inputs: inputs whose readers refuse a tensor of another dtype or device by
            themselves.
    """

    runnable: Callable[..., object]
    artifact: object = None
    direct: Callable[..., object] | None = None
    indirect_because: str = ""
    strict_inputs: frozenset[int] = frozenset()


class CompilerInterface(Protocol):
    """A compiler of pieces; see `make_compiler`.

    A compiler may also have ``to_bytes(piece) -> bytes | None`` and ``from_bytes(data, graph) ->
    CompiledPiece``; then what it makes is kept in the compile cache. One that runs graph passes has
    ``passes``, a `PostGradPassManager`; one with ``begin()`` is told when a trace begins.

    One with ``calls_custom_ops_as_they_are = True`` may be given operators that stand for others,
    so that pieces which differ only in a layer's name are one program
    (`piecework.runtime.pieces.layer_names`).

    Attributes:
        name: what ``CompilationConfig.backend`` calls it.
    """

    name: str

    def compute_hash(self, config: CompilationConfig) -> str:
        """Everything about the compiler that changes its output, as a hex digest."""
        ...

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        """Compile one piece; runs without recording gradients. ``graph`` must stay as it is.

        Args:
            graph: flat inputs, and a tuple of outputs.
            example_inputs: fake tensors and symbols (or integers, for a single size), one per
                placeholder.
            config: the resolved configuration.
            compile_range: batch sizes that the result must serve; None means all.

        Raises:
            Exception: whatever the compiler raises; the caller adds which piece it was and keeps
                the graph.
        """
        ...
