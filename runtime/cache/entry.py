"""One entry of the cache. In: names, bytes, and a way to compile what is missing. Out: verified bytes by name, each compiled once.

It never returns a byte that was not saved under that name, never raises because the disk is full, read-only or
damaged (it warns once of each and compiles), and never looks into the bytes.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from piecework.errors import CacheError
from piecework.runtime.cache.files import FACTORS_NAME, EntryFiles, EntryState
from piecework.runtime.cache.literal_index import INDEX_NAME, check_name
from piecework.runtime.cache.locks import EntryLocks, LockTimeout
from piecework.runtime.cache.manifest import MANIFEST_NAME, Damaged, sha256
from piecework.runtime.cache.safety import UnsafeFile

logger = logging.getLogger(__name__)
T = TypeVar("T")

TEXT_NAMES = ("computation_graph.py", "stitched.py", "transformed_code.py")
COMPILE_LOCK_SECONDS = 3600.0
CHANGE_LOCK_SECONDS = 60.0
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TOUCH_SECONDS = 3600.0
_REREADS = 3
_REREAD_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class CacheResult:
    """What `CacheEntry.get_or_compile` returns: the bytes, whether this call compiled them, whether they are saved."""

    data: bytes
    compiled: bool
    saved: bool


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What happened through one `CacheEntry`."""

    hits: int = 0
    misses: int = 0
    compiled: int = 0
    saved: int = 0
    quarantined: int = 0


@dataclass(slots=True)
class _Shared:
    """What the threads that use one entry change together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    stats: CacheStats = field(default_factory=CacheStats)
    warned: set[str] = field(default_factory=set)
    compiling: set[tuple[int, str]] = field(default_factory=set)
    read_only: bool = False


class CacheEntry:
    """The artifacts and texts of one key, rank and tag. Made by `CacheStore.open`; safe to share between threads.

    Args:
        files: the entry's files, or ``None`` for a disabled cache, which keeps nothing and touches no file.
        locks: the entry's locks.
        factors_json: content of ``cache_key_factors.json``.
        lock_timeout_s: how long to wait for another process that compiles the same artifact.
    """

    def __init__(
        self,
        files: EntryFiles | None,
        locks: EntryLocks | None,
        factors_json: bytes,
        lock_timeout_s: float = COMPILE_LOCK_SECONDS,
    ) -> None:
        self._files = files
        self._locks = locks
        self._factors_json = factors_json
        self._lock_timeout_s = lock_timeout_s
        self._shared = _Shared()

    @property
    def disabled(self) -> bool:
        """Whether nothing is kept."""
        return self._files is None

    @property
    def directory(self) -> Path | None:
        """The entry's directory (it may not exist yet); ``None`` if disabled."""
        return None if self._files is None else self._files.directory

    @property
    def stats(self) -> CacheStats:
        """A snapshot of the counters."""
        return self._shared.stats

    def names(self) -> tuple[str, ...]:
        """The artifacts that the index lists now, sorted."""
        state = self._settle(lambda files: files.read())
        return () if state is None else tuple(sorted(state.records))

    def get(self, name: str) -> bytes | None:
        """Return the bytes saved under `name` once their SHA-256 is right, else ``None``."""
        data = self._lookup(check_name(name))
        self._count(hits=int(data is not None), misses=int(data is None))
        return data

    def put(self, name: str, data: bytes) -> bool:
        """Save `data` under `name`, replacing what was there. Returns whether it is saved."""
        if not isinstance(data, bytes):
            raise CacheError("only bytes can be saved", where=f"{name}: {type(data).__name__}")
        saved = self._change(artifacts={check_name(name): data})
        self._count(saved=int(saved))
        return saved

    def get_or_compile(self, name: str, compile_fn: Callable[[], bytes]) -> CacheResult:
        """Return the bytes of `name`; if there are none, exactly one of all processes and threads compiles them.

        The others wait for it and load. An exception of `compile_fn` goes to its caller, nothing is saved, and
        the next in the line tries. Where saving is impossible each one compiles for itself.
        """
        if (data := self.get(name)) is not None:
            return CacheResult(data, compiled=False, saved=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._not_nested(name))
            if self._wait_for_turn(stack, name) and (data := self._lookup(name)) is not None:
                self._count(hits=1)
                return CacheResult(data, compiled=False, saved=True)
            data = compile_fn()
            self._count(compiled=1)
            return CacheResult(data, compiled=True, saved=self.put(name, data))

    def reject(self, name: str, reason: str) -> None:
        """Quarantine the artifact `name` though its checksum is right: its loader refused it."""
        check_name(name)

        def refuse(files: EntryFiles) -> None:
            record = files.read().records.get(name)
            if record is not None:
                file = files.artifact_path(record.digest)
                relative = str(file.relative_to(files.directory))
                raise Damaged(reason, file=relative, digest=record.digest, whole=False)

        self._settle(refuse)

    def write_text_files(self, texts: Mapping[str, str]) -> bool:
        """Save readable files beside the artifacts (`TEXT_NAMES`); equal content is not written again.

        Returns whether they are saved.
        """
        for name in texts:
            _check_text_name(name)
        return self._change(texts={name: text.encode("utf-8") for name, text in texts.items()})

    def read_text_file(self, name: str) -> str | None:
        """Return a text saved with `write_text_files` once its SHA-256 is right, else ``None``."""
        _check_text_name(name)
        data = self._read_text(name)
        return None if data is None else data.decode("utf-8")

    def verify_on_open(self) -> None:
        """Check manifest, index and texts, quarantine what is damaged, and note that the entry is in use.

        Artifacts are checked when they are read. Raises `CacheError` for an unsafe directory.
        """
        if self._files is None:
            return
        self._files.check_directories()
        state = self._settle(self._read_own)
        if state is None:
            return
        for name in state.text_names:
            self._read_text(name)
        manifest = self._files.directory / MANIFEST_NAME
        with contextlib.suppress(OSError):
            if time.time() - manifest.stat().st_mtime > _TOUCH_SECONDS:
                os.utime(manifest)

    def _read_text(self, name: str) -> bytes | None:
        return self._settle(lambda files: files.read_text(files.read(), name))

    def _read_own(self, files: EntryFiles) -> EntryState:
        """Read the entry and make sure that it was saved for exactly these factors."""
        state = files.read()
        accepted = state.manifest.files.get(FACTORS_NAME)
        if accepted is not None and sha256(self._factors_json) not in accepted:
            raise Damaged("it was saved for other key factors", file=FACTORS_NAME)
        return state

    def _lookup(self, name: str) -> bytes | None:
        def read(files: EntryFiles) -> bytes | None:
            record = files.read().records.get(name)
            return None if record is None else files.read_artifact(record)

        return self._settle(read)

    def _settle(self, read: Callable[[EntryFiles], T]) -> T | None:
        """Run `read`; what looks damaged is looked at again under the lock, and quarantined if it still does."""
        if self._files is None:
            return None
        try:
            return read(self._files)
        except Damaged:
            pass
        except OSError as error:
            self._warn("unreadable", f"it cannot be read ({error}); compiling instead")
            return None
        try:
            with self._changing():
                try:
                    return read(self._files)
                except Damaged as damage:
                    self._quarantine(self._files, damage)
                    return None
        except (OSError, LockTimeout, UnsafeFile):
            return self._settle_without_lock(self._files, read)

    def _settle_without_lock(self, files: EntryFiles, read: Callable[[EntryFiles], T]) -> T | None:
        """The same for a directory that cannot be locked: a writer elsewhere gets a moment to finish."""
        for attempt in range(_REREADS):
            try:
                return read(files)
            except Damaged as damage:
                if attempt == _REREADS - 1:
                    self._warn(
                        "damage",
                        f"{damage}; it cannot be moved aside and is ignored, compiling instead",
                    )
            except OSError as error:
                self._warn("unreadable", f"it cannot be read ({error}); compiling instead")
                return None
            time.sleep(_REREAD_SECONDS)
        return None

    def _quarantine(self, files: EntryFiles, damage: Damaged) -> None:
        target = files.quarantine(damage)
        self._count(quarantined=1)
        if damage.digest is not None:
            with contextlib.suppress(OSError):  # then the next reader finds the artifact missing
                files.change(files.read(), drop_digests=(damage.digest,))
        where = "deleted" if target is None else f"moved to {target}"
        self._warn("damage", f"{damage}; {where}, compiling again")

    def _change(
        self,
        *,
        artifacts: Mapping[str, bytes] | None = None,
        texts: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Save under the entry's lock; whatever prevents it is warned of once."""
        if self._files is None or self._shared.read_only:
            return False
        texts = {FACTORS_NAME: self._factors_json} | dict(texts or {})
        try:
            with self._changing():
                try:
                    state = self._read_own(self._files)
                except Damaged as damage:
                    self._quarantine(self._files, damage)
                    state = self._read_own(self._files)
                self._files.change(state, artifacts=artifacts, texts=texts)
                return True
        except (OSError, LockTimeout, CacheError, Damaged, UnsafeFile) as error:
            self._cannot_save(error)
            return False

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        if self._locks is None or self._shared.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return self._locks.changing(CHANGE_LOCK_SECONDS)

    def _wait_for_turn(self, stack: contextlib.ExitStack, name: str) -> bool:
        """Take the lock for compiling `name`; ``False`` where there can be none."""
        if self._locks is None or self._shared.read_only:
            return False
        try:
            stack.enter_context(self._locks.compiling(name, self._lock_timeout_s))
        except (OSError, LockTimeout, CacheError, UnsafeFile) as error:
            self._cannot_save(error)
            return False
        return True

    @contextlib.contextmanager
    def _not_nested(self, name: str) -> Iterator[None]:
        """Turn a compile function that asks for its own artifact into an error: it would wait for itself."""
        turn = (threading.get_ident(), name)
        if turn in self._shared.compiling:
            raise CacheError("an artifact is asked for while it is being compiled", where=name)
        self._shared.compiling.add(turn)
        try:
            yield
        finally:
            self._shared.compiling.discard(turn)

    def _cannot_save(self, error: Exception) -> None:
        code = error.errno if isinstance(error, OSError) else None
        if code in _READ_ONLY:
            self._shared.read_only = True
            self._warn("save", f"it is read-only ({error}); going on without saving")
        elif code in _FULL:
            self._warn("save", f"there is no space left ({error}); going on without saving")
        else:
            self._warn("save", f"it cannot be written ({error}); going on without saving")

    def _warn(self, kind: str, text: str) -> None:
        """Warn of each kind of trouble once; the rest is there for whoever listens at INFO."""
        with self._shared.lock:
            first = kind not in self._shared.warned
            self._shared.warned.add(kind)
        level = logging.WARNING if first else logging.INFO
        logger.log(level, "compile cache %s: %s", self.directory, text)

    def _count(self, **changes: int) -> None:
        with self._shared.lock:
            old = self._shared.stats
            self._shared.stats = replace(
                old, **{name: getattr(old, name) + value for name, value in changes.items()}
            )


def _check_text_name(name: str) -> None:
    if name not in TEXT_NAMES:
        raise CacheError(
            f"no text of a cache entry is called {ascii(name)[:80]}",
            where=INDEX_NAME,
            hint="one of " + ", ".join(TEXT_NAMES),
        )
