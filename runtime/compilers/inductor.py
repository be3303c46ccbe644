"""Inductor as a compiler of pieces. In: a piece and fake inputs. Out: a standalone compiled artifact.

The piece given is copied by Inductor and stays as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.fx
from piecework.runtime import torch_compat
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.ranges import Range


class InductorStandaloneAdaptor:
    """Compiles with ``torch._inductor.standalone_compile``: one artifact per piece, independent of Dynamo."""

    name = "inductor"

    def compute_hash(self, config: CompilationConfig) -> str:
        options = sorted(
            (key, repr(value)) for key, value in config.inductor_compile_config.items()
        )
        text = f"{self.name} {torch.__version__} {torch_compat.inductor_key()} {options}"
        return hashlib.sha256(text.encode()).hexdigest()

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        counters.num_inductor_compiles += 1
        single = compile_range is not None and compile_range.is_single_size()
        artifact = torch_compat.standalone_compile(
            graph,
            list(example_inputs),
            dynamic_shapes="from_example_inputs" if single else "from_tracing_context",
            config_patches=dict(config.inductor_compile_config),
        )
        return CompiledPiece(artifact, artifact)
