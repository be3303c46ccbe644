"""The GPU benchmark runs: at a small scale on the CPU, where every contender must do the same; what fails costs its own rows; and it says so where there is no GPU."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from piecework.bench.decoder import TINY, build, token_ids
from piecework.bench.gpu import __main__ as gpu
from piecework.bench.gpu import contenders as gpu_contenders
from piecework.bench.gpu.contenders import Contenders
from piecework.bench.gpu.parts import PARTS
from piecework.bench.gpu.rows import Rows, checked
from piecework.cli import app


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_every_part_runs_on_the_cpu(capsys, tmp_path):
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("bare loop", "bare list", "conventional", "one graph", "piecework, full"):
        assert text in printed
    found = lines(tmp_path)
    assert {line["part"] for line in found} == set(PARTS)
    assert not [line for line in found if "failed" in str(line.get("note"))]
    targets = {line["name"] for line in found if line["kind"] == "target"}
    assert targets == {"B8", "B9", "B10", "B11"}
    [memory] = [line for line in found if line.get("name") == "B11"]
    assert memory["met"]  # bytes, not times: they hold on any machine
    tokens = [line["note"] for line in found if "of tokens" in str(line.get("note"))]
    assert len(tokens) == 11 and all("100% of tokens" in note for note in tokens)
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.jsonl", "gpu_profile.txt"}


@torch.no_grad()
def test_every_contender_does_the_same_with_other_inputs_at_every_size():
    model = build(3, TINY, "cpu")
    found = Contenders(model, token_ids(4, TINY, "cpu"), (1, 2, 4), "eager")
    for batch in (1, 2, 4):
        for start in (0, 5):
            found.ids = (torch.arange(4) + start) % TINY.vocabulary
            steps = {name: make() for name, make in found.makers(batch).items()}
            assert list(steps) == [
                "bare loop",
                "bare list",
                "conventional",
                "piecework",
                "one graph",
                "piecework, full",
            ]
            for step in steps.values():
                checked(step, model(found.ids[:batch]))
    modes = {row.mode: row.reason for row in found.stitched.call_report()}
    assert set(modes) == {"PIECEWISE", "FULL"}, "no contender may fall back to running uncaptured"


def test_a_contender_that_fails_costs_its_own_rows(monkeypatch, tmp_path, capsys):
    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_contenders, "Conventional", broken)
    assert gpu.main(["--device", "cpu", "--quick", "--part", "steps", "--out", str(tmp_path)]) == 1
    assert "no such kernel" in capsys.readouterr().err
    rows = [line for line in lines(tmp_path) if line["kind"] == "row"]
    failed = {row["contender"] for row in rows if row["seconds"] is None}
    assert failed == {"conventional"}
    assert {row["contender"] for row in rows} >= {"piecework", "bare loop", "one graph"}


def test_the_limits_of_all_parts_fit_into_the_time():
    script = runpy.run_path(str(Path(gpu.__file__).resolve().parents[1] / "on_gpu.py"))
    limits = script["LIMITS"]
    assert sum(limits.values()) <= script["SECONDS"] <= 600
    assert list(limits)[:2] == ["tests:smoke", "whole"] and limits["tests:smoke"] <= 60
    parts = {each for each in {**limits, **script["MORE"]} if not each.startswith("tests:")}
    assert parts - {"sanitizer"} == set(PARTS)


def test_each_part_is_a_process_with_its_own_limit_and_the_next_goes_on(monkeypatch, tmp_path):
    script = runpy.run_path(str(Path(gpu.__file__).resolve().parents[1] / "on_gpu.py"))
    runner, ran = script["Runner"](tmp_path, tmp_path, "cuda", 570.0), []

    def run(command, *, timeout, **_):
        ran.append((command, timeout))
        if len(ran) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    runner.tests("smoke"), runner.part("transformers"), runner.sanitizer()
    assert [limit for _, limit in ran] == [60, 55, 90] and not runner.clean
    _, part, sanitizer = (command for command, _ in ran)
    assert float(part[part.index("--seconds") + 1]) <= 0.8 * 55, "it ends by itself, with its rows"
    text = " ".join(sanitizer)
    assert "--target-processes application-only" in text and "not reduce_overhead" in text


def test_a_lost_device_ends_the_part(monkeypatch, tmp_path):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = Rows("here", tmp_path)
    with monkeypatch.context() as here:  # undone before the folder's own look at the device
        here.setattr(torch.cuda, "is_available", lambda: True)
        here.setattr(torch.cuda, "synchronize", lost)
        with pytest.raises(SystemExit, match="the device is lost"), rows.attempt({}, "breaks"):
            lost()
    assert "illegal memory access" in lines(tmp_path)[0]["note"]


def test_one_command_from_a_plain_checkout(tmp_path):
    """Under another name and without the package's parent on the path, as on a bare machine."""
    root = Path(gpu.__file__).resolve().parents[2]
    checkout = tmp_path / "some-checkout"
    shutil.copytree(root, checkout, ignore=shutil.ignore_patterns(".*", "__pycache__", "figures"))
    command = [sys.executable, "bench/on_gpu.py", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--only", "tests:graphs", "staging"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"gpu_tests.txt", "gpu_bench.txt", "gpu.jsonl"}
    assert "needs a CUDA device" in (tmp_path / "out" / "gpu_tests.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    result = CliRunner().invoke(app, ["bench", "gpu"])
    assert result.exit_code == 2 and "there is no CUDA device" in result.output
