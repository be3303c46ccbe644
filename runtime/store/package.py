"""Files in one file: a saved program, or a piece in the compile cache.

The file begins with a manifest that lists what follows with digests, and that has a checksum and,
given a key, a signature. Every byte is verified before it is given out, and the file is replaced in
one step: a reader needs no lock.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import ArtifactError, ConfigError
from piecework.runtime.store.files import (
    FULL_DISK,
    MAX_BYTES,
    Damaged,
    read_regular,
    sha256,
    sync_directory,
    write_atomic,
)

Place = str | os.PathLike[str]
KIND = "piecework artifact"
#: What the manifest says of each of several modules that were saved together.
PARTS = "parts"
FORMAT = 4
_HEAD = re.compile(rb"piecework ([0-9]{1,9})\n")
_MANIFEST = re.compile(
    rb'\{\n "checksum": "(?P<checksum>[0-9a-f]{64})",\n'
    rb'(?P<signed> "signature": "(?P<signature>[0-9a-f]*)",\n(?P<body>.*))',
    re.DOTALL,
)


# --- bytes -------------------------------------------------------------------------------------------


def encode(facts: Mapping[str, object], key: bytes | None) -> bytes:
    """``facts`` as JSON with a checksum and, given a key, a signature; the same facts give the same
    bytes.
    """
    body = json.dumps(facts, sort_keys=True, indent=1, allow_nan=False).encode()[2:] + b"\n"
    signature = "" if key is None else hmac.digest(key, body, "sha256").hex()
    signed = f' "signature": "{signature}",\n'.encode() + body
    return f'{{\n "checksum": "{sha256(signed)}",\n'.encode() + signed


def decode(raw: bytes, key: bytes | None, file: str) -> dict[str, object]:
    """What `encode` wrote; raises `Damaged` unless every byte is as it was written and, given a key,
    signed with it.
    """
    found = _MANIFEST.fullmatch(raw)
    if found is None or sha256(found["signed"]).encode() != found["checksum"]:
        raise Damaged("its manifest is not as it was written: the checksum does not match", file)
    if key is not None:
        expected = hmac.digest(key, found["body"], "sha256").hex().encode()
        if not hmac.compare_digest(found["signature"], expected):
            raise Damaged("its signature does not match", file)
    try:
        facts: dict[str, object] = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of who can seal it
        raise Damaged(f"its manifest is no JSON ({type(error).__name__})", file) from error
    del facts["checksum"], facts["signature"]
    return facts


def packed(
    files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None, kind: str
) -> bytes:
    """Files as one ``bytes``, with facts of that kind."""
    rows = {name: [sha256(data), len(data)] for name, data in files.items()}
    manifest = encode({**facts, "kind": kind, "format": FORMAT, "files": rows}, key)
    held = (data for _, data in sorted(files.items()))
    return b"".join([f"piecework {len(manifest)}\n".encode(), manifest, *held])


def unpacked(
    data: bytes, key: bytes | None, kind: str, file: str = "<bytes>"
) -> tuple[dict[str, bytes], dict[str, object]]:
    """The files and facts that `packed` was given; raises `Damaged`."""
    head = _HEAD.match(data)
    if head is None:
        raise Damaged("it is no file of piecework's", file)
    position = head.end() + int(head[1])
    facts = decode(data[head.end() : position], key, file)
    found, rows = (facts.pop("kind", None), facts.pop("format", None)), facts.pop("files", None)
    if found != (kind, FORMAT):
        why = f"it is of {found[0]!r} in format {found[1]!r}, not of {kind!r} in {FORMAT}"
        raise Damaged(why, file)
    files: dict[str, bytes] = {}
    try:
        for name, (digest, size) in sorted(rows.items()):  # type: ignore[union-attr]
            files[name] = data[position : position + size]
            position += size
            if (sha256(files[name]), len(files[name])) != (digest, size):
                why = f"the SHA-256 of {name or 'its content'} is not the one that was saved"
                raise Damaged(why, file)
    except (TypeError, ValueError, AttributeError) as error:
        raise Damaged("it lists no files with their digests and sizes", file) from error
    if position != len(data):
        raise Damaged("it is longer than was saved", file)
    return files, facts


# --- a saved program ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Package:
    """An artifact that was verified."""

    name: str  # where it is, for errors
    facts: Mapping[str, object]  # what the manifest says besides the files
    files: Mapping[str, bytes]  # name → bytes, exactly those that were saved

    @classmethod
    def of(cls, data: bytes, key: bytes | None, name: str = "<bytes>") -> Package:
        """What `packed` made of an artifact; raises `ArtifactError` unless every byte is right."""
        try:
            files, facts = unpacked(data, key, KIND, name)
        except Damaged as error:
            raise _damaged(name, error.reason) from error
        return cls(name, facts, files)

    @classmethod
    def read(cls, place: Place, key: bytes | None) -> Package:
        """The artifact in a file; raises as `of`, or where there is none or others could write it."""
        path = Path(os.path.realpath(file_of(place)))
        try:
            data = read_regular(path.parent, path.name, MAX_BYTES)
        except FileNotFoundError as error:
            hint = "stitched.save(path) makes one"
            raise ArtifactError("there is no artifact here", where=str(path), hint=hint) from error
        except (OSError, Damaged) as error:
            raise _damaged(path, str(error)) from error
        return cls.of(data, key, str(path))

    def file(self, name: str) -> bytes:
        """The bytes of a file; raises `ArtifactError` if the manifest lists none of that name."""
        if name not in self.files:
            raise _damaged(self.name, f"the manifest lists no file {name}")
        return self.files[name]

    def table(self, name: str) -> Mapping[str, str]:
        """What the manifest says of ``name``, as texts by name."""
        found = self.facts.get(name)
        return found if isinstance(found, dict) else {}

    def parts(self) -> tuple[Package, ...]:
        """The same as one artifact for each module that was saved in it with others."""
        rows = self.facts.get(PARTS)
        found = []
        for number, row in enumerate(rows if isinstance(rows, list) else ()):
            folder = part_folder(number)
            files = {name.removeprefix(folder): data for name, data in self.files.items()}
            found.append(Package(f"{self.name}/{folder}", {**self.facts, **row}, files))
        return tuple(found)


def part_folder(number: int) -> str:
    """Under what name the files of a module are that was saved with others."""
    return f"part_{number}/"


def file_of(place: Place) -> Path:
    """The file that ``place`` names; `ConfigError` if none, `ArtifactError` for a URL."""
    if not isinstance(place, (str, os.PathLike)) or not os.fspath(place):
        raise ConfigError(f"an artifact is a file; got {place!r}")
    if "://" in os.fspath(place):
        why = "an artifact is a file, and this is a URL"
        raise ArtifactError(why, where=str(place), hint="copy the file with tools of its own")
    return Path(os.path.abspath(place))


def write_package(
    place: Place, files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None
) -> None:
    """Write an artifact, in place of one that is there; `ArtifactError` where something else is, or
    it can't be written.
    """
    path = Path(os.path.realpath(file_of(place)))
    if os.path.lexists(path):
        head = b""
        with contextlib.suppress(OSError), path.open("rb") as file:
            head = file.read(32)
        if not _HEAD.match(head):
            raise ArtifactError(
                "there is something else than an artifact",
                where=str(path),
                hint="name a new file, or remove what is there",
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packed(files, facts, key, KIND), 0o644)
        sync_directory(path.parent)
    except OSError as error:
        why = "the disk is full" if error.errno in FULL_DISK else error.strerror
        raise ArtifactError(
            f"the artifact can't be written: {why}",
            where=str(path),
            hint="free some space, or name a file that this user can make, or replace",
        ) from error


def _damaged(where: object, reason: str) -> ArtifactError:
    return ArtifactError(
        f"the artifact is damaged or not to be trusted: {reason}",
        where=str(where),
        hint="copy the file again, or save the model again, with the same key; it belongs to this user or root alone",
    )
