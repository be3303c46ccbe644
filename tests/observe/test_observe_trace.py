"""Torch's structured trace: a log of a compilation, read as tlparse reads it, holds our artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def traced(folder: Path, backend: str) -> tuple[list[tuple[str, str]], str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    logs = folder / "trace"
    logs.mkdir()
    done = subprocess.run(
        [sys.executable, str(program), backend, str(folder / "cache")],
        env={
            **os.environ,
            "TORCH_TRACE": str(logs),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "ind"),
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [a for log in sorted(logs.iterdir()) for a in artifacts_of(log.read_text())], done.stdout


def check_artifacts(artifacts: list[tuple[str, str]], source: str, backend: str) -> None:
    ours = [(name, text) for name, text in artifacts if name.startswith("piecework_")]
    names = [name for name, _ in ours]
    assert names == [
        "piecework_config",
        "piecework_split_graph",
        "piecework_piece_start",
        "piecework_submod_0",
        "piecework_piece_start",
        "piecework_submod_2",
        "piecework_stitched_source",
    ]
    texts = [text for _, text in ours]
    assert json.loads(texts[0])["backend"] == backend
    assert "class submod_0(" in texts[1] and "class submod_2(" in texts[1]
    assert texts[2].startswith("submod_0") and texts[4].startswith("submod_2")
    assert "linear" in texts[3] and "linear" not in texts[5]
    assert texts[6].rstrip("\n") == source.rstrip("\n")


def test_a_trace_log_holds_every_stage(tmp_path: Path) -> None:
    artifacts, source = traced(tmp_path, "eager")
    check_artifacts(artifacts, source, "eager")


@pytest.mark.inductor
@pytest.mark.nightly
def test_a_trace_log_with_inductor_holds_both_ours_and_torchs(tmp_path: Path) -> None:
    artifacts, source = traced(tmp_path, "inductor")
    check_artifacts(artifacts, source, "inductor")
    assert any(not name.startswith("piecework_") for name, _ in artifacts)
