"""A piece and its compiled form per batch range."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.fx
from torch.fx import GraphModule, Node

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.errors import BindError
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.compilers import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.pieces.manager import CompilerManager, RangeEntry, Request


class PieceCompiler(Protocol):
    """What pieces need of the backend that they belong to."""

    compiler_manager: CompilerManager
    compile_ranges: tuple[Range | None, ...]
    batch_symbol: str | None


class PiecewiseBackend:
    """A piece, compiled from its graph or loaded; ``sym_shape_indices[0]`` is the batch size."""

    def __init__(
        self,
        graph: GraphModule | None,
        config: CompilationConfig,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: Sequence[int],
        backend: PieceCompiler | None,
        returns_tuple: bool = True,
        compiled_runnables: Mapping[Range | None, Callable[..., object]] | None = None,
        submod_name: str = "",
        structure: Structure | None = None,
    ) -> None:
        loads = compiled_runnables is not None
        if (graph is None) != loads or (backend is None) != loads:
            raise BindError(
                "a piece takes either a graph and a backend, or runnables to load",
                where=submod_name or None,
            )
        self.graph, self.config, self.structure = graph, config, structure
        self.piecewise_compile_index = piecewise_compile_index
        self.total_piecewise_compiles = total_piecewise_compiles
        self.sym_shape_indices = tuple(sym_shape_indices)
        self.returns_tuple, self.submod_name = returns_tuple, submod_name
        self._manager = None if backend is None else backend.compiler_manager
        self.entries: dict[Range | None, RangeEntry] = {}
        if graph is None or backend is None:
            self.load_all_ranges(compiled_runnables or {})
            return
        if structure is None:
            self.structure = structure_of(graph, describe_input=input_signature)
        self.compile_all_ranges(backend)

    def compile_all_ranges(self, backend: PieceCompiler) -> None:
        """Compile the piece once per range; equal pieces share the result."""
        graph, structure = self.compiled_of()
        name, symbol = self.submod_name, backend.batch_symbol
        for each in backend.compile_ranges:
            request = Request(name, graph, structure, each, symbol)
            self.entries[each] = backend.compiler_manager.compile(request)

    def compiled_of(self) -> tuple[GraphModule, Structure]:
        """The graph that is compiled, and its structure; `BindError` where the piece was loaded."""
        if self.graph is None or self.structure is None:
            raise BindError("a piece that was loaded has no graph", where=self.submod_name or None)
        return self.graph, self.structure

    def load_all_ranges(self, runnables: Mapping[Range | None, Callable[..., object]]) -> None:
        for compile_range, runnable in runnables.items():
            entry = RangeEntry(compile_range, CompiledPiece(runnable), 0.0, reused=True)
            self.entries[compile_range] = entry

    def to_bytes(self) -> dict[Range | None, bytes]:
        """The compiled form of each range that can be kept, as the compile cache keeps it."""
        if self._manager is None or not self._manager.makes_bytes:
            why = "a piece that was loaded, or whose compiler keeps nothing, has no bytes"
            raise BindError(why, where=self.submod_name or None)
        to_bytes = self._manager.compiler.to_bytes
        kept = {each: to_bytes(entry.compiled) for each, entry in self.entries.items()}
        return {compile_range: data for compile_range, data in kept.items() if data is not None}

    @property
    def seconds(self) -> float:
        return sum(entry.seconds for entry in self.entries.values())

    @property
    def reused(self) -> bool:
        return all(entry.reused for entry in self.entries.values())

    def runnable_for(self, compile_range: Range | None) -> Callable[..., object]:
        return self.entries[compile_range].runnable

    def direct_runnable_for(self, compile_range: Range | None) -> Callable[..., object]:
        """The innermost callable for one range that does the same as the public one."""
        compiled = self.entries[compile_range].compiled
        return compiled.runnable if compiled.direct is None else compiled.direct

    def __call__(self, *args: object) -> object:
        """Run the form that serves this batch; stitched functions are bound past this."""
        ranges = [each for each in self.entries if each is not None]
        if len(self.entries) == 1 or not ranges:
            (entry,) = self.entries.values()
            return entry.runnable(*args)
        size: int = args[self.sym_shape_indices[0]]  # type: ignore[assignment]
        return self.entries[RangeTable(ranges).find(size)].runnable(*args)


class PiecewiseCompileInterpreter(torch.fx.Interpreter):
    """Walks a stitching graph with fake values; `run` fills ``backends`` by submodule name."""

    def __init__(
        self,
        module: GraphModule,
        compile_submod_names: Sequence[str],
        config: CompilationConfig,
        backend: PieceCompiler,
        structures: Mapping[str, Structure] | None = None,
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # our errors name the piece themselves
        self.compile_submod_names = tuple(compile_submod_names)
        self.config, self.backend = config, backend
        self.structures = structures or {}
        self.backends: dict[str, PiecewiseBackend] = {}

    def run(self, *fake_args: object) -> object:  # type: ignore[override]
        with torch.no_grad():
            return super().run(*fake_args, enable_io_processing=False)

    def call_module(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:  # type: ignore[override]
        name = str(target)
        submod = self.fetch_attr(name)
        assert isinstance(submod, GraphModule)
        if name in self.compile_submod_names:
            structure = self.structures.get(name)
            for node, arg in zip(submod.graph.find_nodes(op="placeholder"), args, strict=True):
                if value_of(node) is None:
                    node.meta["example_value"], structure = arg, None
            counters.num_piecewise_capturable_graphs_seen += 1
            self.backends[name] = PiecewiseBackend(
                submod,
                self.config,
                len(self.backends),
                len(self.compile_submod_names),
                [i for i, arg in enumerate(args) if isinstance(arg, torch.SymInt)],
                self.backend,
                submod_name=name,
                structure=structure,
            )
        returned = submod.graph.output_node().args[0]
        many = isinstance(returned, (tuple, list))
        nodes = returned if many else [returned]
        values = [value_of(each) if isinstance(each, Node) else each for each in nodes]
        if returned is not None and any(value is None for value in values):
            return submod(*args, **kwargs)  # tracing recorded nothing
        return tuple(values) if many else values[0]
