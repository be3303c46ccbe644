"""Files that only we or root can have written, and that are there whole or not at all.

Nothing is repaired: no permission is changed, no link inside a store is followed, and what is unsafe is refused.
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

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
MIN_KEY_BYTES = 16
TEMPORARY_PREFIX = ".tmp-"
LOCKS_DIRECTORY = ".locks"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHOOSE = "choose a directory of your own with PIECEWORK_CACHE_DIR"
_POLL_SECONDS = 0.02
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    # A FIFO put in a file's place must not make a reader wait for a writer.
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


class UnsafeFile(Exception):
    """A file is not a plain file of ours: a link, a pipe, somebody else's, too large."""


class LockTimeout(Exception):
    """Another process held the lock for longer than the caller would wait."""


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


# --- where a cache lies ------------------------------------------------------------------------------


def default_root(environ: Mapping[str, str] | None = None) -> Path:
    """``$PIECEWORK_CACHE_DIR``, else ``$XDG_CACHE_HOME/piecework``, else ``~/.cache/piecework``.

    An empty variable counts as unset, and so does a relative ``XDG_CACHE_HOME``, as its specification says.
    """
    env = os.environ if environ is None else environ
    if chosen := env.get("PIECEWORK_CACHE_DIR"):
        return Path(chosen)
    xdg = env.get("XDG_CACHE_HOME", "")
    if xdg and os.path.isabs(xdg):
        return Path(xdg) / "piecework"
    try:
        return Path.home() / ".cache" / "piecework"
    except RuntimeError as error:
        raise CacheError(
            "no home directory is known to keep the cache in",
            hint="set PIECEWORK_CACHE_DIR, or switch the cache off",
        ) from error


def cache_disabled(environ: Mapping[str, str] | None = None) -> bool:
    """Whether ``PIECEWORK_DISABLE_CACHE`` switches the cache off (any value but empty, 0, false, no, off)."""
    env = os.environ if environ is None else environ
    value = env.get("PIECEWORK_DISABLE_CACHE", "")
    return value.strip().lower() not in ("", "0", "false", "no", "off")


def signing_key(file: str | os.PathLike[str] | None = None) -> bytes | None:
    """The secret in ``file``, else in the one that ``PIECEWORK_CACHE_KEY_FILE`` names; None where there is neither.

    Raises:
        CacheError: it can't be read, or is too short to be a secret.
    """
    path = file or os.environ.get("PIECEWORK_CACHE_KEY_FILE", "")
    try:
        key = Path(path).read_bytes() if path else None
    except OSError as error:
        why = f"the key that signs what is kept can't be read: {error.strerror}"
        raise CacheError(
            why, where=str(path), hint="the file holds a secret as raw bytes"
        ) from error
    if key is not None and len(key) < MIN_KEY_BYTES:
        why = f"the key that signs what is kept has {len(key)} bytes"
        hint = f"a secret has {MIN_KEY_BYTES} bytes or more"
        raise CacheError(why, where=str(path), hint=hint)
    return key


# --- whose a directory is ----------------------------------------------------------------------------


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """The real, absolute path of ``root``, once it and all that leads to it are checked. It need not exist yet.

    Raises:
        CacheError: somebody else could write into it, or put another directory in its place.
    """
    try:
        given = Path(os.path.abspath(os.path.expanduser(os.fspath(root))))
        for part in (given, *given.parents):
            info = _stat(part)
            if info and stat.S_ISLNK(info.st_mode) and not is_trusted_owner(info.st_uid):
                raise CacheError(
                    f"the way to the cache directory goes over another user's link (uid {info.st_uid})",
                    where=str(part),
                    hint=_CHOOSE,
                )
        real = Path(os.path.realpath(given))
        for parent in real.parents:
            _check_parent(parent)
        check_directory(real)
    except (ValueError, OSError) as error:
        raise CacheError(
            f"the cache directory cannot be used: {error}",
            where=repr(os.fspath(root)),
            hint="choose another one with PIECEWORK_CACHE_DIR",
        ) from error
    return real


def check_directory(path: Path) -> bool:
    """Whether ``path`` exists; raises `CacheError` unless it is a real directory that only we can write."""
    info = _stat(path)
    if info is None:
        return False
    mode = f"mode {stat.S_IMODE(info.st_mode):04o}"
    if stat.S_ISLNK(info.st_mode):
        why, hint = "a link stands where a directory should be", "remove the link"
    elif not stat.S_ISDIR(info.st_mode):
        why, hint = "a file stands where a directory should be", "remove the file"
    elif not is_trusted_owner(info.st_uid):
        why, hint = f"the directory belongs to another user (uid {info.st_uid})", _CHOOSE
    elif others_can_write(info):
        why = f"others can write into the directory ({mode}), and what lies in it is executed"
        hint = f"run `chmod go-w {path}` if its content can be trusted, else remove it"
    else:
        return True
    raise CacheError(why, where=str(path), hint=hint)


def make_directory(path: Path, inside: Path) -> None:
    """Create ``path`` and what is missing above it, private to us, and check every level from ``inside`` down."""
    for attempt in range(3):
        try:
            for level in (*reversed(path.parents), path):
                ours = level.is_relative_to(inside)
                if ours or not level.exists():
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(level, DIRECTORY_MODE)
                if ours:
                    check_directory(level)
            return
        except FileNotFoundError:
            # A collector may remove an empty parent between two of our steps.
            if attempt == 2:
                raise


def _check_parent(path: Path) -> None:
    """Refuse a parent in which somebody else could exchange the cache directory for another."""
    info = _stat(path)
    if info is None or not _has_posix_owners():
        return
    hint = f"{_CHOOSE}, or set PIECEWORK_DISABLE_CACHE=1"
    if not is_trusted_owner(info.st_uid):
        raise CacheError(
            f"the cache lies in a directory of another user (uid {info.st_uid})",
            where=str(path),
            hint=hint,
        )
    if info.st_mode & stat.S_ISVTX:
        return
    by_group = info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid)
    if info.st_mode & stat.S_IWOTH or by_group:
        raise CacheError(
            f"the cache lies in a directory where others can exchange it (mode {stat.S_IMODE(info.st_mode):04o})",
            where=str(path),
            hint=f"run `chmod go-w {path}`, or {hint}",
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _has_posix_owners() -> bool:
    return hasattr(os, "geteuid")


def others_can_write(info: os.stat_result) -> bool:
    """Whether somebody else than the owner may write there; never where the system does not say."""
    return _has_posix_owners() and bool(info.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def is_trusted_owner(uid: int) -> bool:
    """Root can write anywhere, so that files of root are no worse than our own."""
    return not _has_posix_owners() or uid in (0, os.geteuid())


def _is_private_group(gid: int) -> bool:
    """Whether the group is the one many systems make for each user, with nobody else in it."""
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    members = set(group.gr_mem)
    return user.pw_gid == gid and group.gr_name == user.pw_name and members <= {user.pw_name}


# --- files -------------------------------------------------------------------------------------------


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of ours, at most ``limit``.

    Raises:
        FileNotFoundError: there is none.
        UnsafeFile: it is a link, not a plain file, somebody else's, writable by others, or larger than ``limit``.
    """
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        raise
    except OSError as error:
        if os.path.islink(path):
            raise UnsafeFile("it is a link") from error
        if os.path.isdir(path):
            raise UnsafeFile("it is a directory") from error
        raise
    try:
        info = os.fstat(descriptor)
        _check_regular(info, limit)
        # Not up to `limit`: that may be a hostile number, and a read allocates what it is asked for.
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(info.st_size + 1)
    finally:
        os.close(descriptor)
    if len(data) > info.st_size:
        raise UnsafeFile("it grew while it was read")
    return data


def _check_regular(info: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise UnsafeFile("it is not a plain file")
    if not is_trusted_owner(info.st_uid):
        raise UnsafeFile(f"it belongs to another user (uid {info.st_uid})")
    if others_can_write(info):
        raise UnsafeFile(f"others can write it (mode {stat.S_IMODE(info.st_mode):04o})")
    if info.st_size > limit:
        raise UnsafeFile(f"it is too large ({info.st_size} bytes, at most {limit})")


def write_atomic(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk and rename it into place.

    Raises:
        OSError: then the old file, or none, is there, and no temporary file is left.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync_directory(path: Path) -> None:
    """Make the renames of a directory durable, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no directories, and some systems sync none
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(root: Path, what: str, timeout_s: float) -> Iterator[None]:
    """Hold the one right to do ``what`` below ``root``, across processes and threads.

    The lock files lie in ``<root>/.locks``, so that what they guard can be moved away while somebody waits. A killed process frees its
    locks (the kernel does); the empty files stay.

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
    lock = FileLock(path, timeout=timeout_s, mode=FILE_MODE)
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
