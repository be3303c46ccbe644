"""One entry of the cache: get, put, compile once, texts, signatures, switches."""

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import CacheError
from piecework.runtime.cache import (
    CacheEntry,
    CacheStats,
    CacheStore,
    KeyFactors,
    cache_disabled,
    content_key,
    verify_cache,
)

FACTORS = KeyFactors.collect(config="c0", versions={"torch": "2.13.0"})
OTHER = KeyFactors.collect(config="c1", versions={"torch": "2.13.0"})
SECRET = b"sixteen or more bytes of it"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def must_not_compile() -> bytes:
    raise AssertionError("compiled although it was saved")


def test_layout(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS, rank=3, dp_rank=1, tag="draft")
    assert entry.put("a", b"data")
    entry.write_text_files({"stitched.py": "s", "computation_graph.py": "g"})
    assert entry.directory == root / FACTORS.hash / "rank_3_1" / "draft"
    names = {path.name for path in entry.directory.iterdir()}
    assert names == {
        "artifacts",
        "cache_key_factors.json",
        "computation_graph.py",
        "manifest.json",
        "piecework_compile_cache.py",
        "stitched.py",
    }
    assert KeyFactors.from_json((entry.directory / "cache_key_factors.json").read_bytes()) == (
        FACTORS
    )
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_get_put_and_counters(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    assert entry.get("a") is None
    assert entry.put("a", b"one")
    assert entry.get("a") == b"one"
    assert entry.put("a", b"two")
    assert entry.get("a") == b"two"
    assert entry.put("empty", b"")
    assert entry.get("empty") == b""
    assert entry.names() == ("a", "empty")
    assert entry.stats == CacheStats(hits=3, misses=1, saved=3)


def test_opening_writes_nothing(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    assert entry.get("a") is None
    assert entry.names() == ()
    assert entry.read_text_file("stitched.py") is None
    assert not root.exists()


def test_get_or_compile(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    first = entry.get_or_compile("a", lambda: b"data")
    assert (first.data, first.compiled, first.saved) == (b"data", True, True)
    again = CacheStore.open(root, FACTORS).get_or_compile("a", must_not_compile)
    assert (again.data, again.compiled, again.saved) == (b"data", False, True)


def test_equal_bytes_are_kept_once(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    for index in range(5):
        entry.put(f"piece {index}", b"the same")
    assert entry.directory is not None
    assert len(list((entry.directory / "artifacts").iterdir())) == 1
    assert [entry.get(name) for name in entry.names()] == [b"the same"] * 5


def test_keys_ranks_and_tags_share_nothing(root: Path) -> None:
    places = [
        {"key_factors": FACTORS},
        {"key_factors": OTHER},
        {"key_factors": FACTORS, "rank": 1},
        {"key_factors": FACTORS, "dp_rank": 1},
        {"key_factors": FACTORS, "tag": "draft"},
    ]
    for index, place in enumerate(places):
        assert CacheStore.open(root, **place).put("a", str(index).encode())
    for index, place in enumerate(places):
        assert CacheStore.open(root, **place).get("a") == str(index).encode()


def test_failed_compile_is_not_saved_and_can_be_tried_again(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)

    def fail() -> bytes:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        entry.get_or_compile("a", fail)
    assert entry.get("a") is None
    assert entry.get_or_compile("a", lambda: b"data").saved


@pytest.mark.parametrize("wrong", ["text", bytearray(3), None, memoryview(b"x")])
def test_only_bytes_are_saved(root: Path, wrong: bytes) -> None:
    entry = CacheStore.open(root, FACTORS)
    with pytest.raises(CacheError, match="only bytes"):
        entry.put("a", wrong)
    with pytest.raises(CacheError, match="only bytes"):
        entry.get_or_compile("a", lambda: wrong)
    assert entry.names() == ()


def test_compile_that_asks_for_itself_is_an_error(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)

    def compile_a() -> bytes:
        return entry.get_or_compile("a", compile_a).data

    with pytest.raises(CacheError, match="while it is being compiled"):
        entry.get_or_compile("a", compile_a)
    # Another artifact may be asked for meanwhile.
    nested = entry.get_or_compile("a", lambda: b"a" + entry.get_or_compile("b", lambda: b"b").data)
    assert nested.data == b"ab"


def test_threads_compile_once(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    compiled: list[int] = []
    results: list[bytes] = []
    together = threading.Barrier(6)

    def compile_slowly() -> bytes:
        compiled.append(1)
        time.sleep(0.05)
        return b"data"

    def work() -> None:
        together.wait()
        results.append(entry.get_or_compile("a", compile_slowly).data)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [b"data"] * 6
    assert len(compiled) == 1
    assert entry.stats.compiled == 1
    assert entry.stats.hits == 5


def test_who_waited_too_long_compiles_for_itself(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = CacheStore.open(root, FACTORS)
    waiter = CacheStore.open(root, FACTORS, lock_timeout_s=0.05)
    results = []

    def compile_and_let_the_other_wait() -> bytes:
        thread = threading.Thread(
            target=lambda: results.append(waiter.get_or_compile("a", lambda: b"data"))
        )
        thread.start()
        thread.join()
        return b"data"

    assert holder.get_or_compile("a", compile_and_let_the_other_wait).data == b"data"
    assert results[0].compiled
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    assert verify_cache(root).findings == ()


def test_rejected_artifact_is_compiled_again(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = CacheStore.open(root, FACTORS)
    entry.put("a", b"intact but unfit")
    entry.put("same bytes", b"intact but unfit")
    entry.put("b", b"fit")
    entry.reject("a", "the loader refused it")
    entry.reject("never saved", "the loader refused it")
    (record,) = (each for each in caplog.records if each.name.startswith("piecework"))
    assert "the loader refused it" in record.getMessage()
    assert entry.names() == ("b",)
    assert entry.get_or_compile("a", lambda: b"new").compiled
    assert CacheStore.open(root, FACTORS).get("a") == b"new"


def test_texts(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    assert entry.write_text_files({"stitched.py": "x = 'ü'\r\n"})
    assert entry.read_text_file("stitched.py") == "x = 'ü'\r\n"
    assert entry.read_text_file("transformed_code.py") is None
    assert entry.directory is not None
    before = {path: path.stat().st_mtime_ns for path in entry.directory.rglob("*")}
    assert CacheStore.open(root, FACTORS).write_text_files({"stitched.py": "x = 'ü'\r\n"})
    assert {path: path.stat().st_mtime_ns for path in entry.directory.rglob("*")} == before
    assert entry.write_text_files({"stitched.py": "y"})
    assert CacheStore.open(root, FACTORS).read_text_file("stitched.py") == "y"


def test_disabled_cache_touches_no_file(root: Path, tmp_path: Path) -> None:
    CacheStore.open(root, FACTORS).put("a", b"saved")
    for entry in (
        CacheStore.open(root, FACTORS, disabled=True),
        # What would be refused is not even looked at.
        CacheStore.open(tmp_path / "none" / "\0", FACTORS, disabled=True),
    ):
        assert entry.disabled
        assert entry.directory is None
        assert entry.get("a") is None
        assert not entry.put("a", b"data")
        result = entry.get_or_compile("a", lambda: b"data")
        assert (result.data, result.compiled, result.saved) == (b"data", True, False)
        assert not entry.write_text_files({"stitched.py": ""})
        assert entry.read_text_file("stitched.py") is None
        assert entry.names() == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert CacheStore.open(root, FACTORS).get("a") == b"saved"


@pytest.mark.parametrize("value", ["", "0", "False", " no ", "off"])
def test_disable_switch_left_alone(value: str) -> None:
    assert cache_disabled({"PIECEWORK_DISABLE_CACHE": value}) is False
    assert cache_disabled({}) is False


@pytest.mark.parametrize("value", ["1", "true", "yes", "2"])
def test_disable_switch_set(value: str) -> None:
    assert cache_disabled({"PIECEWORK_DISABLE_CACHE": value}) is True


def test_signed_entry(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = CacheStore.open(root, FACTORS, hmac_key=SECRET)
    entry.put("a", b"signed")
    assert CacheStore.open(root, FACTORS, hmac_key=SECRET).get("a") == b"signed"
    # Unsigned entries and those of other keys are elsewhere, so that nobody disturbs anybody.
    assert CacheStore.open(root, FACTORS).get("a") is None
    assert CacheStore.open(root, FACTORS, hmac_key=SECRET + b"2").get("a") is None
    assert CacheStore.open(root, FACTORS).put("a", b"unsigned")
    assert CacheStore.open(root, FACTORS, hmac_key=SECRET).get("a") == b"signed"
    assert caplog.records == []
    assert verify_cache(root).unchecked_signatures == 1
    assert verify_cache(root, SECRET).unchecked_signatures == 0
    assert verify_cache(root, SECRET).findings == ()
    assert len(verify_cache(root, b"a wrong key of enough bytes").findings) == 1


def test_forged_entry_is_refused(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can write the directory, but has no key, plants an entry that is right in all but the signature."""
    signed = FACTORS.signed_with(SECRET)
    forger = CacheStore.open(root, signed)
    forger.put("a", b"planted")
    assert CacheStore.open(root, signed).get("a") == b"planted"
    (finding,) = verify_cache(root).findings
    assert "lacks the signature" in finding.reason
    entry = CacheStore.open(root, FACTORS, hmac_key=SECRET)
    assert entry.directory == forger.directory
    assert entry.get_or_compile("a", lambda: b"compiled").data == b"compiled"
    (record,) = (each for each in caplog.records if each.name.startswith("piecework"))
    assert "signature" in record.getMessage()


def test_entry_of_a_colliding_hash_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The directory's name is a shortened hash; the factors themselves decide."""
    monkeypatch.setattr(KeyFactors, "hash", property(lambda self: "0" * 32))
    CacheStore.open(root, FACTORS).put("a", b"of FACTORS")
    entry = CacheStore.open(root, OTHER)
    assert entry.get("a") is None
    assert "other key factors" in caplog.records[0].getMessage()


def test_directory_removed_meanwhile(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    entry.put("a", b"data")
    for _ in range(2):
        root.rename(root.with_name(f"gone {time.monotonic_ns()}"))
        assert entry.get("a") is None
        assert entry.get_or_compile("a", lambda: b"again").saved
        assert entry.get("a") == b"again"


def test_leftovers_of_killed_writers_are_swept(root: Path) -> None:
    entry = CacheStore.open(root, FACTORS)
    entry.put("a", b"data")
    assert entry.directory is not None
    for folder in (entry.directory, entry.directory / "artifacts"):
        (folder / ".tmp-dead").write_bytes(b"half")
    entry.put("b", b"more")
    assert [path for path in root.rglob("*") if path.name.startswith(".tmp-")] == []


def test_umask_opens_nothing_to_others(root: Path) -> None:
    before = os.umask(0)
    try:
        CacheStore.open(root, FACTORS).get_or_compile("a", lambda: b"data")
    finally:
        os.umask(before)
    for path in (root, *root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_cache_does_not_import_torch() -> None:
    script = (
        "import sys, types, pathlib\n"
        "for name, path in (('piecework', '.'), ('piecework.runtime', 'runtime')):\n"
        "    module = types.ModuleType(name)\n"
        "    module.__path__ = [path]\n"
        "    sys.modules[name] = module\n"
        "import piecework.runtime.cache, piecework.runtime.cache.collect\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    package = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=package, check=False).returncode == 0


NAMES = st.text(
    st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="'\"\\"),
    min_size=1,
    max_size=40,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=50)), max_size=6))
def test_behaves_like_a_dict(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[str, bytes]]
) -> None:
    root = tmp_path_factory.mktemp("property") / "cache"
    expected: dict[str, bytes] = {}
    entry: CacheEntry = CacheStore.open(root, FACTORS)
    for name, data in writes:
        assert entry.put(name, data)
        expected[name] = data
    reopened = CacheStore.open(root, FACTORS)
    assert reopened.names() == tuple(sorted(expected))
    assert {name: reopened.get(name) for name in expected} == expected
    assert verify_cache(root).findings == ()


@given(st.lists(st.one_of(st.text(), st.binary())), st.lists(st.one_of(st.text(), st.binary())))
@settings(deadline=None)
def test_content_key_tells_all_parts_apart(
    one: list[str | bytes], other: list[str | bytes]
) -> None:
    def typed(parts: list[str | bytes]) -> list[tuple[type, str | bytes]]:
        return [(type(part), part) for part in parts]

    assert (content_key(*one) == content_key(*other)) == (typed(one) == typed(other))


def test_content_key_keeps_boundaries() -> None:
    assert content_key("ab", "c") != content_key("a", "bc")
    assert content_key("a") != content_key("a", "")
    assert content_key("a") != content_key(b"a")
