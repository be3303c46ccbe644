"""The GPU benchmark runs: at a small scale on the CPU, and says so where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from piecework.bench import gpu
from piecework.runtime.graphs.capture import frozen_garbage


def test_it_runs_on_the_cpu(capsys):
    with frozen_garbage():
        assert gpu.main(["--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    for text in ("bare loop", "wrappers", "one graph", "B10: staging", "B11"):
        assert text in printed


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
