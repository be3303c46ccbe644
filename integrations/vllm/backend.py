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
from piecework.runtime.torch_compat.modes import drop_idle_autocast
from piecework.runtime.torch_compat.settings import aot_settings_unset

_log = logging.getLogger("vllm.piecework")


class EngineBackend:
    """The Dynamo backend of one model of an engine, which vLLM calls ``prefix``, or by its model tag.

    The last batch range of an encoder is open-ended.
    """

    def __init__(self, vllm_config: Any, prefix: str = "", is_encoder: bool = False) -> None:
        from vllm.compilation import backends

        self.vllm_config = vllm_config
        self.prefix = prefix or backends.model_tag
        self.is_encoder = is_encoder or backends.model_is_encoder

    def __call__(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[object], **_: object
    ) -> Any:
        from vllm.compilation import monitor
        from vllm.compilation.counter import compilation_counter

        seconds = time.perf_counter() - monitor.torch_compile_start_time
        _log.info("[%s] Dynamo bytecode transform time: %.2f s", self.prefix, seconds)
        compilation_counter.num_graphs_seen += 1
        drop_idle_autocast(graph)
        backend = new_backend(graph, self.vllm_config, self.prefix, self.is_encoder)
        arguments, paths = places(graph), name_inputs(graph)
        before = counters.snapshot()
        with aot_settings_unset():  # pieces are the same, and kept as the same, with AOT compile
            program = backend.prepare(graph, bound_names(graph, paths))
        _count(program, before)
        _log.info("[%s] %s", self.prefix, program.report())
        call = called(program, paths, self.vllm_config)
        return Served(program, paths, arguments, self.prefix, self.is_encoder, call)


_SAME = (
    "num_inductor_compiles",
    "num_cache_entries_updated",
    "num_compiled_artifacts_saved",
    "num_compiled_artifacts_loaded",
)


def _count(program: Program, before: Mapping[str, int]) -> None:
    """Add to vLLM's counters what it counts of its own compiler."""
    from vllm.compilation.counter import compilation_counter as theirs

    theirs.num_piecewise_graphs_seen += len(program.items)
    theirs.num_piecewise_capturable_graphs_seen += len(program.backends)
    theirs.num_backend_compilations += len(program.backends) * len(program.compile_ranges)
    for name in _SAME:
        more = getattr(counters, name) - before[name]
        setattr(theirs, name, getattr(theirs, name) + more)
