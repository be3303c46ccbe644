"""The GPU benchmark runs: at a small scale on the CPU, and says so where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch

from piecework.bench import gpu


def test_it_runs_on_the_cpu(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(found) == ["gpu_capture", "gpu_staging", "gpu_steps"]
    assert {row["contender"] for row in found["gpu_steps"]["rows"]} == {
        "bare loop",
        "wrappers",
        "one graph",
    }


def test_a_failing_part_does_not_hide_the_others(monkeypatch, capsys):
    def fail(scale):
        raise RuntimeError("no driver")

    monkeypatch.setattr(gpu, "PARTS", {"steps": fail, "staging": gpu.staging})
    assert gpu.main(["--device", "cpu", "--quick"]) == 1
    captured = capsys.readouterr()
    assert "no driver" in captured.err
    assert "steps: failed" in captured.err
    assert "B10: staging eight inputs" in captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
