"""Models cut over processes: pieces are compiled once, and what would hang is an error in bounded time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
HOST = "127.0.0.1"
SCRIPT = Path(__file__).with_name("ranks_model.py")
Found = tuple[Path, list[Any]]
BOUND = 400  # seconds until a test gives up, processes of a busy machine included


def ranks(mode: str, folder: Path, timeout: float = 60) -> list[dict[str, object]]:
    """Run the script on two ranks; what each printed, and how it ended.

    As under torchrun the store is neither rank's: it outlives both, at a port that nobody else can take meanwhile.
    """
    store = torch.distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
        "RANKS_TIMEOUT": str(timeout),
        "PIECEWORK_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, str(SCRIPT), mode, str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, **pipes)
        for rank in range(2)
    ]
    end = time.monotonic() + BOUND
    found = []
    try:
        for each in started:
            out, errors = each.communicate(timeout=max(end - time.monotonic(), 1))
            said = json.loads(out.splitlines()[-1]) if out.strip() else {"stderr": errors[-2000:]}
            found.append({**said, "code": each.returncode})
    finally:
        for each in started:
            each.kill()
    return found


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both ranks found in each mode that ends well, one after the other in two processes, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOST}:0", "--local-addr", HOST]
    done = python(
        *("-m", "torch.distributed.run", "--nproc-per-node", 2, *place),
        *(SCRIPT, "run,capture,once,save,load", folder),
        PIECEWORK_CACHE_DIR=str(folder / "cache"),
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(row["rank"] for row in rows) == [0, 1]
    return folder, [row["found"] for row in rows]


def test_torchrun_runs_a_model_that_is_cut_over_two_processes(
    under_torchrun: Found,
) -> None:
    every = {"inside": True, "in place": True, "outside": True, "cut": True}
    assert [found["run"] for found in under_torchrun[1]] == [every, every]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("mode", "said"), [("sizes", "float32[*, 4]"), ("capture others", "PIECEWISE tokens=4")]
)
def test_ranks_that_would_do_different_things_stop_with_an_error(
    mode: str, said: str, tmp_path: Path
) -> None:
    for each in ranks(mode, tmp_path):
        assert (each.get("error"), each["code"]) == ("RankError", 3), each
        assert said in str(each["says"]) or "lost each other" in str(each["says"])


def test_each_rank_captures_the_same(under_torchrun: Found) -> None:
    first, second = (each["capture"] for each in under_torchrun[1])
    assert first == second
    assert len(first) == 3
    for served, opened, is_open, captured in first.values():
        assert served and captured and not is_open
        assert opened == 2  # for the estimate, and for the captures


@pytest.mark.nightly
def test_the_least_budget_is_everybodys(tmp_path: Path) -> None:
    first, second = (each["found"] for each in ranks("budget", tmp_path))
    assert first == second and first["right"]  # type: ignore[index]
    assert 64 not in first["sizes"]  # type: ignore[index]


@pytest.mark.nightly
def test_what_ranks_run_together_is_not_measured(tmp_path: Path) -> None:
    for each in ranks("measure", tmp_path):
        assert each.get("error") == "RankError" and "as many clocks" in str(each["says"]), each


@pytest.mark.nightly
def test_a_rank_that_does_not_come_ends_the_wait(tmp_path: Path) -> None:
    first, second = ranks("absent", tmp_path, timeout=5)
    assert first.get("error") == "RankError" and "did not come" in str(first["says"]), first
    assert second["found"] == "finished" or second["code"]


def test_equal_pieces_are_compiled_once_over_all_ranks(
    under_torchrun: Found,
) -> None:
    folder, rows = under_torchrun
    found = [each["once"] for each in rows]
    assert found[0] == found[1] and found[0]["right"]
    compiled = Counter((folder / "compiled").read_text().split())
    assert sum(compiled.values()) == found[0]["pieces"], compiled


def test_each_rank_loads_its_own_artifact(under_torchrun: Found) -> None:
    saved, loaded = ([each[mode] for each in under_torchrun[1]] for mode in ("save", "load"))
    assert saved == [{"right": True, "traced": 1}] * 2
    assert loaded == [{"right": True, "traced": 0}] * 2


def test_a_rank_that_is_killed_ends_the_run_with_an_error(tmp_path: Path) -> None:
    start = time.monotonic()
    first, second = ranks("killed", tmp_path, timeout=15)
    assert second["code"] == -signal.SIGKILL
    assert (first["code"], first.get("error")) == (3, "RankError"), first
    assert time.monotonic() - start < BOUND
