"""The files of an artifact. In: texts and bytes by name, and what the manifest says beside. Out: the same in a store; or verified bytes.

It knows nothing of what the files hold. No byte of a file is given out before its digest agrees with the manifest, and the manifest's with itself, and
with the key where there is one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import ArtifactError, CacheError
from piecework.runtime.artifact.store import KIND, MANIFEST, MANIFEST_LIMIT, Read, Store
from piecework.runtime.cache.safety import signing_key

FORMAT = 1
SIGNATURE = "manifest.hmac"
#: What the manifest says of each of several modules that were saved together.
PARTS = "parts"
_LIMIT = 4 << 30
_KEY_BYTES = 16
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AGAIN = "save the model again"
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Folder:
    """An artifact that was verified.

    Attributes:
        name: where it is, for errors.
        facts: what the manifest says besides the files.
        files: file name → its bytes, exactly those that were saved. They are held, so that nothing that happens to the store later matters.
    """

    name: str
    facts: Mapping[str, object]
    files: Mapping[str, bytes]

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ArtifactError: the manifest lists none of that name.
        """
        data = self.files.get(name)
        if data is None:
            raise ArtifactError(
                "the manifest lists no such file",
                where=f"{self.name}/{name}",
                hint=f"copy the directory whole, or {_AGAIN}",
            )
        return data

    def text(self, name: str) -> str:
        """The same as text."""
        return self.read(name).decode("utf-8")

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


def key_of(file: str | os.PathLike[str] | None) -> bytes | None:
    """The secret in ``file``, else in the file that ``PIECEWORK_CACHE_KEY_FILE`` names; None where there is neither.

    Raises:
        ArtifactError: it can't be read, or is too short to be a secret.
    """
    try:
        key = signing_key() if file is None else Path(file).read_bytes()
    except (OSError, CacheError) as error:
        raise ArtifactError(
            f"the key that signs artifacts can't be read: {getattr(error, 'strerror', None) or error}",
            where=None if file is None else str(file),
            hint="key_file names a file that holds the secret as raw bytes",
        ) from error
    if key is not None and len(key) < _KEY_BYTES:
        raise ArtifactError(
            f"the key that signs artifacts has {len(key)} bytes",
            hint=f"a secret has {_KEY_BYTES} bytes or more",
        )
    return key


def write_folder(
    store: Store, files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None
) -> None:
    """Write an artifact, in place of one that is there, whole or not at all.

    Raises:
        ArtifactError: there is something else, or it can't be written.
    """
    store.require_free()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    rows = {name: {"sha256": digests[name], "bytes": len(files[name])} for name in sorted(files)}
    manifest = _encoded({**facts, "files": rows})
    written = {**files, MANIFEST: manifest}
    if key is not None:
        written[SIGNATURE] = (hmac.digest(key, manifest, "sha256").hex() + "\n").encode()
    store.write(written)


def _encoded(facts: Mapping[str, object]) -> bytes:
    """The manifest with its own digest, which tells damage; a signature tells more."""
    body = {"kind": KIND, "format": FORMAT, **facts}
    return (json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n").encode()


def _checksum(body: Mapping[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def open_folder(store: Store, key: bytes | None, tries: int = _TRIES) -> Folder:
    """Verify an artifact's manifest, and then every file that it lists.

    Args:
        key: what it must be signed with; None takes an unsigned one, and does not look at a signature.
        tries: how often it is read again if another artifact took its place meanwhile.

    Raises:
        ArtifactError: there is none, it is damaged, of another format, unsigned or signed with another key, or names a file outside the directory; or a
            file is missing, is no plain file of ours, or was changed.
    """
    read = store.open()
    raw = read(MANIFEST, MANIFEST_LIMIT)
    try:
        return _verified(store.name, read, raw, key)
    except ArtifactError:
        if not tries or store.open()(MANIFEST, MANIFEST_LIMIT) == raw:
            raise
    return open_folder(store, key, tries - 1)


def _verified(name: str, read: Read, raw: bytes, key: bytes | None) -> Folder:
    if key is not None:
        _require_signed(name, read, raw, key)
    try:
        facts = json.loads(raw)
        kind, version = facts["kind"], facts["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(name, "it is not what was written") from error
    if kind != KIND:
        raise ArtifactError(
            "this is no artifact of piecework.load",
            where=name,
            hint="what piecework compile makes holds one in its folder 'artifact'",
        )
    if version != FORMAT:
        raise ArtifactError(
            f"the artifact has format {version!r}; this version of piecework reads {FORMAT}",
            where=name,
            hint=_AGAIN,
        )
    checksum = facts.pop("checksum", None)
    if checksum != _checksum(facts):
        raise _damaged(name, "its checksum does not agree")
    digests = _digests(name, facts.pop("files", None))
    files = {each: _file(name, read, each, digest) for each, digest in digests.items()}
    return Folder(name, facts, files)


def _file(folder: str, read: Read, name: str, digest: str) -> bytes:
    data = read(name, _LIMIT)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(
            "the file is not what was saved: its SHA-256 is not the one in the manifest",
            where=f"{folder}/{name}",
            hint=f"{_AGAIN}; an edited source is saved by use_edited() and save()",
        )
    return data


def _digests(folder: str, rows: object) -> dict[str, str]:
    if not isinstance(rows, dict):
        raise _damaged(folder, "it lists no files")
    found: dict[str, str] = {}
    for name, row in rows.items():
        digest = row.get("sha256") if isinstance(row, dict) else None
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise _damaged(folder, f"it has no digest of {name!r}")
        if not _NAME.fullmatch(name):
            raise ArtifactError(
                f"the manifest names a file outside the artifact: {name!r}",
                where=f"{folder}/{MANIFEST}",
                hint="this was not written by piecework: do not use it",
            )
        found[name] = digest
    return found


def _require_signed(folder: str, read: Read, manifest: bytes, key: bytes) -> None:
    try:
        found = read(SIGNATURE, 1000).decode("ascii", "replace").strip()
    except ArtifactError as error:
        raise ArtifactError(
            "the artifact is not signed, and a key was given to verify it with",
            where=folder,
            hint="save it with the same key",
        ) from error
    if not hmac.compare_digest(found.encode(), hmac.digest(key, manifest, "sha256").hex().encode()):
        raise ArtifactError(
            "the artifact was signed with another key, or changed since",
            where=folder,
            hint="verify with the key that it was saved with",
        )


def _damaged(folder: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"the manifest is damaged: {why}", where=f"{folder}/{MANIFEST}", hint=_AGAIN
    )
