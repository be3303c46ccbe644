"""Keeping a cache small. In: a cache directory, a size and an age. Out: the entries that had to go, and what is left.

It never takes an entry that somebody is changing, and never makes another process fail: an entry disappears in one
rename, and whoever had it open compiles again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import CacheError
from piecework.runtime.cache.atomic import TEMPORARY_PREFIX
from piecework.runtime.cache.files import (
    ARTIFACTS_DIRECTORY,
    QUARANTINE_DIRECTORY,
    EntryFiles,
)
from piecework.runtime.cache.locks import LOCKS_DIRECTORY, EntryLocks, LockTimeout
from piecework.runtime.cache.manifest import Damaged, Identity
from piecework.runtime.cache.safety import UnsafeFile, check_directory, make_directory, resolve_root
from piecework.runtime.cache.survey import (
    EntrySummary,
    entry_identities,
    file_sizes,
    list_entries,
)

TRASH_DIRECTORY = ".trash"
# A lock that nobody has taken for so long is nobody's.
LOCK_AGE_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class CollectionReport:
    """What `collect_garbage` removed (or would remove), and what stays. Sizes in bytes."""

    removed: tuple[str, ...]
    busy: tuple[str, ...]
    removed_bytes: int
    leftover_files: int
    leftover_bytes: int
    kept_entries: int
    kept_bytes: int
    dry_run: bool


def collect_garbage(
    root: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    max_age_s: float | None = None,
    dry_run: bool = False,
) -> CollectionReport:
    """Remove entries unused for longer than `max_age_s`, then the longest unused until `max_bytes` are left.

    Also removes what only takes space: artifacts that no index names, files of killed writers, and what has been in
    quarantine for longer than `max_age_s` (all of it when no age is given). Raises `CacheError` for a directory that is
    unsafe or cannot be changed.
    """
    try:
        return _collect(root, max_bytes, max_age_s, dry_run)
    except OSError as error:
        raise CacheError(
            f"the cache cannot be cleaned up: {error}",
            where=os.fspath(root),
            hint="is it read-only, or full of what another user wrote?",
        ) from error


def _collect(
    root: str | os.PathLike[str], max_bytes: int | None, max_age_s: float | None, dry_run: bool
) -> CollectionReport:
    real = resolve_root(root)
    if not check_directory(real):
        return CollectionReport((), (), 0, 0, 0, 0, 0, dry_run)
    now = time.time()
    entries = list_entries(real)
    chosen = _choose(entries, now, max_bytes, max_age_s)
    removed: list[EntrySummary] = []
    busy: list[EntrySummary] = []
    for entry in chosen:
        gone = dry_run or _remove_entry(real, entry.identity)
        (removed if gone else busy).append(entry)
    leftovers: dict[Path, int] = {}
    gone_names = {entry.identity for entry in removed}
    for identity in entry_identities(real):
        if identity not in gone_names:
            leftovers |= _sweep_entry(real, identity, dry_run)
    leftovers |= _sweep_aside(real, now, max_age_s, dry_run)
    kept = [entry for entry in entries if entry not in removed]
    inside = sum(
        size
        for path, size in leftovers.items()
        if not path.relative_to(real).parts[0].startswith(".")
    )
    return CollectionReport(
        removed=tuple(str(entry.identity) for entry in removed),
        busy=tuple(str(entry.identity) for entry in busy),
        removed_bytes=sum(entry.bytes for entry in removed),
        leftover_files=len(leftovers),
        leftover_bytes=sum(leftovers.values()),
        kept_entries=len(kept),
        kept_bytes=sum(entry.bytes for entry in kept) - inside,
        dry_run=dry_run,
    )


def _choose(
    entries: tuple[EntrySummary, ...], now: float, max_bytes: int | None, max_age_s: float | None
) -> list[EntrySummary]:
    """`entries` come with the one used last first; what is beyond the size goes, once the old ones are gone."""
    chosen: list[EntrySummary] = []
    total = 0
    is_full = False
    for entry in entries:
        if max_age_s is not None and now - entry.last_used > max_age_s:
            chosen.append(entry)
            continue
        is_full = is_full or (max_bytes is not None and total + entry.bytes > max_bytes)
        if is_full:
            chosen.append(entry)
        else:
            total += entry.bytes
    return chosen


def _remove_entry(real: Path, identity: Identity) -> bool:
    directory = real.joinpath(*identity.parts)
    try:
        with EntryLocks(real, identity).changing(0.0):
            trash = real / TRASH_DIRECTORY
            make_directory(trash, inside=real)
            box = Path(tempfile.mkdtemp(dir=trash))
            os.rename(directory, box / identity.tag)
    except FileNotFoundError:
        return True
    except (LockTimeout, UnsafeFile):
        return False
    shutil.rmtree(box, ignore_errors=True)
    for parent in directory.parents[:2]:
        with contextlib.suppress(OSError):  # other ranks or tags are still in it
            os.rmdir(parent)
    return True


def _sweep_entry(real: Path, identity: Identity, dry_run: bool) -> dict[Path, int]:
    """Remove the files of one entry that its index does not need."""
    files = EntryFiles(real, identity, None)
    swept: dict[Path, int] = {}
    try:
        with EntryLocks(real, identity).changing(0.0):
            state = files.read(check_signature=False)
            needed = {record.digest for record in state.records.values()}
            for path, size in file_sizes(files.directory).items():
                is_orphan = path.parent.name == ARTIFACTS_DIRECTORY and path.stem not in needed
                if is_orphan or path.name.startswith(TEMPORARY_PREFIX):
                    swept |= _unlink(path, size, dry_run)
    except (LockTimeout, UnsafeFile, Damaged):
        return swept  # in use, or damaged: the next one to open it sees to that
    return swept


def _sweep_aside(real: Path, now: float, max_age_s: float | None, dry_run: bool) -> dict[Path, int]:
    """Remove old quarantined files, the trash of killed collectors and locks that nobody uses."""
    swept: dict[Path, int] = {}
    limits = (
        (QUARANTINE_DIRECTORY, -1.0 if max_age_s is None else max_age_s),
        (TRASH_DIRECTORY, -1.0),
    )
    for name, age in limits:
        for box in _children(real / name):
            if now - os.lstat(box).st_mtime > age:
                swept |= file_sizes(box)
                if not dry_run:
                    shutil.rmtree(box, ignore_errors=True)
    for path in _children(real / LOCKS_DIRECTORY):
        info = os.lstat(path)
        if now - info.st_mtime > LOCK_AGE_SECONDS:
            swept |= _unlink(path, info.st_size, dry_run)
    return swept


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if check_directory(directory) else []


def _unlink(path: Path, size: int, dry_run: bool) -> dict[Path, int]:
    if not dry_run:
        try:
            os.unlink(path)
        except OSError:
            return {}
    return {path: size}
