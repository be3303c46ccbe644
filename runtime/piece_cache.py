"""Compiled pieces kept on disk. In: a piece's content and a way to compile it. Out: its bytes, from the cache or compiled once.

A piece is found by its content (operators, operands, shapes, what is known of its symbols), never by its place in a model; bytes
are verified by the cache before they are given out.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.fx

from piecework.codegen.structure import Structure
from piecework.errors import CacheError
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
from piecework.runtime.code_identity import canonical, text_of
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.piece_operators import operator_facts
from piecework.runtime.ranges import Range
from piecework.runtime.torch_compat.settings import global_inductor_passes, torch_settings

T = TypeVar("T")
_log = logging.getLogger(__name__)
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
        graph: torch.fx.GraphModule,
        structure: Structure,
        compile_range: Range | None,
        compile_piece: Callable[[], T],
        to_bytes: Callable[[T], bytes | None],
        load: Callable[[bytes], T],
    ) -> tuple[T, bool]:
        """The compiled form of a piece, and whether it came from the cache.

        Args:
            graph: the piece.
            structure: its canonical form.
            compile_range: the batch sizes that it serves.
            compile_piece: compiles it.
            to_bytes: what to keep of the compiled form; None if it can't be kept.
            load: turns bytes into the compiled form.
        """
        name = self._name(graph, structure, compile_range)
        if name is None:
            return compile_piece(), False
        fresh: list[T] = []

        def compile_to_bytes() -> bytes:
            fresh.append(compile_piece())
            data = to_bytes(fresh[0])
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
            return compile_piece(), False
        counters.num_compiled_artifacts_loaded += 1
        return loaded, True

    def holds(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is listed in the index; it may still prove damaged when it is read."""
        name = self._name(graph, structure, compile_range)
        return name is not None and name in self.entry.names()

    def _name(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> str | None:
        """What a piece is kept under: its content. None if it can't be kept."""
        if not (self.enabled and structure.portable):
            return None
        operators, reason = operator_facts(graph)
        if reason:
            _log.info("a piece is not kept in the compile cache: %s", reason)
            return None
        return content_key("\n".join(structure.lines), str(compile_range), self._facts, operators)

    def write_texts(self, graph: torch.fx.GraphModule, code: str) -> None:
        """Keep the split graph and the stitching source beside the artifacts, for people to read."""
        if self.enabled:
            readable = graph.print_readable(print_output=False)
            self.entry.write_text_files({"computation_graph.py": readable, "stitched.py": code})

    def write_entry(self, code: str) -> None:
        """Keep the source of the entry, which a call runs in place of the model's forward, for people to read."""
        if self.enabled:
            self.entry.write_text_files({"transformed_code.py": code})


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
    sources = {} if off else _sources(graph)
    off = off or sources is None
    factors = KeyFactors.collect(
        config={**config.hash_factors(), "compiler": compiler_hash, **({} if off else _settings())},
        versions={
            **installed_versions(("torch", "triton", "piecework")),
            "piecework sources": _OWN_SOURCES,
        },
        device={**host_factors(), **_accelerator(), "threads": str(torch.get_num_threads())},
        environment=environment_factors(),
        sources=sources or {},
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


# The parts of piecework that decide what is compiled and how, for an installation that is worked on: as they are when they
# are loaded, since what is edited later does not run in this process.
_OWN_SOURCES = content_key(*(tree_digest(_PACKAGE / room) for room in _ROOMS))


def _settings() -> dict[str, str]:
    """Torch's settings of this process, and passes that somebody has put into Inductor's own configuration.

    Raises:
        ConfigError: such a pass has no stable form.
    """
    passes = {
        f"_inductor.config.{slot}": text_of(canonical(each, f"torch._inductor.config.{slot}"))
        for slot, each in global_inductor_passes().items()
    }
    return {**torch_settings(), **passes}


def _sources(graph: torch.fx.GraphModule) -> dict[str, str] | None:
    """The source files of the key; None if one can't be read: its changes would go unseen, so nothing may be kept."""
    try:
        return source_factors(_traced_files(graph))
    except CacheError as error:
        _log.warning("compile cache: %s; this model is compiled without it", error)
        return None


def _traced_files(graph: torch.fx.GraphModule) -> list[str]:
    """The source files that Dynamo traced through; torch's and piecework's own are in the key otherwise."""
    found: dict[str, None] = {}
    rooms = (str(_PACKAGE / room) + os.sep for room in (*_ROOMS, "integrations"))
    own = (os.path.dirname(os.path.abspath(torch.__file__)) + os.sep, *rooms)
    for node in graph.graph.nodes:
        trace = node.meta.get("stack_trace")
        for file in _FRAME_FILE.findall(trace) if isinstance(trace, str) else ():
            if not file.startswith(own):
                found[file] = None
    return list(found)


def _accelerator() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    return {"cuda": f"{torch.version.cuda} sm_{major}{minor}"}
