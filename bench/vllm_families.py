"""Families that a vLLM engine serves on piecework: tokens, log-probabilities and pieces.

python -m piecework.bench.vllm_families run families.jsonl [NAME …]   # appends a line for each family
python -m piecework.bench.vllm_families table families.jsonl docs/vllm.md
python -m piecework.bench.vllm_families turns 3                      # B14 and B15: both in turn, so many times
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 512, "n_inner": 128}
_HEADS = {"num_key_value_heads": 2}
_EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
_AS_SMALL = (
    "Llama Qwen2 Qwen3 Mistral Gemma Granite Cohere StableLm Olmo Olmo2 Nemotron SmolLM3 "
    "Arcee Ernie4_5 SeedOss Helium Apertus HunYuanDenseV1"
)
#: transformers' configuration class without "Config" → what differs from `SMALL`.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _AS_SMALL.split()},
    "Gemma3Text": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "Gemma2": {"query_pre_attn_scalar": 32, "sliding_window": 64},
    "Phi": {**_HEADS, "partial_rotary_factor": 0.5},
    "Phi3": {"rope_scaling": None, "original_max_position_embeddings": 512},
    "GPT2": _GPT,
    "GPTNeoX": {**_HEADS, "rotary_pct": 0.5},
    "GPTJ": {**_GPT, "rotary_dim": 16},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Bloom": {"n_layer": 4, "n_head": 2},
    "Falcon": {"multi_query": True, "alibi": False, "new_decoder_architecture": False},
    "Cohere2": {"sliding_window": 64},
    "Starcoder2": {"sliding_window": None},
    "Olmo3": {"sliding_window": 64},
    "Glm": {"partial_rotary_factor": 0.5},
    "Glm4": {"partial_rotary_factor": 0.5},
    "Exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": _EXPERTS,
    "Qwen3Moe": {**_EXPERTS, "shared_expert_intermediate_size": 0},  # vLLM would make one
    "Olmoe": _EXPERTS,
    "GraniteMoe": _EXPERTS,
    "GPTBigCode": _GPT,
    "Persimmon": _HEADS,
    "Phimoe": _EXPERTS,
}
BATCH, ALONE = [3, 17, 40, 90], [29]


def checkpoint(family: str, folder: Path, layers: int = 4) -> Path:
    """A small model of a family with random weights, as `save_pretrained` writes it."""
    import torch
    import transformers

    kind = getattr(transformers, f"{family}Config")
    given = {**SMALL, "num_hidden_layers": layers, **FAMILIES[family]}
    fixed = {name for name in given if isinstance(getattr(kind, name, None), property)}
    config = kind(**{name: value for name, value in given.items() if name not in fixed})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for each in model.parameters():
        if each.dim() > 2:  # experts, which are whatever was in memory
            torch.nn.init.normal_(each, std=0.02)
    path = folder / family
    model.save_pretrained(path)
    return path


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` gives in a process of its own, which starts with vLLM imported."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def measured(path: Path, compilation: dict[str, Any]) -> dict[str, Any]:
    """One engine: what it generates, and how long it took."""
    import vllm
    from vllm.compilation.counter import compilation_counter

    before = compilation_counter.clone()
    start = time.perf_counter()
    engine = vllm.LLM(
        str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        enable_chunked_prefill=True,
        disable_log_stats=True,
        compilation_config=compilation,
    )
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    config = engine.llm_engine.vllm_config.compilation_config
    found["backend"], found["mode"] = config.backend, int(config.mode)
    found["compile seconds"] = config.compilation_time
    after = compilation_counter.clone()
    found["counters"] = {
        name: value - getattr(before, name)
        for name, value in vars(after).items()
        if value != getattr(before, name)
    }
    found["tokens"], found["logprobs"] = [], []
    options = vllm.SamplingParams(
        max_tokens=12, temperature=0, detokenize=False, ignore_eos=True, logprobs=1
    )
    for lengths in (BATCH, ALONE):
        given = [prompt(i, n) for i, n in enumerate(lengths)]
        for each in engine.generate(given, options, use_tqdm=False):
            out = each.outputs[0]
            found["tokens"].append(list(out.token_ids))
            pairs = zip(out.logprobs, out.token_ids, strict=True)
            found["logprobs"].append([row[token].logprob for row, token in pairs])
    found["forward ms"], found["forward of 4 ms"] = _forward(engine, 1), _forward(engine, 4)
    return found


def prompt(number: int, length: int) -> dict[str, list[int]]:
    """Tokens that are the same in every process."""
    return {"prompt_token_ids": [1] + [(7 * number + 13 * j) % 500 + 5 for j in range(length - 1)]}


def _forward(engine: Any, requests: int) -> float:
    """The fastest tenth of the forwards of a decode step of so many requests, in milliseconds."""
    import vllm

    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, log = worker.model_runner, []
    forward = runner._model_forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = forward(*args, **kwargs)
        log.append(time.perf_counter() - start)
        return result

    runner._model_forward = timed
    options = vllm.SamplingParams(max_tokens=60, temperature=0, detokenize=False, ignore_eos=True)
    engine.generate([prompt(i, 4) for i in range(requests)], options, use_tqdm=False)
    runner._model_forward = forward
    return 1e3 * sorted(log)[len(log) // 10]


def row(family: str) -> dict[str, Any]:
    """A family: eager, piecework without and with what it kept, and vLLM's own compiler."""
    found: dict[str, Any] = {"family": family}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = f"{folder}/cache"
        try:
            path = apart(checkpoint, family, Path(folder))
            found["eager"] = apart(measured, path, {"mode": 0})
        except Exception as error:  # noqa: BLE001 - it is a row of the table
            return {**found, "not served": _told(error)}
        if any(map(math.isnan, itertools.chain(*found["eager"]["logprobs"]))):
            return {**found, "not served": "its random weights give no numbers"}
        ours = {"backend": "piecework"}
        for name, options in (("cold", ours), ("warm", ours), ("default", {})):
            try:
                found[name] = apart(measured, path, options)
            except Exception as error:  # noqa: BLE001 - it is a row of the table
                found[name] = {"error": _told(error)}
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


# --- the table ---------------------------------------------------------------------------------------

_START, _END = "<!-- families: generated -->", "<!-- end -->"
_HEADER = ("families", "tokens", "log-probabilities within", "pieces", "unique")


def table(rows: list[dict[str, Any]], before: str = "") -> list[str]:
    """The table as Markdown; families of ``before`` that were not measured now stay in it."""
    from piecework.bench.lists.page import table as joined  # only here: it imports torch

    found = {}
    for line in before.splitlines():
        names, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
        if cells and cells[0].startswith(("equal", "DIFFERENT", "refused")):
            found.update(dict.fromkeys(names.split(", "), cells))
    found.update({each["family"]: _cells(each) for each in rows if "not served" not in each})
    return joined(_HEADER, ((name, *found[name]) for name in sorted(found, key=str.lower)))


def _cells(found: dict[str, Any]) -> list[str]:
    eager, cold, warm = (found[name] for name in ("eager", "cold", "warm"))
    if "error" in cold:
        return [f"refused: {cold['error']}", "", "", ""]
    runs = [each for each in (cold, warm) if "error" not in each]
    same = len(runs) == 2 and all(each["tokens"] == eager["tokens"] for each in runs)
    equal = same and not warm["counters"].get("num_graphs_seen")  # a second start traces nothing
    apart = max(
        abs(a - b)
        for each in runs
        for ours, theirs in zip(each["logprobs"], eager["logprobs"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    counts = ("num_piecewise_capturable_graphs_seen", "num_inductor_compiles")
    counted = (str(cold["counters"].get(name, 0)) for name in counts)
    return ["equal" if equal else "DIFFERENT", f"{apart:.0e}", *counted]


def turns(times: int) -> Iterator[str]:
    """A Llama of 16 layers on vLLM's default and on piecework."""
    kinds = {"default": {}, "piecework": {"backend": "piecework"}}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = apart(checkpoint, "Llama", Path(folder), 16)
        for turn, name, start in itertools.product(range(times), kinds, ("cold", "warm")):
            os.environ["VLLM_CACHE_ROOT"] = f"{folder}/{turn}{name}"
            run = apart(measured, path, {"custom_ops": ["none"], **kinds[name]})
            found.setdefault((start, name), []).append(run)
    runs = list(itertools.chain(*found.values()))
    if any(each["tokens"] != runs[0]["tokens"] for each in runs):
        raise AssertionError("tokens differ")
    if any(each["counters"].get("num_graphs_seen") for each in found["warm", "piecework"]):
        raise AssertionError("a warm start traced")
    yield "| | default | piecework | ratio |"
    yield "|---|---|---|---|"
    for what, start in itertools.product(
        ("seconds", "compile seconds", "forward ms", "forward of 4 ms"), ("cold", "warm")
    ):
        theirs, ours = (
            statistics.median(each[what] for each in found[start, name]) for name in kinds
        )
        ratio = f"{ours / theirs:.2f}" if theirs else "–"  # the default counts no compile seconds
        yield f"| {what}, {start} | {theirs:.2f} | {ours:.2f} | {ratio} |"


def main(arguments: list[str]) -> None:
    what, lines, *rest = arguments
    if what == "table":
        rows = [json.loads(line) for line in Path(lines).read_text().splitlines()]
        page = Path(rest[0])
        head, _, tail = page.read_text().partition(_START)
        before, _, rest_of_page = tail.partition(_END)
        text = "\n".join(table(rows, before))
        page.write_text(f"{head}{_START}\n\n{text}\n\n{_END}{rest_of_page}")
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import transformers  # noqa: F401 - before processes part
    import vllm.entrypoints.llm  # noqa: F401

    if what == "turns":
        print(*turns(int(lines)), sep="\n")
        return
    for family in rest or FAMILIES:
        with open(lines, "a") as out:
            out.write(json.dumps(row(family)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
