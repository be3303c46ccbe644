"""Engines of vLLM's for the tests of this folder, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).with_name("engine_run.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it needs vLLM."""
    missing = importlib.util.find_spec("vllm") is None
    for each in items:
        if Path(__file__).parent in each.path.parents:
            each.add_marker("vllm")
            if missing:
                each.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


Engine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of four small layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
    )
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def engine(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Runs an engine in a process of its own: keyword arguments are `engine_run`'s, ``cache`` is vLLM's cache folder."""
    folder = tmp_path_factory.mktemp("engines")

    def run(*, cache: Path, environ: dict[str, str] | None = None, **what: Any) -> dict[str, Any]:
        out = folder / f"{len(list(folder.iterdir()))}.json"
        done = subprocess.run(
            [sys.executable, str(RUN), json.dumps({"model": checkpoint, **what}), str(out)],
            env={**os.environ, "VLLM_CACHE_ROOT": str(cache), **(environ or {})},
            capture_output=True,
            text=True,
            timeout=900,
        )
        found = json.loads(out.read_text()) if out.exists() else {}
        return {**found, "log": done.stdout + done.stderr, "exit": done.returncode}

    return run


@pytest.fixture(scope="session")
def eager(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine generates uncompiled."""
    found = engine(cache=tmp_path_factory.mktemp("eager"), compilation_config={"mode": 0})
    assert found["exit"] == 0, found["log"]
    return found
