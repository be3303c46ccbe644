"""Real models compiled by many processes, and by processes that are killed, on one cache directory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from piecework.runtime.store.upkeep import verify

MODEL = Path(__file__).with_name("piece_cache_model.py")
UNIQUE = 3  # different pieces of the model


@pytest.mark.nightly
def test_eight_processes_compile_each_piece_once(tmp_path: Path) -> None:
    def run(number: int) -> dict[str, object]:
        environment = {
            **os.environ,
            "PIECEWORK_CACHE_DIR": str(tmp_path / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"inductor_{number}"),
        }
        command = [sys.executable, str(MODEL), "{}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(run, range(8)))
    assert sum(int(str(each["num_inductor_compiles"])) for each in done) == UNIQUE
    assert sum(int(str(each["num_compiled_artifacts_loaded"])) for each in done) == 7 * UNIQUE
    assert all(float(str(each["error"])) < 1e-5 for each in done)


@dataclass
class Ended:
    """A process that has ended: its exit code (negative: the signal), the seconds it ran, and what it left."""

    code: int
    seconds: float
    out: Path

    @property
    def result(self) -> dict[str, float]:
        assert self.code == 0, self.log
        return json.loads(self.out.read_text())

    @property
    def log(self) -> str:
        return self.out.with_suffix(".log").read_text()


class Server:
    """The process that all others are forked from."""

    def __init__(self, folder: Path) -> None:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(MODEL), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(self, cache: Path, width: int, kill: Kill | None = None) -> Ended:
        """Compile in a new process, which ``kill``, if there is one, does not let finish."""
        assert self._process.stdin is not None
        self._count += 1
        out = self._folder / f"run_{self._count}.json"
        order = {"cache": str(cache), "width": width, "out": str(out)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid, start = int(self._line()), time.monotonic()
        if kill is not None:
            kill.wait(cache, start)
            kill.strike(pid)
        code = int(self._line())
        return Ended(code, time.monotonic() - start, out)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Kill:
    """When to send SIGKILL, and to whom.

    Attributes:
        after_s: seconds after the start; or after ``artifacts``, if that is given.
        artifacts: wait until so many files lie in the cache's artifact folder, whole or not.
        with_compiler: the process's C++ compiler dies with it, as when a container is stopped; else only the process
            does, as when memory is short.
    """

    after_s: float
    artifacts: int = 0
    with_compiler: bool = False

    def wait(self, cache: Path, start: float) -> None:
        gives_up = time.monotonic() + 300.0
        while self.artifacts and sum(1 for _ in cache.glob("*/*/*/artifacts/*")) < self.artifacts:
            assert time.monotonic() < gives_up, "it has saved nothing"
            time.sleep(0.0005)
        begin = time.monotonic() if self.artifacts else start
        time.sleep(max(0.0, begin + self.after_s - time.monotonic()))

    def strike(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it leads no group yet, or has finished
            if self.with_compiler:
                os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.mark.nightly
def test_killed_while_it_compiles_and_saves_then_loaded(server: Server, tmp_path: Path) -> None:
    """Each case is a model of another width, so that Inductor really compiles, in a cache of its own.

    Four in five die anywhere between start and end; every fifth right after a file of the cache has appeared, since saving
    is a small part of the whole.
    """
    cases = 50
    server.run(
        tmp_path / "first", 400
    )  # what Inductor finds out once per machine: compiler, instructions
    span = server.run(tmp_path / "measured", 401)
    assert span.result["num_inductor_compiles"] == UNIQUE
    chance = random.Random(cases)
    killed, survivors = 0, []
    for case in range(cases):
        cache, width = tmp_path / f"cache_{case}", 8 + case
        kill = Kill((case + chance.random()) / cases * span.seconds)
        if case % 5 == 4:
            kill = Kill(chance.uniform(0.0, 0.01), artifacts=chance.randint(1, UNIQUE))
        kill.with_compiler = case % 2 == 0
        killed += server.run(cache, width, kill).code == -signal.SIGKILL

        listed = verify(cache) if cache.exists() else None
        assert listed is None or listed.findings == ()
        after = server.run(cache, width)
        left = 0 if listed is None else listed.artifacts
        survivors.append(left)
        assert after.result["error"] < 1e-5
        assert after.result["num_compiled_artifacts_loaded"] == left
        assert after.result["num_inductor_compiles"] == UNIQUE - left
        assert "compile cache" not in after.log  # half a file is no damage: it was never listed

        again = server.run(cache, width)
        assert again.result["num_compiled_artifacts_loaded"] == UNIQUE
        assert again.result["num_inductor_compiles"] == 0
        assert again.result["error"] < 1e-5
        assert verify(cache).findings == ()
        assert not [path for path in cache.rglob("*") if path.name.startswith(".tmp-")]
        assert not (cache / ".quarantine").exists()
    print(f"span {span.seconds:.1f} s, {killed} killed, artifacts left: {survivors}")
    assert killed >= 0.8 * cases, "too many had finished before they were killed"
    assert set(survivors) >= {0, 1, 2}, f"the kills did not fall at different stages: {survivors}"
