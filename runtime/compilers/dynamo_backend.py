"""Any torch.compile backend as a compiler of pieces, where the graph is compiled whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch.fx

from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.store.digest import digest_of


class DynamoBackendAdaptor:
    """Hands a graph to a backend in Dynamo's sense: ``backend(graph_module, example_inputs) -> callable``.

    Args:
        backend: the name of a backend that torch knows, or the backend itself.

    Raises:
        ConfigError: it can't be called.
    """

    def __init__(self, backend: str | Callable[..., object]) -> None:
        known = torch_compat.dynamo_backend(backend) if isinstance(backend, str) else backend
        if not callable(known):
            raise ConfigError(
                f"backend {backend!r} can't be called",
                where="backend",
                hint="name a function that takes a graph and its inputs, as torch.compile(backend=...) does",
            )
        self._backend = known
        self.name = backend if isinstance(backend, str) else str(getattr(known, "__name__", known))

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
        compiled = self._backend(copy.deepcopy(graph), list(example_inputs))
        if not callable(compiled):
            raise PieceCompileError(
                f"backend {self.name} returned a {type(compiled).__qualname__}, which can't be called",
                hint="a backend returns a function, such as the graph that it was given",
            )
        return CompiledPiece(compiled)
