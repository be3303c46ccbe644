"""Looking after a whole cache: its entries, why a key misses, what is damaged, and less of it.

Only `collect` removes anything. It never takes an entry that somebody is changing, and whoever has
one open that is removed compiles again. No link is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from piecework.errors import CacheError
from piecework.runtime.store.entry import (
    ARTIFACTS_DIRECTORY,
    INDEX_NAME,
    QUARANTINE_DIRECTORY,
    CacheEntry,
    Identity,
)
from piecework.runtime.store.factors import (
    FACTORS_NAME,
    MAX_FACTORS_BYTES,
    Difference,
    KeyFactors,
)
from piecework.runtime.store.files import (
    LOCKS_DIRECTORY,
    Damaged,
    check_directory,
    read_regular,
    resolve_root,
)

# A lock that nobody has taken for so long is nobody's.
LOCK_AGE_SECONDS = 7 * 24 * 3600.0
_ENTRY = re.compile(r"([0-9a-f]{32})/rank_([0-9]{1,7})_([0-9]{1,7})/([^/]+)")


class EntrySummary(NamedTuple):
    """One entry: who it is, its size on disk, its artifact files, and when it was used."""

    identity: Identity
    bytes: int
    artifacts: int
    last_used: float


class Finding(NamedTuple):
    """Something damaged: in which entry, in which file, and what is wrong."""

    entry: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.file}: {self.reason}"


class Verification(NamedTuple):
    """What `verify` looked at and found."""

    entries: int
    artifacts: int
    bytes: int
    findings: tuple[Finding, ...]


class CollectionReport(NamedTuple):
    """What `collect` removed (or would remove), and what stays. Sizes in bytes."""

    removed: tuple[str, ...]
    busy: tuple[str, ...]
    removed_bytes: int
    leftover_files: int
    leftover_bytes: int
    kept_entries: int
    kept_bytes: int


def list_entries(root: str | os.PathLike[str]) -> tuple[EntrySummary, ...]:
    """All entries, the one used last first."""
    found = []
    for identity, directory in _directories(resolve_root(root)):
        sizes = _file_sizes(directory)
        artifacts = sum(path.parent.name == ARTIFACTS_DIRECTORY for path in sizes)
        try:
            last_used = os.lstat(directory / INDEX_NAME).st_mtime
        except OSError:
            last_used = 0.0
        found.append(EntrySummary(identity, sum(sizes.values()), artifacts, last_used))
    return tuple(sorted(found, key=lambda entry: (-entry.last_used, str(entry.identity))))


def _directories(real: Path) -> Iterator[tuple[Identity, Path]]:
    """The entries below a resolved root, by the names of their directories."""
    for path in sorted(real.glob("*/rank_*/*")):
        named = _ENTRY.fullmatch(path.relative_to(real).as_posix())
        linked = any(each.is_symlink() for each in (path, *path.parents[:2]))
        if named and path.is_dir() and not linked:
            yield Identity(named[1], int(named[2]), int(named[3]), named[4]), path


def _file_sizes(directory: Path) -> dict[Path, int]:
    """Every plain file below ``directory`` with its size."""
    sizes: dict[Path, int] = {}
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(OSError):
                info = os.lstat(path)
                if stat.S_ISREG(info.st_mode):
                    sizes[path] = info.st_size
    return sizes


# --- why a key misses --------------------------------------------------------------------------------


def saved_keys(root: str | os.PathLike[str]) -> dict[str, KeyFactors]:
    """Every readable key in the cache by its hash, the one used last first."""
    real = resolve_root(root)
    found: dict[str, KeyFactors] = {}
    for entry in list_entries(real):
        with contextlib.suppress(OSError, Damaged, CacheError):
            found.setdefault(entry.identity.key, _factors(real, entry.identity))
    return found


def _factors(real: Path, identity: Identity) -> KeyFactors:
    """What an entry's key was made of."""
    raw = read_regular(real / str(identity), FACTORS_NAME, MAX_FACTORS_BYTES)
    factors = KeyFactors.from_json(raw)
    if factors.hash != identity.key:
        raise CacheError("its hash is not the name of the entry's directory")
    return factors


def nearest(
    current: KeyFactors, keys: Iterable[KeyFactors]
) -> tuple[KeyFactors, tuple[Difference, ...]] | None:
    """The key with the fewest differences, and what they are; None where there is no key."""
    compared = [(key, current.differences(key)) for key in keys]
    return min(compared, key=lambda pair: len(pair[1]), default=None)


# --- what is damaged ---------------------------------------------------------------------------------


def verify(root: str | os.PathLike[str], hmac_key: bytes | None = None) -> Verification:
    """Check every byte of every artifact.

    Args:
        hmac_key: what signed entries must be signed with; None looks at no
            signature.
    """
    real = resolve_root(root)
    findings: list[Finding] = []
    sizes: list[int] = []
    entries = list(_directories(real))
    for identity, directory in entries:

        @contextlib.contextmanager
        def noting(file: str, entry: str = str(identity)) -> Iterator[None]:
            try:
                yield
            except Damaged as damage:
                findings.append(Finding(entry, damage.file, damage.reason))
            except (OSError, CacheError) as error:
                findings.append(Finding(entry, file, str(error)))

        if not (directory / INDEX_NAME).exists():
            continue  # a writer was killed before it kept anything
        signed = False
        with noting(FACTORS_NAME):
            signed = "signing" in _factors(real, identity).groups
        entry = CacheEntry(real, identity, hmac_key=hmac_key if signed else None)
        with noting("."):
            entry.check_directories()
            for name in entry.names():
                with noting(name):
                    sizes.append(len(entry.read(name)))
    return Verification(len(entries), len(sizes), sum(sizes), tuple(findings))


# --- less of it --------------------------------------------------------------------------------------


def collect(
    root: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    max_age_s: float | None = None,
    dry_run: bool = False,
) -> CollectionReport:
    """Remove entries unused for longer than ``max_age_s``, then the longest unused until
    ``max_bytes`` are left.

    Also removes what only takes space: locks that nobody uses, and what has been in quarantine for
    longer than ``max_age_s`` (or any time).

    Raises:
        CacheError: the directory is unsafe, or cannot be changed.
    """
    real, now = resolve_root(root), time.time()
    entries = list_entries(real)
    chosen: list[EntrySummary] = []
    total, is_full = 0, False
    for entry in entries:  # the one used last first: what is beyond the size goes
        is_old = max_age_s is not None and now - entry.last_used > max_age_s
        too_much = max_bytes is not None and total + entry.bytes > max_bytes
        is_full = is_full or (not is_old and too_much)
        if is_old or is_full:
            chosen.append(entry)
        else:
            total += entry.bytes
    try:
        removed = [each for each in chosen if dry_run or _remove_entry(real, each.identity)]
        aside = _sweep_aside(real, now, max_age_s, dry_run)
    except OSError as error:
        raise CacheError(
            f"the cache cannot be cleaned up: {error}",
            where=os.fspath(root),
            hint="is it read-only, or full of what another user wrote?",
        ) from error
    kept = [each for each in entries if each not in removed]
    return CollectionReport(
        removed=tuple(str(each.identity) for each in removed),
        busy=tuple(str(each.identity) for each in chosen if each not in removed),
        removed_bytes=sum(each.bytes for each in removed),
        leftover_files=len(aside),
        leftover_bytes=sum(aside),
        kept_entries=len(kept),
        kept_bytes=sum(each.bytes for each in kept),
    )


def _remove_entry(real: Path, identity: Identity) -> bool:
    """Whether it could be removed: somebody may be changing it."""
    entry = CacheEntry(real, identity)
    try:
        with entry.changing(0.0):
            (entry.directory / INDEX_NAME).unlink(missing_ok=True)  # with it the entry is gone
            shutil.rmtree(entry.directory, ignore_errors=True)
    except (TimeoutError, Damaged):
        return False
    for parent in entry.directory.parents[:2]:
        with contextlib.suppress(OSError):  # other ranks or tags are still in it
            os.rmdir(parent)
    return True


def _sweep_aside(real: Path, now: float, max_age_s: float | None, dry_run: bool) -> list[int]:
    """Remove old quarantined files, and locks that nobody uses; their sizes."""
    sizes: list[int] = []
    quarantined = -1.0 if max_age_s is None else max_age_s
    for name, age in ((QUARANTINE_DIRECTORY, quarantined), (LOCKS_DIRECTORY, LOCK_AGE_SECONDS)):
        boxes = sorted((real / name).iterdir()) if check_directory(real / name) else []
        for box in boxes:
            if now - os.lstat(box).st_mtime > age:
                sizes += _file_sizes(box).values() if box.is_dir() else [0]
                if not dry_run:
                    shutil.rmtree(box) if box.is_dir() else box.unlink(missing_ok=True)
    return sizes
