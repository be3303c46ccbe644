"""The one form of manifests: JSON that lists files with their digests, with its own checksum and, given a key, a signature.

It is the index of a cache entry, and the manifest of a saved program. Of texts, integers, lists and dicts alone it is a
Python literal too.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from piecework.runtime.store.files import UnsafeFile, read_regular, sha256

MAX_MANIFEST_BYTES = 64 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
# The last lines of a manifest, over all bytes before them.
_SEALS = re.compile(
    rb',\n "checksum": "(?P<checksum>[0-9a-f]{64})"'
    rb'(?:,\n "signature": "(?P<signature>[0-9a-f]{64})")?\n\}\n\Z'
)
_SEALS_BYTES = 300


class Damaged(Exception):
    """Something is not what was saved.

    Args:
        reason: what is wrong, for people.
        file: its path below the directory that it belongs to.
    """

    def __init__(self, reason: str, file: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.reason = reason
        self.file = file


class Record(NamedTuple):
    """The bytes of one name: their SHA-256, and how many there are."""

    digest: str
    size: int


def record_of(data: bytes) -> Record:
    return Record(sha256(data), len(data))


def encode(facts: Mapping[str, object], key: bytes | None) -> bytes:
    """``facts``, of which there are some, as the bytes of a manifest; the same facts give the same bytes."""
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


def read_manifest(path: Path, key: bytes | None) -> dict[str, object]:
    """What a file holds that `encode` wrote; raises `FileNotFoundError` where there is none, else as `decode` does."""
    try:
        return decode(read_regular(path, MAX_MANIFEST_BYTES), key, path.name)
    except UnsafeFile as error:
        raise Damaged(str(error), path.name) from error


def records_of(facts: Mapping[str, object], field: str, file: str) -> dict[str, Record]:
    """The records that ``facts`` lists under ``field``: name → digest and size."""
    rows = facts.get(field)
    if not isinstance(rows, dict):
        raise Damaged(f"it lists no {field}", file)
    found: dict[str, Record] = {}
    for name, row in rows.items():
        if not (isinstance(row, list) and len(row) == 2 and _DIGEST.fullmatch(str(row[0]))):
            raise Damaged(f"it has no digest of {name!r}", file)
        if type(row[1]) is not int or row[1] < 0:
            raise Damaged(f"it has no size of {name!r}", file)
        found[name] = Record(*row)
    return found


def read_recorded(path: Path, record: Record, file: str) -> bytes:
    """The bytes of a file; raises `Damaged` unless size and SHA-256 are as recorded."""
    try:
        data = read_regular(path, record.size)
    except FileNotFoundError as error:
        raise Damaged("it is missing", file) from error
    except UnsafeFile as error:
        raise Damaged(str(error), file) from error
    if record_of(data) != record:
        reason = f"its SHA-256 is not the one that was saved ({len(data)} of {record.size} bytes)"
        raise Damaged(reason, file)
    return data


def _seals(body: bytes, key: bytes | None) -> dict[str, str]:
    seals = {"checksum": sha256(body)}
    if key is not None:
        seals["signature"] = hmac.digest(key, body, "sha256").hex()
    return seals
