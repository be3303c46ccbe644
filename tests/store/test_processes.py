"""Many processes, and processes that die, on one cache directory; each test starts real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_child
from store_child import FACTORS, payload

from piecework.runtime.store.cache import open_entry, verify


def start(*arguments: object) -> subprocess.Popen[str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, store_child.__file__, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of flushes to a busy disk would take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="piecework-", dir=memory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def root(place: Path) -> Path:
    return place / "cache"


def load_everything(root: Path, count: int) -> None:
    """Open in this process, and check every byte."""
    entry = open_entry(root, FACTORS)
    for name in (f"piece {index}" for index in range(count)):
        result = entry.get_or_compile(name, lambda name=name: payload(name))
        assert result.data == payload(name) and result.saved
    text = entry.directory / "stitched.py"
    assert not text.exists() or text.read_text().startswith("# after piece ")
    assert entry.write_texts({"stitched.py": "x = 1\n"})


def assert_clean(root: Path) -> None:
    """Nothing half-written lies about, nothing is damaged, nothing was taken for damaged."""
    left = [path for path in root.rglob("*") if path.name.startswith(".tmp-")]
    assert left == []
    assert verify(root).findings == ()
    assert not (root / ".quarantine").exists()


def test_eight_processes_compile_each_key_once(root: Path) -> None:
    count = 6
    children = [start("share", root, count) for _ in range(8)]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:  # all wait at the line: let them go
        assert child.stdin is not None
        child.stdin.close()
        child.stdin = None
    outcomes = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * 8, outcomes
    assert [errors for _, errors in outcomes] == [""] * 8
    found = [json.loads(out) for out, _ in outcomes]
    assert all(each["right"] and each["texts_saved"] for each in found)
    compiled = sorted(name for each in found for name in each["compiled"])
    assert compiled == [f"piece {index}" for index in range(count)]
    assert verify(root).artifacts == count
    assert_clean(root)


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.nightly)])
def test_killed_at_every_file_operation(place: Path, warned: list[str], count: int) -> None:
    """No instant between two file operations of saving an artifact and a text is left out."""
    step = deaths = 0
    while True:
        step += 1
        root = place / f"cache {step}"
        child = start("save_and_die", root, count, step)
        _, errors = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), errors
        deaths += child.returncode != 0
        load_everything(root, count)
        assert_clean(root)
        if child.returncode == 0:
            break
    assert deaths > 20
    assert warned == []


def test_killed_while_it_holds_the_lock_frees_it(root: Path) -> None:
    """The one that waits gets the lock of the one that was killed while compiling, and compiles."""
    holder = start("hold", root)
    assert holder.stdout is not None and holder.stdout.readline() == "begin\n"
    holder.kill()
    holder.communicate()
    result = open_entry(root, FACTORS).get_or_compile("slow", lambda: b"done")
    assert result == (b"done", True, True)
