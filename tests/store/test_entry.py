"""One entry of the cache: get, put, compile once, texts, signatures; and damage of artifacts: quarantine, one warning, right bytes."""

import ast
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from piecework.runtime.store.cache import INDEX_NAME, KIND, CacheEntry, open_entry, verify
from piecework.runtime.store.factors import KeyFactors, content_key
from piecework.runtime.store.files import cache_disabled
from piecework.runtime.store.package import packed

FACTORS = KeyFactors({"config": {"dtype": "bf16"}, "versions": {"torch": "2.13.0"}})
OTHER = KeyFactors({"config": {"dtype": "fp32"}, "versions": {"torch": "2.13.0"}})
SECRET = b"sixteen or more bytes of it"
PAYLOADS = {f"piece {n}": random.Random(n).randbytes(300 + 211 * n) for n in range(4)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def must_not_compile() -> bytes:
    raise AssertionError("compiled although it was saved")


def fill(entry: CacheEntry) -> list[bool]:
    """Use the entry as a run would; return which pieces had to be compiled."""
    compiled = []
    for name, data in PAYLOADS.items():
        result = entry.get_or_compile(name, lambda data=data: data)
        assert (result.data, result.saved) == (data, True)
        compiled.append(result.compiled)
    assert entry.write_texts({"stitched.py": "x = 1\n"})
    return compiled


# --- use ---------------------------------------------------------------------------------------------


def test_layout(root: Path) -> None:
    before = os.umask(0)
    try:
        entry = open_entry(root, FACTORS, rank=3, dp_rank=1, tag="draft")
        assert not root.exists()  # opening writes nothing
        assert entry.put("a", b"data")
        entry.write_texts({"stitched.py": "s", "computation_graph.py": "ü\r\n"})
    finally:
        os.umask(before)
    assert entry.directory == root / FACTORS.hash / "rank_3_1" / "draft"
    assert {path.name for path in entry.directory.iterdir()} == {
        *("artifacts", "cache_key_factors.json", "computation_graph.py"),
        *("piecework_compile_cache.py", "stitched.py"),
    }
    factors = (entry.directory / "cache_key_factors.json").read_bytes()
    assert KeyFactors.from_json(factors) == FACTORS
    assert (entry.directory / "computation_graph.py").read_bytes() == "ü\r\n".encode()
    index = (entry.directory / INDEX_NAME).read_text()  # a Python literal, for people
    assert list(ast.literal_eval(index)["artifacts"]) == ["a"]
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_what_is_put_is_got(root: Path) -> None:
    entry = open_entry(root, FACTORS)
    assert entry.get("a") is None and entry.names() == ()
    for name, data in (("a", b"one"), ("a", b"two"), ("b", b"two"), ("empty", b"")):
        assert entry.put(name, data)
        assert open_entry(root, FACTORS).get(name) == data
    assert entry.names() == ("a", "b", "empty")
    first = entry.get_or_compile("c", lambda: b"data")
    assert first == (b"data", True, True)
    assert entry.get_or_compile("c", must_not_compile) == (b"data", False, True)


def test_failed_compile_is_not_saved_and_can_be_tried_again(root: Path) -> None:
    entry = open_entry(root, FACTORS)
    with pytest.raises(ZeroDivisionError):
        entry.get_or_compile("a", lambda: bytes(1 // 0))
    assert entry.get_or_compile("a", lambda: b"data") == (b"data", True, True)


def test_threads_compile_once(root: Path) -> None:
    entry = open_entry(root, FACTORS)
    compiled: list[int] = []
    together = threading.Barrier(6)

    def compile_slowly() -> bytes:
        compiled.append(1)
        time.sleep(0.05)
        return b"data"

    def work(_: int) -> bytes:
        together.wait()
        return entry.get_or_compile("a", compile_slowly).data

    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(work, range(6))] == [b"data"] * 6
    assert len(compiled) == 1


def test_rejected_artifact_is_compiled_again(root: Path, warned: list[str]) -> None:
    entry = open_entry(root, FACTORS)
    for name, data in (("a", b"unfit"), ("b", b"fit")):
        entry.put(name, data)
    entry.reject("a", "the loader refused it")
    (warning,) = warned
    assert "the loader refused it" in warning
    assert entry.names() == ("b",)
    assert entry.get_or_compile("a", lambda: b"new").compiled
    assert open_entry(root, FACTORS).get("a") == b"new"


def test_disable_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, off in (("", 0), ("0", 0), (" no ", 0), ("1", 1), ("yes", 1)):
        monkeypatch.setenv("PIECEWORK_DISABLE_CACHE", value)
        assert cache_disabled() is bool(off)


# --- signatures --------------------------------------------------------------------------------------


def test_signed_entry(root: Path, warned: list[str]) -> None:
    assert open_entry(root, FACTORS, hmac_key=SECRET).put("a", b"signed")
    # Unsigned entries and those of other keys are elsewhere, so that nobody disturbs anybody.
    assert open_entry(root, FACTORS).get("a") is None
    assert open_entry(root, FACTORS, hmac_key=SECRET + b"2").get("a") is None
    assert open_entry(root, FACTORS).put("a", b"unsigned")
    assert open_entry(root, FACTORS, hmac_key=SECRET).get("a") == b"signed"
    assert warned == []
    assert verify(root).findings == verify(root, SECRET).findings == ()
    assert len(verify(root, b"a wrong key of enough bytes").findings) == 1


def test_forged_entry_is_refused(root: Path, warned: list[str]) -> None:
    """Whoever can write the directory, but has no key, plants an entry that is right in all but the signature."""
    forger = open_entry(root, FACTORS.signed_with(SECRET))
    forger.put("a", b"planted")
    entry = open_entry(root, FACTORS, hmac_key=SECRET)
    assert entry.directory == forger.directory
    assert entry.get_or_compile("a", lambda: b"compiled").data == b"compiled"
    (warning,) = warned
    assert "signature" in warning


# --- damage ------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "flip": lambda data, at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "cut": lambda data, at: data[:at],
    "grow": lambda data, at: data[:at] + b"\0" + data[at:],
    "empty": lambda data, at: b"",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "cache"
    assert all(fill(open_entry(root, FACTORS)))
    return root


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_costs_a_compile(saved: Path, tmp_path: Path, warned: list[str], kind: str) -> None:
    for at in range(0, 600, 97):
        root = tmp_path / f"case {at}"
        shutil.copytree(saved, root)
        target = next(root.rglob("*.bin"))
        target.write_bytes(DAMAGES[kind](target.read_bytes(), at))
        assert verify(root).findings
        assert sum(fill(open_entry(root, FACTORS))) == 1
        assert len(warned) == 1, warned
        shelved = [path.name for path in (root / ".quarantine").rglob("*") if path.is_file()]
        assert [name.endswith(target.name) for name in shelved] == [True]
        # The next process finds everything whole again.
        assert not any(fill(open_entry(root, FACTORS)))
        assert verify(root).findings == ()
        assert len(warned) == 1
        warned.clear()


IN_ITS_PLACE: dict[str, Callable[[Path, Path], object]] = {
    "writable": lambda target, _: target.chmod(0o666),
    "gone": lambda target, _: target.unlink(),
    "directory": lambda target, _: (target.unlink(), target.mkdir()),
    "fifo": lambda target, _: (target.unlink(), os.mkfifo(target)),
    "link": lambda target, outside: (target.unlink(), target.symlink_to(outside)),
}


@pytest.mark.parametrize("kind", IN_ITS_PLACE)
def test_something_else_in_a_files_place(
    saved: Path, tmp_path: Path, warned: list[str], kind: str
) -> None:
    """A pipe does not make it wait, a link is not followed, what others may write is not read."""
    root, outside = tmp_path / "cache", tmp_path / "outside"
    shutil.copytree(saved, root)
    target = next(root.rglob("*.bin"))
    outside.write_bytes(before := target.read_bytes())
    IN_ITS_PLACE[kind](target, outside)
    assert sum(fill(open_entry(root, FACTORS))) == 1
    assert len(warned) == (kind != "gone"), warned
    assert outside.read_bytes() == before and not target.is_symlink()
    assert not any(fill(open_entry(root, FACTORS)))


PLACE = f"{FACTORS.hash}/rank_0_0/backbone"
HOSTILE = {
    "code": b"__import__('os').environ.__setitem__('RAN', '1')",
    "deep": b"[" * 1_000_000,
    "another name": packed({"": b"x"}, {"entry": PLACE, "name": "piece 1"}, None, KIND),
    "another kind": packed({"": b"x"}, {"entry": PLACE, "name": "piece 0"}, None, "a cake"),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_artifact(saved: Path, tmp_path: Path, warned: list[str], raw: bytes) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    (root / PLACE / "artifacts" / "piece 0.bin").write_bytes(raw)
    assert sum(fill(open_entry(root, FACTORS))) == 1
    assert len(warned) == 1 and "RAN" not in os.environ


def test_entry_copied_to_another_key_rank_or_tag_is_refused(
    saved: Path, tmp_path: Path, warned: list[str]
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    others = {"factors": OTHER}, {"factors": FACTORS, "rank": 1}, {"factors": FACTORS, "tag": "m"}
    for place in others:
        entry = open_entry(root, **place)
        shutil.copytree(root / PLACE, entry.directory)
        assert entry.get("piece 0") is None
    assert open_entry(root, FACTORS).get("piece 0") == PAYLOADS["piece 0"]
    assert len(warned) == 3


def test_content_key_tells_all_parts_apart() -> None:
    keys = [content_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), ())]
    assert len(set(keys)) == len(keys)
