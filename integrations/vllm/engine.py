"""What vLLM calls with a graph: cut at its own operators, compiled piece by piece, stitched, with its
static-graph wrapper around each piece, and kept by its AOT compile.

The engine's dispatcher, memory profile, graph pools, counters and options stay vLLM's.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.fx
from torch._dynamo.aot_compile import SerializableCallable

from piecework.codegen.split.splitting import operator_name
from piecework.errors import ConfigError
from piecework.integrations.vllm.forward import Place, places
from piecework.runtime.artifact.program import program_from_bytes, program_to_bytes
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.counters import counters
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.bound_call import BoundCall, bound_names, name_inputs
from piecework.runtime.pieces.program import Program
from piecework.runtime.pieces.ranks import require_agreement
from piecework.runtime.pieces.report import Report
from piecework.runtime.splitting_op import registry
from piecework.runtime.torch_compat import drop_idle_autocast
from piecework.runtime.torch_compat.settings import aot_settings_unset

_log = logging.getLogger("vllm.piecework")

#: Splitting operators whose whole work one Python function of vLLM's does: they need no dispatcher.
_LAYERS = "vllm.model_executor.layers.attention"
_FUNCTIONS = (
    (f"{_LAYERS}.attention", "unified_attention_with_output"),
    (f"{_LAYERS}.attention", "unified_kv_cache_update"),
    (f"{_LAYERS}.mla_attention", "unified_mla_attention_with_output"),
    (f"{_LAYERS}.mla_attention", "unified_mla_kv_cache_update"),
)
# vLLM counts these of its own compiler.
_SAME = (
    *("num_inductor_compiles", "num_cache_entries_updated"),
    *("num_compiled_artifacts_saved", "num_compiled_artifacts_loaded"),
)


class EngineBackend:
    """The Dynamo backend of one model of an engine."""

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
        _declare_functions()
        config, runtime = settings(self.vllm_config, self.is_encoder)
        backend = PieceworkBackend(
            config,
            self.prefix,
            self.is_encoder,
            splitting_ops=splitting_ops(self.vllm_config.compilation_config, graph),
            runtime_config=runtime,
        )
        arguments, paths = places(graph), name_inputs(graph)
        before = counters.snapshot()
        with aot_settings_unset():  # pieces are the same, and kept as the same, with AOT compile
            program = backend.prepare(graph, bound_names(graph, paths))
        pieces = len(program.backends)
        compilation_counter.num_piecewise_graphs_seen += len(program.items)
        compilation_counter.num_piecewise_capturable_graphs_seen += pieces
        compilation_counter.num_backend_compilations += pieces * len(program.compile_ranges)
        for name in _SAME:
            more = getattr(counters, name) - before[name]
            setattr(compilation_counter, name, getattr(compilation_counter, name) + more)
        _log.info("[%s] %s", self.prefix, program.report())
        call = _called(program, paths, self.vllm_config)
        return Served(program, paths, arguments, self.prefix, self.is_encoder, call)


class Served(SerializableCallable):
    """A compiled graph as vLLM holds it, and keeps it for another process."""

    def __init__(
        self,
        program: Program | bytes,
        paths: Sequence[str | None],
        places: Sequence[Place | None],
        prefix: str,
        is_encoder: bool,
        call: BoundCall | None = None,
    ) -> None:
        self.program, self.paths, self.places = program, tuple(paths), tuple(places)
        self.prefix, self.is_encoder = prefix, is_encoder
        self.call = self.run = call

    def __call__(self, *args: object) -> object:
        assert self.run is not None, "finalize_loading was not called"
        return self.run(*args)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Served) -> bytes:
        """Texts, kernels and plan, with their digest; no graph, no weight."""
        kept = fn.program
        data = kept if isinstance(kept, bytes) else program_to_bytes(kept)
        return pickle.dumps((data, fn.paths, fn.places, fn.prefix, fn.is_encoder))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Served:
        return cls(*pickle.loads(data))

    def finalize_loading(self, vllm_config: Any) -> None:
        """Bind the pieces in this process's wrappers; after an `ArtifactError` vLLM compiles."""
        if not isinstance(self.program, bytes):
            return
        config, _ = settings(vllm_config, self.is_encoder)
        _declare_functions()
        self.program = program_from_bytes(self.program, config)
        self.call = self.run = _called(self.program, self.paths, vllm_config)
        _log.info("[%s] %s", self.prefix, self.program.report())


def _declare_functions() -> None:
    """Tell piecework what vLLM's operators run, as far as their modules are loaded."""
    for module, name in _FUNCTIONS:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            registry.functions[f"vllm::{name}"] = function


def _called(program: Program, paths: Sequence[str | None], vllm_config: Any) -> BoundCall:
    """``program`` as vLLM calls it: each piece inside of the platform's static-graph wrapper."""
    from vllm.compilation.backends import wrap_with_cudagraph_if_needed as wrapped

    config, last = vllm_config.compilation_config, len(program.submod_lists[0]) - 1
    if config.cudagraph_mode.has_piecewise_cudagraphs() and config.cudagraph_copy_inputs:
        why = "inputs are staged by vLLM's model runner here, which keeps them in place"
        raise ConfigError(why, where="cudagraph_copy_inputs", hint="leave it out")
    lists = [
        [wrapped(each, vllm_config, config, i == 0, i == last) for i, each in enumerate(pieces)]
        for pieces in program.submod_lists
    ]
    require_agreement(program, settings(vllm_config, False)[1])
    config._piecework[program.name] = program
    return BoundCall(program, paths, lists)


def reports(worker: Any) -> dict[str, Report]:
    """What a rank runs, by vLLM's names of its models: for ``llm.collective_rpc(reports)``."""
    programs = worker.vllm_config.compilation_config._piecework
    return {name: program.report() for name, program in programs.items()}


def splitting_ops(config: Any, graph: torch.fx.GraphModule) -> list[str]:
    """vLLM's splitting operators that ``graph`` calls: its list names those of all its models."""
    called = {operator_name(node.target) for node in graph.graph.nodes}
    return [each for each in config.splitting_ops or () if each.partition(".")[0] in called]


def settings(vllm_config: Any, is_encoder: bool) -> tuple[CompilationConfig, RuntimeConfig]:
    """The engine's settings as piecework's, with ``additional_config["piecework"]`` on top."""
    from vllm import envs

    theirs, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    largest = vllm_config.scheduler_config.max_num_batched_tokens
    root = theirs.cache_dir or Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache"
    fields: dict[str, object] = {
        "inductor_compile_config": dict(theirs.inductor_compile_config),
        "compile_sizes": [each for each in theirs.compile_sizes or () if isinstance(each, int)],
        "compile_ranges_endpoints": [
            each for each in theirs.compile_ranges_endpoints or () if each < largest or is_encoder
        ],
        "cache_dir": Path(root) / "piecework",
        "debug_dump_path": theirs.debug_dump_path,
        **_own_options(vllm_config),
    }
    runtime = RuntimeConfig(
        max_num_batched_tokens=largest,
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        rank=parallel.rank,
        dp_rank=parallel.data_parallel_index,
        world_size=parallel.world_size,
        tensor_parallel_size=parallel.tensor_parallel_size,
        # a replica that needs no others is told its number, and that it is alone
        data_parallel_size=max(parallel.data_parallel_size, parallel.data_parallel_index + 1),
        model_name=str(getattr(vllm_config.model_config, "model", "")),
    )
    return CompilationConfig(**fields), runtime


def _own_options(vllm_config: Any) -> Mapping[str, object]:
    given = vllm_config.additional_config
    own = given.get("piecework", {}) if isinstance(given, Mapping) else {}
    decided = {"mode", "splitting_ops", "cudagraph_mode", "cudagraph_capture_sizes"} & set(own)
    if decided:
        why = f"{', '.join(sorted(decided))} of an engine is vLLM's to say"
        hint = "put it into the compilation config"
        raise ConfigError(why, where="additional_config.piecework", hint=hint)
    return dict(own)
