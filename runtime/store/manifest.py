"""Directories of files that one manifest lists with their digests: what the cache and saved
programs have in common.

A manifest is JSON with its own checksum and, given a key, a signature; of texts, integers, lists
and dicts alone it is a Python literal too. Files are there before the manifest names them, and it
is replaced in one step: a reader needs no lock.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from piecework.runtime.store.files import (
    UnsafeFile,
    read_regular,
    sha256,
    sync_directory,
    write_atomic,
)

FORMAT = 3
MAX_MANIFEST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
# The last lines of a manifest, over all bytes before them.
_SEALS = re.compile(
    rb',\n "checksum": "(?P<checksum>[0-9a-f]{64})"'
    rb'(?:,\n "signature": "(?P<signature>[0-9a-f]{64})")?\n\}\n\Z'
)
_SEALS_BYTES = 300


class Damaged(Exception):
    """Something is not what was saved: why, and its path below the directory."""

    def __init__(self, reason: str, file: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.reason = reason
        self.file = file


class Record(NamedTuple):
    """The bytes of one name: their SHA-256, and how many there are."""

    digest: str
    size: int

    @classmethod
    def of(cls, data: bytes) -> Record:
        return cls(sha256(data), len(data))


class Manifest(NamedTuple):
    """What a manifest says: the files that it lists by name, and whatever else."""

    files: dict[str, Record]
    facts: dict[str, object]


def encode(facts: Mapping[str, object], key: bytes | None) -> bytes:
    """``facts``, of which there are some, sealed; the same facts give the same bytes."""
    text = json.dumps(facts, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    body = text.encode("ascii").removesuffix(b"\n}")
    seals = "".join(f',\n "{name}": "{seal}"' for name, seal in _seals(body, key).items())
    return body + seals.encode() + b"\n}\n"


def decode(raw: bytes, key: bytes | None, file: str) -> dict[str, object]:
    """What `encode` wrote.

    Args:
        key: what it must be signed with; None does not look at a signature.
        file: its name, for errors.

    Raises:
        Damaged: a byte of it is not as it was written, or it is not signed with the key.
    """
    tail = _SEALS.search(raw, max(0, len(raw) - _SEALS_BYTES))
    if tail is None:
        raise Damaged("it is no manifest, or not in the form in which it was written", file)
    for name, expected in _seals(raw[: tail.start()], key).items():
        if not hmac.compare_digest(tail[name] or b"", expected.encode()):
            raise Damaged(f"its {name} does not match", file)
    try:
        facts = json.loads(raw)
    except (ValueError, RecursionError) as error:  # of who can seal it
        raise Damaged(f"it is no manifest ({type(error).__name__})", file) from error
    return {name: each for name, each in facts.items() if name not in ("checksum", "signature")}


def _seals(body: bytes, key: bytes | None) -> dict[str, str]:
    seals = {"checksum": sha256(body)}
    if key is not None:
        seals["signature"] = hmac.digest(key, body, "sha256").hex()
    return seals


class Sealed(NamedTuple):
    """How a directory's manifest is called and sealed, and where the files lie that it lists.

    Attributes:
        manifest: its file's name.
        kind: what it says that it is of; another one is refused.
        place: a file's name and record → its path; raises `Damaged` for a name that leads
            elsewhere.
        key: signs it, and must have signed what is read; None looks at no signature.
    """

    manifest: str
    kind: str
    place: Callable[[str, Record], str]
    key: bytes | None

    def encode(self, files: Mapping[str, Record], facts: Mapping[str, object]) -> bytes:
        return encode({**facts, "kind": self.kind, "format": FORMAT, "files": files}, self.key)

    def decode(self, raw: bytes) -> Manifest:
        """What a manifest says; raises `Damaged`."""
        facts = decode(raw, self.key, self.manifest)
        found = facts.pop("kind", None), facts.pop("format", None)
        if found != (self.kind, FORMAT):
            why = f"it is of {found[0]!r} in format {found[1]!r}, not of {self.kind!r} in {FORMAT}"
            raise Damaged(why, self.manifest)
        rows = facts.pop("files", None)
        if not isinstance(rows, dict) or not all(map(_is_record, rows.values())):
            raise Damaged("it lists no files with their digests and sizes", self.manifest)
        files = {name: Record(*row) for name, row in rows.items()}
        for name, record in files.items():
            self.place(name, record)
        return Manifest(files, facts)

    def read(self, directory: Path) -> Manifest:
        """What a directory's manifest says; raises `Damaged`, or `FileNotFoundError`."""
        try:
            return self.decode(read_regular(directory / self.manifest, MAX_MANIFEST_BYTES))
        except UnsafeFile as error:
            raise Damaged(str(error), self.manifest) from error

    def read_file(self, directory: Path, name: str, record: Record) -> bytes:
        """The bytes of a file; raises `Damaged` unless size and SHA-256 are as recorded."""
        place = self.place(name, record)
        try:
            data = read_regular(directory / place, record.size)
        except FileNotFoundError as error:
            raise Damaged("it is missing", place) from error
        except UnsafeFile as error:
            raise Damaged(str(error), place) from error
        return verified(data, record, place)

    def write(
        self,
        directory: Path,
        added: Mapping[str, bytes],
        kept: Mapping[str, Record],
        facts: Mapping[str, object],
        mode: int = 0o600,
    ) -> Manifest:
        """Write the files ``added``, then a manifest of them and of those ``kept``."""
        files = {**kept, **{name: Record.of(data) for name, data in added.items()}}
        places = {name: directory / self.place(name, files[name]) for name in added}
        for name, data in added.items():
            write_atomic(places[name], data, mode)
        for folder in {each.parent for each in places.values()}:
            sync_directory(folder)
        write_atomic(directory / self.manifest, self.encode(files, facts), mode)
        sync_directory(directory)
        return Manifest(files, dict(facts))


def verified(data: bytes, record: Record, file: str) -> bytes:
    """``data`` if it is what was recorded; else raises `Damaged`."""
    if Record.of(data) != record:
        reason = f"its SHA-256 is not the one that was saved ({len(data)} of {record.size} bytes)"
        raise Damaged(reason, file)
    return data


def _is_record(row: object) -> bool:
    pair = isinstance(row, list) and len(row) == 2 and _DIGEST.fullmatch(str(row[0]))
    return bool(pair) and type(row[1]) is int and row[1] >= 0  # type: ignore[index]
