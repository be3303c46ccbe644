"""What vLLM calls with a graph: cut at its own operators, compiled piece by piece, stitched, with its static-graph wrapper around each piece.

The engine's dispatcher, memory profile, graph pools and counters stay vLLM's; its options are handed on, none is decided here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx

from piecework.integrations.vllm.engine import called, new_backend
from piecework.integrations.vllm.forward import places
from piecework.integrations.vllm.kept import Served
from piecework.runtime.counters import counters
from piecework.runtime.pieces.bound_call import bound_names, name_inputs
from piecework.runtime.pieces.program import Program
from piecework.runtime.torch_compat.settings import aot_settings_unset

_log = logging.getLogger("vllm.piecework")


class EngineBackend:
    """The Dynamo backend of one model of an engine.

    Args:
        vllm_config: the engine's configuration; ``additional_config["piecework"]`` holds fields of `CompilationConfig`.
        prefix: what vLLM calls this model; its model tag if empty.
        is_encoder: the last batch range is open-ended.

    Attributes:
        program: what was made of the graph.
    """

    def __init__(self, vllm_config: Any, prefix: str = "", is_encoder: bool = False) -> None:
        from vllm.compilation import backends

        self.vllm_config = vllm_config
        self.prefix = prefix or backends.model_tag
        self.is_encoder = is_encoder or backends.model_is_encoder
        self.program: Program | None = None

    def __call__(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[object], **_: object
    ) -> Any:
        from vllm.compilation import monitor
        from vllm.compilation.counter import compilation_counter

        seconds = time.perf_counter() - monitor.torch_compile_start_time
        _log.info("[%s] Dynamo bytecode transform time: %.2f s", self.prefix, seconds)
        compilation_counter.num_graphs_seen += 1
        backend = new_backend(graph, self.vllm_config, self.prefix, self.is_encoder)
        arguments, paths = places(graph), name_inputs(graph)
        before = _counted()
        with (
            aot_settings_unset()
        ):  # the pieces are the same, and kept as the same, with AOT compile
            self.program = program = backend.prepare(graph, bound_names(graph, paths))
        _count(program, before)
        _log.info("[%s] %s", self.prefix, program.report())
        call = called(program, paths, self.vllm_config)
        return Served(program, paths, arguments, self.prefix, self.is_encoder, call)


# --- vLLM's counters ---------------------------------------------------------------------------------

_SAME = (
    "num_inductor_compiles",
    "num_cache_entries_updated",
    "num_compiled_artifacts_saved",
    "num_compiled_artifacts_loaded",
)


def _counted() -> dict[str, int]:
    return {name: getattr(counters, name) for name in _SAME}


def _count(program: Program, before: Mapping[str, int]) -> None:
    """Add to vLLM's counters what it counts of its own compiler."""
    from vllm.compilation.counter import compilation_counter as theirs

    pieces, ranges = len(program.backends), len(program.compile_ranges)
    theirs.num_piecewise_graphs_seen += len(program.items)
    theirs.num_piecewise_capturable_graphs_seen += pieces
    theirs.num_backend_compilations += pieces * ranges
    for name, now in _counted().items():
        setattr(theirs, name, getattr(theirs, name) + now - before[name])
