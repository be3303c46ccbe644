"""The directory of an artifact. In: texts and bytes by name, and what the manifest says beside. Out: a directory that appears whole or not at all; or its verified bytes.

It knows nothing of what the files hold. No byte of a file is given out before its digest agrees with the manifest, and the manifest's with itself, and
with the key where there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import ArtifactError, CacheError
from piecework.runtime.cache.atomic import sync_directory
from piecework.runtime.cache.safety import UnsafeFile, read_regular, signing_key

FORMAT = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.hmac"
_LIMIT = 4 << 30
_MANIFEST_LIMIT = 64 << 20
_KEY_BYTES = 16
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_AGAIN = "save the model again"


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory that was verified.

    Attributes:
        path: where it is.
        facts: what the manifest says besides the files.
        files: file name → its bytes, exactly those that were saved. They are held, so that nothing that happens to the directory later matters.
    """

    path: Path
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
                where=str(self.path / name),
                hint=f"copy the directory whole, or {_AGAIN}",
            )
        return data

    def text(self, name: str) -> str:
        """The same as text."""
        return self.read(name).decode("utf-8")


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


# --- writing -----------------------------------------------------------------------------------------


def write_folder(
    path: Path, files: Mapping[str, bytes], facts: Mapping[str, object], key: bytes | None
) -> None:
    """Write a directory, in place of an artifact that is there.

    Everything is written beside it first and moved into place at the end. Where an older artifact is replaced, a process that dies between the two moves
    leaves none.

    Raises:
        ArtifactError: there is something else, or it can't be written.
    """
    path = Path(os.path.abspath(path))
    replaced = _replaced(path)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = _encoded(
        {
            **facts,
            "files": {
                name: {"sha256": digests[name], "bytes": len(files[name])} for name in sorted(files)
            },
        }
    )
    written = {**files, MANIFEST: manifest}
    if key is not None:
        written[SIGNATURE] = (hmac.digest(key, manifest, "sha256").hex() + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for name, data in written.items():
                _write(staging / name, data)
            _put(staging, path, replaced)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):
            sync_directory(path.parent)
    except OSError as error:
        raise ArtifactError(
            f"the artifact can't be written: {error.strerror or error}",
            where=str(path),
            hint="name a directory that can be made, or replaced, by this user",
        ) from error


def _replaced(path: Path) -> bool:
    """Whether an artifact is there, which may be replaced."""
    if not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        try:
            names = os.listdir(path)
        except OSError as error:
            raise ArtifactError(
                f"the directory can't be read: {error.strerror}", where=str(path)
            ) from error
        if not names or _is_ours(path / MANIFEST):
            return True
    raise ArtifactError(
        "there is something else than an artifact",
        where=str(path),
        hint="name a new directory, or remove what is there",
    )


def _is_ours(manifest: Path) -> bool:
    try:
        return b'"piecework artifact"' in _read(manifest, _MANIFEST_LIMIT)[:200]
    except ArtifactError:
        return False


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _put(staging: Path, path: Path, replaced: bool) -> None:
    staging.chmod(0o755)
    if not replaced:
        staging.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        path.rename(aside / "old")
        try:
            staging.rename(path)
        except BaseException:
            (aside / "old").rename(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _encoded(facts: Mapping[str, object]) -> bytes:
    """The manifest with its own digest, which tells damage; a signature tells more."""
    body = {"kind": "piecework artifact", "format": FORMAT, **facts}
    return (json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n").encode()


def _checksum(body: Mapping[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# --- reading -----------------------------------------------------------------------------------------


def open_folder(path: Path, key: bytes | None) -> Folder:
    """Verify a directory's manifest, and then every file that it lists.

    Args:
        key: what it must be signed with; None takes an unsigned one, and does not look at a signature.

    Raises:
        ArtifactError: there is none, it is damaged, of another format, unsigned or signed with another key, or names a file outside the directory; or a
            file is missing, is no plain file of ours, or was changed.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise ArtifactError(
            "there is no artifact here",
            where=str(path),
            hint="stitched.save(path) makes one",
        )
    _require_safe(path)
    raw = _read(path / MANIFEST, _MANIFEST_LIMIT)
    if key is not None:
        _require_signed(path, raw, key)
    try:
        facts = json.loads(raw)
        kind, version = facts["kind"], facts["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, "it is not what was written") from error
    if kind != "piecework artifact":
        raise ArtifactError(
            "this is no artifact of piecework.load",
            where=str(path),
            hint="what piecework compile makes holds one in its folder 'artifact'",
        )
    if version != FORMAT:
        raise ArtifactError(
            f"the artifact has format {version!r}; this version of piecework reads {FORMAT}",
            where=str(path),
            hint=_AGAIN,
        )
    checksum = facts.pop("checksum", None)
    if checksum != _checksum(facts):
        raise _damaged(path, "its checksum does not agree")
    digests = _digests(path, facts.pop("files", None))
    return Folder(
        path, facts, {name: _verified(path / name, each) for name, each in digests.items()}
    )


def _verified(path: Path, digest: str) -> bytes:
    data = _read(path, _LIMIT)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(
            "the file is not what was saved: its SHA-256 is not the one in the manifest",
            where=str(path),
            hint=f"{_AGAIN}; an edited source is saved by use_edited() and save()",
        )
    return data


def _digests(path: Path, rows: object) -> dict[str, str]:
    if not isinstance(rows, dict):
        raise _damaged(path, "it lists no files")
    found: dict[str, str] = {}
    for name, row in rows.items():
        digest = row.get("sha256") if isinstance(row, dict) else None
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise _damaged(path, f"it has no digest of {name!r}")
        if not _NAME.fullmatch(name):
            raise ArtifactError(
                f"the manifest names a file outside the artifact: {name!r}",
                where=str(path / MANIFEST),
                hint="this was not written by piecework: do not use it",
            )
        found[name] = digest
    return found


def _require_signed(path: Path, manifest: bytes, key: bytes) -> None:
    try:
        found = _read(path / SIGNATURE, 1000).decode("ascii", "replace").strip()
    except ArtifactError as error:
        raise ArtifactError(
            "the artifact is not signed, and a key was given to verify it with",
            where=str(path),
            hint="save it with the same key",
        ) from error
    if not hmac.compare_digest(found.encode(), hmac.digest(key, manifest, "sha256").hex().encode()):
        raise ArtifactError(
            "the artifact was signed with another key, or changed since",
            where=str(path),
            hint="verify with the key that it was saved with",
        )


def _require_safe(path: Path) -> None:
    """Refuse a directory that others than its owner can write, or that belongs to neither us nor root."""
    info = os.stat(path)
    if not hasattr(os, "geteuid"):
        return
    if info.st_uid not in (0, os.geteuid()):
        raise ArtifactError(
            f"the artifact belongs to another user (uid {info.st_uid}), and its code would run",
            where=str(path),
            hint="copy it as your own, if you trust it",
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ArtifactError(
            f"others can write into the artifact (mode {stat.S_IMODE(info.st_mode):04o}), and its code would run",
            where=str(path),
            hint=f"run `chmod -R go-w {path}` if its content can be trusted",
        )


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except FileNotFoundError as error:
        raise ArtifactError(
            "a file of the artifact is missing",
            where=str(path),
            hint=f"copy the directory whole, or {_AGAIN}",
        ) from error
    except (OSError, UnsafeFile) as error:
        raise ArtifactError(
            f"a file of the artifact can't be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            hint="its files are plain files of this user or of root, which others can't write",
        ) from error


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"the manifest is damaged: {why}", where=str(path / MANIFEST), hint=_AGAIN)
