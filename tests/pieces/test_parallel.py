"""Compiling in workers: every piece once, in processes of their own, with results and errors as without them."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Kept, mix
from rich.console import Console
from torch import nn

import piecework
from piecework.errors import PieceCompileError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.observe.progress import CompileProgress
from piecework.runtime.pieces.parallel import run_in_workers

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Model(nn.Module):
    """Five pieces, all different."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 + i, 5 + i) for i in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            y = layer(x)
            x = torch.empty_like(y)
            mix(y, x)
        return self.layers[-1](x)


class Log:
    """Which process compiled what: number, width, range."""

    def __init__(self, path: Path) -> None:
        self.path, self.refuses = path, ""

    def hear(self, graph: object, inputs: list[object], compile_range: object) -> None:
        first = next(each for each in inputs if isinstance(each, torch.Tensor))
        width = str(first.shape[-1])
        with self.path.open("a") as file:
            file.write(f"{os.getpid()} {width} {compile_range}\n")
        if width == self.refuses:
            raise ValueError(f"no width {width}")

    def lines(self) -> list[list[str]]:
        return [line.split(" ", 2) for line in self.path.read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log(tmp_path / "log")
    monkeypatch.setattr(Kept, "hear", found.hear)
    return found


@pytest.fixture
def config(tmp_path: Path, log: Log) -> CompilationConfig:
    return CompilationConfig(
        backend="models:Kept",
        cache_dir=tmp_path / "cache",
        debug_dump_path=tmp_path / "dump",
        compile_workers=2,
        compile_ranges_endpoints=[16],
    )


def test_jobs_run_in_processes_of_their_own_at_most_n_at_a_time(tmp_path: Path) -> None:
    def job(number: int) -> Callable[[], None]:
        def run() -> None:
            (tmp_path / f"{number}.start").write_text(repr(time.monotonic()))
            time.sleep(0.05)
            (tmp_path / f"{number}.end").write_text(f"{time.monotonic()!r} {os.getpid()}")

        return run

    seen = {n: how for n, *how in run_in_workers({str(n): job(n) for n in range(6)}, 2)}
    assert sorted(seen) == [str(n) for n in range(6)]
    assert all(seconds >= 0.05 and succeeded for seconds, succeeded in seen.values())
    starts = [float((tmp_path / f"{n}.start").read_text()) for n in range(6)]
    ends = [(tmp_path / f"{n}.end").read_text().split() for n in range(6)]
    assert len({pid for _, pid in ends} | {str(os.getpid())}) == 7
    runs = [(start, float(end)) for start, (end, _) in zip(starts, ends, strict=True)]
    assert all(sum(a <= start < end for a, end in runs) <= 2 for start in starts)


def test_a_failing_a_dying_and_a_hanging_worker_are_reported_and_the_rest_runs() -> None:
    def fail() -> None:
        raise ValueError("not this one")

    jobs = {
        "fails": fail,
        "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "leaves": lambda: os._exit(3),
        "hangs": lambda: time.sleep(600),
        "works": lambda: None,
    }
    seen = {name: ok for name, _, ok in run_in_workers(jobs, 3, hangs_after_s=5.0)}
    assert seen == {name: name == "works" for name in jobs}


def test_nothing_is_forked_once_cuda_is_in_use(config, log, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    piecework.compile(Model(), (torch.randn(4, 4),), config=config)
    assert {pid for pid, _, _ in log.lines()} == {str(os.getpid())}


def test_each_piece_is_compiled_once_and_all_but_the_first_in_workers(
    config: CompilationConfig, log: Log
) -> None:
    model = Model()
    stitched = piecework.compile(model, (torch.randn(4, 4),), config=config)
    lines = log.lines()
    assert len(lines) == 10 == len({(width, sizes) for _, width, sizes in lines})
    assert [pid for pid, _, _ in lines].count(str(os.getpid())) == 1
    assert sum(row.compiles for row in stitched.report().ranges) == 10
    for batch in (4, 20):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(stitched(x), model(x))
    # Everything is in the cache now: nothing is forked and nothing compiled.
    again = piecework.compile(model, (torch.randn(4, 4),), config=config)
    assert log.lines() == lines
    torch.testing.assert_close(again(x), model(x))


def test_a_piece_that_fails_in_a_worker_fails_as_it_does_without(
    config: CompilationConfig, log: Log
) -> None:
    log.refuses = "6"
    with pytest.raises(PieceCompileError, match="no width 6") as caught:
        piecework.compile(Model(), (torch.randn(4, 4),), config=config)
    assert "layers.2" in str(caught.value.where)
    widths = [(pid, width) for pid, width, _ in log.lines() if width == "6"]
    assert str(os.getpid()) in dict(widths)  # the error is raised here, with its own traceback


def test_progress_shows_each_piece_with_its_time(config: CompilationConfig) -> None:
    text = io.StringIO()
    model, x = Model(), torch.randn(4, 4)
    stitched = piecework.StitchedModule(model, config=config)
    manager = stitched.backend.compiler_manager
    manager.progress = CompileProgress(Console(file=text, width=200))
    stitched.prepare(x)
    first, *lines = text.getvalue().splitlines()
    assert first == "Model: traced; 10 compilations for 5 pieces"
    assert [line.partition("]")[0] for line in lines] == [f"[{n}/10" for n in range(1, 11)]
    assert sum(line.endswith(" s in a worker") for line in lines) == 9
    assert lines[0].startswith("[1/10] submod_0 [1, 16]: ")


@pytest.mark.inductor
def test_inductor_compiles_in_workers(tmp_path: Path) -> None:
    model, x = Model(), torch.randn(4, 4)
    config = CompilationConfig(cache_dir=tmp_path, compile_workers=2)
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_loaded=4):
        stitched = piecework.compile(model, (x,), config=config)
    for batch in (4, 9):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(stitched(x), model(x))
