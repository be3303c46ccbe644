"""A saved program's files: a directory, or one ``bytes``, of which every byte is verified before it
is given out.

A file's name in the directory tells its content too, so that nothing is overwritten: a new manifest
takes the place of the old one in one step, and then the files that it does not list go.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from piecework.errors import ArtifactError, CacheError, ConfigError
from piecework.runtime.store.files import (
    FULL_DISK,
    LOCKS_DIRECTORY,
    LockTimeout,
    UnsafeFile,
    check_directory,
    locked,
    read_regular,
)
from piecework.runtime.store.manifest import (
    MAX_MANIFEST_BYTES,
    Damaged,
    Record,
    Sealed,
    verified,
)

Place = str | os.PathLike[str]
KIND = "piecework artifact"
MANIFEST = "manifest.json"
#: What the manifest says of each of several modules that were saved together.
PARTS = "parts"
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_AGAIN = "save the model again"
_TRIES = 5
_LOCK_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Folder:
    """An artifact that was verified.

    Attributes:
        name: where it is, for errors.
        facts: what the manifest says besides the files.
        files: name → bytes, exactly those that were saved; what happens to the directory later does
            not matter.
    """

    name: str
    facts: Mapping[str, object]
    files: Mapping[str, bytes]

    def read(self, name: str) -> bytes:
        """The bytes of a file; raises `ArtifactError` if the manifest lists none of that name."""
        data = self.files.get(name)
        if data is None:
            where = f"{self.name}/{name}"
            raise ArtifactError("the manifest lists no such file", where=where, hint=_AGAIN)
        return data

    def text(self, name: str) -> str:
        return self.read(name).decode("utf-8")

    def table(self, name: str) -> Mapping[str, str]:
        """What the manifest says of ``name``, as texts by name."""
        found = self.facts.get(name)
        return found if isinstance(found, dict) else {}

    def parts(self) -> tuple[Folder, ...]:
        """The same as one artifact for each module that was saved in it with others."""
        rows = self.facts.get(PARTS)
        shared = {name: value for name, value in self.facts.items() if name != PARTS}
        return tuple(
            Folder(
                f"{self.name}/{part_folder(number)}",
                {**shared, **row},
                {name.removeprefix(part_folder(number)): data for name, data in self.files.items()},
            )
            for number, row in enumerate(rows if isinstance(rows, list) else ())
        )


def part_folder(number: int) -> str:
    """Where the files of a module lie that was saved with others."""
    return f"part_{number}/"


def directory_of(place: Place) -> Path:
    """The directory that ``place`` names.

    Raises:
        ConfigError: it names none.
        ArtifactError: it is a URL.
    """
    if not isinstance(place, (str, os.PathLike)) or not os.fspath(place):
        raise ConfigError(f"an artifact lies in a directory; got {place!r}")
    if "://" in os.fspath(place):
        why = "an artifact lies in a directory, and this is a URL"
        raise ArtifactError(why, where=str(place), hint="copy the directory with tools of its own")
    return Path(os.path.abspath(place))


def has_artifact(path: Path) -> bool:
    """Whether there is an artifact, sound or not."""
    return os.path.lexists(path / MANIFEST)


def _sealed(key: bytes | None) -> Sealed:
    def place(name: str, record: Record) -> str:
        if not _NAME.fullmatch(name):
            raise Damaged(f"it names a file outside the artifact, {name!r}", MANIFEST)
        pure = PurePosixPath(name)
        return str(pure.with_name(f"{pure.stem}.{record.digest[:16]}{pure.suffix}"))

    return Sealed(MANIFEST, KIND, place, key)


# --- a directory -------------------------------------------------------------------------------------


def write_folder(
    path: Path, files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None
) -> None:
    """Write an artifact, in place of one that is there; a killed process leaves the old one, or
    none.

    Raises:
        ArtifactError: there is something else, or it can't be written.
    """
    try:
        _require_free(path)
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
        with locked(path, "save", _LOCK_SECONDS):
            for name in files:
                (path / name).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            sealed = _sealed(key)
            made = sealed.write(path, files, {}, facts, 0o644)
            listed = {path / sealed.place(name, each) for name, each in made.files.items()}
            _remove_others(path, {path / MANIFEST, *listed})
    except (OSError, CacheError, LockTimeout, UnsafeFile) as error:
        full = isinstance(error, OSError) and error.errno in FULL_DISK
        why = "the disk is full" if full else str(getattr(error, "strerror", None) or error)
        hint = "free some space, or name a directory that this user can make, or replace"
        raise ArtifactError(
            f"the artifact can't be written: {why}", where=str(path), hint=hint
        ) from error


def _require_free(path: Path) -> None:
    """Raise `ArtifactError` if there is something else than an artifact, or a killed save."""
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink():
        if not os.listdir(path) or (path / LOCKS_DIRECTORY).is_dir():
            return
        with contextlib.suppress(OSError, UnsafeFile):
            if f'"{KIND}"'.encode() in read_regular(path / MANIFEST, MAX_MANIFEST_BYTES):
                return
    raise ArtifactError(
        "there is something else than an artifact",
        where=str(path),
        hint="name a new directory, or remove what is there",
    )


def _remove_others(path: Path, kept: set[Path]) -> None:
    for folder, _, names in os.walk(path, topdown=False):
        for each in (Path(folder, name) for name in names):
            if each not in kept and each.parent.name != LOCKS_DIRECTORY:
                with contextlib.suppress(OSError):
                    each.unlink()
        with contextlib.suppress(OSError):  # only an empty one goes
            os.rmdir(folder)


def open_folder(path: Path, key: bytes | None, tries: int = _TRIES) -> Folder:
    """Verify an artifact's manifest, and then every file that it lists.

    Args:
        key: what it must be signed with; None takes an unsigned one, and does not look at a
            signature.
        tries: how often it is read again if another artifact took its place meanwhile.

    Raises:
        ArtifactError: there is none, it is damaged, of another format, not signed with the key, or
            others could write it.
    """
    if not path.is_dir():
        hint = "stitched.save(path) makes one"
        raise ArtifactError("there is no artifact here", where=str(path), hint=hint)
    sealed, raw = _sealed(key), b""
    try:
        check_directory(Path(os.path.realpath(path)))
        raw = read_regular(path / MANIFEST, MAX_MANIFEST_BYTES)
        listed = sealed.decode(raw)
        files = {n: sealed.read_file(path, n, record) for n, record in listed.files.items()}
        return Folder(str(path), listed.facts, files)
    except (OSError, UnsafeFile, CacheError, Damaged) as error:
        with contextlib.suppress(OSError, UnsafeFile):
            if tries and read_regular(path / MANIFEST, MAX_MANIFEST_BYTES) != raw:
                return open_folder(path, key, tries - 1)
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(path, f"{MANIFEST} is missing" if missing else str(error)) from error


def _damaged(where: object, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the artifact is damaged or not to be trusted: {reason}",
        where=str(where),
        hint=f"copy the directory whole, or {_AGAIN}, with the same key; its files belong to this user or root "
        "alone, and an edited source is saved by use_edited() and save()",
    )


# --- one bytes ---------------------------------------------------------------------------------------


def packed(files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None) -> bytes:
    """An artifact as one ``bytes``: the manifest's length, the manifest, the files in its order."""
    manifest = _sealed(key).encode({name: Record.of(data) for name, data in files.items()}, facts)
    held = [data for _, data in sorted(files.items())]
    return b"".join([len(manifest).to_bytes(8, "big"), manifest, *held])


def unpacked(data: bytes, key: bytes | None) -> Folder:
    """What `packed` made, verified as `open_folder` does; raises as it does."""
    position = 8 + int.from_bytes(data[:8], "big")
    files: dict[str, bytes] = {}
    try:
        listed = _sealed(key).decode(data[8:position])
        for name, record in sorted(listed.files.items()):
            end = position + record.size
            files[name], position = verified(data[position:end], record, name), end
    except Damaged as error:
        raise _damaged("<bytes>", str(error)) from error
    return Folder("<bytes>", listed.facts, files)
