"""An engine in a process of its own: in, what to run as JSON; out, tokens, counters and times as JSON.

python engine_run.py '{"model": "…", "compilation_config": {…}, "engine": {…}, "prompts": [3, 7], "graphs": false}' out.json
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
import types
from collections import Counter
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "disable_log_stats": True,
}


def prompt(number: int, length: int) -> dict[str, list[int]]:
    """Tokens that are the same in every process."""
    return {"prompt_token_ids": [1] + [(7 * number + 13 * j) % 500 + 5 for j in range(length - 1)]}


def stand_in_graphs() -> Counter[str]:
    """Static graphs on the CPU: as CUDA's, a replay reads and writes the memory of the capture alone."""
    import torch
    from vllm.compilation.counter import compilation_counter
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available
    from vllm.platforms.cpu import CpuPlatform

    seen: Counter[str] = Counter()

    def addresses(values: Any) -> list[int]:
        return [each.data_ptr() for each in values if isinstance(each, torch.Tensor)]

    class StandIn:
        def __init__(
            self, runnable: Any, vllm_config: Any, runtime_mode: Any, cudagraph_options: Any = None
        ) -> None:
            self.runnable, self.mode, self.options = runnable, runtime_mode, cudagraph_options
            self.captured: dict[Any, Any] = {}
            seen["wrapped"] += 1
            seen["first"] += cudagraph_options.debug_log_enable
            seen["last"] += cudagraph_options.weak_ref_output

        def __call__(self, *args: Any) -> Any:
            context = get_forward_context() if is_forward_context_available() else None
            mode = CUDAGraphMode.NONE if context is None else context.cudagraph_runtime_mode
            if mode == CUDAGraphMode.NONE or mode != self.mode:
                seen["live"] += 1
                return self.runnable(*args)
            key = context.batch_descriptor
            if key not in self.captured:
                self.captured[key] = args, self.runnable(*args)
                seen["captures"] += 1
                compilation_counter.num_cudagraph_captured += 1
                seen[f"captured {key.num_tokens}"] += 1
                return self.captured[key][1]
            held, out = self.captured[key]
            seen["replays"] += 1
            seen["addresses changed"] += addresses(args) != addresses(held)
            for kept, new in zip(out, self.runnable(*held), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
            return out

    module = types.ModuleType("piecework_stand_in")
    module.StandIn = StandIn  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    CpuPlatform.support_static_graph_mode = classmethod(lambda cls: True)
    CpuPlatform.get_static_graph_wrapper_cls = classmethod(lambda cls: "piecework_stand_in.StandIn")
    return seen


def cut_elsewhere_on_rank_1() -> None:
    """As if another piecework ran there."""
    import torch

    from piecework.integrations.vllm import engine

    cuts = engine.splitting_ops
    engine.splitting_ops = lambda *args: cuts(*args)[torch.distributed.get_rank() :]


async def replicas(what: dict[str, Any]) -> dict[str, Any]:
    """A server's engine, which may have several; what each request gives, whichever served it."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    config = what["compilation_config"]
    arguments = {**ENGINE, **what["engine"], "compilation_config": config}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=what["model"], **arguments))
    how = {"detokenize": False, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
    options = SamplingParams(max_tokens=8, temperature=0, **how)

    async def one(number: int, length: int) -> list[int]:
        given = prompt(number, length)
        (out,) = [each async for each in engine.generate(given, options, request_id=str(number))]
        return list(out.outputs[0].token_ids)

    lengths = what["prompts"]
    tokens = await asyncio.gather(*itertools.starmap(one, enumerate(lengths)))
    engine.shutdown()
    return {"tokens": {",".join(map(str, lengths)): tokens}}


def embedded(what: dict[str, Any]) -> dict[str, Any]:
    """What an embedding model makes of prompts."""
    from vllm import LLM
    from vllm.compilation.counter import compilation_counter

    options = {**ENGINE, "max_num_batched_tokens": 256, "skip_tokenizer_init": False}
    config = what["compilation_config"]
    llm = LLM(what["model"], runner="pooling", **options, compilation_config=config)
    given = [prompt(i, n) for i, n in enumerate([1, 3, 16, 90])]
    outputs = llm.embed(given, use_tqdm=False)
    counters = {name: value for name, value in vars(compilation_counter).items() if value}
    return {"embeddings": [each.outputs.embedding for each in outputs], "counters": counters}


def run(what: dict[str, Any]) -> dict[str, Any]:
    if what.get("replicas"):
        return asyncio.run(replicas(what))
    if what.get("embeds"):
        return embedded(what)
    graphs = stand_in_graphs() if what.get("graphs") else None
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    start = time.perf_counter()
    engine = {**ENGINE, **what.get("engine", {})}
    llm = LLM(what["model"], **engine, compilation_config=what.get("compilation_config", {}))
    seconds = time.perf_counter() - start
    how = {"detokenize": False, "ignore_eos": True, "logprobs": 1}
    options = SamplingParams(max_tokens=what.get("tokens", 8), temperature=0, **how)
    found: dict[str, Any] = {"tokens": {}, "logprobs": {}}
    for lengths in what.get("prompts", [[1], [16], [200], [1, 3, 16, 40, 90, 120, 2, 7]]):
        given = [prompt(i, n) for i, n in enumerate(lengths)]
        outputs = [each.outputs[0] for each in llm.generate(given, options, use_tqdm=False)]
        name = ",".join(map(str, lengths))
        found["tokens"][name] = [list(each.token_ids) for each in outputs]
        found["logprobs"][name] = [
            [row[token].logprob for row, token in zip(each.logprobs, each.token_ids, strict=True)]
            for each in outputs
        ]
    config = llm.llm_engine.vllm_config.compilation_config
    return {
        **found,
        "seconds": seconds,
        "compile seconds": config.compilation_time,
        "mode": str(config.mode),
        "backend": config.backend,
        "custom_ops": config.custom_ops,
        "counters": {name: value for name, value in vars(compilation_counter).items() if value},
        "graphs": dict(graphs or {}),
        "ranks": llm.collective_rpc(of_a_rank) if what.get("ranks") else [],
    }


def of_a_rank(worker: Any) -> dict[str, Any]:
    """What a rank runs, and its counters."""
    from vllm.compilation.counter import compilation_counter

    from piecework.integrations.vllm.engine import reports

    return {
        "reports": {name: str(report) for name, report in reports(worker).items()},
        "counters": {name: value for name, value in vars(compilation_counter).items() if value},
    }


if os.environ.get("RANKS_DIFFER"):  # each rank is a process that imports this file
    cut_elsewhere_on_rank_1()

if __name__ == "__main__":
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with open(sys.argv[2], "w") as out:
        json.dump(run(json.loads(sys.argv[1])), out, indent=1)
