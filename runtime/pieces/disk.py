"""Compiled pieces kept on disk, found by their content and never by their place in a model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch.fx

from piecework.codegen.graph.origin import graph_of, value_of
from piecework.codegen.graph.structure import Structure
from piecework.errors import CacheError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import factors_of
from piecework.runtime.counters import counters
from piecework.runtime.store import surroundings as store_surroundings
from piecework.runtime.store.entry import CacheEntry, open_entry
from piecework.runtime.store.factors import KeyFactors, content_key
from piecework.runtime.store.files import cache_disabled, signing_key

T = TypeVar("T")
_log = logging.getLogger(__name__)


class _NotKept(Exception):
    """The compiler's result has no bytes; it is used and not saved."""


class PieceCache:
    """The cache entry of one compilation.

    What a compilation finds out about sizes (Inductor takes 16-bit indices below 32768 rows, and
    adds a guard) is kept with the code and made known again when it is loaded, so that the checks
    of a call are the same whether a piece was compiled or loaded.

    Args:
        entry: where texts are kept; None keeps nothing.
        pieces: where bytes are kept: a piece is found by its content, so all ranks share them, and
            one compiles what the others wait for.
        sizes: the environment of the trace's symbols; None for a trace that has none.
    """

    def __init__(
        self, entry: CacheEntry | None, sizes: object = None, pieces: CacheEntry | None = None
    ) -> None:
        self.entry, self._pieces, self._sizes = entry, pieces, sizes
        self._known = torch_compat.known_sizes(sizes)
        self._facts = torch_compat.sizes_text(sizes)
        self._told: set[str] = set()

    def get_or_compile(
        self,
        graph: torch.fx.GraphModule,
        structure: Structure,
        compile_range: Range | None,
        compile_piece: Callable[[], T],
        to_bytes: Callable[[T], bytes | None],
        load: Callable[[bytes], T],
    ) -> tuple[T, bool]:
        """The compiled form of a piece, and whether it came from the cache; ``to_bytes`` gives None
        where it can't be kept."""
        name, entry = self._name(graph, structure, compile_range), self._pieces
        if name is None or entry is None:
            return compile_piece(), False
        fresh: list[T] = []

        def compile_to_bytes() -> bytes:
            fresh.append(compile_piece())
            data = to_bytes(fresh[0])
            learned = torch_compat.learned_since(self._sizes, self._known)
            if learned is None:
                self._not_kept("compiling it added a condition on a size that the data decides")
            if data is None or learned is None:
                raise _NotKept
            return json.dumps(learned).encode("ascii") + b"\n" + data

        # What was learned from other example sizes may not hold for these; then there is a form for exactly these.
        for each in (name, content_key(name, torch_compat.hints_text(self._sizes))):
            try:
                result = entry.get_or_compile(each, compile_to_bytes)
            except _NotKept:
                return fresh[0], False
            if fresh:
                counters.num_cache_entries_updated += int(result.saved)
                counters.num_compiled_artifacts_saved += int(result.saved)
                return fresh[0], False
            try:
                head, _, data = result.data.partition(b"\n")
                learned, loaded = json.loads(head), load(data)
            except Exception as error:  # noqa: BLE001 - torch raises anything
                entry.reject(each, f"{type(error).__name__}: {error}")
                break
            if not learned or torch_compat.learn_again(self._sizes, learned):
                counters.num_compiled_artifacts_loaded += 1
                return loaded, True
        return compile_piece(), False

    def _not_kept(self, reason: str) -> None:
        """Say once why a piece is compiled anew by each process."""
        level = logging.INFO if reason in self._told else logging.WARNING
        self._told.add(reason)
        _log.log(level, "a piece is not kept in the compile cache: %s", reason)

    def holds(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is listed in the index; it may still prove damaged when it is read."""
        name = self._name(graph, structure, compile_range)
        return name is not None and self._pieces is not None and name in self._pieces.names()

    def _name(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> str | None:
        """What a piece is kept under: its content. None if it can't be kept."""
        if self.entry is None:
            return None
        operators, reason = store_surroundings.operator_facts(graph)
        if structure.local or reason:
            self._not_kept(structure.local or reason)
            return None
        return content_key("\n".join(structure.lines), str(compile_range), self._facts, operators)

    def write_texts(
        self, graph: torch.fx.GraphModule, pieces: Mapping[str, Structure], code: str
    ) -> None:
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


def open_piece_cache(
    config: CompilationConfig,
    compiler_hash: Callable[[], str],
    graph: torch.fx.GraphModule,
    inputs: Iterable[object],
    *,
    tag: str = "backbone",
    runtime_config: RuntimeConfig | None = None,
) -> PieceCache:
    """Open the cache entry for one captured graph, whose source files are part of the key.

    Where something that decides the code has no stable form, there is one warning, and nothing is
    kept.

    Raises:
        CacheError: the cache directory is not safe to use, or the key that signs it can't be read.
    """
    if cache_disabled():
        return PieceCache(None)
    try:
        limits = {} if runtime_config is None else factors_of(runtime_config)
        files = store_surroundings.traced_files(graph)
        factors = KeyFactors(
            {
                **store_surroundings.surroundings(graph),
                "config": {
                    **config.hash_factors(),
                    "compiler": compiler_hash(),
                    **{f"runtime.{name}": text for name, text in limits.items()},
                },
                "sources": store_surroundings.source_factors(files),
            }
        )
    except (CacheError, Unidentifiable) as error:
        _log.warning("compile cache: %s; this model is compiled without it", error)
        return PieceCache(None)
    runtime = runtime_config or RuntimeConfig()
    place = {"root": config.cache_dir, "tag": tag, "hmac_key": signing_key()}
    entry = open_entry(factors=factors, rank=runtime.rank, dp_rank=runtime.dp_rank, **place)
    shared = entry.identity[1:3] == (0, 0)
    pieces = entry if shared else open_entry(factors=factors, **place)
    sizes = torch_compat.shape_env_of((*inputs, *(value_of(node) for node in graph.graph.nodes)))
    return PieceCache(entry, sizes, pieces)
