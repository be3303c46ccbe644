"""Torch's structured trace: a log of a compilation, read as tlparse reads it, holds our artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import python

PROGRAM = """
import sys
import piecework
import torch
from piecework.runtime.config.compilation import CompilationConfig

@piecework.splitting_op("observe_trace::mix", mutates_args=("out",))
def mix(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)

    def forward(self, x):
        out = torch.empty_like(x)
        mix(self.project(x), out)
        return out + x

config = CompilationConfig(backend=sys.argv[1], cache_dir=sys.argv[2])
stitched = piecework.compile(Model(), (torch.randn(4, 8),), config=config)
print(stitched.source.code, end="")
"""


def artifacts_of(log: str) -> list[tuple[str, str]]:
    """Name and payload of each artifact: a glog line with JSON, then the payload, each line after a tab."""
    found: list[tuple[str, str]] = []
    lines = log.splitlines()
    for number, line in enumerate(lines):
        head, _, text = line.partition("] ")
        if not head.startswith("V") or not text.startswith("{"):
            continue
        record = json.loads(text)
        if "artifact" in record:
            end = number + 1
            while end < len(lines) and lines[end].startswith("\t"):
                end += 1
            payload = "\n".join(each[1:] for each in lines[number + 1 : end])
            found.append((record["artifact"]["name"], payload))
    return found


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.nightly])],
)
def test_a_trace_log_holds_every_stage(tmp_path: Path, backend: str) -> None:
    program, logs = tmp_path / "program.py", tmp_path / "trace"
    program.write_text(PROGRAM)
    logs.mkdir()
    places = {"TORCH_TRACE": str(logs), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "ind")}
    done = python(program, backend, tmp_path / "cache", **places)
    found = [each for log in sorted(logs.iterdir()) for each in artifacts_of(log.read_text())]
    ours = [(name, text) for name, text in found if name.startswith("piecework_")]
    assert [name.removeprefix("piecework_") for name, _ in ours] == [
        *("config", "split_graph", "piece_start", "submod_0", "piece_start", "submod_2"),
        "stitched_source",
    ]
    config, split, first, graph, second, last, source = (text for _, text in ours)
    assert json.loads(config)["backend"] == backend
    assert "class submod_0(" in split and "class submod_2(" in split
    assert first.startswith("submod_0") and second.startswith("submod_2")
    assert "linear" in graph and "linear" not in last
    assert source.rstrip("\n") == done.stdout.rstrip("\n")
    assert len(found) > len(ours)  # torch's own are there too
