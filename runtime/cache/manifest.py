"""The manifest of one cache entry. In: which bytes each file may hold. Out: `manifest.json`, self-checking and optionally signed, and back.

It never reads another file and never trusts a manifest that was made for another entry.

A file lists every digest that it may have: while a file is being replaced the manifest, which is written first,
accepts both the old and the new content, so that a writer killed between the two renames leaves a sound entry.
``None`` among them means that the file may be absent.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

MANIFEST_NAME = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_ARTIFACT_BYTES = 1 << 40
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class Damaged(Exception):
    """Part of an entry is not what was saved.

    Args:
        reason: what is wrong, to be read by a person.
        file: the name of the damaged file inside the entry.
        digest: set when it is one artifact; its content address.
        whole: whether nothing of the entry can be trusted any more.
    """

    def __init__(
        self, reason: str, *, file: str, digest: str | None = None, whole: bool = True
    ) -> None:
        super().__init__(f"{file}: {reason}")
        self.reason = reason
        self.file = file
        self.digest = digest
        self.whole = whole


@dataclass(frozen=True, slots=True)
class Identity:
    """Which entry this is: the key's hash, the ranks and the model's tag."""

    key: str
    rank: int
    dp_rank: int
    tag: str

    @property
    def parts(self) -> tuple[str, str, str]:
        """The three directories below the root."""
        return (self.key, f"rank_{self.rank}_{self.dp_rank}", self.tag)

    def __str__(self) -> str:
        return "/".join(self.parts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files` maps a file name to the digests it may have; `artifacts` maps a digest to its size in bytes."""

    identity: Identity
    files: Mapping[str, tuple[str | None, ...]]
    artifacts: Mapping[str, int]
    signed: bool = False


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def is_digest(value: object) -> bool:
    """Whether `value` is a hexadecimal SHA-256."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def encode_manifest(manifest: Manifest, hmac_key: bytes | None) -> bytes:
    """Return the bytes of ``manifest.json``: canonical JSON with its own checksum and, given a key, its HMAC."""
    body: dict[str, object] = {
        "format": FORMAT,
        "identity": _identity_fields(manifest.identity),
        "files": {name: list(digests) for name, digests in manifest.files.items()},
        "artifacts": dict(manifest.artifacts),
    }
    return _canonical(body | _seals(body, hmac_key))


def decode_manifest(
    raw: bytes, identity: Identity, hmac_key: bytes | None, *, check_signature: bool = True
) -> Manifest:
    """Return the manifest that `raw` holds; raise `Damaged` unless every byte of it is as it was written.

    Args:
        raw: content of ``manifest.json``.
        identity: the entry that it must have been made for.
        hmac_key: the key that it must be signed with; ``None`` expects an unsigned one.
        check_signature: ``False`` lets an inspection without the key read a signed manifest.
    """
    try:
        value = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _bad(f"not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict) or _canonical(value) != raw:
        raise _bad("not in the form in which it was written")
    body = {name: field for name, field in value.items() if name not in ("sha256", "hmac")}
    seals = _seals(body, hmac_key)
    if not _same(value.get("sha256"), seals["sha256"]):
        raise _bad("its checksum does not match")
    signature = value.get("hmac")
    expected = seals["hmac"]
    sealed = signature is None if expected is None else _same(signature, expected)
    if check_signature and not sealed:
        raise _bad("its signature does not match the key")
    if body.get("format") != FORMAT:
        raise _bad("unknown format")
    if body.get("identity") != _identity_fields(identity):
        raise _bad("it was made for another entry")
    return Manifest(
        identity,
        _files(body.get("files")),
        _artifacts(body.get("artifacts")),
        signature is not None,
    )


def _identity_fields(identity: Identity) -> dict[str, object]:
    return {
        "key": identity.key,
        "rank": identity.rank,
        "dp_rank": identity.dp_rank,
        "tag": identity.tag,
    }


def _canonical(value: Mapping[str, object]) -> bytes:
    try:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _bad("not in the form in which it was written") from error
    return text.encode("ascii") + b"\n"


def _seals(body: Mapping[str, object], hmac_key: bytes | None) -> dict[str, str | None]:
    content = b"piecework cache manifest\n" + _canonical(body)
    mac = None if hmac_key is None else hmac.new(hmac_key, content, hashlib.sha256).hexdigest()
    return {"sha256": sha256(content), "hmac": mac}


def _same(found: object, expected: str | None) -> bool:
    return (
        isinstance(found, str)
        and found.isascii()
        and expected is not None
        and hmac.compare_digest(found, expected)
    )


def _files(value: object) -> dict[str, tuple[str | None, ...]]:
    if not isinstance(value, dict):
        raise _bad("`files` is not an object")
    files: dict[str, tuple[str | None, ...]] = {}
    for name, digests in value.items():
        if _FILE_NAME.fullmatch(name) is None:
            raise _bad("a file has an impossible name")
        if not isinstance(digests, list) or not 1 <= len(digests) <= 4:
            raise _bad(f"`{name}` has no digests")
        if not all(digest is None or is_digest(digest) for digest in digests):
            raise _bad(f"`{name}` has an impossible digest")
        files[name] = tuple(digests)
    return files


def _artifacts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise _bad("`artifacts` is not an object")
    for digest, size in value.items():
        if not is_digest(digest) or type(size) is not int or not 0 <= size <= MAX_ARTIFACT_BYTES:
            raise _bad("an artifact has an impossible digest or size")
    return value


def _bad(reason: str) -> Damaged:
    return Damaged(reason, file=MANIFEST_NAME)
