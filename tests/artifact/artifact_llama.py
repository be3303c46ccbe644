"""A small model of transformers, stitched and saved in one process and loaded in another. In: save or load, a compiler, a folder, a family. Out: one line of JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import piecework
from piecework.integrations.transformers import save, stitch

REQUESTS = ((1, 1), (1, 2), (2, 5), (3, 9), (1, 40))


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "bloom":  # which is served whole
        sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}
        return BloomForCausalLM(BloomConfig(**sizes, eos_token_id=None, pad_token_id=0)).eval()
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tokens_of(model: PreTrainedModel) -> list[list[list[int]]]:
    found = []
    for batch, length in REQUESTS:
        ids = torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        how = {"max_new_tokens": 6, "do_sample": False}
        found.append(model.generate(ids, attention_mask=mask, **how).tolist())
    return found


def main(what: str, backend: str, folder: str, family: str) -> dict[str, object]:
    model = build(family)
    if what == "save":
        expected = tokens_of(model)
        Path(folder, "expected.json").write_text(json.dumps(expected))
    expected = json.loads(Path(folder, "expected.json").read_text())
    stitch(model, config={"backend": backend}, artifact=Path(folder, "artifact"))
    equal = tokens_of(model) == expected
    if what == "save":
        save(model, Path(folder, "artifact"))  # all kinds of calls that came
    return {
        "equal": equal,
        "counters": {k: v for k, v in piecework.counters.snapshot().items() if v},
        "inductor": [
            m
            for m in ("torch._inductor.compile_fx", "torch._inductor.codecache")
            if m in sys.modules
        ],
        "cached": os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
