"""Many processes, and processes that die, on one cache directory; each test starts real ones."""

import hashlib
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

from piecework.runtime.store.cache import open_entry, verify
from piecework.runtime.store.factors import KeyFactors

CHILD = Path(__file__).with_name("store_child.py")
FACTORS = KeyFactors({"config": {"dtype": "bf16"}})


def payload(name: str) -> bytes:
    block = hashlib.sha256(name.encode()).digest()
    return block * (1000 + block[0])


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def load_everything(root: Path, count: int) -> int:
    """Open in this process, check every byte, and return how many artifacts had survived."""
    entry = open_entry(root, FACTORS)
    compiled = 0
    for index in range(count):
        name = f"piece {index}"
        result = entry.get_or_compile(name, lambda name=name: payload(name))
        assert result.data == payload(name)
        assert result.saved
        compiled += result.compiled
    text = entry.directory / "stitched.py"
    assert not text.exists() or text.read_text().startswith("# after piece ")
    assert entry.write_texts({"stitched.py": "x = 1\n"})
    return count - compiled


def assert_clean(root: Path) -> None:
    """Nothing half-written lies about, nothing is damaged, nothing was taken for damaged."""
    left = [path for path in root.rglob("*") if path.name.startswith(".tmp-")]
    assert left == []
    assert verify(root).findings == ()
    assert not (root / ".quarantine").exists()


def test_eight_processes_compile_each_key_once(tmp_path: Path, root: Path) -> None:
    journal, count = tmp_path / "journal", 6
    children = [start("share", root, journal, count) for _ in range(8)]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:  # all wait at the line: let them go
        assert child.stdin is not None
        child.stdin.close()
        child.stdin = None
    outcomes = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0] * 8, outcomes
    for out, _ in outcomes:
        assert json.loads(out) == {"right": True, "warnings": []}
    compiled = journal.read_text().splitlines()
    assert sorted(compiled) == [f"piece {index}" for index in range(count)]
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
    script = (
        "import runpy, sys, time; sys.argv = ['child', 'use', sys.argv[1], '0'];"
        f"child = runpy.run_path({str(CHILD)!r});"
        "entry = child['open_entry'](sys.argv[2], child['FACTORS']);"
        "entry.get_or_compile('slow', lambda: (print('begin', flush=True), time.sleep(600)))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "begin\n"
    holder.kill()
    holder.communicate()
    result = open_entry(root, FACTORS).get_or_compile("slow", lambda: b"done")
    assert (result.data, result.compiled, result.saved) == (b"done", True, True)
