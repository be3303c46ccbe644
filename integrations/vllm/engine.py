"""An engine's settings as piecework's, and a program as the engine calls it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.fx

from piecework.codegen.split.splitting import operator_name
from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.bound_call import BoundCall
from piecework.runtime.pieces.program import Program
from piecework.runtime.pieces.ranks import require_agreement
from piecework.runtime.pieces.report import Report
from piecework.runtime.splitting_op import registry

#: Splitting operators whose whole work one Python function of vLLM's does: they need no dispatcher.
_FUNCTIONS = (
    ("vllm.model_executor.layers.attention.attention", "unified_attention_with_output"),
    ("vllm.model_executor.layers.attention.attention", "unified_kv_cache_update"),
    ("vllm.model_executor.layers.attention.mla_attention", "unified_mla_attention_with_output"),
    ("vllm.model_executor.layers.attention.mla_attention", "unified_mla_kv_cache_update"),
)


def declare_functions() -> None:
    """Tell piecework what vLLM's operators run, as far as their modules are loaded."""
    for module, name in _FUNCTIONS:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            registry.functions[f"vllm::{name}"] = function


def new_backend(
    graph: torch.fx.GraphModule, vllm_config: Any, prefix: str, is_encoder: bool
) -> PieceworkBackend:
    """piecework's backend with the engine's settings, for a graph."""
    declare_functions()
    config, runtime = settings(vllm_config, is_encoder)
    ops = splitting_ops(vllm_config.compilation_config, graph)
    return PieceworkBackend(config, prefix, is_encoder, splitting_ops=ops, runtime_config=runtime)


def called(program: Program, paths: Sequence[str | None], vllm_config: Any) -> BoundCall:
    """``program`` as vLLM calls it: each piece inside of the platform's static-graph wrapper, where pieces are captured.

    Raises:
        ConfigError: vLLM is to copy inputs in front of captured pieces.
        RankError: another tensor-parallel rank would do something else, or is gone.
    """
    from vllm.compilation.backends import wrap_with_cudagraph_if_needed as wrapped

    config, last = vllm_config.compilation_config, len(program.submod_lists[0]) - 1
    if config.cudagraph_mode.has_piecewise_cudagraphs() and config.cudagraph_copy_inputs:
        raise ConfigError(
            "inputs are staged by vLLM's model runner here, which keeps them in place",
            where="cudagraph_copy_inputs",
            hint="leave it out",
        )
    lists = [
        [wrapped(each, vllm_config, config, i == 0, i == last) for i, each in enumerate(pieces)]
        for pieces in program.submod_lists
    ]
    require_agreement(program, settings(vllm_config, False)[1])
    config._piecework[program.name] = program
    return BoundCall(program, paths, lists)


def reports(worker: Any) -> dict[str, Report]:
    """What a rank of an engine runs, by vLLM's names of its models: for ``llm.collective_rpc(reports)``."""
    programs = worker.vllm_config.compilation_config._piecework
    return {name: program.report() for name, program in programs.items()}


def splitting_ops(config: Any, graph: torch.fx.GraphModule) -> list[str]:
    """vLLM's splitting operators that ``graph`` calls: its list names those of all its models."""
    called = {operator_name(node.target) for node in graph.graph.nodes}
    return [each for each in config.splitting_ops or () if each.partition(".")[0] in called]


def settings(vllm_config: Any, is_encoder: bool) -> tuple[CompilationConfig, RuntimeConfig]:
    """The engine's settings as piecework's; the user's own for piecework on top.

    Raises:
        ConfigError: ``additional_config["piecework"]`` has a field that there is not, or one that vLLM's configuration decides.
    """
    theirs, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    largest = vllm_config.scheduler_config.max_num_batched_tokens
    fields: dict[str, object] = {
        "inductor_compile_config": dict(theirs.inductor_compile_config),
        "compile_sizes": [each for each in theirs.compile_sizes or () if isinstance(each, int)],
        "compile_ranges_endpoints": [
            each for each in theirs.compile_ranges_endpoints or () if each < largest or is_encoder
        ],
        "cache_dir": cache_root(theirs),
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


def cache_root(config: Any) -> Path:
    """Where pieces are kept: in vLLM's cache folder, or the one that the user named."""
    from vllm import envs

    root = config.cache_dir or Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache"
    return Path(root) / "piecework"


def _own_options(vllm_config: Any) -> Mapping[str, object]:
    given = vllm_config.additional_config
    own = given.get("piecework", {}) if isinstance(given, Mapping) else {}
    decided = {"mode", "splitting_ops", "cudagraph_mode", "cudagraph_capture_sizes"} & set(own)
    if decided:
        raise ConfigError(
            f"{', '.join(sorted(decided))} of an engine is vLLM's to say",
            where="additional_config.piecework",
            hint="put it into the compilation config",
        )
    return dict(own)
