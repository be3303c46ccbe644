"""Compiled pieces kept on disk. In: a piece's content and a way to compile it. Out: its bytes, from the cache or compiled once.

A piece is found by its content (operators, operands, shapes, what is known of its symbols), never by its place in a model; bytes
are verified by the cache before they are given out.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.fx

from piecework.codegen.graph.origin import graph_of, value_of
from piecework.codegen.graph.structure import Structure
from piecework.errors import CacheError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
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
from piecework.runtime.cache.safety import signing_key
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.hash import factors_of
from piecework.runtime.counters import counters
from piecework.runtime.identity.piece_operators import operator_facts
from piecework.runtime.identity.settings import settings_factors

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FRAME_FILE = re.compile(r'^\s*File "([^"\n]+)", line \d+', re.MULTILINE)


class PieceCache:
    """The cache entry of one compilation.

    What a compilation finds out about sizes (Inductor takes 16-bit indices below 32768 rows, and adds a guard) is kept with the
    code and made known again when it is loaded, so that the checks of a call are the same whether a piece was compiled or loaded.

    Args:
        entry: where texts are kept, and bytes.
        pieces: where bytes are kept, if elsewhere: a piece is found by its content, so all ranks share them, and one compiles what the others wait for.
        sizes: the environment of the trace's symbols; None for a trace that has none.
    """

    def __init__(
        self, entry: CacheEntry, sizes: object = None, pieces: CacheEntry | None = None
    ) -> None:
        self.entry = entry
        self._pieces = entry if pieces is None else pieces
        self._sizes = sizes
        self._known = torch_compat.known_sizes(sizes)
        self._facts = torch_compat.sizes_text(sizes)

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
        # What was learned from other example sizes may not hold for these; then there is a form for exactly these.
        for each in (name, content_key(name, torch_compat.hints_text(self._sizes))):
            try:
                return self._through_entry(each, compile_piece, to_bytes, load)
            except _OtherSizes:
                continue
        return compile_piece(), False

    def _through_entry(
        self,
        name: str,
        compile_piece: Callable[[], T],
        to_bytes: Callable[[T], bytes | None],
        load: Callable[[bytes], T],
    ) -> tuple[T, bool]:
        """`get_or_compile` under one name; raises `_OtherSizes` if what is kept there is not right for these sizes."""
        fresh: list[T] = []

        def compile_to_bytes() -> bytes:
            fresh.append(compile_piece())
            data, learned = to_bytes(fresh[0]), self._learned()
            if data is None or learned is None:
                raise _NotKept
            return json.dumps(learned).encode("ascii") + b"\n" + data

        try:
            result = self._pieces.get_or_compile(name, compile_to_bytes)
        except _NotKept:
            return fresh[0], False
        if fresh:
            counters.num_cache_entries_updated += int(result.saved)
            counters.num_compiled_artifacts_saved += int(result.saved)
            return fresh[0], False
        try:
            head, _, data = result.data.partition(b"\n")
            learned = json.loads(head)
            loaded = load(data)
        except Exception as error:  # noqa: BLE001 - torch raises anything
            self._pieces.reject(name, f"{type(error).__name__}: {error}")
            return compile_piece(), False
        if learned and not torch_compat.learn_again(self._sizes, learned):
            raise _OtherSizes
        counters.num_compiled_artifacts_loaded += 1
        return loaded, True

    def _learned(self) -> tuple[str, ...] | None:
        """What compiling found out about sizes since the cache was opened; None if it can't be kept."""
        learned = torch_compat.learned_since(self._sizes, self._known)
        if learned is None:
            _log.info(
                "a piece is not kept in the compile cache: compiling it added a condition on a size that the data decides"
            )
        return learned

    def holds(
        self, graph: torch.fx.GraphModule, structure: Structure, compile_range: Range | None
    ) -> bool:
        """Whether a piece is listed in the index; it may still prove damaged when it is read."""
        name = self._name(graph, structure, compile_range)
        return name is not None and name in self._pieces.names()

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

    def write_texts(
        self, graph: torch.fx.GraphModule, pieces: Mapping[str, Structure], code: str
    ) -> None:
        """Keep the split graph, with each different piece once, and the stitching source beside the artifacts, for people to read."""
        if self.enabled:
            readable = "\n\n".join([graph.code, *_different(graph, pieces)])
            self.entry.write_text_files({"computation_graph.py": readable, "stitched.py": code})

    def write_entry(self, code: str) -> None:
        """Keep the source of the entry, which a call runs in place of the model's forward, for people to read."""
        if self.enabled:
            self.entry.write_text_files({"transformed_code.py": code})


def _different(graph: torch.fx.GraphModule, pieces: Mapping[str, Structure]) -> Iterator[str]:
    """Each different piece as text, under the names of those that are like it."""
    names: dict[str, list[str]] = {}
    for name, structure in pieces.items():
        names.setdefault(structure.key, []).append(name)
    for like in names.values():
        text = graph_of(graph, like[0]).print_readable(print_output=False)
        yield f"# {', '.join(like)}\n{text}"


class _OtherSizes(Exception):
    """What is kept was compiled for other sizes than those of the example inputs."""


class _NotKept(Exception):
    """The compiler's result has no bytes; it is used and not saved."""


def open_piece_cache(
    config: CompilationConfig,
    compiler_hash: Callable[[], str],
    graph: torch.fx.GraphModule,
    inputs: Iterable[object],
    *,
    tag: str = "backbone",
    runtime_config: RuntimeConfig | None = None,
    disabled: bool = False,
) -> PieceCache:
    """Open the cache entry for one captured graph.

    Where something that decides the code has no stable form, there is one warning, and nothing is kept.

    Args:
        compiler_hash: says everything about the compiler that changes its output.
        graph: the captured graph; the source files that it was traced from are part of the key.
        inputs: its fake inputs.
        runtime_config: the program's limits; its ranks are part of the path of texts.

    Raises:
        CacheError: the cache directory is not safe to use, or the key that signs it can't be read.
    """
    off = disabled or cache_disabled()
    runtime = RuntimeConfig() if runtime_config is None else runtime_config
    factors = None if off else _factors(config, compiler_hash, graph, runtime_config)
    nothing = KeyFactors.collect(config={}, versions={})

    def of_rank(rank: int, dp_rank: int) -> CacheEntry:
        return CacheStore.open(
            config.cache_dir,
            factors or nothing,
            rank,
            dp_rank,
            tag,
            hmac_key=None if factors is None else signing_key(),
            disabled=factors is None,
        )

    entry = of_rank(runtime.rank, runtime.dp_rank)
    pieces = entry if (runtime.rank, runtime.dp_rank) == (0, 0) else of_rank(0, 0)
    sizes = torch_compat.shape_env_of((*inputs, *(value_of(node) for node in graph.graph.nodes)))
    return PieceCache(entry, sizes, pieces)


def _factors(
    config: CompilationConfig,
    compiler_hash: Callable[[], str],
    graph: torch.fx.GraphModule,
    runtime: RuntimeConfig | None,
) -> KeyFactors | None:
    """Everything that decides the code of a graph's pieces; None, with a warning, if a part of it can't be told."""
    try:
        limits = {} if runtime is None else factors_of(runtime)
        return KeyFactors.collect(
            config={
                **config.hash_factors(),
                "compiler": compiler_hash(),
                **settings_factors(),
                **{f"runtime.{name}": text for name, text in limits.items()},
            },
            versions={
                **installed_versions(("torch", "triton", "piecework")),
                "piecework sources": _OWN_SOURCES,
            },
            device={
                **host_factors(),
                **accelerators(graph),
                "threads": str(torch.get_num_threads()),
            },
            environment=environment_factors(),
            sources=source_factors(_traced_files(graph)),
        )
    except (CacheError, Unidentifiable) as error:
        _log.warning("compile cache: %s; this model is compiled without it", error)
        return None


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


_PACKAGE = Path(__file__).resolve().parents[2]
_ROOMS = ("codegen", "templates", "runtime")


# The parts of piecework that decide what is compiled and how, for an installation that is worked on: as they are when they
# are loaded, since what is edited later does not run in this process.
_OWN_SOURCES = content_key(*(tree_digest(_PACKAGE / room) for room in _ROOMS))


def own_sources() -> str:
    """A digest of the parts of piecework that decide what is compiled and how, as they were loaded."""
    return _OWN_SOURCES


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


def accelerators(*graphs: torch.fx.GraphModule) -> dict[str, str]:
    """The GPUs that ``graphs`` compute on; graphs of the CPU ask for none, since that would start CUDA in this process."""
    devices = {
        leaf.device
        for graph in graphs
        for node in graph.graph.nodes
        for leaf in torch_compat.flatten_tree(value_of(node))[0]
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda"
    }
    found = sorted({torch.cuda.get_device_capability(device) for device in devices})
    names = " ".join(f"sm_{major}{minor}" for major, minor in found)
    return {"cuda": f"{torch.version.cuda} {names}"} if found else {}
