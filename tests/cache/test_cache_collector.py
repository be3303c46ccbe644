"""Keeping a cache small: by age, by size, leftovers; and never what is in use."""

import os
import time
from pathlib import Path

import pytest

from piecework.errors import CacheError
from piecework.runtime.cache import (
    CacheEntry,
    CacheStore,
    KeyFactors,
    collect_garbage,
    list_entries,
    verify_cache,
)
from piecework.runtime.cache.locks import EntryLocks
from piecework.runtime.cache.manifest import Identity

DAY = 86400.0


def factors(name: str) -> KeyFactors:
    return KeyFactors.collect(config=name, versions={})


def make(root: Path, name: str, age_days: float, size: int = 10_000, tag: str = "m") -> CacheEntry:
    entry = CacheStore.open(root, factors(name), tag=tag)
    entry.put("a", name.encode() * (size // len(name)))
    assert entry.directory is not None
    when = time.time() - age_days * DAY
    os.utime(entry.directory / "manifest.json", (when, when))
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


def test_by_age(root: Path) -> None:
    for age in (1, 5, 20, 40):
        make(root, f"age{age}", age)
    report = collect_garbage(root, max_age_s=10 * DAY)
    assert keys(root) == [factors("age1").hash, factors("age5").hash]
    assert len(report.removed) == 2
    assert report.kept_entries == 2
    assert report.removed_bytes > 20_000
    assert not (root / factors("age40").hash).exists()
    assert verify_cache(root).findings == ()


def test_by_size_the_longest_unused_goes(root: Path) -> None:
    for age in (3, 1, 2):
        make(root, f"age{age}", age)
    report = collect_garbage(root, max_bytes=25_000)
    assert keys(root) == [factors("age1").hash, factors("age2").hash]
    assert report.kept_bytes <= 25_000
    assert collect_garbage(root, max_bytes=25_000).removed == ()
    collect_garbage(root, max_bytes=0)
    assert keys(root) == []


def test_by_size_nothing_older_than_a_removed_one_stays(root: Path) -> None:
    """A small old entry does not survive a large newer one: the order of use decides."""
    make(root, "new", 1, size=1000)
    make(root, "large", 2, size=90_000)
    make(root, "small", 3, size=1000)
    collect_garbage(root, max_bytes=20_000)
    assert keys(root) == [factors("new").hash]


def test_dry_run_changes_nothing(root: Path) -> None:
    make(root, "old", 50)
    make(root, "new", 1)
    before = sorted(root.rglob("*"))
    report = collect_garbage(root, max_age_s=10 * DAY, max_bytes=0, dry_run=True)
    assert len(report.removed) == 2
    assert report.dry_run
    assert sorted(root.rglob("*")) == before


def test_use_makes_an_entry_young_again(root: Path) -> None:
    make(root, "used", 50)
    make(root, "unused", 50)
    assert CacheStore.open(root, factors("used"), tag="m").get("a") is not None
    collect_garbage(root, max_age_s=10 * DAY)
    assert keys(root) == [factors("used").hash]


def test_entry_in_use_stays(root: Path) -> None:
    make(root, "busy", 50)
    identity = Identity(factors("busy").hash, 0, 0, "m")
    with EntryLocks(root, identity).changing(1.0):
        report = collect_garbage(root, max_age_s=DAY)
    assert report.busy == (str(identity),)
    assert report.removed == ()
    assert keys(root) == [identity.key]


def test_whoever_has_it_open_compiles_again(root: Path) -> None:
    entry = make(root, "open", 50)
    collect_garbage(root, max_age_s=DAY)
    assert entry.get("a") is None
    assert entry.get_or_compile("a", lambda: b"again").saved
    assert entry.get("a") == b"again"


def test_other_tags_and_ranks_of_a_key_stay(root: Path) -> None:
    make(root, "shared", 50, tag="old")
    make(root, "shared", 1, tag="new")
    collect_garbage(root, max_age_s=10 * DAY)
    assert [entry.identity.tag for entry in list_entries(root)] == ["new"]


def test_leftovers(root: Path) -> None:
    entry = make(root, "kept", 1)
    assert entry.directory is not None
    entry.put("a", b"replaced")  # the old artifact has no name any more
    (entry.directory / ".tmp-dead").write_bytes(b"x" * 100)
    trash = root / ".trash" / "killed collector"
    trash.mkdir(parents=True)
    (trash / "file").write_bytes(b"x")
    for path in (root / ".trash", trash):
        path.chmod(0o700)
    assert len(list((entry.directory / "artifacts").iterdir())) == 2
    would = collect_garbage(root, dry_run=True)
    report = collect_garbage(root)
    assert (report.leftover_files, report.leftover_bytes) == (
        would.leftover_files,
        would.leftover_bytes,
    )
    assert report.leftover_files == 3
    assert report.removed == ()
    assert len(list((entry.directory / "artifacts").iterdir())) == 1
    assert not (entry.directory / ".tmp-dead").exists()
    assert not trash.exists()
    assert entry.get("a") == b"replaced"
    assert report.kept_bytes == sum(entry.bytes for entry in list_entries(root))


def test_quarantine_goes_by_age(root: Path) -> None:
    entry = make(root, "damaged", 1)
    assert entry.directory is not None
    next((entry.directory / "artifacts").iterdir()).write_bytes(b"damage")
    assert entry.get("a") is None
    (box,) = (root / ".quarantine").iterdir()
    collect_garbage(root, max_age_s=10 * DAY)
    assert box.exists()
    os.utime(box, (0, 0))
    collect_garbage(root, max_age_s=10 * DAY)
    assert not box.exists()


def test_locks_go_when_nobody_took_them_for_long(root: Path) -> None:
    entry = make(root, "x", 1)
    only_changing = set((root / ".locks").iterdir())
    entry.get_or_compile("b", lambda: b"data")
    (compiling,) = set((root / ".locks").iterdir()) - only_changing
    collect_garbage(root)
    assert compiling.exists()
    for lock in (compiling, *only_changing):
        os.utime(lock, (0, 0))
    assert collect_garbage(root).leftover_files == 1
    assert not compiling.exists()
    # The collector has taken the other one itself, to look into the entry.
    assert set((root / ".locks").iterdir()) == only_changing
    assert entry.get_or_compile("c", lambda: b"data").saved


def test_no_directory_and_an_unsafe_one(root: Path) -> None:
    report = collect_garbage(root, max_bytes=0)
    assert (report.removed, report.kept_entries) == ((), 0)
    assert not root.exists()
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(CacheError, match="others can write"):
        collect_garbage(root, max_bytes=0)
