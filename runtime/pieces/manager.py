"""Compiles pieces, equal ones once, and keeps them with the guards that compiling added."""

import logging
import pickle
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.origin import SymbolNames, graph_of, origin_of_piece, value_of
from piecework.codegen.graph.structure import Structure
from piecework.errors import (
    CacheError,
    ConfigError,
    PieceCompileError,
    PieceworkError,
    Unidentifiable,
)
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range, file_name
from piecework.runtime.compilers import CompiledPiece, CompilerInterface, make_compiler
from piecework.runtime.compilers.passes import PostGradPassManager
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import factors_of
from piecework.runtime.counters import counters
from piecework.runtime.observe.progress import current_progress
from piecework.runtime.store import surroundings as store_surroundings
from piecework.runtime.store.cache import CacheEntry, open_entry
from piecework.runtime.store.factors import KeyFactors, content_key
from piecework.runtime.store.files import cache_disabled, signing_key

_NO_COMPILER = (
    "Inductor needs a C++ compiler on a CPU: install g++ (build-essential), or name another one "
    "in the environment variable CXX; CompilationConfig(backend='eager') needs none"
)
_HINT = (
    "CompilationConfig(backend='eager') runs the piece uncompiled, to tell a compiler's fault from "
    "the model's; with TORCHDYNAMO_REPRO_AFTER=aot torch writes a script of it"
)
Key = tuple[object, ...]
_log = logging.getLogger(__name__)


class Request(NamedTuple):
    """One compilation: a piece for one range of batch sizes; None means all sizes."""

    submod_name: str
    graph: GraphModule
    structure: Structure
    compile_range: Range | None
    batch_symbol: str | None

    @property
    def name(self) -> str:
        return self.submod_name + ("" if self.compile_range is None else f" {self.compile_range}")

    @property
    def key(self) -> Key:
        """What the compiled form is right for in this process."""
        env = torch_compat.shape_env_of(get_fake_args_from_graph(self.graph))
        return self.structure.key, self.compile_range, id(env)

    @property
    def inputs(self) -> list[object]:
        """What the compiler is given: the sizes of a single-size range, else the trace's."""
        if self.compile_range is not None and self.compile_range.is_single_size():
            return create_concrete_args(self.graph, self.compile_range.start, self.batch_symbol)
        return get_fake_args_from_graph(self.graph)


@dataclass(frozen=True, slots=True)
class RangeEntry:
    """The compiled form of a piece for one range of batch sizes; None means all sizes."""

    compile_range: Range | None
    compiled: CompiledPiece
    seconds: float
    reused: bool  # an equal piece was compiled before in this compilation
    cached: bool = False  # it was loaded from disk

    @property
    def runnable(self) -> Callable[..., object]:
        return self.compiled.runnable


class CompilerManager:
    """Compiles pieces through one compiler and keeps what it compiled, by content."""

    def __init__(self, config: CompilationConfig) -> None:
        self.config, self.progress = config, current_progress()
        self.entry: CacheEntry | None = None  # where the texts of a compilation are kept
        self.elsewhere: dict[Key, float] = {}  # seconds of what a worker has put into the cache
        self._pieces: Any = None
        self._sizes: object = None
        self._told: set[str] = set()
        # With their graphs: no object that a key tells apart by its address may go away.
        self._done: dict[Key, tuple[RangeEntry, GraphModule]] = {}

    @cached_property
    def compiler(self) -> CompilerInterface:
        """The compiler, made when it is first asked for: what is loaded needs none."""
        return make_compiler(self.config)

    @property
    def makes_bytes(self) -> bool:
        return hasattr(self.compiler, "to_bytes")

    @property
    def passes(self) -> PostGradPassManager | None:
        """The graph passes that the compiler runs; None if it runs none."""
        return getattr(self.compiler, "passes", None)

    def begin(self) -> None:
        """Tell the compiler, if it wants to know, and who waits, that a trace begins."""
        getattr(self.compiler, "begin", lambda: None)()
        self.progress.begin()

    def may_share_names(self) -> bool:
        """Whether custom operators are called as they are, and no user's pass looks for them."""
        opaque = getattr(self.compiler, "calls_custom_ops_as_they_are", False)
        return bool(opaque) and not self.config.inductor_passes

    def initialize_cache(
        self,
        graph: GraphModule,
        inputs: Iterable[object],
        *,
        tag: str = "backbone",
        runtime_config: RuntimeConfig | None = None,
    ) -> None:
        """Open the cache: ranks share pieces, not texts. Without a stable form nothing is kept."""
        if not self.makes_bytes or cache_disabled():
            return
        try:
            limits = {} if runtime_config is None else factors_of(runtime_config)
            config = self.config.hash_factors()
            config["compiler"] = self.compiler.compute_hash(self.config)
            config |= {f"runtime.{name}": text for name, text in limits.items()}
            sources = store_surroundings.source_factors(store_surroundings.traced_files(graph))
            ambient = store_surroundings.surroundings(graph)
            factors = KeyFactors({**ambient, "config": config, "sources": sources})
        except (CacheError, Unidentifiable) as error:
            _log.warning("compile cache: %s; this model is compiled without it", error)
            return
        runtime = runtime_config or RuntimeConfig()
        place = {"root": self.config.cache_dir, "tag": tag, "hmac_key": signing_key()}
        self.entry = open_entry(
            factors=factors, rank=runtime.rank, dp_rank=runtime.dp_rank, **place
        )
        first = (runtime.rank, runtime.dp_rank) == (0, 0)
        self._pieces = self.entry if first else open_entry(factors=factors, **place)
        self._sizes = torch_compat.shape_env_of([*inputs, *map(value_of, graph.graph.nodes)])
        self._known = torch_compat.known_sizes(self._sizes)
        self._facts = torch_compat.sizes_text(self._sizes)

    def write_texts(self, graph: GraphModule, pieces: Mapping[str, Structure], code: str) -> None:
        """Keep the split graph, with each different piece once, and the stitching source."""
        if self.entry is None:
            return
        names: dict[str, list[str]] = {}
        for name, structure in pieces.items():
            names.setdefault(structure.key, []).append(name)
        texts = [graph.code]
        for equal in names.values():
            text = graph_of(graph, equal[0]).print_readable(print_output=False)
            texts.append(f"# {', '.join(equal)}\n{text}")
        self.entry.write_texts({"computation_graph.py": "\n\n".join(texts), "stitched.py": code})

    def write_entry(self, code: str) -> None:
        """Keep the source of the entry, which a call runs in place of the model's forward."""
        if self.entry is not None:
            self.entry.write_texts({"transformed_code.py": code})

    def is_kept(self, request: Request) -> bool:
        """Whether a piece is listed in the cache; it may still prove damaged when it is read."""
        name = self._name(request)
        return name is not None and name in self._pieces.names()

    def _name(self, request: Request) -> str | None:
        """What a piece is kept under: its content. None if it can't be kept."""
        if self.entry is None:
            return None
        structure = request.structure
        operators, reason = store_surroundings.operator_facts(request.graph)
        if structure.local or reason:
            self._not_kept(structure.local or reason)
            return None
        served, lines = str(request.compile_range), "\n".join(structure.lines)
        return content_key(lines, served, self._facts, operators)

    def _not_kept(self, reason: str) -> None:
        """Warn once of why a piece is compiled anew by each process."""
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("a piece is not kept in the compile cache: %s", reason)

    def compile(self, request: Request) -> RangeEntry:
        """Compile a piece for a range, or reuse what an equal piece was compiled to."""
        key, name, graph = request.key, request.submod_name, request.graph
        if key in self._done:
            entry, first = self._done[key]
            if first is graph:  # compiled ahead, before it was reached
                return entry
            _log.info("%s: the program of an earlier piece", name)
            return replace(entry, seconds=0.0, reused=True, cached=False)
        served, batches = request.compile_range, request.compile_range or "all"

        def compile_now() -> CompiledPiece:
            counters.num_backend_compilations += 1
            torch_compat.trace_artifact("piece_start", lambda: f"{name} for batch {batches}")
            text = partial(graph.print_readable, print_output=False)
            torch_compat.trace_artifact(file_name(name, served), text)
            return self.compiler.compile(graph, request.inputs, self.config, served)

        start = time.perf_counter()
        try:
            # Code is the same in inference mode, which Dynamo leaves while it compiles.
            with torch.inference_mode(False), torch.no_grad():
                kept = self._name(request)
                loaded = None if kept is None else self._loaded(graph, kept, compile_now)
                compiled, cached = loaded or (compile_now(), False)
            if not isinstance(compiled, CompiledPiece):
                made = f"compiler {self.compiler.name!r} made a {type(compiled).__qualname__}"
                hint = "see piecework.runtime.compilers.CompilerInterface"
                raise ConfigError(f"{made}, not a CompiledPiece", where="backend", hint=hint)
        except Exception as error:
            own = isinstance(error, PieceworkError) and not isinstance(error, PieceCompileError)
            if own or torch_compat.asks_for_restart(error):
                raise
            raise self._failure(request, error) from error
        seconds = time.perf_counter() - start
        if key in self.elsewhere:  # its progress was told
            seconds += self.elsewhere.pop(key)
        else:
            self.progress.compiled(request.name, seconds, "from the cache" if cached else "")
        how = "from the cache" if cached else f"compiled by {self.compiler.name}"
        _log.info("%s for batch %s: %s, %.2f s", name, batches, how, seconds)
        entry = RangeEntry(served, compiled, seconds, reused=False, cached=cached)
        self._done[key] = entry, graph
        return entry

    def _loaded(
        self, graph: GraphModule, name: str, compile_now: Callable[[], CompiledPiece]
    ) -> tuple[CompiledPiece, bool] | None:
        """A piece through the cache, and whether it was there; None where that is no good."""
        fresh: list[CompiledPiece] = []

        def compile_to_bytes() -> bytes | None:
            fresh.append(compile_now())
            try:
                data = self.compiler.to_bytes(fresh[0])
            except Exception as error:  # noqa: BLE001 - a full disk, and whatever torch raises
                self._not_kept(f"its bytes can't be made: {type(error).__name__}: {error}")
                return None
            learned = torch_compat.learned_since(self._sizes, self._known)
            if learned is None:
                self._not_kept("compiling it added a condition on a size that the data decides")
            unkept = data is None or learned is None
            return None if unkept else pickle.dumps((learned, data))

        # What was learned from other example sizes may not hold for these; those have their own.
        for each in (name, content_key(name, torch_compat.hints_text(self._sizes))):
            result = self._pieces.get_or_compile(each, compile_to_bytes)
            if fresh:
                counters.num_cache_entries_updated += int(result.saved)
                counters.num_compiled_artifacts_saved += int(result.saved)
                return fresh[0], False
            try:
                learned, data = pickle.loads(result.data)
                piece = self.compiler.from_bytes(data, graph)
            except Exception as error:  # noqa: BLE001 - torch raises anything
                self._pieces.reject(each, f"{type(error).__name__}: {error}")
                return None
            if not learned or torch_compat.learn_again(self._sizes, learned):
                counters.num_compiled_artifacts_loaded += 1
                return piece, True
        return None

    def _failure(self, request: Request, error: Exception) -> PieceCompileError:
        seen: list[BaseException] = []
        inner: BaseException | None = error  # what a pass raised, Inductor wraps
        while inner is not None and inner not in seen and not isinstance(inner, PieceCompileError):
            seen.append(inner)
            inner = inner.__cause__ or inner.__context__
        of_pass = inner if isinstance(inner, PieceCompileError) else None
        first_line = str(error).strip().partition("\n")[0]
        why = f"{type(error).__name__}: {first_line}" if of_pass is None else of_pass.message
        no_compiler = "InvalidCxxCompiler" in why
        name, served = request.submod_name, request.compile_range
        sizes = "" if served is None else f" for batches {served}"
        failure = PieceCompileError(
            f"{self.compiler.name} failed on {name}{sizes}: {why}",
            where=origin_of_piece(request.graph, SymbolNames()).module or name,
            hint=of_pass.hint if of_pass is not None else _NO_COMPILER if no_compiler else _HINT,
        )
        failure.whatever_is_traced = of_pass is not None or no_compiler
        return failure


def get_fake_args_from_graph(graph: GraphModule) -> list[object]:
    return [value_of(node) for node in graph.graph.find_nodes(op="placeholder")]


def create_concrete_args(graph: GraphModule, size: int, batch_symbol: str | None) -> list[object]:
    """Fake inputs of ``graph`` for one batch size; symbols but ``batch_symbol`` stay."""
    values = get_fake_args_from_graph(graph)
    if batch_symbol is None:
        return values
    return [torch_compat.with_symbol(value, batch_symbol, size) for value in values]
