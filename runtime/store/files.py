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
from collections.abc import Iterator, Mapping
from pathlib import Path

from piecework.errors import CacheError

MIN_KEY_BYTES = 16
TEMPORARY_PREFIX = ".tmp-"
LOCKS_DIRECTORY = ".locks"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHOOSE = "choose a directory of your own with PIECEWORK_CACHE_DIR"
_POLL_SECONDS = 0.02
# Not blocking: a FIFO put in a file's place must not make a reader wait for a writer.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class UnsafeFile(Exception):
    """A file is not a plain file of ours: a link, a pipe, somebody else's, too large."""


class LockTimeout(Exception):
    """Another process held the lock for longer than the caller would wait."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- where a cache lies ------------------------------------------------------------------------------


def default_root(environ: Mapping[str, str] | None = None) -> Path:
    """``$PIECEWORK_CACHE_DIR``, else ``$XDG_CACHE_HOME/piecework``, else ``~/.cache/piecework``.

    An empty variable counts as unset, and so does a relative ``XDG_CACHE_HOME``, as its
    specification says.
    """
    env = os.environ if environ is None else environ
    if chosen := env.get("PIECEWORK_CACHE_DIR"):
        return Path(chosen)
    xdg = env.get("XDG_CACHE_HOME", "")
    try:
        above = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    except RuntimeError as error:
        hint = "set PIECEWORK_CACHE_DIR, or switch the cache off"
        raise CacheError("no home directory is known to keep the cache in", hint=hint) from error
    return above / "piecework"


def cache_disabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``PIECEWORK_DISABLE_CACHE`` is set, and not to 0, false, no or off."""
    env = os.environ if environ is None else environ
    value = env.get("PIECEWORK_DISABLE_CACHE", "")
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def signing_key(file: str | os.PathLike[str] | None = None) -> bytes | None:
    """The secret in ``file``, else in the one that ``PIECEWORK_CACHE_KEY_FILE`` names; None where
    there is neither.

    Raises:
        CacheError: it can't be read, or is too short to be a secret.
    """
    path = file or os.environ.get("PIECEWORK_CACHE_KEY_FILE", "")
    if not path:
        return None
    hint = f"the file holds a secret of {MIN_KEY_BYTES} raw bytes or more"
    try:
        key = Path(path).read_bytes()
    except OSError as error:
        why = f"the key that signs what is kept can't be read: {error.strerror}"
        raise CacheError(why, where=str(path), hint=hint) from error
    if len(key) < MIN_KEY_BYTES:
        why = f"the key that signs what is kept has {len(key)} bytes"
        raise CacheError(why, where=str(path), hint=hint)
    return key


# --- whose a directory is ----------------------------------------------------------------------------


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """The real, absolute path of ``root``, once it and all that leads to it are checked. It need
    not exist yet.

    Raises:
        CacheError: somebody else could write into it, or put another directory in its place.
    """
    try:
        given = Path(os.path.abspath(os.path.expanduser(os.fspath(root))))
        for part in (given, *given.parents):
            if part.is_symlink() and not _is_trusted_owner(uid := os.lstat(part).st_uid):
                why = f"the way to the cache directory goes over another user's link (uid {uid})"
                raise CacheError(why, where=str(part), hint=_CHOOSE)
        real = Path(os.path.realpath(given))
        for parent in real.parents:
            _check_parent(parent)
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
    if stat.S_ISLNK(info.st_mode):
        why, hint = "a link stands where a directory should be", "remove the link"
    elif not stat.S_ISDIR(info.st_mode):
        why, hint = "a file stands where a directory should be", "remove the file"
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


def _check_parent(path: Path) -> None:
    """Refuse a parent in which somebody else could exchange the cache directory for another."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return
    hint = f"{_CHOOSE}, or set PIECEWORK_DISABLE_CACHE=1"
    if not _is_trusted_owner(info.st_uid):
        why = f"the cache lies in a directory of another user (uid {info.st_uid})"
        raise CacheError(why, where=str(path), hint=hint)
    if info.st_mode & stat.S_ISVTX:
        return
    by_group = info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid)
    if info.st_mode & stat.S_IWOTH or by_group:
        mode = stat.S_IMODE(info.st_mode)
        why = f"the cache lies in a directory where others can exchange it (mode {mode:04o})"
        raise CacheError(why, where=str(path), hint=f"run `chmod go-w {path}`, or {hint}")


def _others_can_write(info: os.stat_result) -> bool:
    return bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_trusted_owner(uid: int) -> bool:
    """Root can write anywhere, so that files of root are no worse than our own."""
    return uid in (0, os.geteuid())


def _is_private_group(gid: int) -> bool:
    """Whether the group is the one many systems make for each user, with nobody else in it."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    alone = {*group.gr_mem} <= {user.pw_name}
    return user.pw_gid == gid and group.gr_name == user.pw_name and alone


# --- files -------------------------------------------------------------------------------------------


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of ours, at most ``limit``.

    Raises:
        FileNotFoundError: there is none.
        UnsafeFile: it is a link, not a plain file, somebody else's, writable by others, or larger
            than ``limit``.
    """
    try:
        file = open(path, "rb", opener=lambda name, _: os.open(name, _READ_FLAGS))  # noqa: SIM115
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise UnsafeFile(f"it is no plain file ({error.strerror})") from error
        raise
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise UnsafeFile("it is no plain file")
        if not _is_trusted_owner(info.st_uid):
            raise UnsafeFile(f"it belongs to another user (uid {info.st_uid})")
        if _others_can_write(info):
            raise UnsafeFile(f"others can write it (mode {stat.S_IMODE(info.st_mode):04o})")
        if info.st_size > limit:
            raise UnsafeFile(f"it is too large ({info.st_size} bytes, at most {limit})")
        # Not up to `limit`: that may be a hostile number, and a read allocates what it is asked for.
        data = file.read(info.st_size + 1)
    if len(data) > info.st_size:
        raise UnsafeFile("it grew while it was read")
    return data


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk and rename it into place.

    Raises:
        OSError: then the old file, or none, is there, and no temporary file is left.
    """
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

    Raises:
        LockTimeout: another one held it for so long.
    """
    from filelock import FileLock, Timeout  # who only reads needs none

    directory = root / LOCKS_DIRECTORY
    make_directory(directory, inside=root)
    path = directory / f"{sha256(what.encode())[:40]}.lock"
    if path.is_symlink():  # older filelock releases would follow it and truncate its target
        raise UnsafeFile("its lock is a link")
    # One instance per hold: an instance may be taken again by its own thread, which is not meant here.
    lock = FileLock(path, timeout=timeout_s, mode=0o600)
    try:
        lock.acquire(poll_interval=_POLL_SECONDS)
    except Timeout as error:
        raise LockTimeout(f"no lock after {timeout_s:g} s") from error
    try:
        with contextlib.suppress(OSError):  # lets the collector see which locks are in use
            os.utime(path)
        yield
    finally:
        lock.release()
