"""Looking over a whole cache. In: a cache directory. Out: its entries, their sizes, and what in them is damaged.

It never changes anything, and never follows a link.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from piecework.errors import CacheError
from piecework.runtime.cache.factors import KeyFactors
from piecework.runtime.cache.files import (
    ARTIFACTS_DIRECTORY,
    FACTORS_NAME,
    EntryFiles,
    EntryState,
)
from piecework.runtime.cache.manifest import MANIFEST_NAME, Damaged, Identity, sha256
from piecework.runtime.cache.safety import resolve_root
from piecework.runtime.model_tag import TAG

_KEY = re.compile(r"[0-9a-f]{32}")
_RANK = re.compile(r"rank_([0-9]{1,7})_([0-9]{1,7})")


@dataclass(frozen=True, slots=True)
class EntrySummary:
    """One entry: who it is, its size on disk, its artifact files, and when it was used (seconds since the epoch)."""

    identity: Identity
    directory: Path
    bytes: int
    artifacts: int
    last_used: float


@dataclass(frozen=True, slots=True)
class Finding:
    """Something damaged: in which entry, in which file, and what is wrong."""

    entry: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.entry}: {self.file}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_cache` looked at and found."""

    entries: int
    artifacts: int
    bytes: int
    findings: tuple[Finding, ...]
    unchecked_signatures: int


def entry_identities(real_root: Path) -> Iterator[Identity]:
    """Yield the entries below a resolved root, by the names of their directories."""
    for key in _directories(real_root):
        if _KEY.fullmatch(key.name) is None:
            continue
        for rank in _directories(key):
            numbers = _RANK.fullmatch(rank.name)
            if numbers is None:
                continue
            for tag in _directories(rank):
                if TAG.fullmatch(tag.name) is not None:
                    yield Identity(key.name, int(numbers[1]), int(numbers[2]), tag.name)


def list_entries(root: str | os.PathLike[str]) -> tuple[EntrySummary, ...]:
    """Return all entries, the one used last first."""
    real = resolve_root(root)
    summaries = [summarize(real, identity) for identity in entry_identities(real)]
    return tuple(sorted(summaries, key=lambda entry: (-entry.last_used, str(entry.identity))))


def summarize(real_root: Path, identity: Identity) -> EntrySummary:
    """Measure one entry without reading it."""
    directory = real_root.joinpath(*identity.parts)
    sizes = file_sizes(directory)
    artifacts = sum(1 for path in sizes if path.parent.name == ARTIFACTS_DIRECTORY)
    try:
        last_used = os.lstat(directory / MANIFEST_NAME).st_mtime
    except OSError:
        last_used = 0.0
    return EntrySummary(identity, directory, sum(sizes.values()), artifacts, last_used)


def file_sizes(directory: Path) -> dict[Path, int]:
    """Return every plain file below `directory` with its size; links are not followed and not counted."""
    sizes: dict[Path, int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            try:
                info = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(info.st_mode):
                sizes[path] = info.st_size
    return sizes


def verify_cache(root: str | os.PathLike[str], hmac_key: bytes | None = None) -> Verification:
    """Check every byte of every entry against its manifest.

    With `hmac_key` signed entries must carry its signature; without, signatures are counted as unchecked.
    """
    real = resolve_root(root)
    findings: list[Finding] = []
    entries = artifacts = size = unchecked = 0
    for identity in entry_identities(real):
        entries += 1
        try:
            files = EntryFiles(real, identity, hmac_key)
            files.check_directories()
            state, has_unchecked = _read_state(files, hmac_key)
        except Damaged as damage:
            findings.append(Finding(str(identity), damage.file, damage.reason))
            continue
        except (OSError, CacheError) as error:
            findings.append(Finding(str(identity), ".", str(error)))
            continue
        unchecked += has_unchecked
        findings += _verify_content(files, state)
        records = {record.digest: record.size for record in state.records.values()}
        artifacts += len(records)
        size += sum(records.values())
    return Verification(entries, artifacts, size, tuple(findings), unchecked)


def _read_state(files: EntryFiles, hmac_key: bytes | None) -> tuple[EntryState, bool]:
    """Read an entry; the flag says that it is signed and there was no key to check that with."""
    if hmac_key is None:
        state = files.read(check_signature=False)
        return state, state.manifest.signed
    try:
        return files.read(), False
    except Damaged:
        state = files.read(check_signature=False)
        if state.manifest.signed:
            raise
        return state, False


def _verify_content(files: EntryFiles, state: EntryState) -> Iterator[Finding]:
    entry = str(files.identity)
    for name in state.text_names:
        try:
            data = files.read_text(state, name)
        except (Damaged, OSError) as error:
            yield Finding(entry, name, error.reason if isinstance(error, Damaged) else str(error))
            continue
        if data is None and None not in state.manifest.files[name]:
            yield Finding(entry, name, "it is missing")
        if name == FACTORS_NAME and data is not None:
            if not sha256(data).startswith(files.identity.key):
                yield Finding(entry, name, "its hash is not the name of the entry's directory")
            elif not state.manifest.signed and _asks_for_signature(data):
                yield Finding(entry, MANIFEST_NAME, "it lacks the signature that its key asks for")
    for record in dict.fromkeys(state.records.values()):
        try:
            files.read_artifact(record)
        except Damaged as damage:
            yield Finding(entry, damage.file, damage.reason)
        except OSError as error:
            yield Finding(entry, f"{ARTIFACTS_DIRECTORY}/{record.digest}.bin", str(error))


def _asks_for_signature(factors_json: bytes) -> bool:
    factors = KeyFactors.from_json(factors_json).factors
    return any(factor.group == "signing" for factor in factors)


def _directories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as found:
            names = [item.name for item in found if item.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(names)]
