"""One entry of the cache. In: names, bytes, and a way to compile what is missing. Out: verified bytes by name, each compiled once.

Layout: ``<root>/<hash>/rank_<rank>_<dp_rank>/<tag>/`` with the index ``piecework_compile_cache.py``, the bytes ``artifacts/<sha256>.bin`` and texts for
people. Bytes are there before the index names them, and the index is replaced in one step, so that a reader needs no lock and a killed writer leaves a sound
entry. It never raises because the disk is full, read-only or damaged: it warns once of each, and compiles.
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
from piecework.runtime.model_tag import TAG
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
    sync_directory,
    write_atomic,
)
from piecework.runtime.store.manifest import (
    MAX_MANIFEST_BYTES,
    Damaged,
    Record,
    decode,
    encode,
    read_recorded,
    record_of,
    records_of,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

INDEX_NAME = "piecework_compile_cache.py"
ARTIFACTS_DIRECTORY = "artifacts"
QUARANTINE_DIRECTORY = ".quarantine"
FORMAT = 2
MIN_KEY_BYTES = 16
COMPILE_LOCK_SECONDS = 3600.0
_CHANGE_LOCK_SECONDS = 60.0
_TOUCH_SECONDS = 3600.0
_MAX_RANK = 10**6
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


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
        tag: which model of the process (``backbone``, ``eagle_head``); letters, digits, ``_ . -``.
        hmac_key: sign the index with this secret, and accept none that it did not sign (16 bytes or more).
        lock_timeout_s: how long to wait for another process that compiles the same artifact.

    Raises:
        CacheError: an impossible tag, rank or key, or a directory that others can write, that is somebody else's, or a link.

    Example:
        >>> entry = open_entry(None, KeyFactors({"versions": {"torch": "2.13.0"}}))
        >>> entry.get_or_compile(content_key(graph_text, "1-16"), compile_to_bytes).data
    """
    for value, name in ((rank, "rank"), (dp_rank, "dp_rank")):
        if type(value) is not int or not 0 <= value <= _MAX_RANK:
            raise CacheError(
                f"a rank must be an integer from 0 to {_MAX_RANK}, not {value!r}", where=name
            )
    if not isinstance(tag, str) or TAG.fullmatch(tag) is None:
        raise CacheError(
            "a tag must be 1 to 100 letters, digits, `_`, `.` or `-`, and not start with `.` or `-`",
            where=ascii(tag)[:80],
        )
    if hmac_key is not None:
        if not isinstance(hmac_key, bytes) or len(hmac_key) < MIN_KEY_BYTES:
            raise CacheError(
                f"the cache's HMAC key must be bytes, at least {MIN_KEY_BYTES} of them",
                where="hmac_key",
            )
        factors = factors.signed_with(hmac_key)
    real = resolve_root(default_root() if root is None else root)
    identity = Identity(factors.hash, rank, dp_rank, tag)
    entry = CacheEntry(real, identity, factors.to_json(), hmac_key, lock_timeout_s)
    entry.check_directories()
    entry.touch()
    return entry


class CacheEntry:
    """The artifacts and texts of one key, rank and tag. Made by `open_entry`; threads may share it."""

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
        self._key = hmac_key
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
        """What the index lists: name → digest and size; nothing where there is none. Raises `Damaged`."""
        try:
            raw = read_regular(self.directory / INDEX_NAME, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return {}
        except UnsafeFile as error:
            raise Damaged(str(error), INDEX_NAME) from error
        facts = decode(raw, self._key, INDEX_NAME)
        if facts.get("format") != FORMAT or facts.get("entry") != str(self.identity):
            raise Damaged("it was made for another entry, or in another format", INDEX_NAME)
        return records_of(facts, "pieces", INDEX_NAME)

    def read(self, record: Record) -> bytes:
        """The bytes of an artifact. Raises `Damaged`."""
        file = f"{ARTIFACTS_DIRECTORY}/{record.digest}.bin"
        return read_recorded(self.directory / file, record, file)

    def _settled(self, read: Callable[[], T]) -> T | None:
        """Run ``read``; what looks damaged is looked at again under the lock, and put into quarantine if it still does."""
        try:
            return read()
        except Damaged as error:
            damage = error
        except OSError as error:
            self._warn("unreadable", f"it cannot be read ({error}); compiling instead")
            return None
        try:
            with self.changing():
                try:
                    return read()
                except Damaged as error:
                    damage = error
                    self._quarantine(damage)
        except (OSError, LockTimeout, UnsafeFile, CacheError):
            ignored = "it cannot be moved aside and is ignored, compiling instead"
            self._warn("damage", f"{damage}; {ignored}")
        return None

    def _quarantine(self, damage: Damaged) -> None:
        """Move what is damaged out of the way, and have the index forget it; the caller holds the lock."""
        source = self.directory / damage.file
        where = "it is gone"
        if os.path.lexists(source):
            shelf = self.root / QUARANTINE_DIRECTORY
            try:
                make_directory(shelf, inside=self.root)
                box = tempfile.mkdtemp(prefix=f"{self.identity.key[:12]}-", dir=shelf)
                where = f"moved to {box}"
                os.rename(source, Path(box) / source.name)
            except OSError:
                # A full disk may refuse the new directory; what is damaged must still not be found again.
                os.unlink(source)
                where = "deleted"
        self._warn("damage", f"{damage}; {where}, compiling again")
        if damage.file != INDEX_NAME:
            kept = {n: r for n, r in self.records().items() if r.digest != source.stem}
            with contextlib.suppress(OSError):  # then the next reader finds the artifact missing
                self._write_index(kept)

    # --- writing -------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> bool:
        """Save ``data`` under ``name``, in place of what was there. Returns whether it is saved."""
        return self._change({name: data}, {})

    def write_texts(self, texts: Mapping[str, str]) -> bool:
        """Save texts for people beside the artifacts, which nothing reads. Returns whether they are saved."""
        return self._change({}, {name: text.encode() for name, text in texts.items()})

    def get_or_compile(self, name: str, compile_fn: Callable[[], bytes]) -> CacheResult:
        """The bytes of ``name``; if there are none, exactly one of all processes and threads compiles them.

        The others wait for it and load. An exception of ``compile_fn`` goes to its caller, nothing is saved, and the next in the
        line tries. Where saving is impossible each one compiles for itself.
        """
        if (data := self.get(name)) is not None:
            return CacheResult(data, compiled=False, saved=True)
        with contextlib.ExitStack() as stack:
            if self._wait_for_turn(stack, name) and (data := self.get(name)) is not None:
                return CacheResult(data, compiled=False, saved=True)
            data = compile_fn()
            return CacheResult(data, compiled=True, saved=self.put(name, data))

    def reject(self, name: str, reason: str) -> None:
        """Put the artifact ``name`` into quarantine though its digest is right: its loader refused it."""

        def refuse() -> None:
            record = self.records().get(name)
            if record is not None:
                raise Damaged(reason, f"{ARTIFACTS_DIRECTORY}/{record.digest}.bin")

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
                make_directory(self.directory / ARTIFACTS_DIRECTORY, inside=self.root)
                self._sweep()
                for name, data in {FACTORS_NAME: self._factors_json, **texts}.items():
                    self._write(name, data)
                if added:
                    self._add(records, added)
                return True
        except (OSError, LockTimeout, CacheError, Damaged, UnsafeFile) as error:
            self._cannot_save(error)
            return False

    def _sweep(self) -> None:
        """Remove what killed writers left; the caller holds the lock."""
        for folder in (self.directory, self.directory / ARTIFACTS_DIRECTORY):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                path.unlink(missing_ok=True)

    def _add(self, records: Mapping[str, Record], added: Mapping[str, bytes]) -> None:
        new = {name: record_of(data) for name, data in added.items()}
        written: list[Path] = []
        try:
            for name, data in added.items():
                file = f"{ARTIFACTS_DIRECTORY}/{new[name].digest}.bin"
                if self._write(file, data):
                    written.append(self.directory / file)
            sync_directory(self.directory / ARTIFACTS_DIRECTORY)
            self._write_index({**records, **new})
        except BaseException:
            for path in written:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def _write(self, file: str, data: bytes) -> bool:
        """Write a file unless it holds just that; returns whether it was written."""
        path = self.directory / file
        with contextlib.suppress(OSError, UnsafeFile):
            if read_regular(path, len(data)) == data:
                return False
        write_atomic(path, data)
        return True

    def _write_index(self, records: Mapping[str, Record]) -> None:
        facts = {"format": FORMAT, "entry": str(self.identity), "pieces": records}
        write_atomic(self.directory / INDEX_NAME, encode(facts, self._key))
        sync_directory(self.directory)

    # --- locks, checks and warnings ------------------------------------------------------------------

    def changing(
        self, timeout_s: float = _CHANGE_LOCK_SECONDS
    ) -> contextlib.AbstractContextManager[None]:
        """Hold the right to change the entry's files. Short: no compiler runs inside."""
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return locked(self.root, f"{self.identity}\nfiles", timeout_s)

    def _wait_for_turn(self, stack: contextlib.ExitStack, name: str) -> bool:
        """Take the lock for compiling ``name``; False where there can be none."""
        if self._read_only:
            return False
        what = f"{self.identity}\nartifact\n{name}"
        try:
            stack.enter_context(locked(self.root, what, self._lock_timeout_s))
        except (OSError, LockTimeout, CacheError, UnsafeFile) as error:
            self._cannot_save(error)
            return False
        return True

    def check_directories(self) -> None:
        """Raise `CacheError` if a directory of the entry is a link, somebody else's, or writable by others."""
        level = self.root
        for part in (*self.identity.parts, ARTIFACTS_DIRECTORY):
            level = level / part
            check_directory(level)
        for own in (LOCKS_DIRECTORY, QUARANTINE_DIRECTORY):
            check_directory(self.root / own)

    def touch(self) -> None:
        """Note that the entry is in use, for the collector."""
        index = self.directory / INDEX_NAME
        with contextlib.suppress(OSError):
            if time.time() - index.stat().st_mtime > _TOUCH_SECONDS:
                os.utime(index)

    def _cannot_save(self, error: Exception) -> None:
        code = error.errno if isinstance(error, OSError) else None
        if code in _READ_ONLY:
            self._read_only = True
            self._warn("save", f"it is read-only ({error}); going on without saving")
        elif code in FULL_DISK:
            self._warn("save", f"there is no space left ({error}); going on without saving")
        else:
            self._warn("save", f"it cannot be written ({error}); going on without saving")

    def _warn(self, kind: str, text: str) -> None:
        """Warn of each kind of trouble once; the rest is there for whoever listens at INFO."""
        level = logging.INFO if kind in self._warned else logging.WARNING
        self._warned.add(kind)
        logger.log(level, "compile cache %s: %s", self.directory, text)
