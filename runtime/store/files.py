"""Files that only we or root can have written, and that are there whole or not at all.

Nothing is repaired: no permission is changed, no link inside a store is followed, and what is
unsafe is refused.
"""

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
TEMPORARY_PREFIX = ".tmp-"
LOCKS_DIRECTORY = ".locks"
_CHOOSE = "choose a directory of your own with PIECEWORK_CACHE_DIR"
# Not blocking: a FIFO put in a file's place must not make a reader wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Damaged(CacheError):
    """A file is not what was saved, or not ours alone."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def default_root() -> Path:
    """``$PIECEWORK_CACHE_DIR``, else ``$XDG_CACHE_HOME/piecework``, else ``~/.cache/piecework``."""
    if chosen := os.environ.get("PIECEWORK_CACHE_DIR"):
        return Path(chosen)
    xdg = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored
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
    """The secret in ``file``, else in ``$PIECEWORK_CACHE_KEY_FILE``, else None."""
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


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """The real, absolute path of ``root``, once it is checked; it need not exist yet."""
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
    kind = "link" if stat.S_ISLNK(info.st_mode) else "file"
    problem = f"a {kind} stands where a directory should be"
    if stat.S_ISDIR(info.st_mode):
        problem = _who_else_writes(info)
    if problem:
        hint = f"remove it, or run `chmod go-w {path}` if its content can be trusted; or {_CHOOSE}"
        raise CacheError(problem, where=str(path), hint=hint)
    return True


def make_directory(path: Path, inside: Path) -> None:
    """Create ``path`` and what is missing above it, private to us."""
    ours = path.is_relative_to(inside)
    if ours or not path.exists():
        make_directory(path.parent, inside)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    if ours:
        check_directory(path)


def _who_else_writes(info: os.stat_result) -> str:
    """Who beside us and root, who can write anywhere, can write it; "" if nobody."""
    if info.st_uid not in (0, os.geteuid()):
        return f"it belongs to another user (uid {info.st_uid})"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write it (mode {stat.S_IMODE(info.st_mode):04o}), and it is executed"
    return ""


def read_regular(path: Path) -> bytes:
    """The bytes of a plain file of ours; `Damaged` for anything else."""
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, _READ_FLAGS)) as file:
            info = os.fstat(file.fileno())
            plain = stat.S_ISREG(info.st_mode)
            if problem := _who_else_writes(info) if plain else "it is no plain file":
                raise Damaged(problem, where=str(path))
            return file.read()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise Damaged("it is no plain file", where=str(path)) from error
        raise


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
        raise Damaged("the lock is a link", where=str(path))
    # One instance per hold: an instance may be taken again by its own thread, which is not meant here.
    with FileLock(path, timeout=timeout_s, mode=0o600).acquire(poll_interval=0.02):
        with contextlib.suppress(OSError):  # lets the collector see which locks are in use
            os.utime(path)
        yield
