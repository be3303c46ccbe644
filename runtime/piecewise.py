"""Pieces and their compiled forms. In: the submodules of a stitching graph. Out: one `PiecewiseBackend` each, equal ones compiled once.

A piece is compiled before it is ever called; nothing here decides per call more than the range of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.fx

from piecework.codegen.origin import SymbolNames, origin_of_piece, value_of
from piecework.codegen.structure import Structure, input_signature, structure_of
from piecework.errors import BindError, InputError, PieceCompileError, PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.compile_progress import CompileProgress, current_progress
from piecework.runtime.compilers import CompiledPiece, make_compiler
from piecework.runtime.compilers.reproducer import keep_reproducer
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.observe import trace
from piecework.runtime.parallel import JobResult
from piecework.runtime.passes import PostGradPassManager
from piecework.runtime.piece_cache import PieceCache, keeps_pieces, open_piece_cache
from piecework.runtime.ranges import Range

GENERAL = None  # the range of a piece that serves every batch size


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """The compiled form of a piece for one range of batch sizes; ``compile_range`` None means all sizes.

    ``reused``: an equal piece was compiled before in this compilation; ``cached``: it was loaded from disk.
    """

    compile_range: Range | None
    compiled: CompiledPiece
    seconds: float
    reused: bool
    cached: bool = False

    @property
    def runnable(self) -> Callable[..., object]:
        return self.compiled.runnable


@dataclass
class CompilerManager:
    """Compiles pieces through one compiler and keeps what it compiled, by content.

    Attributes:
        config: the resolved configuration.
        seconds: time spent in the compiler.
        progress: told of each compilation, if there is one; that of `show_progress` by default.
    """

    config: CompilationConfig
    seconds: float = 0.0
    progress: CompileProgress | None = field(default_factory=current_progress)
    _ahead: dict[tuple[str, Range | None], RangeEntry] = field(default_factory=dict)
    _elsewhere: dict[tuple[str, Range | None], JobResult] = field(default_factory=dict)
    _done: dict[tuple[str, Range | None], CompiledPiece] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiler = make_compiler(self.config)
        self.cache: PieceCache | None = None

    def get_ready(self, values: Iterable[object]) -> None:
        """Let the compiler begin what can run while the model is being traced, unless the cache may have it all.

        Args:
            values: the example inputs, tensors and anything else.
        """
        begin = getattr(self.compiler, "get_ready", None)
        if begin is not None and not keeps_pieces(self.config):
            begin(values)

    def initialize_cache(
        self,
        graph: torch.fx.GraphModule,
        inputs: Iterable[object],
        *,
        disable_cache: bool = False,
        tag: str = "backbone",
        rank: int = 0,
        dp_rank: int = 0,
    ) -> None:
        """Open the on-disk cache for a captured graph, if the compiler's results can be kept.

        Raises:
            CacheError: the cache directory is not safe to use.
        """
        if hasattr(self.compiler, "to_bytes"):
            self.cache = open_piece_cache(
                self.config,
                self.compute_hash(),
                graph,
                inputs,
                rank=rank,
                dp_rank=dp_rank,
                tag=tag,
                disabled=disable_cache,
            )

    @property
    def passes(self) -> PostGradPassManager | None:
        """The graph passes that the compiler runs; None if it runs none."""
        return getattr(self.compiler, "passes", None)

    def is_kept(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is compiled or in the cache already, so that `compile` would not call the compiler."""
        if (structure.key, compile_range) in self._done:
            return True
        return self.cache is not None and self.cache.holds(graph, structure, compile_range)

    def compiled_ahead(self, structure: Structure, entry: RangeEntry) -> None:
        """Keep what `compile` returned before the piece was reached, for the first piece that asks for it."""
        self._ahead[structure.key, entry.compile_range] = entry

    def compiled_elsewhere(
        self, structure: Structure, compile_range: Range | None, result: JobResult
    ) -> None:
        """Note that a worker has put a piece into the caches, where `compile` will find it."""
        self._elsewhere[structure.key, compile_range] = result
        if self.progress is not None and not result.error:
            self.progress.finished(result.name, result.seconds, "in a worker")

    def may_share_names(self) -> bool:
        """Whether pieces may be made equal by handing them names as inputs (`share_layer_names`).

        The compiler must call custom operators as they are, and no user's pass may be looking for them.
        """
        opaque = getattr(self.compiler, "calls_custom_ops_as_they_are", False)
        return bool(opaque) and not self.config.inductor_passes

    def compute_hash(self) -> str:
        """Everything about the compiler that changes its output."""
        return self.compiler.compute_hash(self.config)

    def compile(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        compile_range: Range | None,
        *,
        structure: Structure,
        submod_name: str,
    ) -> RangeEntry:
        """Compile ``graph`` for ``compile_range``, or reuse what an equal piece was compiled to.

        Raises:
            PieceCompileError: the compiler failed; names the piece and the modules that it holds.
        """
        ahead = self._ahead.pop((structure.key, compile_range), None)
        if ahead is not None:
            return ahead
        done = self._done.get((structure.key, compile_range))
        if done is not None:
            return RangeEntry(compile_range, done, 0.0, reused=True)
        start = time.perf_counter()
        cached = False

        def compile_now() -> CompiledPiece:
            counters.num_backend_compilations += 1
            trace.artifact(
                "piece_start", lambda: f"{submod_name} for batch {compile_range or 'all'}"
            )
            trace.artifact("piece_graph", lambda: graph.print_readable(print_output=False))
            return self.compiler.compile(graph, example_inputs, self.config, compile_range)

        try:
            with torch.no_grad():
                if self.cache is None:
                    compiled = compile_now()
                else:
                    compiled, cached = self.cache.get_or_compile(
                        graph,
                        structure,
                        compile_range,
                        compile_now,
                        self.compiler.to_bytes,
                        lambda data: self.compiler.from_bytes(data, graph),
                    )
        except Exception as error:
            own = isinstance(error, PieceworkError) and not isinstance(error, PieceCompileError)
            if own or torch_compat.asks_for_restart(error):
                raise
            raise self._failure(graph, example_inputs, compile_range, submod_name, error) from error
        seconds = time.perf_counter() - start
        worker = self._elsewhere.pop((structure.key, compile_range), None)
        if worker is not None and not worker.error:
            seconds += worker.seconds
        elif self.progress is not None:
            name = submod_name + ("" if compile_range is None else f" {compile_range}")
            self.progress.finished(name, seconds, "from the cache" if cached else "")
        self.seconds += seconds
        self._done[structure.key, compile_range] = compiled
        return RangeEntry(compile_range, compiled, seconds, reused=False, cached=cached)

    def _failure(
        self,
        graph: torch.fx.GraphModule,
        example_inputs: Sequence[object],
        compile_range: Range | None,
        submod_name: str,
        error: Exception,
    ) -> PieceCompileError:
        """The error for a piece that did not compile; its graph is kept as a file that compiles it again."""
        modules = origin_of_piece(graph, SymbolNames(), line_numbers=True).module
        try:
            path = keep_reproducer(
                graph,
                example_inputs,
                self.config,
                compile_range,
                submod_name=submod_name,
                error=error,
            )
            kept = f"python {path} compiles it again"
        except OSError as problem:
            kept = f"its graph could not be kept ({problem})"
        sizes = "" if compile_range is None else f" for batches {compile_range}"
        return PieceCompileError(
            f"{self.compiler.name} failed on {submod_name}{sizes}: {_first_line(error)}",
            where=modules or submod_name,
            hint=f"{kept}; CompilationConfig(backend='eager') runs the piece uncompiled, to tell a compiler's fault "
            "from the model's",
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class PieceCompiler(Protocol):
    """What pieces need of the backend that they belong to."""

    compiler_manager: CompilerManager
    compile_ranges: tuple[Range | None, ...]
    batch_symbol: str | None


class PiecewiseBackend:
    """One piece: its graph and its compiled form per range.

    Two exclusive modes: *compile* (a graph is given; all ranges are compiled now) and *load* (runnables are given).

    Args:
        graph: the piece, or None in load mode.
        config: the resolved configuration.
        piecewise_compile_index: which of the compiled pieces this is, from 0.
        total_piecewise_compiles: how many compiled pieces there are.
        sym_shape_indices: which inputs are sizes; the first is the batch size.
        backend: owns the compiler manager and the ranges.
        returns_tuple: whether the runnable returns a tuple also for a single output.
        compiled_runnables: range → callable, in load mode.
        submod_name: the piece's name in the stitching graph.

    Raises:
        BindError: both or neither of ``graph`` and ``compiled_runnables`` were given.
        PieceCompileError: the compiler failed.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule | None,
        config: CompilationConfig,
        piecewise_compile_index: int,
        total_piecewise_compiles: int,
        sym_shape_indices: Sequence[int],
        backend: PieceCompiler | None,
        returns_tuple: bool = True,
        compiled_runnables: Mapping[Range | None, Callable[..., object]] | None = None,
        submod_name: str = "",
    ) -> None:
        if (graph is None) == (compiled_runnables is None):
            raise BindError(
                "a piece takes either a graph to compile or runnables to load, and exactly one of them",
                where=submod_name or None,
            )
        self.graph = graph
        self.config = config
        self.piecewise_compile_index = piecewise_compile_index
        self.total_piecewise_compiles = total_piecewise_compiles
        self.sym_shape_indices = tuple(sym_shape_indices)
        self.returns_tuple = returns_tuple
        self.submod_name = submod_name
        self.structure: Structure | None = None
        self.entries: dict[Range | None, RangeEntry] = {}
        if graph is not None:
            if backend is None:
                raise BindError("compiling a piece needs a backend", where=submod_name or None)
            self.structure = structure_of(graph, describe_input=input_signature)
            self.compile_all_ranges(backend)
        else:
            self.load_all_ranges(compiled_runnables or {})

    def compile_all_ranges(self, backend: PieceCompiler) -> None:
        """Compile the piece once per range; equal pieces share the result."""
        assert self.graph is not None and self.structure is not None
        for compile_range in backend.compile_ranges:
            self.entries[compile_range] = backend.compiler_manager.compile(
                self.graph,
                inputs_for(self.graph, compile_range, backend.batch_symbol),
                compile_range,
                structure=self.structure,
                submod_name=self.submod_name,
            )

    def load_all_ranges(self, runnables: Mapping[Range | None, Callable[..., object]]) -> None:
        """Take callables that were compiled before."""
        for compile_range, runnable in runnables.items():
            entry = RangeEntry(compile_range, CompiledPiece(runnable), 0.0, reused=True)
            self.entries[compile_range] = entry

    @property
    def seconds(self) -> float:
        return sum(entry.seconds for entry in self.entries.values())

    @property
    def reused(self) -> bool:
        return all(entry.reused for entry in self.entries.values())

    def runnable_for(self, compile_range: Range | None) -> Callable[..., object]:
        """The compiler's public callable for one range."""
        return self.entries[compile_range].runnable

    def direct_runnable_for(self, compile_range: Range | None) -> Callable[..., object]:
        """The innermost callable for one range that is known to do the same as the public one."""
        compiled = self.entries[compile_range].compiled
        return compiled.runnable if compiled.direct is None else compiled.direct

    def __call__(self, *args: object) -> object:
        """Run the form that serves this batch; the stitched function is bound past this, to the runnable itself."""
        if len(self.entries) == 1:
            (entry,) = self.entries.values()
            return entry.runnable(*args)
        size = args[self.sym_shape_indices[0]]
        for entry in self.entries.values():
            if entry.compile_range is None or size in entry.compile_range:
                return entry.runnable(*args)
        ranges = ", ".join(str(r) for r in self.entries)
        raise InputError(f"batch size {size} is outside every compiled range: {ranges}")


def get_fake_args_from_graph(graph: torch.fx.GraphModule) -> list[object]:
    """The fake value of each placeholder of ``graph``, in order."""
    return [value_of(node) for node in graph.graph.find_nodes(op="placeholder")]


def inputs_for(
    graph: torch.fx.GraphModule, compile_range: Range | None, batch_symbol: str | None
) -> list[object]:
    """What a compiler is given for one batch range: concrete sizes for a single size, else what tracing recorded."""
    if compile_range is not None and compile_range.is_single_size():
        return create_concrete_args(graph, compile_range.start, batch_symbol)
    return get_fake_args_from_graph(graph)


def create_concrete_args(
    graph: torch.fx.GraphModule, size: int, batch_symbol: str | None
) -> list[object]:
    """Fake inputs of ``graph`` for one batch size: the batch symbol becomes ``size``, other symbols stay.

    Args:
        size: the batch size.
        batch_symbol: the symbol that it is, such as ``"s0"``; None leaves everything symbolic.

    Returns:
        Integers, symbols and fake tensors with the same dtype, device, strides and storage offset.
    """
    if batch_symbol is None:
        return get_fake_args_from_graph(graph)
    return [
        torch_compat.with_symbol(value, batch_symbol, size)
        for value in get_fake_args_from_graph(graph)
    ]


class PiecewiseCompileInterpreter(torch.fx.Interpreter):
    """Walks a stitching graph with fake values and builds one `PiecewiseBackend` per piece.

    Args:
        module: the stitching graph.
        compile_submod_names: submodules to compile; all others are only stepped over.
        config: the resolved configuration.
        backend: owns the compiler manager and the ranges.

    Attributes:
        backends: submodule name → backend, filled by `run`.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        compile_submod_names: Sequence[str],
        config: CompilationConfig,
        backend: PieceCompiler,
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # our errors name the piece themselves
        self.compile_submod_names = tuple(compile_submod_names)
        self.config = config
        self.backend = backend
        self.backends: dict[str, PiecewiseBackend] = {}

    def run(self, *fake_args: object) -> object:  # type: ignore[override]
        with torch.no_grad():
            return super().run(*fake_args, enable_io_processing=False)

    def call_module(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:  # type: ignore[override]
        name = str(target)
        submod = self.fetch_attr(name)
        assert isinstance(submod, torch.fx.GraphModule)
        if name in self.compile_submod_names:
            _remember_inputs(submod, args)
            counters.num_piecewise_capturable_graphs_seen += 1
            self.backends[name] = PiecewiseBackend(
                submod,
                self.config,
                len(self.backends),
                len(self.compile_submod_names),
                [i for i, arg in enumerate(args) if isinstance(arg, torch.SymInt)],
                self.backend,
                submod_name=name,
            )
        known = _recorded_output(submod)
        return submod(*args, **kwargs) if known is _UNKNOWN else known


def _remember_inputs(submod: torch.fx.GraphModule, args: Sequence[object]) -> None:
    """Give placeholders without a recorded fake value the one that reached them."""
    for node, arg in zip(submod.graph.find_nodes(op="placeholder"), args, strict=True):
        if value_of(node) is None:
            node.meta["example_value"] = arg


_UNKNOWN = object()


def _recorded_output(submod: torch.fx.GraphModule) -> object:
    """What tracing recorded for the outputs of ``submod``; ``_UNKNOWN`` if any is missing."""
    returned = submod.graph.output_node().args[0]
    if returned is None:
        return None
    many = isinstance(returned, (tuple, list))
    nodes = returned if many else [returned]
    values = tuple(value_of(n) if isinstance(n, torch.fx.Node) else n for n in nodes)
    if any(value is None for value in values):
        return _UNKNOWN
    return values if many else values[0]
