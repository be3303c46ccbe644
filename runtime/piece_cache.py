"""Compiled pieces kept on disk. In: a piece's content and a way to compile it. Out: its bytes, from the cache or compiled once.

A piece is found by its content (operators, operands, shapes, what is known of its symbols), never by its place in a model; bytes
are verified by the cache before they are given out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
import torch.fx

from piecework.codegen.structure import Structure
from piecework.runtime import torch_compat
from piecework.runtime.cache import (
    CacheEntry,
    CacheStore,
    KeyFactors,
    cache_disabled,
    content_key,
    default_root,
)
from piecework.runtime.cache.collect import (
    environment_factors,
    host_factors,
    installed_versions,
    source_factors,
    tree_digest,
)
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.ranges import Range

_FRAME_FILE = re.compile(r'^\s*File "([^"\n]+)", line \d+', re.MULTILINE)


class PieceCache:
    """The cache entry of one compilation.

    Args:
        entry: where bytes are kept.
        facts: what the trace knows of its symbols.
    """

    def __init__(self, entry: CacheEntry, facts: str) -> None:
        self.entry = entry
        self._facts = facts

    @property
    def enabled(self) -> bool:
        return not self.entry.disabled

    def get_or_compile(
        self,
        structure: Structure,
        compile_range: Range | None,
        compile_piece: Callable[[], tuple[object, bytes | None]],
        load: Callable[[bytes], object],
    ) -> tuple[object, bool]:
        """The compiled form of a piece, and whether it came from the cache.

        Args:
            structure: the piece's canonical form.
            compile_range: the batch sizes that it serves.
            compile_piece: compiles it; returns the compiled form and its bytes (None if it can't be kept).
            load: turns bytes into the compiled form.
        """
        if not (self.enabled and structure.portable):
            return compile_piece()[0], False
        name = self._name(structure, compile_range)
        fresh: list[object] = []

        def compile_to_bytes() -> bytes:
            compiled, data = compile_piece()
            fresh.append(compiled)
            if data is None:
                raise _NotKept
            return data

        try:
            result = self.entry.get_or_compile(name, compile_to_bytes)
        except _NotKept:
            return fresh[0], False
        if fresh:
            counters.num_cache_entries_updated += int(result.saved)
            counters.num_compiled_artifacts_saved += int(result.saved)
            return fresh[0], False
        try:
            loaded = load(result.data)
        except Exception as error:  # noqa: BLE001 - torch raises anything
            self.entry.reject(name, f"{type(error).__name__}: {error}")
            return compile_piece()[0], False
        counters.num_compiled_artifacts_loaded += 1
        return loaded, True

    def holds(self, structure: Structure, compile_range: Range | None) -> bool:
        """Whether a piece is listed in the index; it may still prove damaged when it is read."""
        if not (self.enabled and structure.portable):
            return False
        return self._name(structure, compile_range) in self.entry.names()

    def _name(self, structure: Structure, compile_range: Range | None) -> str:
        return content_key("\n".join(structure.lines), str(compile_range), self._facts)

    def write_texts(self, graph: torch.fx.GraphModule, code: str) -> None:
        """Keep the split graph and the stitching source beside the artifacts, for people to read."""
        if self.enabled:
            readable = graph.print_readable(print_output=False)
            self.entry.write_text_files({"computation_graph.py": readable, "stitched.py": code})


class _NotKept(Exception):
    """The compiler's result has no bytes; it is used and not saved."""


def open_piece_cache(
    config: CompilationConfig,
    compiler_hash: str,
    graph: torch.fx.GraphModule,
    inputs: Iterable[object],
    *,
    rank: int = 0,
    dp_rank: int = 0,
    tag: str = "backbone",
    disabled: bool = False,
) -> PieceCache:
    """Open the cache entry for one captured graph.

    Args:
        compiler_hash: everything about the compiler that changes its output.
        graph: the captured graph; the source files that it was traced from are part of the key.
        inputs: its fake inputs.

    Raises:
        CacheError: the cache directory is not safe to use.
    """
    off = disabled or cache_disabled()
    factors = KeyFactors.collect(
        config={**config.hash_factors(), "compiler": compiler_hash},
        versions={
            **installed_versions(("torch", "triton", "piecework")),
            "piecework sources": "" if off else _own_sources(),
        },
        device={**host_factors(), **_accelerator(), "threads": str(torch.get_num_threads())},
        environment=environment_factors(),
        sources={} if off else source_factors(_traced_files(graph)),
    )
    entry = CacheStore.open(config.cache_dir, factors, rank, dp_rank, tag, disabled=off)
    return PieceCache(entry, torch_compat.shape_facts(inputs))


def keeps_pieces(config: CompilationConfig) -> bool:
    """Whether the cache directory holds anything, whatever it was compiled for."""
    if cache_disabled():
        return False
    root = config.cache_dir or default_root()
    try:
        with os.scandir(root) as found:
            return any(each.is_dir() for each in found)
    except OSError:
        return False  # it is not there yet; one that can't be used is refused when it is opened


_PACKAGE = Path(__file__).resolve().parents[1]
_ROOMS = ("codegen", "templates", "runtime")


@cache
def _own_sources() -> str:
    """A digest of the parts of piecework that decide what is compiled and how, for an installation that is worked on."""
    return content_key(*(tree_digest(_PACKAGE / room) for room in _ROOMS))


def _traced_files(graph: torch.fx.GraphModule) -> list[str]:
    """The source files that Dynamo traced through; torch's and piecework's own are in the key otherwise."""
    found: dict[str, None] = {}
    rooms = (str(_PACKAGE / room) + os.sep for room in (*_ROOMS, "integrations"))
    own = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, *rooms)
    for node in graph.graph.nodes:
        trace = node.meta.get("stack_trace")
        for file in _FRAME_FILE.findall(trace) if isinstance(trace, str) else ():
            if not file.startswith(own) and (file.startswith("<") or Path(file).is_file()):
                found[file] = None
    return list(found)


def _accelerator() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"cuda": f"{torch.version.cuda} sm_{major}{minor}"}
