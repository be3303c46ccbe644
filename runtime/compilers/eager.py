"""Compilers that leave a piece as it is, or hand it whole to a torch.compile backend."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import torch.fx

from piecework.codegen.split.regions import regions_in
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.codegen.stitch.source import generate_source
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.interface import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.store.digest import digest_of

_log = logging.getLogger(__name__)


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
        return CompiledPiece(uncompiled(graph))


def left_uncompiled(graph: torch.fx.GraphModule) -> CompiledPiece:
    """A piece as FX wrote it that writes to memory which several of its inputs share.

    AOTAutograd rebuilds such inputs from one base, whose size and start it takes from the trace,
    and makes outputs that are views of them anew as views of that base: where an input is a part of
    the memory, results are others.
    """
    reason = "it writes to memory that several of its inputs share"
    _log.warning("%s is not compiled: %s, which compilers get wrong", graph._get_name(), reason)
    counters.num_eager_compiles += 1
    return CompiledPiece(uncompiled(graph), indirect_because=reason)


def uncompiled(graph: torch.fx.GraphModule) -> Callable[..., object]:
    """``graph`` as a function that runs its operators one by one.

    FX writes no ``finally``: a graph with regions (autocast, gradient mode) is emitted and proved
    as stitching source is, so that an exception leaves none of them open.
    """
    for each in graph.modules():
        if isinstance(each, torch.fx.GraphModule) and "forward" not in vars(type(each)):
            each.recompile()  # it was read, and nobody had to run it yet
    if not regions_in(graph.graph):
        return graph.forward
    source = generate_source(graph)
    submods = {name: graph.get_submodule(name) for name in source.submod_names}
    return compile_execution_fn(source.code, submods, source.submod_names, source.consts)


class DynamoBackendAdaptor:
    """Hands a graph to a backend in Dynamo's sense: ``backend(graph_module, example_inputs) ->
    callable``.

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
