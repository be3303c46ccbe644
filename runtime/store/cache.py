"""Compiled pieces on disk, each compiled once by all processes; and looking after a whole cache.

An entry is ``<root>/<hash>/rank_<rank>_<dp_rank>/<tag>/`` with ``artifacts/<name>.bin``, each
sealed by itself, and texts for people. Trouble with the disk costs a warning and a compilation.
Only `collect` removes anything, and no link is followed. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, TypeVar

from piecework.errors import CacheError
from piecework.runtime.store import files
from piecework.runtime.store.factors import FACTORS_NAME, Difference, KeyFactors
from piecework.runtime.store.package import Place, packed, unpacked

T = TypeVar("T")
logger = logging.getLogger(__name__)

KIND = "piecework compiled piece"
INDEX_NAME = "piecework_compile_cache.py"
ARTIFACTS_DIRECTORY = "artifacts"
QUARANTINE_DIRECTORY = ".quarantine"
COMPILE_LOCK_SECONDS = 3600.0
# A lock that nobody has taken for so long is nobody's.
LOCK_AGE_SECONDS = 7 * 24 * 3600.0
_ENTRY = re.compile(r"([0-9a-f]{32})/rank_([0-9]{1,7})_([0-9]{1,7})/([^/]+)")
_END = ".bin"
_TOUCH_SECONDS = 3600.0
_TROUBLE = (OSError, CacheError)


class CacheResult(NamedTuple):
    """The bytes, whether this call compiled them, and whether they are saved."""

    data: bytes | None
    compiled: bool
    saved: bool


class Identity(NamedTuple):
    """Which entry this is: the key's hash, the ranks and the model's tag."""

    key: str
    rank: int
    dp_rank: int
    tag: str

    def __str__(self) -> str:
        return f"{self.key}/rank_{self.rank}_{self.dp_rank}/{self.tag}"


def open_entry(
    root: Place | None,
    factors: KeyFactors,
    rank: int = 0,
    dp_rank: int = 0,
    tag: str = "backbone",
    *,
    hmac_key: bytes | None = None,
) -> CacheEntry:
    """The entry for these factors; it is created when something is first saved."""
    if hmac_key is not None:
        factors = factors.signed_with(hmac_key)
    real = files.resolve_root(files.default_root() if root is None else root)
    identity = Identity(factors.hash, rank, dp_rank, tag)
    entry = CacheEntry(real, identity, factors.to_json(), hmac_key)
    entry.check_directories()
    index = entry.directory / INDEX_NAME
    with contextlib.suppress(OSError):  # the collector sees that it is in use
        if time.time() - index.stat().st_mtime > _TOUCH_SECONDS:
            os.utime(index)
    return entry


class CacheEntry:
    """The artifacts and texts of one key, rank and tag. Made by `open_entry`."""

    def __init__(
        self, root: Path, identity: Identity, factors: bytes = b"", hmac_key: bytes | None = None
    ) -> None:
        self.root, self.identity, self.directory = root, identity, root / str(identity)
        self._factors_json, self._hmac_key = factors, hmac_key
        self._warned: set[str] = set()

    def names(self) -> tuple[str, ...]:
        """The artifacts that there are now, sound or not, sorted."""
        try:
            found = os.listdir(self.directory / ARTIFACTS_DIRECTORY)
        except OSError:
            return ()
        return tuple(sorted(each.removesuffix(_END) for each in found if each.endswith(_END)))

    def read(self, name: str) -> bytes:
        """The bytes saved under ``name``. Raises `FileNotFoundError`, or `Damaged`."""
        raw = files.read_regular(self.directory / _place(name))
        held, facts = unpacked(raw, self._hmac_key, KIND)
        if facts != self._facts(name):
            raise files.Damaged(f"it is that of {facts}")
        return held[""]

    def get(self, name: str) -> bytes | None:
        """The bytes saved under ``name`` once their SHA-256 is right, else None."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None
        except _TROUBLE as error:
            self.reject(name, str(error))
        return None

    def reject(self, name: str, reason: str) -> None:
        """Put the artifact ``name``, which is damaged or unfit, into quarantine."""
        shelf, place = self.root / QUARANTINE_DIRECTORY, self.directory / _place(name)
        where = f"moved to {shelf}"
        try:
            files.make_directory(shelf, inside=self.root)
            os.replace(place, shelf / f"{self.identity.key[:12]}-{time.time_ns()}-{place.name}")
        except _TROUBLE as error:
            where = f"it stays ({error})"
        self._warn("damage", f"{_place(name)}: {reason}; {where}, compiling again")

    def put(self, name: str, data: bytes) -> bool:
        """Save ``data`` under ``name``, in place of what was there; whether it is saved."""
        sealed = packed({"": data}, self._facts(name), self._hmac_key, KIND)
        return self._write({_place(name): sealed})

    def write_texts(self, texts: Mapping[str, str]) -> bool:
        """Save texts for people, which nothing reads; whether they are saved."""
        return self._write({name: text.encode() for name, text in texts.items()})

    def get_or_compile(self, name: str, compile_fn: Callable[[], bytes | None]) -> CacheResult:
        """The bytes of ``name``, or one process compiles and others wait; None is not saved."""
        data = self.get(name)
        with contextlib.ExitStack() as stack:
            if data is None:
                what = f"{self.identity}\nartifact\n{name}"
                try:
                    stack.enter_context(files.locked(self.root, what, COMPILE_LOCK_SECONDS))
                    data = self.get(name)
                except _TROUBLE as error:
                    self._cannot_save(error)
            if data is not None:
                return CacheResult(data, compiled=False, saved=True)
            data = compile_fn()
            saved = data is not None and self.put(name, data)
            return CacheResult(data, compiled=True, saved=saved)

    def _write(self, written: Mapping[str, bytes]) -> bool:
        """Save under the entry's lock; whatever prevents it is warned of once."""
        try:
            with self.changing():
                folder = self.directory / ARTIFACTS_DIRECTORY
                files.make_directory(folder, inside=self.root)
                for at in (self.directory, folder):
                    for path in at.glob(f"{files.TEMPORARY_PREFIX}*"):
                        path.unlink(missing_ok=True)  # of killed writers
                if not (self.directory / FACTORS_NAME).exists():
                    written = {FACTORS_NAME: self._factors_json, **written}
                for name, data in written.items():
                    files.write_atomic(self.directory / name, data)
                places = {name: self.directory / _place(name) for name in self.names()}
                sizes = {name: place.lstat().st_size for name, place in places.items()}
                index = json.dumps({"artifacts": sizes}, indent=1) + "\n"
                files.write_atomic(self.directory / INDEX_NAME, index.encode())
                return True
        except _TROUBLE as error:
            self._cannot_save(error)
            return False

    def changing(self, timeout_s: float = 60.0) -> contextlib.AbstractContextManager[None]:
        """Hold the right to change the entry's files. Short: no compiler runs inside."""
        return files.locked(self.root, f"{self.identity}\nfiles", timeout_s)

    def check_directories(self) -> None:
        """Raise `CacheError` if a directory of the entry is a link, or not ours alone."""
        inside = self.directory / ARTIFACTS_DIRECTORY
        for level in (*reversed(inside.parents[:3]), inside):
            files.check_directory(level)
        for name in (files.LOCKS_DIRECTORY, QUARANTINE_DIRECTORY):
            files.check_directory(self.root / name)

    def _facts(self, name: str) -> dict[str, object]:
        """What an artifact says of itself, so that a copy of it elsewhere is refused."""
        return {"entry": str(self.identity), "name": name}

    def _cannot_save(self, error: Exception) -> None:
        self._warn("save", f"it cannot be written ({error}); going on without saving")

    def _warn(self, kind: str, text: str) -> None:
        """Warn of each kind of trouble once; the rest is there for whoever listens at INFO."""
        level = logging.INFO if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "compile cache %s: %s", self.directory, text)


def _place(name: str) -> str:
    """Where an artifact lies in its entry."""
    return f"{ARTIFACTS_DIRECTORY}/{name}{_END}"


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
    kept_entries: int
    kept_bytes: int


def list_entries(root: Place) -> tuple[EntrySummary, ...]:
    """All entries, the one used last first; one with no index was never finished, or is removed."""
    real = files.resolve_root(root)
    found = []
    for path in real.glob("*/rank_*/*"):
        named = _ENTRY.fullmatch(path.relative_to(real).as_posix())
        linked = any(each.is_symlink() for each in (path, *path.parents[:2]))
        if not named or linked or not path.is_dir():
            continue
        size, artifacts, last_used = 0, 0, 0.0
        for each in path.rglob("*"):
            with contextlib.suppress(OSError):
                info = each.lstat()
                size += info.st_size if stat.S_ISREG(info.st_mode) else 0
                artifacts += each.name.endswith(_END)
                last_used = info.st_mtime if each.name == INDEX_NAME else last_used
        identity = Identity(named[1], int(named[2]), int(named[3]), named[4])
        found.append(EntrySummary(identity, size, artifacts, last_used))
    return tuple(sorted(found, key=lambda entry: (-entry.last_used, str(entry.identity))))


def saved_keys(root: Place) -> dict[str, KeyFactors]:
    """Every readable key in the cache by its hash, the one used last first."""
    real = files.resolve_root(root)
    found: dict[str, KeyFactors] = {}
    for entry in list_entries(real):
        with contextlib.suppress(*_TROUBLE):
            found.setdefault(entry.identity.key, _factors(real, entry.identity))
    return found


def _factors(real: Path, identity: Identity) -> KeyFactors:
    """What an entry's key was made of."""
    factors = KeyFactors.from_json(files.read_regular(real / str(identity) / FACTORS_NAME))
    if factors.hash != identity.key:
        raise CacheError("its hash is not the name of the entry's directory")
    return factors


def nearest(
    current: KeyFactors, keys: Iterable[KeyFactors]
) -> tuple[KeyFactors, tuple[Difference, ...]] | None:
    """The key with the fewest differences, and what they are; None where there is no key."""
    compared = [(key, current.differences(key)) for key in keys]
    return min(compared, key=lambda pair: len(pair[1]), default=None)


def verify(root: Place, hmac_key: bytes | None = None) -> Verification:
    """Check every byte of every artifact, and with a key the signatures of signed entries."""
    real = files.resolve_root(root)
    findings: list[Finding] = []
    sizes: list[int] = []

    def checked(identity: Identity, file: str, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except _TROUBLE as error:
            findings.append(Finding(str(identity), file, str(error)))
            return None

    entries = [each.identity for each in list_entries(real) if each.last_used]
    for identity in entries:
        factors = checked(identity, FACTORS_NAME, partial(_factors, real, identity))
        signed = factors is not None and "signing" in factors.groups
        entry = CacheEntry(real, identity, hmac_key=hmac_key if signed else None)
        if checked(identity, ".", lambda entry=entry: entry.check_directories() or entry) is None:
            continue
        for name in entry.names():
            data = checked(identity, _place(name), partial(entry.read, name))
            sizes += [] if data is None else [len(data)]
    return Verification(len(entries), len(sizes), sum(sizes), tuple(findings))


def collect(
    root: Place, max_bytes: int | None = None, max_age_s: float | None = None, dry_run: bool = False
) -> CollectionReport:
    """Remove entries by age, then the longest unused down to ``max_bytes``; unused locks; and what
    was quarantined before ``max_age_s``, or ever.
    """
    real, now = files.resolve_root(root), time.time()
    entries = list_entries(real)
    totals = accumulate(each.bytes for each in entries)  # the one used last first
    chosen = [
        each
        for each, total in zip(entries, totals, strict=True)
        if (max_age_s is not None and now - each.last_used > max_age_s)
        or (max_bytes is not None and total > max_bytes)
    ]
    try:
        removed = [each for each in chosen if dry_run or _remove_entry(real, each.identity)]
        if not dry_run:
            _sweep_aside(real, now, max_age_s)
    except OSError as error:
        hint = "is it read-only, or full of what another user wrote?"
        raise CacheError(f"the cache cannot be cleaned up: {error}", hint=hint) from error
    kept = [each.bytes for each in entries if each not in removed]
    return CollectionReport(
        removed=tuple(str(each.identity) for each in removed),
        busy=tuple(str(each.identity) for each in chosen if each not in removed),
        removed_bytes=sum(each.bytes for each in removed),
        kept_entries=len(kept),
        kept_bytes=sum(kept),
    )


def _remove_entry(real: Path, identity: Identity) -> bool:
    """Whether it could be removed: somebody may be changing it."""
    entry = CacheEntry(real, identity)
    try:
        with entry.changing(0.0):
            (entry.directory / INDEX_NAME).unlink(missing_ok=True)  # with it the entry is gone
            shutil.rmtree(entry.directory, ignore_errors=True)
    except (TimeoutError, files.Damaged):
        return False
    for parent in entry.directory.parents[:2]:
        with contextlib.suppress(OSError):  # other ranks or tags are still in it
            os.rmdir(parent)
    return True


def _sweep_aside(real: Path, now: float, max_age_s: float | None) -> None:
    """Remove old quarantined files, and locks that nobody uses."""
    quarantined = -1.0 if max_age_s is None else max_age_s
    ages = {QUARANTINE_DIRECTORY: quarantined, files.LOCKS_DIRECTORY: LOCK_AGE_SECONDS}
    for name, age in ages.items():
        for path in (real / name).iterdir() if files.check_directory(real / name) else ():
            if now - path.lstat().st_mtime > age:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
