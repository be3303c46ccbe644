"""One writer at a time. In: the name of what is going to be written. Out: a held lock, across processes and threads.

It never decides what to do when a lock cannot be had: the caller gets `LockTimeout` or the `OSError`.

The lock files lie in ``<root>/.locks`` and not in the entry, so that an entry can be moved away or collected while
somebody waits for it. A killed process frees its locks (the kernel does); the empty files stay.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from piecework.runtime.cache.manifest import Identity
from piecework.runtime.cache.safety import FILE_MODE, UnsafeFile, make_directory

LOCKS_DIRECTORY = ".locks"
_POLL_SECONDS = 0.02


class LockTimeout(Exception):
    """Another process held the lock for longer than the caller would wait."""


class EntryLocks:
    """The locks of one entry: one for changing its files, and one per artifact for compiling it."""

    def __init__(self, root: Path, identity: Identity) -> None:
        self._root = root
        self._identity = identity

    def changing(self, timeout_s: float) -> contextlib.AbstractContextManager[None]:
        """Hold the right to change the entry's files. Short: no compiler runs inside."""
        return self._hold("files", timeout_s)

    def compiling(self, name: str, timeout_s: float) -> contextlib.AbstractContextManager[None]:
        """Hold the right to compile the artifact `name`."""
        return self._hold("artifact\n" + name, timeout_s)

    @contextlib.contextmanager
    def _hold(self, what: str, timeout_s: float) -> Iterator[None]:
        directory = self._root / LOCKS_DIRECTORY
        make_directory(directory, inside=self._root)
        digest = hashlib.sha256(f"{self._identity}\n{what}".encode()).hexdigest()
        path = directory / f"{digest[:40]}.lock"
        # Older filelock releases would follow a link here and truncate its target.
        if path.is_symlink():
            raise UnsafeFile("its lock is a link")
        # One instance per hold: an instance may be taken again by its own thread, which is not meant here.
        lock = FileLock(path, timeout=timeout_s, mode=FILE_MODE)
        try:
            lock.acquire(poll_interval=_POLL_SECONDS)
        except Timeout as error:
            raise LockTimeout(f"no lock after {timeout_s:g} s") from error
        try:
            # Lets the collector see which locks are in use.
            with contextlib.suppress(OSError):
                os.utime(path)
            yield
        finally:
            lock.release()
