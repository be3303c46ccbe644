"""Engines of vLLM's for the tests of this folder, each in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
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


Finish = Callable[..., dict[str, Any]]


class Engine:
    """Runs engines, each in a process of its own: keyword arguments are `engine_run`'s, ``cache`` is vLLM's cache folder."""

    def __init__(self, checkpoint: str, folder: Path) -> None:
        self.checkpoint, self.folder, self.count = checkpoint, folder, 0

    def __call__(self, *, fails: bool = False, **what: Any) -> dict[str, Any]:
        found = self.start(**what)()
        assert (found["exit"] != 0) is fails, found["log"][-5000:]
        return found

    def start(self, *, cache: Path, environ: dict[str, str] | None = None, **what: Any) -> Finish:
        """Begin; what is returned waits for the end."""
        self.count += 1
        out, log = (self.folder / f"{self.count}.{kind}" for kind in ("json", "log"))
        process = subprocess.Popen(
            [sys.executable, str(RUN), json.dumps({"model": self.checkpoint, **what}), str(out)],
            env={**os.environ, "VLLM_CACHE_ROOT": str(cache), **(environ or {})},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

        def finish(kill_when: Callable[[], bool] | None = None) -> dict[str, Any]:
            while kill_when is not None and process.poll() is None:
                if kill_when():
                    process.kill()
                time.sleep(0.1)
            code = process.wait(timeout=900)
            text = out.read_text() if out.exists() else ""
            found = json.loads(text or "{}")
            return {**found, "log": log.read_text(), "exit": code}

        return finish


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama of four small layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, num_hidden_layers=4, architectures=["LlamaForCausalLM"])
    path = tmp_path_factory.mktemp("models") / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def engine(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(checkpoint, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="session")
def eager(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine generates uncompiled."""
    return engine(cache=tmp_path_factory.mktemp("eager"), compilation_config={"mode": 0})
