"""Writing a file or a directory whole or not at all. In: a path and what shall be there. Out: exactly that, durable, or what was there before.

It never leaves anything half-written under the final name, and never follows a link that lies there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, flush it to the disk and rename it into place.

    Raises `OSError`; then the old file, or none, is there, and no temporary file is left.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def directory_in_place(path: Path) -> Iterator[Path]:
    """A new directory beside ``path``, which the block fills, and which takes the place of ``path`` at its end.

    A directory that is there is removed. A process that is killed leaves the old one or the new one, and maybe a hidden one beside; where the system can't
    exchange two names in one step, it may leave none.

    Raises:
        OSError: it can't be made or moved; the old directory, or none, is there then.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        _put_in_place(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    with contextlib.suppress(OSError):
        sync_directory(path.parent)


_TRIES = 100
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


def _put_in_place(new: Path, path: Path) -> None:
    for tried in range(_TRIES):
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        try:
            _exchange(new, path)
            return
        except OSError:  # another writer was between its two moves
            if tried == _TRIES - 1:
                raise


def _exchange(new: Path, path: Path) -> None:
    """Let two directories change places; in two moves, with none at ``path`` in between, where the system has no better way."""
    renameat2 = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is not None and not renameat2(
        here, os.fsencode(new), here, os.fsencode(path), both
    ):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        path.rename(aside / "old")
        try:
            new.rename(path)
        except BaseException:
            (aside / "old").rename(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Make the renames of a directory durable, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return  # Windows opens no directories
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def sweep_temporaries(path: Path) -> int:
    """Remove what killed writers left in `path`; only for the holder of the entry's lock. Returns how many."""
    removed = 0
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return 0
    for name in names:
        if name.startswith(TEMPORARY_PREFIX):
            with contextlib.suppress(OSError):
                os.unlink(path / name)
                removed += 1
    return removed
