"""Compiles pieces through one compiler, equal ones once, and finds them in the cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.fx

from piecework.codegen.graph.origin import SymbolNames, origin_of_piece, value_of
from piecework.codegen.graph.structure import Structure
from piecework.errors import ConfigError, PieceCompileError, PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range, file_name
from piecework.runtime.compilers import CompiledPiece, CompilerInterface, make_compiler
from piecework.runtime.compilers.passes import PostGradPassManager
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.counters import counters
from piecework.runtime.observe import trace
from piecework.runtime.observe.progress import CompileProgress, current_progress
from piecework.runtime.pieces.disk import PieceCache, open_piece_cache

_NO_COMPILER = (
    "Inductor needs a C++ compiler on a CPU: install g++ (build-essential), or name another one "
    "in the environment variable CXX; CompilationConfig(backend='eager') needs none"
)
_HINT = (
    "CompilationConfig(backend='eager') runs the piece uncompiled, to tell a compiler's fault from "
    "the model's; with TORCHDYNAMO_REPRO_AFTER=aot torch writes a script of it"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """The compiled form of a piece for one range of batch sizes; ``compile_range`` None means all
    sizes.

    ``reused``: an equal piece was compiled before in this compilation; ``cached``: it was loaded
    from disk.
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
        progress: told of each compilation; that of `show_progress` by default. None shows nothing.
        cache: where compiled pieces lie on disk, if the compiler's results can be kept.
        ahead: keys of what was compiled before its piece was reached, which then is no reuse.
        elsewhere: key → seconds of what a worker has put into the cache.
    """

    config: CompilationConfig
    progress: CompileProgress | None = field(default_factory=current_progress)
    cache: PieceCache | None = None
    ahead: set[tuple[object, ...]] = field(default_factory=set)
    elsewhere: dict[tuple[object, ...], float] = field(default_factory=dict)
    # With their graphs: no object that a key tells apart by its address may go away.
    _done: dict[tuple[object, ...], tuple[RangeEntry, torch.fx.GraphModule]] = field(
        default_factory=dict
    )

    @cached_property
    def compiler(self) -> CompilerInterface:
        """The compiler, made when it is first asked for: what is loaded needs none.

        Raises:
            ConfigError: the configuration names none, or options that it does not know.
        """
        return make_compiler(self.config)

    def initialize_cache(
        self,
        graph: torch.fx.GraphModule,
        inputs: Iterable[object],
        *,
        tag: str = "backbone",
        runtime_config: RuntimeConfig | None = None,
    ) -> None:
        """Open the on-disk cache for a captured graph, if the compiler's results can be kept.

        Raises:
            CacheError: the cache directory is not safe to use.
        """
        if self.makes_bytes:
            self.cache = open_piece_cache(
                self.config,
                self.compute_hash,
                graph,
                inputs,
                tag=tag,
                runtime_config=runtime_config,
            )

    @property
    def makes_bytes(self) -> bool:
        """Whether what the compiler makes can be kept."""
        return hasattr(self.compiler, "to_bytes")

    @property
    def passes(self) -> PostGradPassManager | None:
        """The graph passes that the compiler runs; None if it runs none."""
        return getattr(self.compiler, "passes", None)

    def begin(self) -> None:
        """Tell the compiler, if it wants to know, that a trace begins."""
        getattr(self.compiler, "begin", lambda: None)()

    def may_share_names(self) -> bool:
        """Whether pieces may be made equal by handing them names as inputs (`share_layer_names`).

        The compiler must call custom operators as they are, and no user's pass may look for them.
        """
        opaque = getattr(self.compiler, "calls_custom_ops_as_they_are", False)
        return bool(opaque) and not self.config.inductor_passes

    def compute_hash(self) -> str:
        """Everything about the compiler that changes its output."""
        return self.compiler.compute_hash(self.config)

    def to_bytes(self, piece: CompiledPiece) -> bytes | None:
        """What the cache keeps of a piece; None, with a warning, if the compiler can't give it."""
        try:
            return self.compiler.to_bytes(piece)
        except Exception as error:  # noqa: BLE001 - the piece is compiled and can be used
            why, name = _first_line(error), self.compiler.name
            _log.warning(
                "compiler %r: to_bytes failed: %s; the piece is used and not kept", name, why
            )
            return None

    def is_kept(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is compiled or in the cache already."""
        if key_of(graph, structure, compile_range) in self._done:
            return True
        return self.cache is not None and self.cache.holds(graph, structure, compile_range)

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
        key = key_of(graph, structure, compile_range)
        if key in self._done:
            entry = self._done[key][0]
            if key in self.ahead:
                self.ahead.remove(key)
                return entry
            _log.info("%s: the program of an earlier piece", submod_name)
            return replace(entry, seconds=0.0, reused=True, cached=False)

        def compile_now() -> CompiledPiece:
            counters.num_backend_compilations += 1
            trace.artifact(
                "piece_start", lambda: f"{submod_name} for batch {compile_range or 'all'}"
            )
            text = partial(graph.print_readable, print_output=False)
            trace.artifact(file_name(submod_name, compile_range), text)
            made = self.compiler.compile(graph, example_inputs, self.config, compile_range)
            return self._checked(made, "compile")

        def load(data: bytes) -> CompiledPiece:
            return self._checked(self.compiler.from_bytes(data, graph), "from_bytes")

        start = time.perf_counter()
        try:
            # Code is the same in inference mode, which Dynamo leaves while it compiles.
            with torch.inference_mode(False), torch.no_grad():
                compiled, cached = (self.cache or PieceCache(None)).get_or_compile(
                    graph, structure, compile_range, compile_now, self.to_bytes, load
                )
        except Exception as error:
            own = isinstance(error, PieceworkError) and not isinstance(error, PieceCompileError)
            if own or torch_compat.asks_for_restart(error):
                raise
            raise self._failure(graph, compile_range, submod_name, error) from error
        seconds = time.perf_counter() - start
        if key in self.elsewhere:  # its progress was told
            seconds += self.elsewhere.pop(key)
        elif self.progress is not None:
            name = submod_name + ("" if compile_range is None else f" {compile_range}")
            self.progress.compiled(name, seconds, "from the cache" if cached else "")
        how = "from the cache" if cached else f"compiled by {self.compiler.name}"
        _log.info("%s for batch %s: %s, %.2f s", submod_name, compile_range or "all", how, seconds)
        entry = RangeEntry(compile_range, compiled, seconds, reused=False, cached=cached)
        self._done[key] = entry, graph
        return entry

    def _checked(self, piece: object, method: str) -> CompiledPiece:
        """What the compiler returned, if it kept to its interface."""
        if isinstance(piece, CompiledPiece):
            return piece
        kind = "None" if piece is None else f"a {type(piece).__qualname__}"
        raise ConfigError(
            f"compiler {self.compiler.name!r}: {method} returned {kind}, not a CompiledPiece",
            where="backend",
            hint="see piecework.runtime.compilers.CompilerInterface",
        )

    def _failure(
        self,
        graph: torch.fx.GraphModule,
        compile_range: Range | None,
        submod_name: str,
        error: Exception,
    ) -> PieceCompileError:
        """The error for a piece that did not compile."""
        of_pass = _pass_failure(error)
        why = _first_line(error) if of_pass is None else of_pass.message
        no_compiler = "InvalidCxxCompiler" in why
        sizes = "" if compile_range is None else f" for batches {compile_range}"
        failure = PieceCompileError(
            f"{self.compiler.name} failed on {submod_name}{sizes}: {why}",
            where=origin_of_piece(graph, SymbolNames(), line_numbers=True).module or submod_name,
            hint=of_pass.hint if of_pass is not None else _NO_COMPILER if no_compiler else _HINT,
        )
        failure.whatever_is_traced = of_pass is not None or no_compiler
        return failure


def key_of(
    graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
) -> tuple[object, ...]:
    """What a compiled piece is right for in this process."""
    env = torch_compat.shape_env_of(map(value_of, graph.graph.find_nodes(op="placeholder")))
    return structure.key, compile_range, id(env)


def _pass_failure(error: BaseException | None) -> PieceCompileError | None:
    """The failure of a pass, which Inductor wraps."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, PieceCompileError):
            return error
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
