"""Any torch.compile backend as a compiler of pieces, where the graph is compiled whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch.fx

from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.store.digest import digest_of


class DynamoBackendAdaptor:
    """Hands a graph to a backend in Dynamo's sense: ``backend(graph_module, example_inputs) -> callable``.

    Args:
        backend: the name of a backend that torch knows, or the backend itself.
    """

    def __init__(self, backend: str | Callable[..., object]) -> None:
        by_name = isinstance(backend, str)
        self._backend = torch_compat.dynamo_backend(backend) if by_name else backend
        self.name = backend if by_name else str(getattr(backend, "__name__", backend))

    def compute_hash(self, config: CompilationConfig) -> str:
        return digest_of(self._backend, "backend")

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        # A backend may rewrite the graph that it is given, and equal pieces are compared by theirs.
        return CompiledPiece(self._backend(copy.deepcopy(graph), list(example_inputs)))
