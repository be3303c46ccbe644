"""Where artifacts lie. In: a path or a URL. Out: a `Store`, which gives out the bytes of an artifact's files, and takes a whole artifact or nothing.

A directory of this machine is read and written file by file. Anything else that fsspec knows holds an artifact as one object, a zip archive without compression: one
object is replaced in one step. It knows nothing of what the files hold, and verifies nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import uuid
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from piecework.errors import ArtifactError, ConfigError
from piecework.runtime.cache.atomic import directory_in_place
from piecework.runtime.cache.safety import (
    UnsafeFile,
    is_trusted_owner,
    others_can_write,
    read_regular,
)

Place = str | os.PathLike[str]
Read = Callable[[str, int], bytes]
"""Takes a file's name and the most bytes that it may have; raises `ArtifactError`."""

MANIFEST = "manifest.json"
KIND = "piecework artifact"
MANIFEST_LIMIT = 64 << 20
_AGAIN = "save the model again"


class Store(Protocol):
    """A place for one artifact."""

    name: str
    """For errors."""

    def exists(self) -> bool:
        """Whether anything is there."""
        ...

    def open(self) -> Read:
        """What reads the files that are there now.

        Raises:
            ArtifactError: there is no artifact, or it may not be used.
        """
        ...

    def require_free(self) -> None:
        """Raise `ArtifactError` if something else than an artifact is there."""
        ...

    def write(self, files: Mapping[str, bytes]) -> None:
        """Put ``files`` there, in place of an artifact.

        Raises:
            ArtifactError: they can't be written; what was there is there still.
        """
        ...


def store_of(place: Place) -> Store:
    """The store that a path or a URL names.

    Raises:
        ConfigError: it is neither.
        ArtifactError: fsspec can't open the URL.
    """
    if not isinstance(place, (str, os.PathLike)) or not os.fspath(place):
        raise ConfigError(f"an artifact lies at a path or a URL; got {place!r}")
    if not isinstance(place, str) or "://" not in place:
        return Directory(Path(os.path.abspath(place)))
    system, path = _file_system(place)
    local = "file" in (
        system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)
    )
    return Directory(Path(os.path.abspath(path))) if local else Archive(place, system, path)


_FSSPEC_LACKS = "pip install fsspec, and what it needs for such URLs"
_FSSPEC_KNOWS = "check the URL; fsspec.available_protocols() lists what it may begin with"


def _file_system(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)  # type: ignore[no-any-return]
    except Exception as error:
        raise ArtifactError(
            f"the URL can't be opened: {error}",
            where=url,
            hint=_FSSPEC_LACKS if isinstance(error, ImportError) else _FSSPEC_KNOWS,
        ) from error


# --- a directory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory of this machine."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return os.path.lexists(self.path)

    def open(self) -> Read:
        if not self.path.is_dir():
            raise ArtifactError(
                "there is no artifact here", where=self.name, hint="stitched.save(path) makes one"
            )
        _require_safe(self.path)
        return self._read

    def _read(self, name: str, limit: int) -> bytes:
        path = self.path / name
        try:
            return read_regular(path, limit)
        except FileNotFoundError as error:
            raise _missing(str(path)) from error
        except (OSError, UnsafeFile) as error:
            raise ArtifactError(
                f"a file of the artifact can't be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                hint="its files are plain files of this user or of root, which others can't write",
            ) from error

    def require_free(self) -> None:
        path = self.path
        if not os.path.lexists(path):
            return
        if path.is_dir() and not path.is_symlink():
            try:
                names = os.listdir(path)
            except OSError as error:
                raise ArtifactError(
                    f"the directory can't be read: {error.strerror}", where=self.name
                ) from error
            if not names or self._is_ours():
                return
        raise _something_else(self.name)

    def _is_ours(self) -> bool:
        try:
            return _begins_ours(self._read(MANIFEST, MANIFEST_LIMIT))
        except ArtifactError:
            return False

    def write(self, files: Mapping[str, bytes]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with directory_in_place(self.path) as staging:
                for name, data in files.items():
                    write_file(staging / name, data)
        except OSError as error:
            raise ArtifactError(
                f"the artifact can't be written: {error.strerror or error}",
                where=self.name,
                hint="name a directory that can be made, or replaced, by this user",
            ) from error


def write_file(path: Path, data: bytes) -> None:
    """Write one file of a new directory."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _require_safe(path: Path) -> None:
    """Refuse a directory that others than its owner can write, or that belongs to neither us nor root."""
    info = os.stat(path)
    if not is_trusted_owner(info.st_uid):
        raise ArtifactError(
            f"the artifact belongs to another user (uid {info.st_uid}), and its code would run",
            where=str(path),
            hint="copy it as your own, if you trust it",
        )
    if others_can_write(info):
        raise ArtifactError(
            f"others can write into the artifact (mode {stat.S_IMODE(info.st_mode):04o}), and its code would run",
            where=str(path),
            hint=f"run `chmod -R go-w {path}` if its content can be trusted",
        )


# --- an object ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Archive:
    """One object of a file system of fsspec's.

    Attributes:
        name: its URL.
        system: the file system.
        path: where it is there.
    """

    name: str
    system: Any
    path: str

    def exists(self) -> bool:
        return bool(self._asked(lambda: self.system.exists(self.path)))

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What the file system answers; its libraries raise errors of any class."""
        try:
            return ask()
        except Exception as error:
            raise ArtifactError(
                f"the store does not answer: {type(error).__name__}: {error}",
                where=self.name,
                hint="see that it can be reached, read and written from here",
            ) from error

    def open(self) -> Read:
        if not self._asked(lambda: self.system.isfile(self.path)):
            raise ArtifactError(
                "there is no artifact here", where=self.name, hint="stitched.save(url) makes one"
            )
        data = self._asked(lambda: self.system.cat_file(self.path))
        try:
            archive = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:
            raise self._damaged(error) from error

        def read(name: str, limit: int) -> bytes:
            where = f"{self.name}/{name}"
            try:
                found = archive.getinfo(name)
                # What is not compressed is no larger than the archive.
                if found.compress_type != zipfile.ZIP_STORED or found.file_size > limit:
                    raise ArtifactError(
                        "a file of the artifact is compressed, or too large",
                        where=where,
                        hint=_AGAIN,
                    )
                return archive.read(found)
            except ArtifactError:
                raise
            except KeyError as error:
                raise _missing(where) from error
            except Exception as error:
                raise self._damaged(error) from error

        return read

    def _damaged(self, error: Exception) -> ArtifactError:
        return ArtifactError(f"the archive is damaged: {error}", where=self.name, hint=_AGAIN)

    def require_free(self) -> None:
        if not self.exists():
            return
        if self._asked(lambda: self.system.isfile(self.path)):
            head = self._asked(lambda: self.system.cat_file(self.path, start=0, end=1000))
            if head[:4] == b"PK\3\4" and _begins_ours(head[30 + len(MANIFEST) :]):
                return
        raise _something_else(self.name)

    def write(self, files: Mapping[str, bytes]) -> None:
        """The object appears under another name first, and is moved."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(files, key=lambda each: (each != MANIFEST, each)):
                archive.writestr(zipfile.ZipInfo(name), files[name])
        staged = f"{self.path}.{uuid.uuid4().hex}.part"

        def put() -> None:
            self.system.makedirs(self.path.rpartition("/")[0], exist_ok=True)
            try:
                self.system.pipe_file(staged, data.getvalue())
                self.system.mv(staged, self.path)
            except BaseException:
                with contextlib.suppress(Exception):
                    self.system.rm_file(staged)
                raise

        self._asked(put)


def _begins_ours(manifest: bytes) -> bool:
    return f'"{KIND}"'.encode() in manifest[:200]


def _missing(where: str) -> ArtifactError:
    return ArtifactError(
        "a file of the artifact is missing",
        where=where,
        hint=f"copy the directory whole, or {_AGAIN}",
    )


def _something_else(where: str) -> ArtifactError:
    return ArtifactError(
        "there is something else than an artifact",
        where=where,
        hint="name a new directory, or remove what is there",
    )
