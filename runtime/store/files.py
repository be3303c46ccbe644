"""Files that only we or root can have written, and that are there whole or not at all.

Nothing is repaired: no permission is changed, no link inside a store is followed, and what is
unsafe is refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from piecework.errors import CacheError

MIN_KEY_BYTES = 16
MAX_BYTES = 1 << 36
TEMPORARY_PREFIX = ".tmp-"
LOCKS_DIRECTORY = ".locks"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHOOSE = "choose a directory of your own with PIECEWORK_CACHE_DIR"
# Not blocking: a FIFO put in a file's place must not make a reader wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Damaged(Exception):
    """A file is not what was saved, or not ours alone: why, and its path below the directory."""

    def __init__(self, reason: str, file: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.reason = reason
        self.file = file


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- where a cache lies ------------------------------------------------------------------------------


def default_root() -> Path:
    """``$PIECEWORK_CACHE_DIR``, else ``$XDG_CACHE_HOME/piecework``, else ``~/.cache/piecework``.

    An empty variable counts as unset, and so does a relative ``XDG_CACHE_HOME``, as its
    specification says.
    """
    if chosen := os.environ.get("PIECEWORK_CACHE_DIR"):
        return Path(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "piecework"
    except RuntimeError as error:
        hint = "set PIECEWORK_CACHE_DIR, or switch the cache off"
        raise CacheError("no home directory is known to keep the cache in", hint=hint) from error


def cache_disabled() -> bool:
    """Whether ``PIECEWORK_DISABLE_CACHE`` is set, and not to 0, false, no or off."""
    value = os.environ.get("PIECEWORK_DISABLE_CACHE", "")
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def signing_key(file: str | os.PathLike[str] | None = None) -> bytes | None:
    """The secret in ``file``, else in the one that ``PIECEWORK_CACHE_KEY_FILE`` names; None where
    there is neither.
    """
    path = file or os.environ.get("PIECEWORK_CACHE_KEY_FILE", "")
    if not path:
        return None
    try:
        key = Path(path).read_bytes()
        problem = "" if len(key) >= MIN_KEY_BYTES else f"has {len(key)} bytes"
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    if problem:
        hint = f"the file holds a secret of {MIN_KEY_BYTES} raw bytes or more"
        why = f"the key that signs what is kept {problem}"
        raise CacheError(why, where=str(path), hint=hint)
    return key


# --- whose a directory is ----------------------------------------------------------------------------


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """The real, absolute path of ``root``, once it is checked. It need not exist yet.

    Who can put another directory in its place, by a link or above it, puts one of his own there:
    owners are checked of directories, and of every file that is read.
    """
    try:
        real = Path(os.path.realpath(os.path.expanduser(os.fspath(root))))
        check_directory(real)
    except (ValueError, OSError) as error:
        why = f"the cache directory cannot be used: {error}"
        raise CacheError(why, where=repr(os.fspath(root)), hint=_CHOOSE) from error
    return real


def check_directory(path: Path) -> bool:
    """Whether ``path`` exists; raises `CacheError` unless it is one that only we can write."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(info.st_mode):
        kind = "link" if stat.S_ISLNK(info.st_mode) else "file"
        why, hint = f"a {kind} stands where a directory should be", f"remove the {kind}"
    elif not _is_trusted_owner(info.st_uid):
        why, hint = f"the directory belongs to another user (uid {info.st_uid})", _CHOOSE
    elif _others_can_write(info):
        mode = stat.S_IMODE(info.st_mode)
        why = f"others can write into the directory (mode {mode:04o}), and what lies in it is executed"
        hint = f"run `chmod go-w {path}` if its content can be trusted, else remove it"
    else:
        return True
    raise CacheError(why, where=str(path), hint=hint)


def make_directory(path: Path, inside: Path) -> None:
    """Create ``path`` and what is missing above it, private to us."""
    for attempt in range(3):
        try:
            for level in (*reversed(path.parents), path):
                ours = level.is_relative_to(inside)
                if ours or not level.exists():
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(level, 0o700)
                if ours:
                    check_directory(level)
            return
        except FileNotFoundError:
            # A collector may remove an empty parent between two of our steps.
            if attempt == 2:
                raise


def _others_can_write(info: os.stat_result) -> bool:
    return bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_trusted_owner(uid: int) -> bool:
    """Root can write anywhere, so that files of root are no worse than our own."""
    return uid in (0, os.geteuid())


# --- files -------------------------------------------------------------------------------------------


def read_regular(directory: Path, name: str, limit: int) -> bytes:
    """The bytes of a plain file of ours below ``directory``, at most ``limit``."""
    path = directory / name
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, _READ_FLAGS))  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise Damaged(f"it is no plain file ({error.strerror})", name) from error
        raise
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise Damaged("it is no plain file", name)
        if not _is_trusted_owner(info.st_uid) or _others_can_write(info):
            mode = stat.S_IMODE(info.st_mode)
            raise Damaged(f"others can write it (uid {info.st_uid}, mode {mode:04o})", name)
        if info.st_size > limit:
            raise Damaged(f"it is too large ({info.st_size} bytes, at most {limit})", name)
        # Not up to `limit`: that may be a hostile number, and a read allocates what it is asked for.
        data = file.read(info.st_size + 1)
    if len(data) > info.st_size:
        raise Damaged("it grew while it was read", name)
    return data


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk and rename it into place."""
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
            os.fchmod(descriptor, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_directory(path: Path) -> None:
    """Make the renames of a directory durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(root: Path, what: str, timeout_s: float) -> Iterator[None]:
    """Hold the one right to do ``what`` below ``root``, across processes and threads.

    The lock files lie in ``<root>/.locks``, so that what they guard can be moved away while
    somebody waits. A killed process frees its locks (the kernel does); the empty files stay.
    """
    from filelock import FileLock  # who only reads needs none

    directory = root / LOCKS_DIRECTORY
    make_directory(directory, inside=root)
    path = directory / f"{sha256(what.encode())[:40]}.lock"
    if path.is_symlink():  # older filelock releases would follow it and truncate its target
        raise Damaged("the lock is a link", f"{LOCKS_DIRECTORY}/{path.name}")
    # One instance per hold: an instance may be taken again by its own thread, which is not meant here.
    with FileLock(path, timeout=timeout_s, mode=0o600).acquire(poll_interval=0.02):
        with contextlib.suppress(OSError):  # lets the collector see which locks are in use
            os.utime(path)
        yield
