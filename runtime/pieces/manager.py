"""Compiles pieces through one compiler, equal ones once, and keeps them on disk.

On disk a piece is found by its content and never by its place in a model. What a compilation finds
out about sizes (Inductor takes 16-bit indices below 32768 rows, and adds a guard) is kept with the
code and made known again when it is loaded, so that the checks of a call are the same either way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

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
from piecework.runtime.observe import trace
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


class _NotKept(Exception):
    """The compiler's result has no bytes; it is used and not saved."""


class CompilerManager:
    """Compiles pieces through one compiler and keeps what it compiled, by content.

    Attributes:
        progress: told of each compilation; that of `show_progress` by default. None shows nothing.
        entry: where the texts of a compilation are kept, if anything is.
        ahead: keys of what was compiled before its piece was reached, which then is no reuse.
        elsewhere: key → seconds of what a worker has put into the cache.
    """

    def __init__(self, config: CompilationConfig) -> None:
        self.config, self.progress = config, current_progress()
        self.entry: CacheEntry | None = None
        self.ahead: set[Key] = set()
        self.elsewhere: dict[Key, float] = {}
        self._pieces: Any = None
        self._sizes: object = None
        self._told: set[str] = set()
        # With their graphs: no object that a key tells apart by its address may go away.
        self._done: dict[Key, tuple[RangeEntry, GraphModule]] = {}

    @cached_property
    def compiler(self) -> CompilerInterface:
        """The compiler, made when it is first asked for: what is loaded needs none.

        Raises:
            ConfigError: the configuration names none, or options that it does not know.
        """
        return make_compiler(self.config)

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

    # --- on disk ---------------------------------------------------------------------------------

    def initialize_cache(
        self,
        graph: GraphModule,
        inputs: Iterable[object],
        *,
        tag: str = "backbone",
        runtime_config: RuntimeConfig | None = None,
    ) -> None:
        """Open the on-disk cache for a captured graph, whose source files are part of the key, if the
        compiler's results can be kept. Where something that decides the code has no stable form,
        there is one warning, and nothing is kept.

        Pieces are found by their content, so all ranks share them, and one compiles what the others
        wait for; each rank has its own texts.

        Raises:
            CacheError: the cache directory is not safe to use, or its key can't be read.
        """
        if not self.makes_bytes or cache_disabled():
            return
        try:
            limits = {} if runtime_config is None else factors_of(runtime_config)
            files = store_surroundings.traced_files(graph)
            factors = KeyFactors(
                {
                    **store_surroundings.surroundings(graph),
                    "config": {
                        **self.config.hash_factors(),
                        "compiler": self.compute_hash(),
                        **{f"runtime.{name}": text for name, text in limits.items()},
                    },
                    "sources": store_surroundings.source_factors(files),
                }
            )
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
        values = (*inputs, *map(value_of, graph.graph.nodes))
        self._sizes = torch_compat.shape_env_of(values)
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

    def is_kept(
        self, graph: GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is listed in the cache; it may still prove damaged when it is read."""
        name = self._name(graph, structure, compile_range)
        return name is not None and name in self._pieces.names()

    def _name(
        self, graph: GraphModule, structure: Structure, compile_range: Range | None
    ) -> str | None:
        """What a piece is kept under: its content. None if it can't be kept."""
        if self.entry is None:
            return None
        operators, reason = store_surroundings.operator_facts(graph)
        if structure.local or reason:
            self._not_kept(structure.local or reason)
            return None
        return content_key("\n".join(structure.lines), str(compile_range), self._facts, operators)

    def _not_kept(self, reason: str) -> None:
        """Warn once of why a piece is compiled anew by each process."""
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("a piece is not kept in the compile cache: %s", reason)

    # --- compiling -------------------------------------------------------------------------------

    def compile(
        self,
        graph: GraphModule,
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
            return self.compiler.compile(graph, example_inputs, self.config, compile_range)

        start = time.perf_counter()
        try:
            # Code is the same in inference mode, which Dynamo leaves while it compiles.
            with torch.inference_mode(False), torch.no_grad():
                name = self._name(graph, structure, compile_range)
                loaded = None if name is None else self._loaded(graph, name, compile_now)
                compiled, cached = loaded or (compile_now(), False)
            if not isinstance(compiled, CompiledPiece):
                raise ConfigError(
                    f"compiler {self.compiler.name!r} made a {type(compiled).__qualname__}, not a CompiledPiece",
                    where="backend",
                    hint="see piecework.runtime.compilers.CompilerInterface",
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

    def _loaded(
        self, graph: GraphModule, name: str, compile_now: Callable[[], CompiledPiece]
    ) -> tuple[CompiledPiece, bool] | None:
        """A piece through the cache, and whether it was there; None where what is there is no good."""
        fresh: list[CompiledPiece] = []

        def compile_to_bytes() -> bytes:
            fresh.append(compile_now())
            try:
                data = self.compiler.to_bytes(fresh[0])
            except Exception as error:  # a full disk, and whatever torch raises
                self._not_kept(f"its bytes can't be made: {type(error).__name__}: {error}")
                raise _NotKept from error
            learned = torch_compat.learned_since(self._sizes, self._known)
            if learned is None:
                self._not_kept("compiling it added a condition on a size that the data decides")
            if data is None or learned is None:
                raise _NotKept
            return json.dumps(learned).encode("ascii") + b"\n" + data

        # What was learned from other example sizes may not hold for these; then there is a form for exactly these.
        for each in (name, content_key(name, torch_compat.hints_text(self._sizes))):
            try:
                result = self._pieces.get_or_compile(each, compile_to_bytes)
            except _NotKept:
                return fresh[0], False
            if fresh:
                counters.num_cache_entries_updated += int(result.saved)
                counters.num_compiled_artifacts_saved += int(result.saved)
                return fresh[0], False
            try:
                head, _, data = result.data.partition(b"\n")
                learned, piece = json.loads(head), self.compiler.from_bytes(data, graph)
            except Exception as error:  # noqa: BLE001 - torch raises anything
                self._pieces.reject(each, f"{type(error).__name__}: {error}")
                return None
            if not learned or torch_compat.learn_again(self._sizes, learned):
                counters.num_compiled_artifacts_loaded += 1
                return piece, True
        return None

    def _failure(
        self, graph: GraphModule, compile_range: Range | None, submod_name: str, error: Exception
    ) -> PieceCompileError:
        """The error for a piece that did not compile."""
        chain: list[BaseException | None] = [error]  # what a pass raised, Inductor wraps
        while chain[-1] is not None and not isinstance(chain[-1], PieceCompileError):
            behind = chain[-1].__cause__ or chain[-1].__context__
            chain.append(None if behind in chain else behind)
        of_pass = chain[-1]
        why = _first_line(error) if of_pass is None else of_pass.message
        no_compiler = "InvalidCxxCompiler" in why
        sizes = "" if compile_range is None else f" for batches {compile_range}"
        failure = PieceCompileError(
            f"{self.compiler.name} failed on {submod_name}{sizes}: {why}",
            where=origin_of_piece(graph, SymbolNames()).module or submod_name,
            hint=of_pass.hint if of_pass is not None else _NO_COMPILER if no_compiler else _HINT,
        )
        failure.whatever_is_traced = of_pass is not None or no_compiler
        return failure


def key_of(graph: GraphModule, structure: Structure, compile_range: Range | None) -> Key:
    """What a compiled piece is right for in this process."""
    env = torch_compat.shape_env_of(map(value_of, graph.graph.find_nodes(op="placeholder")))
    return structure.key, compile_range, id(env)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
