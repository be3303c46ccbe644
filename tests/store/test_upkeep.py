"""Keeping a cache small: by age, by size, leftovers; and never what is in use."""

import os
import time
from pathlib import Path

import pytest

from piecework.errors import CacheError
from piecework.runtime.store.cache import (
    INDEX_NAME,
    CacheEntry,
    Identity,
    collect,
    list_entries,
    nearest,
    open_entry,
    saved_keys,
    verify,
)
from piecework.runtime.store.factors import KeyFactors

DAY = 86400.0


def factors(name: str) -> KeyFactors:
    return KeyFactors({"config": {"name": name}})


def make(root: Path, name: str, age_days: float, size: int = 10_000, tag: str = "m") -> CacheEntry:
    entry = open_entry(root, factors(name), tag=tag)
    entry.put("a", name.encode() * (size // len(name)))
    when = time.time() - age_days * DAY
    os.utime(entry.directory / INDEX_NAME, (when, when))
    return entry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def keys(root: Path) -> list[str]:
    return [entry.identity.key for entry in list_entries(root)]


def test_list_entries(root: Path) -> None:
    assert list_entries(root) == ()
    make(root, "old", 3)
    make(root, "new", 1, tag="draft")
    first, second = list_entries(root)
    assert (first.identity.key, first.identity.tag) == (factors("new").hash, "draft")
    assert (second.identity.key, second.artifacts) == (factors("old").hash, 1)
    assert 10_000 < second.bytes < 12_000
    # What is no entry is left alone.
    (root / "notes").mkdir()
    (root / ("f" * 32) / "rank_x_0" / "m").mkdir(parents=True)
    (root / ("e" * 32)).symlink_to(root / factors("old").hash)
    assert len(list_entries(root)) == 2


def test_the_old_go_and_then_the_longest_unused(root: Path) -> None:
    for age in (1, 5, 2, 40):
        make(root, f"age{age}", age)
    make(root, "age1", 50, tag="old")  # another one of a key that stays
    report = collect(root, max_age_s=10 * DAY)
    assert keys(root) == [factors(f"age{age}").hash for age in (1, 2, 5)]
    assert (len(report.removed), report.kept_entries) == (2, 3)
    assert report.removed_bytes > 20_000
    assert not (root / factors("age40").hash).exists()
    assert collect(root, max_bytes=25_000).kept_bytes <= 25_000
    assert keys(root) == [factors("age1").hash, factors("age2").hash]
    assert collect(root, max_bytes=25_000).removed == ()
    assert verify(root).findings == ()
    collect(root, max_bytes=0)
    assert keys(root) == []


def test_dry_run_changes_nothing(root: Path) -> None:
    make(root, "old", 50)
    make(root, "new", 1)
    before = sorted(root.rglob("*"))
    report = collect(root, max_age_s=10 * DAY, max_bytes=0, dry_run=True)
    assert len(report.removed) == 2
    assert sorted(root.rglob("*")) == before


def test_entry_in_use_stays(root: Path) -> None:
    make(root, "busy", 50)
    identity = Identity(factors("busy").hash, 0, 0, "m")
    with CacheEntry(root, identity).changing(1.0):
        report = collect(root, max_age_s=DAY)
    assert report.busy == (str(identity),)
    assert report.removed == ()
    assert keys(root) == [identity.key]


def test_quarantine_goes_by_age(root: Path) -> None:
    entry = make(root, "damaged", 1)
    next((entry.directory / "artifacts").iterdir()).write_bytes(b"damage")
    assert entry.get("a") is None
    (box,) = (root / ".quarantine").iterdir()
    collect(root, max_age_s=10 * DAY)
    assert box.exists()
    os.utime(box, (0, 0))
    collect(root, max_age_s=10 * DAY)
    assert not box.exists()


def test_locks_go_when_nobody_took_them_for_long(root: Path) -> None:
    entry = make(root, "x", 1)
    only_changing = set((root / ".locks").iterdir())
    entry.get_or_compile("b", lambda: b"data")
    (compiling,) = set((root / ".locks").iterdir()) - only_changing
    collect(root)
    assert compiling.exists()
    for lock in (compiling, *only_changing):
        os.utime(lock, (0, 0))
    collect(root)
    assert not any((root / ".locks").iterdir())
    assert entry.get_or_compile("c", lambda: b"data").saved


def test_no_directory_and_an_unsafe_one(root: Path) -> None:
    report = collect(root, max_bytes=0)
    assert (report.removed, report.kept_entries) == ((), 0)
    assert not root.exists()
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(CacheError, match="others can write"):
        collect(root, max_bytes=0)


# --- why a key misses --------------------------------------------------------------------------------


def key(torch: str = "2.13.0", layer: str = "1" * 64, **config: str) -> KeyFactors:
    fields = {"dtype": "bf16", "mode": "3", **config}
    return KeyFactors(
        {"config": fields, "versions": {"torch": torch}, "sources": {"model.layer": layer}}
    )


def test_the_nearest_key_is_the_one_with_the_fewest_differences(root: Path) -> None:
    for age, each in enumerate((key(), key(torch="2.11.0", dtype="int8"), key(dtype="fp64"))):
        entry = open_entry(root, each)
        entry.put("a", b"data")
        os.utime(entry.directory / INDEX_NAME, (1e9 - age, 1e9 - age))
    keys = list(saved_keys(root).values())
    assert keys == [key(), key(torch="2.11.0", dtype="int8"), key(dtype="fp64")]
    found = nearest(key(dtype="fp32"), keys)  # two are equally near; the one used last
    assert found is not None and found[0] == key()
    assert [str(each) for each in found[1]] == ["config: dtype: bf16 -> fp32"]
    assert nearest(key(), ()) is None


def test_damaged_factors_are_passed_over_and_found(root: Path) -> None:
    for dtype in ("fp16", "fp32", "fp64"):
        open_entry(root, key(dtype=dtype)).put("a", b"data")
    first, second, _ = sorted(root.rglob("cache_key_factors.json"))
    first.write_text("{")
    second.write_bytes(key(dtype="forged").to_json())
    assert len(saved_keys(root)) == 1
    assert {each.file for each in verify(root).findings} == {"cache_key_factors.json"}
