"""Where a cache may live. In: a directory that a user named. Out: the same directory, proved to be ours alone, or a `CacheError`.

It never repairs: no permission is changed, no link is followed inside the cache, nothing that exists is replaced.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from piecework.errors import CacheError

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_CHOOSE = "choose a directory of your own with PIECEWORK_CACHE_DIR"
_READ_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_CLOEXEC", 0)
    # A FIFO put in a file's place must not make a reader wait for a writer.
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_BINARY", 0)
)


class UnsafeFile(Exception):
    """A file of the cache is not a plain file of ours: a link, a pipe, somebody else's, too large."""


def default_root(environ: Mapping[str, str] | None = None) -> Path:
    """Return ``$PIECEWORK_CACHE_DIR``, else ``$XDG_CACHE_HOME/piecework``, else ``~/.cache/piecework``.

    An empty variable counts as unset, and so does a relative ``XDG_CACHE_HOME`` (the XDG specification says so).
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


def signing_key(environ: Mapping[str, str] | None = None) -> bytes | None:
    """The secret in the file that ``PIECEWORK_CACHE_KEY_FILE`` names, which signs manifests; None where it is unset or empty.

    Raises:
        CacheError: the file can't be read.
    """
    env = os.environ if environ is None else environ
    path = env.get("PIECEWORK_CACHE_KEY_FILE", "")
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise CacheError(
            f"the key that signs the cache can't be read: {error.strerror}",
            where=path,
            hint="PIECEWORK_CACHE_KEY_FILE names a file that holds the secret as raw bytes",
        ) from error


def resolve_root(root: str | os.PathLike[str]) -> Path:
    """Return the real, absolute path of `root` after checking it and all that leads to it.

    The directory need not exist yet. Raises `CacheError` when somebody else could write into it or put
    another directory in its place.
    """
    try:
        given = Path(os.path.abspath(os.path.expanduser(os.fspath(root))))
        for part in (given, *given.parents):
            _check_link_owner(part)
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
    """Return whether `path` exists; raise `CacheError` unless it is a real directory that only we can write."""
    info = _stat(path)
    if info is None:
        return False
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(
            "a link stands where a directory of the cache should be",
            where=str(path),
            hint="remove the link; a cache never follows links",
        )
    if not stat.S_ISDIR(info.st_mode):
        raise CacheError(
            "the cache needs a directory here", where=str(path), hint="remove the file"
        )
    if not is_trusted_owner(info.st_uid):
        raise CacheError(
            f"the cache directory belongs to another user (uid {info.st_uid})",
            where=str(path),
            hint=_CHOOSE,
        )
    if others_can_write(info):
        raise CacheError(
            f"others can write into the cache directory (mode {stat.S_IMODE(info.st_mode):04o}), "
            "and what lies in it is executed",
            where=str(path),
            hint=f"run `chmod go-w {path}` if its content can be trusted, else remove it",
        )
    return True


def make_directory(path: Path, *, inside: Path) -> None:
    """Create `path` and what is missing above it, mode 0700, and check every level from `inside` down."""
    for attempt in range(3):
        try:
            for level in (*reversed(path.parents), path):
                if not level.exists() or level == inside or inside in level.parents:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(level, DIRECTORY_MODE)
                    check_directory(level)
            return
        except FileNotFoundError:
            # A collector may remove an empty parent between two of our steps.
            if attempt == 2:
                raise


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a plain file of ours, at most `limit`.

    Raises `FileNotFoundError` when there is none, and `UnsafeFile` when it is a link, not a plain file,
    somebody else's, writable by others, or larger than `limit`.
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


def _check_link_owner(path: Path) -> None:
    info = _stat(path)
    if info is not None and stat.S_ISLNK(info.st_mode) and not is_trusted_owner(info.st_uid):
        raise CacheError(
            f"the way to the cache directory goes over another user's link (uid {info.st_uid})",
            where=str(path),
            hint=_CHOOSE,
        )


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
    return _has_posix_owners() and bool(info.st_mode & _WRITABLE_BY_OTHERS)


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
    return (
        user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    )
