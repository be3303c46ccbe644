"""The GPU benchmark runs: at a small scale on the CPU, where every contender must do the same; and it says so where there is no GPU."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from piecework.bench import gpu
from piecework.bench.gpu_contenders import Contenders
from piecework.bench.gpu_model import TINY, build, token_ids
from piecework.cli import app
from piecework.errors import PieceworkError
from piecework.runtime.graphs.plan.phase import frozen_garbage


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    with frozen_garbage():
        yield


def test_every_part_runs_on_the_cpu(capsys, tmp_path):
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("bare loop", "conventional", "one graph", "piecework, full", "B11: capture"):
        assert text in printed
    assert {path.stem for path in tmp_path.glob("*.json")} == {f"gpu_{name}" for name in gpu.PARTS}
    saved = json.loads((tmp_path / "gpu_steps.json").read_text())
    assert {target["name"] for target in saved["targets"]} == {"B8", "B9"}
    [memory] = json.loads((tmp_path / "gpu_capture.json").read_text())["targets"]
    assert memory["name"] == "B11" and memory["met"]  # bytes, not times: they hold on any machine


@torch.no_grad()
def test_every_contender_does_the_same_with_other_inputs_at_every_size():
    model = build(3, TINY, "cpu")
    found = Contenders(model, token_ids(4, TINY, "cpu"), (1, 2, 4), "eager")
    for batch in (1, 2, 4):
        for start in (0, 5):
            found.ids = (torch.arange(4) + start) % TINY.vocabulary
            steps = found.steps(batch)
            assert list(steps) == [
                "bare loop",
                "conventional",
                "piecework",
                "one graph",
                "piecework, full",
            ]
            gpu.check_equal(steps, model(found.ids[:batch]))
    modes = {row.mode: row.reason for row in found.stitched.call_report()}
    assert set(modes) == {"PIECEWISE", "FULL"}, "no contender may fall back to running uncaptured"


def test_a_contender_that_differs_is_named():
    right = torch.ones(2, 3)
    gpu.check_equal({"a": lambda: right.clone()}, right)
    for wrong in (right + 1, right[:1], None):
        with pytest.raises(PieceworkError, match=r"^slow "):
            gpu.check_equal({"fine": lambda: right, "slow": lambda wrong=wrong: wrong}, right)


@pytest.mark.parametrize(
    ("host", "whole", "met"),
    [
        ((100, 105, 158), (100, 102, 100), [True, True, True, True]),
        ((100, 106, 200), (100, 102, 100), [False, True, True, True]),
        ((100, 105, 150), (100, 104, 100), [True, False, False, False]),
        ((100, 90, 200), (100, 100, 99), [True, True, True, True]),
    ],
)
def test_targets_are_held_against_the_right_contenders(host, whole, met):
    names = ("bare loop", "piecework", "conventional")
    found = gpu.step_targets(
        "here",
        dict(zip(names, host, strict=True)),
        dict(zip(("bare loop", "piecework", "one graph"), whole, strict=True)),
    )
    assert [target.name for target in found] == ["B8", "B8", "B9", "B9"]
    assert [target.met for target in found] == met


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
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert result.exit_code == 2 and "there is no CUDA device" in result.output
