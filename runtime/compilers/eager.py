"""The compiler that compiles nothing. In: a piece. Out: the piece's own generated forward.

Useful for tests and for looking at the stitching alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx

from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.ranges import Range


class EagerAdaptor:
    """Runs each piece as FX wrote it."""

    name = "eager"

    def compute_hash(self, config: CompilationConfig) -> str:
        return "eager"

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        counters.num_eager_compiles += 1
        return CompiledPiece(graph.forward)
