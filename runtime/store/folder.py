"""Files that one manifest lists with their digests: a saved program's directory, or one ``bytes``,
as for a piece in the compile cache.

Files are there before the manifest names them, and it is replaced in one step: a reader needs no
lock. Every byte is verified before it is given out.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from piecework.errors import ArtifactError, CacheError, ConfigError
from piecework.runtime.store.files import (
    FULL_DISK,
    LOCKS_DIRECTORY,
    Damaged,
    check_directory,
    locked,
    read_regular,
    sha256,
    sync_directory,
    write_atomic,
)

FORMAT = 4
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST = re.compile(
    rb'\{\n "checksum": "(?P<checksum>[0-9a-f]{64})",\n'
    rb'(?P<signed> "signature": "(?P<signature>[0-9a-f]*)",\n(?P<body>.*))',
    re.DOTALL,
)


# --- manifests ---------------------------------------------------------------------------------------


class Record(NamedTuple):
    """The bytes of one name: their SHA-256, and how many there are."""

    digest: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> Record:
        return cls(sha256(data), len(data))


def encode(facts: Mapping[str, object], key: bytes | None) -> bytes:
    """``facts`` as JSON with a checksum and, given a key, a signature; the same facts give the same
    bytes. Of texts, integers, lists and dicts alone it is a Python literal too.
    """
    body = json.dumps(facts, sort_keys=True, indent=1, allow_nan=False).encode()[2:] + b"\n"
    signature = "" if key is None else hmac.digest(key, body, "sha256").hex()
    signed = f' "signature": "{signature}",\n'.encode() + body
    return f'{{\n "checksum": "{sha256(signed)}",\n'.encode() + signed


def decode(raw: bytes, key: bytes | None, file: str) -> dict[str, object]:
    """What `encode` wrote.

    Args:
        key: what it must be signed with; None does not look at a signature.
        file: its name, for errors.

    Raises:
        Damaged: a byte of it is not as it was written, or it is not signed with the key.
    """
    found = _MANIFEST.fullmatch(raw)
    if found is None:
        raise Damaged("it is no manifest, or not in the form in which it was written", file)
    if sha256(found["signed"]).encode() != found["checksum"]:
        raise Damaged("its checksum does not match", file)
    if key is not None:
        expected = hmac.digest(key, found["body"], "sha256").hex().encode()
        if not hmac.compare_digest(found["signature"], expected):
            raise Damaged("its signature does not match", file)
    try:
        facts: dict[str, object] = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of who can seal it
        raise Damaged(f"it is no manifest ({type(error).__name__})", file) from error
    del facts["checksum"], facts["signature"]
    return facts


def sealed(
    kind: str, files: Mapping[str, Record], facts: Mapping[str, object], key: bytes | None
) -> bytes:
    """A manifest of a kind of directory that lists ``files``."""
    return encode({**facts, "kind": kind, "format": FORMAT, "files": files}, key)


def opened(
    raw: bytes, kind: str, key: bytes | None, file: str = MANIFEST
) -> tuple[dict[str, Record], dict[str, object]]:
    """The files that a manifest lists, and whatever else it says; raises `Damaged`."""
    facts = decode(raw, key, file)
    found = facts.pop("kind", None), facts.pop("format", None)
    if found != (kind, FORMAT):
        why = f"it is of {found[0]!r} in format {found[1]!r}, not of {kind!r} in {FORMAT}"
        raise Damaged(why, file)
    rows = facts.pop("files", None)
    if not isinstance(rows, dict) or not all(map(_is_record, rows.values())):
        raise Damaged("it lists no files with their digests and sizes", file)
    return {name: Record(*row) for name, row in rows.items()}, facts


def verified(data: bytes, record: Record, file: str) -> bytes:
    """``data`` if it is what was recorded; else raises `Damaged`."""
    if Record.of(data) != record:
        reason = f"its SHA-256 is not the one that was saved ({len(data)} of {record.size} bytes)"
        raise Damaged(reason, file)
    return data


def _is_record(row: object) -> bool:
    pair = isinstance(row, list) and len(row) == 2 and _DIGEST.fullmatch(str(row[0]))
    return bool(pair) and type(row[1]) is int and row[1] >= 0  # type: ignore[index]


def packed(
    files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None, kind: str
) -> bytes:
    """Files as one ``bytes``: the manifest's length, the manifest, the files in its order."""
    manifest = sealed(kind, {name: Record.of(data) for name, data in files.items()}, facts, key)
    held = [data for _, data in sorted(files.items())]
    return b"".join([len(manifest).to_bytes(8, "big"), manifest, *held])


def unpacked(
    data: bytes, key: bytes | None, kind: str, file: str = "<bytes>"
) -> tuple[dict[str, bytes], dict[str, object]]:
    """The files and facts that `packed` was given; raises `Damaged`."""
    position = 8 + int.from_bytes(data[:8], "big")
    listed, facts = opened(data[8:position], kind, key, file)
    files: dict[str, bytes] = {}
    for name, record in sorted(listed.items()):
        end = position + record.size
        files[name], position = verified(data[position:end], record, file), end
    if position != len(data):
        raise Damaged("it is longer than was saved", file)
    return files, facts


# --- a saved program ---------------------------------------------------------------------------------

Place = str | os.PathLike[str]
KIND = "piecework artifact"
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
    return (path / MANIFEST).is_file()


def _place(name: str, record: Record) -> str:
    """Where a file lies: its name tells its content too, so that nothing is overwritten."""
    if not _NAME.fullmatch(name):
        raise Damaged(f"it names a file outside the artifact, {name!r}", MANIFEST)
    pure = PurePosixPath(name)
    return str(pure.with_name(f"{pure.stem}.{record.digest[:16]}{pure.suffix}"))


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
            listed = {name: Record.of(data) for name, data in files.items()}
            places = {path / _place(*each): files[each[0]] for each in listed.items()}
            for place, data in places.items():
                place.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
                write_atomic(place, data, 0o644)
            for folder in {each.parent for each in places}:
                sync_directory(folder)
            write_atomic(path / MANIFEST, sealed(KIND, listed, facts, key), 0o644)
            sync_directory(path)
            _remove_others(path, {path / MANIFEST, *places})
    except (OSError, CacheError, Damaged) as error:
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
        with contextlib.suppress(OSError, Damaged):
            if f'"{KIND}"'.encode() in read_regular(path, MANIFEST, MAX_MANIFEST_BYTES):
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
    raw = b""
    try:
        check_directory(Path(os.path.realpath(path)))
        raw = read_regular(path, MANIFEST, MAX_MANIFEST_BYTES)
        listed, facts = opened(raw, KIND, key)
        files = {name: _read(path, name, record) for name, record in listed.items()}
        return Folder(str(path), facts, files)
    except (OSError, CacheError, Damaged) as error:
        with contextlib.suppress(OSError, Damaged):
            if tries and read_regular(path, MANIFEST, MAX_MANIFEST_BYTES) != raw:
                return open_folder(path, key, tries - 1)
        missing = isinstance(error, FileNotFoundError)
        raise _damaged(path, f"{MANIFEST} is missing" if missing else str(error)) from error


def _read(path: Path, name: str, record: Record) -> bytes:
    place = _place(name, record)
    try:
        return verified(read_regular(path, place, record.size), record, place)
    except FileNotFoundError as error:
        raise Damaged("it is missing", place) from error


def _damaged(where: object, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the artifact is damaged or not to be trusted: {reason}",
        where=str(where),
        hint=f"copy the directory whole, or {_AGAIN}, with the same key; its files belong to this user or root "
        "alone, and an edited source is saved by use_edited() and save()",
    )


def folder_of(data: bytes, key: bytes | None) -> Folder:
    """What `packed` made of an artifact, verified as `open_folder` does; raises as it does."""
    try:
        files, facts = unpacked(data, key, KIND)
    except Damaged as error:
        raise _damaged("<bytes>", str(error)) from error
    return Folder("<bytes>", facts, files)
