"""A compilation's pieces on disk: each compiled once by all processes, given out if every byte is
right.

An entry is ``<root>/<hash>/rank_<rank>_<dp_rank>/<tag>/`` with an index, ``artifacts/<sha256>.bin``
and texts for people. A killed writer leaves a sound entry, and a disk that is full, read-only or
damaged costs a warning and a compilation.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from piecework.errors import CacheError
from piecework.runtime.store.factors import FACTORS_NAME, KeyFactors
from piecework.runtime.store.files import (
    FULL_DISK,
    LOCKS_DIRECTORY,
    TEMPORARY_PREFIX,
    LockTimeout,
    UnsafeFile,
    check_directory,
    default_root,
    locked,
    make_directory,
    read_regular,
    resolve_root,
    write_atomic,
)
from piecework.runtime.store.manifest import Damaged, Record, Sealed

logger = logging.getLogger(__name__)
T = TypeVar("T")

INDEX_NAME = "piecework_compile_cache.py"
ARTIFACTS_DIRECTORY = "artifacts"
QUARANTINE_DIRECTORY = ".quarantine"
COMPILE_LOCK_SECONDS = 3600.0
_CHANGE_LOCK_SECONDS = 60.0
_TOUCH_SECONDS = 3600.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_TROUBLE = (OSError, LockTimeout, CacheError, UnsafeFile, Damaged)


class CacheResult(NamedTuple):
    """The bytes, whether this call compiled them, and whether they are saved."""

    data: bytes
    compiled: bool
    saved: bool


class Identity(NamedTuple):
    """Which entry this is: the key's hash, the ranks and the model's tag."""

    key: str
    rank: int
    dp_rank: int
    tag: str

    @property
    def parts(self) -> tuple[str, str, str]:
        """The three directories below the root."""
        return (self.key, f"rank_{self.rank}_{self.dp_rank}", self.tag)

    def __str__(self) -> str:
        return "/".join(self.parts)


def open_entry(
    root: str | os.PathLike[str] | None,
    factors: KeyFactors,
    rank: int = 0,
    dp_rank: int = 0,
    tag: str = "backbone",
    *,
    hmac_key: bytes | None = None,
    lock_timeout_s: float = COMPILE_LOCK_SECONDS,
) -> CacheEntry:
    """The entry for these factors; it is created when something is first saved.

    Args:
        root: the cache directory; None for `default_root`.
        rank, dp_rank: this process's.
        tag: which model of the process.
        hmac_key: sign the index with this secret, and accept none that it did not sign.
        lock_timeout_s: how long to wait for another process that compiles the same artifact.

    Raises:
        CacheError: a directory that others can write, that is somebody else's, or a link.

    Example:
        >>> entry = open_entry(None, KeyFactors({"versions": {"torch": "2.13.0"}}))
        >>> entry.get_or_compile(content_key(graph_text, "1-16"), compile_to_bytes).data
    """
    if hmac_key is not None:
        factors = factors.signed_with(hmac_key)
    real = resolve_root(default_root() if root is None else root)
    identity = Identity(factors.hash, rank, dp_rank, tag)
    entry = CacheEntry(real, identity, factors.to_json(), hmac_key, lock_timeout_s)
    entry.check_directories()
    index = entry.directory / INDEX_NAME
    with contextlib.suppress(OSError):  # the collector sees that it is in use
        if time.time() - index.stat().st_mtime > _TOUCH_SECONDS:
            os.utime(index)
    return entry


class CacheEntry:
    """The artifacts and texts of one key, rank and tag. Made by `open_entry`."""

    def __init__(
        self,
        root: Path,
        identity: Identity,
        factors_json: bytes = b"",
        hmac_key: bytes | None = None,
        lock_timeout_s: float = COMPILE_LOCK_SECONDS,
    ) -> None:
        self.root = root
        self.identity = identity
        self.directory = root.joinpath(*identity.parts)
        self._factors_json = factors_json
        self._sealed = Sealed(INDEX_NAME, f"cache entry {identity}", place_of, hmac_key)
        self._lock_timeout_s = lock_timeout_s
        self._read_only = False
        self._warned: set[str] = set()

    # --- reading -------------------------------------------------------------------------------------

    def names(self) -> tuple[str, ...]:
        """The artifacts that the index lists now, sorted."""
        return tuple(sorted(self._settled(self.records) or ()))

    def get(self, name: str) -> bytes | None:
        """The bytes saved under ``name`` once their SHA-256 is right, else None."""

        def read() -> bytes | None:
            record = self.records().get(name)
            return None if record is None else self.read(record)

        return self._settled(read)

    def records(self) -> dict[str, Record]:
        """What the index lists; nothing where there is none. Raises `Damaged`."""
        try:
            return self._sealed.read(self.directory).files
        except FileNotFoundError:
            return {}

    def read(self, record: Record) -> bytes:
        """The bytes of an artifact. Raises `Damaged`."""
        return self._sealed.read_file(self.directory, "", record)

    def _settled(self, read: Callable[[], T]) -> T | None:
        """Run ``read``; what looks damaged is read again under the lock."""
        try:
            return read()
        except OSError as error:
            self._warn("unreadable", f"it cannot be read ({error}); compiling instead")
            return None
        except Damaged as error:
            damage = error
        try:
            with self.changing():
                try:
                    return read()
                except Damaged as error:
                    damage = error
                    self._quarantine(damage)
        except _TROUBLE:
            self._warn("damage", f"{damage}; it can't be moved aside and is ignored, compiling")
        return None

    def _quarantine(self, damage: Damaged) -> None:
        """Move what is damaged away, and have the index forget it; the caller holds the lock."""
        source = self.directory / damage.file
        where = "it is gone"
        if os.path.lexists(source):
            shelf = self.root / QUARANTINE_DIRECTORY
            try:
                make_directory(shelf, inside=self.root)
                box = tempfile.mkdtemp(prefix=f"{self.identity.key[:12]}-", dir=shelf)
                where = f"moved to {box}"
                os.rename(source, Path(box) / source.name)
            except OSError:  # a full disk may refuse the new directory
                os.unlink(source)
                where = "deleted"
        self._warn("damage", f"{damage}; {where}, compiling again")
        if damage.file != INDEX_NAME:
            kept = {n: r for n, r in self.records().items() if place_of(n, r) != damage.file}
            with contextlib.suppress(OSError):  # then the next reader finds the artifact missing
                self._sealed.write(self.directory, {}, kept, {})

    # --- writing -------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> bool:
        """Save ``data`` under ``name``, in place of what was there; whether it is saved."""
        return self._change({name: data}, {})

    def write_texts(self, texts: Mapping[str, str]) -> bool:
        """Save texts for people, which nothing reads; whether they are saved."""
        return self._change({}, {name: text.encode() for name, text in texts.items()})

    def get_or_compile(self, name: str, compile_fn: Callable[[], bytes]) -> CacheResult:
        """The bytes of ``name``; if there are none, one of all processes and threads compiles them.

        The others wait for it and load. An exception of ``compile_fn`` goes to its caller, nothing
        is saved, and the next in the line tries. Where saving is impossible each one compiles for
        itself.
        """
        if (data := self.get(name)) is not None:
            return CacheResult(data, compiled=False, saved=True)
        with contextlib.ExitStack() as stack:
            if not self._read_only:
                what = f"{self.identity}\nartifact\n{name}"
                try:
                    stack.enter_context(locked(self.root, what, self._lock_timeout_s))
                    data = self.get(name)
                except _TROUBLE as error:
                    self._cannot_save(error)
            if data is not None:
                return CacheResult(data, compiled=False, saved=True)
            data = compile_fn()
            return CacheResult(data, compiled=True, saved=self.put(name, data))

    def reject(self, name: str, reason: str) -> None:
        """Put the artifact ``name`` into quarantine though its digest is right."""

        def refuse() -> None:
            record = self.records().get(name)
            if record is not None:
                raise Damaged(reason, place_of(name, record))

        self._settled(refuse)

    def _change(self, added: Mapping[str, bytes], texts: Mapping[str, bytes]) -> bool:
        """Save under the entry's lock; whatever prevents it is warned of once."""
        if self._read_only:
            return False
        try:
            with self.changing():
                try:
                    records = self.records()
                except Damaged as damage:
                    self._quarantine(damage)
                    records = {}
                folder = self.directory / ARTIFACTS_DIRECTORY
                make_directory(folder, inside=self.root)
                for at in (self.directory, folder):
                    for path in at.glob(f"{TEMPORARY_PREFIX}*"):
                        path.unlink(missing_ok=True)  # of killed writers
                for name, data in {FACTORS_NAME: self._factors_json, **texts}.items():
                    with contextlib.suppress(OSError, UnsafeFile):
                        if read_regular(self.directory / name, len(data)) == data:
                            continue
                    write_atomic(self.directory / name, data)
                if added:
                    self._sealed.write(self.directory, added, records, {})
                return True
        except _TROUBLE as error:
            self._cannot_save(error)
            return False

    # --- locks, checks and warnings ------------------------------------------------------------------

    def changing(
        self, timeout_s: float = _CHANGE_LOCK_SECONDS
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the right to change the entry's files. Short: no compiler runs inside."""
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return locked(self.root, f"{self.identity}\nfiles", timeout_s)

    def check_directories(self) -> None:
        """Raise `CacheError` if a directory of the entry is a link, or not ours alone."""
        level = self.root
        for part in (*self.identity.parts, ARTIFACTS_DIRECTORY):
            level = level / part
            check_directory(level)
        for own in (LOCKS_DIRECTORY, QUARANTINE_DIRECTORY):
            check_directory(self.root / own)

    def _cannot_save(self, error: Exception) -> None:
        code = error.errno if isinstance(error, OSError) else None
        self._read_only = self._read_only or code in _READ_ONLY
        why = "it is read-only" if code in _READ_ONLY else "it cannot be written"
        why = "there is no space left" if code in FULL_DISK else why
        self._warn("save", f"{why} ({error}); going on without saving")

    def _warn(self, kind: str, text: str) -> None:
        """Warn of each kind of trouble once; the rest is there for whoever listens at INFO."""
        level = logging.INFO if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "compile cache %s: %s", self.directory, text)


def place_of(name: str, record: Record) -> str:
    """Where an artifact lies in its entry, whatever it is called."""
    return f"{ARTIFACTS_DIRECTORY}/{record.digest}.bin"
