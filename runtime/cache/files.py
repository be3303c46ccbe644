"""The files of one cache entry. In: an entry's directory and identity. Out: verified bytes, or `Damaged`; and changes that are atomic.

It never locks and never decides: whoever changes an entry holds its lock, and whoever finds damage confirms it under
the lock first, because a reader without the lock may see one file before and the next after somebody's change.

Every change writes artifacts, then the manifest (which accepts old and new), then the files that it describes.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from piecework.runtime.cache.atomic import sweep_temporaries, sync_directory, write_atomic
from piecework.runtime.cache.literal_index import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Record,
    parse_index,
    render_index,
)
from piecework.runtime.cache.locks import LOCKS_DIRECTORY
from piecework.runtime.cache.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Damaged,
    Identity,
    Manifest,
    decode_manifest,
    encode_manifest,
    sha256,
)
from piecework.runtime.cache.safety import (
    UnsafeFile,
    check_directory,
    make_directory,
    read_regular,
)

ARTIFACTS_DIRECTORY = "artifacts"
QUARANTINE_DIRECTORY = ".quarantine"
FACTORS_NAME = "cache_key_factors.json"
MAX_TEXT_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class EntryState:
    """What an entry holds: its manifest, and its artifacts by name."""

    manifest: Manifest
    records: Mapping[str, Record]

    @property
    def text_names(self) -> tuple[str, ...]:
        """The files besides the index that the manifest knows."""
        return tuple(name for name in self.manifest.files if name != INDEX_NAME)


class EntryFiles:
    """Reads and changes the files of one entry below `root`."""

    def __init__(self, root: Path, identity: Identity, hmac_key: bytes | None) -> None:
        self.root = root
        self.identity = identity
        self.directory = root.joinpath(*identity.parts)
        self._hmac_key = hmac_key

    def check_directories(self) -> None:
        """Raise `CacheError` if a directory of the entry is a link, somebody else's, or writable by others."""
        level = self.root
        for part in (*self.identity.parts, ARTIFACTS_DIRECTORY):
            level = level / part
            check_directory(level)
        for own in (LOCKS_DIRECTORY, QUARANTINE_DIRECTORY):
            check_directory(self.root / own)

    def artifact_path(self, digest: str) -> Path:
        """Where the bytes with this SHA-256 are kept."""
        return self.directory / ARTIFACTS_DIRECTORY / f"{digest}.bin"

    def read(self, *, check_signature: bool = True) -> EntryState:
        """Return the verified manifest and index; an entry that does not exist is empty."""
        raw = self._read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        if raw is None:
            if os.path.lexists(self.directory / INDEX_NAME):
                raise Damaged("it is missing although there is an index", file=MANIFEST_NAME)
            return EntryState(Manifest(self.identity, {}, {}), {})
        manifest = decode_manifest(
            raw, self.identity, self._hmac_key, check_signature=check_signature
        )
        index = self._read(INDEX_NAME, MAX_INDEX_BYTES)
        if (None if index is None else sha256(index)) not in manifest.files.get(
            INDEX_NAME, (None,)
        ):
            raise Damaged("its SHA-256 is not the one in the manifest", file=INDEX_NAME)
        records = {} if index is None else parse_index(index, self.identity.key)
        for record in records.values():
            if manifest.artifacts.get(record.digest) != record.size:
                raise Damaged("it names an artifact that is not in the manifest", file=INDEX_NAME)
        return EntryState(manifest, records)

    def read_artifact(self, record: Record) -> bytes:
        """Return the bytes of an artifact; raise `Damaged` unless size and SHA-256 are right."""
        file = f"{ARTIFACTS_DIRECTORY}/{record.digest}.bin"
        try:
            data = read_regular(self.artifact_path(record.digest), record.size)
        except FileNotFoundError as error:
            raise Damaged("it is missing", file=file, digest=record.digest, whole=False) from error
        except UnsafeFile as error:
            raise Damaged(str(error), file=file, digest=record.digest, whole=False) from error
        if len(data) != record.size:
            reason = f"it has {len(data)} bytes instead of {record.size}"
            raise Damaged(reason, file=file, digest=record.digest, whole=False)
        if sha256(data) != record.digest:
            reason = "its SHA-256 is not the one in the manifest"
            raise Damaged(reason, file=file, digest=record.digest, whole=False)
        return data

    def read_text(self, state: EntryState, name: str) -> bytes | None:
        """Return a file that the manifest knows, ``None`` if there is none; raise `Damaged` if it was changed."""
        accepted = state.manifest.files.get(name)
        if accepted is None:
            return None
        data = self._read(name, MAX_TEXT_BYTES, whole=False)
        if data is not None and sha256(data) not in accepted:
            reason = "its SHA-256 is not the one in the manifest"
            raise Damaged(reason, file=name, whole=False)
        return data

    def change(
        self,
        state: EntryState,
        *,
        artifacts: Mapping[str, bytes] | None = None,
        texts: Mapping[str, bytes] | None = None,
        drop_digests: Collection[str] = (),
    ) -> EntryState:
        """Add artifacts and texts, and forget the names of some digests; the caller holds the entry's lock.

        Raises `OSError` if something cannot be written: the entry then is as sound as before, and
        the artifacts added here are gone again.
        """
        added = artifacts or {}
        self._prepare()
        records = {
            name: record
            for name, record in state.records.items()
            if record.digest not in drop_digests
        }
        records |= {name: Record(sha256(data), len(data)) for name, data in added.items()}
        written: list[Path] = []
        try:
            for data in added.values():
                path = self.artifact_path(sha256(data))
                if not self._holds(path, data):
                    write_atomic(path, data)
                    written.append(path)
            if written:
                sync_directory(self.directory / ARTIFACTS_DIRECTORY)
            files = dict(texts or {}) | {INDEX_NAME: render_index(self.identity.key, records)}
            return self._write_files(state, files, records)
        except BaseException:
            for path in written:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def quarantine(self, damage: Damaged) -> Path | None:
        """Move what is damaged out of the way and return where to; ``None`` if it had to be deleted instead.

        The caller holds the entry's lock. Raises `OSError` if it can be neither moved nor deleted.
        """
        source = self.directory if damage.whole else self.directory / damage.file
        if not os.path.lexists(source):
            return None
        shelf = self.root / QUARANTINE_DIRECTORY
        try:
            make_directory(shelf, inside=self.root)
            key, rank, tag = self.identity.parts
            box = tempfile.mkdtemp(prefix=f"{key[:12]}-{rank}-{tag[:40]}-", dir=shelf)
            target = Path(box) / source.name
            os.rename(source, target)
        except OSError:
            # A full disk may refuse the new directory; what is damaged must still not be found again.
            names = (MANIFEST_NAME, INDEX_NAME) if damage.whole else (damage.file,)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.directory / name)
            return None
        return target

    def _prepare(self) -> None:
        make_directory(self.directory / ARTIFACTS_DIRECTORY, inside=self.root)
        sweep_temporaries(self.directory)
        sweep_temporaries(self.directory / ARTIFACTS_DIRECTORY)

    def _write_files(
        self, state: EntryState, files: Mapping[str, bytes], records: Mapping[str, Record]
    ) -> EntryState:
        known = dict(state.manifest.files)
        changed: dict[str, bytes] = {}
        for name, data in files.items():
            new, current = sha256(data), self._current_digest(name)
            if current != new or new not in known.get(name, ()):
                changed[name] = data
            # The old content stays acceptable until the new one is in place.
            is_sound = current is None or current in known.get(name, ())
            known[name] = tuple(dict.fromkeys((current, new) if is_sound else (new,)))
        if not changed:
            return state
        kept = {record.digest: record.size for record in state.records.values()}
        manifest = replace(
            state.manifest,
            files=known,
            artifacts=kept | {record.digest: record.size for record in records.values()},
            signed=self._hmac_key is not None,
        )
        write_atomic(self.directory / MANIFEST_NAME, encode_manifest(manifest, self._hmac_key))
        sync_directory(self.directory)
        for name, data in changed.items():  # the index is the last: with it the change has happened
            write_atomic(self.directory / name, data)
        with contextlib.suppress(
            OSError
        ):  # what a crash of the machine loses is found by its digest
            sync_directory(self.directory)
        return EntryState(manifest, records)

    def _current_digest(self, name: str) -> str | None:
        try:
            data = self._read(name, MAX_TEXT_BYTES, whole=False)
        except Damaged:
            return ""  # never equal to a digest: what lies there is going to be replaced
        return None if data is None else sha256(data)

    def _read(self, name: str, limit: int, *, whole: bool = True) -> bytes | None:
        try:
            return read_regular(self.directory / name, limit)
        except FileNotFoundError:
            return None
        except UnsafeFile as error:
            raise Damaged(str(error), file=name, whole=whole) from error

    def _holds(self, path: Path, data: bytes) -> bool:
        try:
            return read_regular(path, len(data)) == data
        except (OSError, UnsafeFile):
            return False
