"""What a compiler of pieces must offer, and those that leave a piece as it is or hand it on."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.fx import GraphModule

from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.codegen.stitch.source import generate_source
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.store.digest import digest_of


@dataclass(frozen=True, slots=True)
class CompiledPiece:
    # takes the piece's inputs positionally and returns a tuple or list of its outputs
    runnable: Callable[..., object]
    # the compiler's own object, for serialisation; None if there is nothing to keep
    artifact: object = None
    # does the same with less around it, for plain tensors without modes; None if nothing does
    direct: Callable[..., object] | None = None
    indirect_because: str = ""  # why there is no ``direct``
    # inputs whose readers refuse a tensor of another dtype or device by themselves
    strict_inputs: frozenset[int] = frozenset()


class CompilerInterface(Protocol):
    """A compiler of pieces; see `make_compiler`.

    A compiler may also have ``to_bytes(piece) -> bytes | None`` and ``from_bytes(data, graph) ->
    CompiledPiece``; then what it makes is kept in the compile cache. One that runs graph passes has
    ``passes``, a `PostGradPassManager`; one with ``begin()`` is told when a trace begins; one with
    ``calls_custom_ops_as_they_are = True`` may be given operators that stand for others, so that
    pieces which differ only in a layer's name are one program.
    """

    name: str  # what ``CompilationConfig.backend`` calls it

    def compute_hash(self, config: CompilationConfig) -> str:
        """Everything about the compiler that changes its output, as a hex digest."""
        ...

    def compile(
        self,
        graph: GraphModule,
        example_inputs: Sequence[object],
        config: CompilationConfig,
        compile_range: Range | None,
    ) -> CompiledPiece:
        """Compile one piece; runs without recording gradients. ``graph`` must stay as it is.

        Args:
            graph: flat inputs, and a tuple of outputs.
            example_inputs: fake tensors and symbols (integers, for a single size), by placeholder.
            config: the resolved configuration.
            compile_range: batch sizes that the result must serve; None means all.

        Raises:
            Exception: whatever the compiler raises; the caller adds which piece it was.
        """
        ...


class EagerAdaptor:
    """Runs each piece as FX wrote it."""

    name = "eager"

    def compute_hash(self, config: CompilationConfig) -> str:
        return "eager"

    def compile(self, graph: GraphModule, *rest: object) -> CompiledPiece:
        counters.num_eager_compiles += 1
        return CompiledPiece(uncompiled(graph))


def uncompiled(graph: GraphModule) -> Callable[..., object]:
    """``graph`` as a function that runs its operators one by one."""
    from piecework.codegen.split.regions import regions_in

    for each in graph.modules():
        if isinstance(each, GraphModule) and "forward" not in vars(type(each)):
            each.recompile()  # it was read, and nobody had to run it yet
    if not regions_in(graph.graph):
        return graph.forward
    # FX writes no ``finally``: an exception would leave a region (autocast, gradient mode) open.
    source = generate_source(graph)
    submods = {name: graph.get_submodule(name) for name in source.submod_names}
    return compile_execution_fn(source.code, submods, source.submod_names, source.consts)


class DynamoBackendAdaptor:
    """Hands a graph to a backend in Dynamo's sense, given itself or by torch's name."""

    def __init__(self, backend: str | Callable[..., object]) -> None:
        by_name = isinstance(backend, str)
        self._backend = torch_compat.dynamo_backend(backend) if by_name else backend
        self.name = backend if by_name else str(getattr(backend, "__name__", backend))

    def compute_hash(self, config: CompilationConfig) -> str:
        return digest_of(self._backend, "backend")

    def compile(
        self, graph: GraphModule, example_inputs: Sequence[object], *rest: object
    ) -> CompiledPiece:
        # A backend may rewrite the graph that it is given, and equal pieces are compared by theirs.
        return CompiledPiece(self._backend(copy.deepcopy(graph), list(example_inputs)))
