"""Compiled pieces by submodule and range. In: bytes for each (submodule, range). Out: the same bytes, each kept once, loaded in parallel.

It never unpickles or executes: a loader that the caller gives does, and only on bytes whose SHA-256 is right.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from piecework.errors import ArtifactError

_MAGIC = b"piecework artifacts 1\n"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 64 << 20


class StandaloneCompiledArtifacts:
    """(submodule, range) -> SHA-256 -> bytes, and what a loader made of the bytes.

    Example:
        >>> artifacts = StandaloneCompiledArtifacts()
        >>> artifacts.insert("submod_0", "1-16", b"...")
        >>> artifacts.load_all(my_loader)
        >>> artifacts.get_loaded("submod_0", "1-16")
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}
        self._data: dict[str, bytes] = {}
        self._loaded: dict[str, object] = {}
        self._lock = threading.Lock()

    def insert(self, submod_name: str, range_name: str, data: bytes) -> str:
        """Keep `data` for a submodule and range; return its SHA-256. Equal bytes are kept once."""
        if not isinstance(data, bytes):
            raise ArtifactError(
                "an artifact must be bytes",
                where=f"{submod_name}, {range_name}: {type(data).__name__}",
            )
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            before = self._digests.get((submod_name, range_name))
            self._digests[submod_name, range_name] = digest
            self._data.setdefault(digest, data)
            if before is not None and before not in self._digests.values():
                self._data.pop(before)
                self._loaded.pop(before, None)
        return digest

    def get(self, submod_name: str, range_name: str) -> bytes:
        """Return the bytes; raise `ArtifactError` that lists what there is if there are none."""
        return self._data[self._digest(submod_name, range_name)]

    def get_loaded(self, submod_name: str, range_name: str) -> object:
        """Return what `load_all` made of the bytes; raise `ArtifactError` before it ran."""
        digest = self._digest(submod_name, range_name)
        try:
            return self._loaded[digest]
        except KeyError:
            raise ArtifactError(
                "the artifact is not loaded yet",
                where=f"{submod_name}, {range_name}",
                hint="call load_all(loader) first",
            ) from None

    def load_all(self, loader: Callable[[bytes], object], max_workers: int | None = None) -> None:
        """Run `loader` once on each distinct artifact that is not loaded yet, in parallel threads.

        The first failure is raised as `ArtifactError` naming its submodules; what did load stays loaded.
        """
        with self._lock:
            waiting = [digest for digest in self._data if digest not in self._loaded]
        if not waiting:
            return
        workers = max_workers or min(len(waiting), os.cpu_count() or 1)
        failures: list[tuple[str, Exception]] = []

        def load(digest: str) -> None:
            data = self._data[digest]
            try:
                if hashlib.sha256(data).hexdigest() != digest:
                    raise ArtifactError("its SHA-256 is not the one it was kept under")
                self._loaded[digest] = loader(data)
            except Exception as error:  # noqa: BLE001
                # Whatever a loader raises is reported with its piece.
                failures.append((digest, error))

        with ThreadPoolExecutor(workers, thread_name_prefix="piecework-load") as pool:
            list(pool.map(load, waiting))
        if failures:
            digest, error = min(failures, key=lambda failure: waiting.index(failure[0]))
            raise ArtifactError(
                f"an artifact could not be loaded: {type(error).__name__}: {error}",
                where=", ".join(f"{submod} {name}" for submod, name in self._users(digest)),
                hint="compile again; the bytes are intact but do not suit this torch or machine",
            ) from error

    def size_bytes(self) -> int:
        """Bytes kept, each distinct artifact counted once."""
        return sum(len(data) for data in self._data.values())

    def num_artifacts(self) -> int:
        """Distinct artifacts."""
        return len(self._data)

    def num_entries(self) -> int:
        """(submodule, range) pairs."""
        return len(self._digests)

    def submodule_names(self) -> tuple[str, ...]:
        """The submodules, in the order of their first insertion."""
        return tuple(dict.fromkeys(submod for submod, _ in self._digests))

    def entries(self) -> Mapping[tuple[str, str], str]:
        """A copy of the table: (submodule, range) -> SHA-256."""
        return dict(self._digests)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(dict(self._digests))

    def __contains__(self, pair: object) -> bool:
        return pair in self._digests

    def to_bytes(self) -> bytes:
        """Return one self-checking byte string: a JSON table and each distinct artifact once; no pickle."""
        order = list(self._data)
        table = {
            "entries": [[*pair, digest] for pair, digest in self._digests.items()],
            "artifacts": [[digest, len(self._data[digest])] for digest in order],
        }
        header = json.dumps(table).encode("ascii")
        checksum = hashlib.sha256(header).digest()
        parts = [_MAGIC, len(header).to_bytes(_LENGTH_BYTES, "big"), checksum, header]
        return b"".join([*parts, *(self._data[digest] for digest in order)])

    @classmethod
    def from_bytes(cls, raw: bytes) -> StandaloneCompiledArtifacts:
        """Read what `to_bytes` returned; raise `ArtifactError` if a single byte is different."""
        start = len(_MAGIC) + _LENGTH_BYTES + hashlib.sha256().digest_size
        if not raw.startswith(_MAGIC) or len(raw) < start:
            raise _damaged("it does not begin like artifacts")
        length = int.from_bytes(raw[len(_MAGIC) :][:_LENGTH_BYTES], "big")
        checksum = raw[len(_MAGIC) + _LENGTH_BYTES : start]
        header = raw[start : start + length] if length <= _MAX_HEADER_BYTES else b""
        if hashlib.sha256(header).digest() != checksum:
            raise _damaged("its table is damaged")
        artifacts = cls()
        position = start + length
        try:
            table = json.loads(header)
            for digest, size in table["artifacts"]:
                data = raw[position : position + size]
                if hashlib.sha256(data).hexdigest() != digest:
                    raise _damaged(f"artifact {digest[:12]} is damaged")
                artifacts._data[digest] = data
                position += size
            for submod, name, digest in table["entries"]:
                if not (isinstance(submod, str) and isinstance(name, str)):
                    raise TypeError("a submodule or a range is not text")
                if digest not in artifacts._data:
                    raise _damaged(f"an artifact of {submod} is missing")
                artifacts._digests[submod, name] = digest
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged("its table is not in the right form") from error
        if position != len(raw):
            raise _damaged("it is longer than its table says")
        return artifacts

    def _digest(self, submod_name: str, range_name: str) -> str:
        try:
            return self._digests[submod_name, range_name]
        except KeyError:
            ranges = [name for submod, name in self._digests if submod == submod_name]
            known = (
                f"ranges of {submod_name}: {', '.join(ranges)}"
                if ranges
                else (f"submodules: {', '.join(self.submodule_names()) or 'none'}")
            )
            raise ArtifactError(
                "there is no such artifact", where=f"{submod_name}, {range_name}", hint=known
            ) from None

    def _users(self, digest: str) -> list[tuple[str, str]]:
        return [pair for pair, found in self._digests.items() if found == digest]


def _damaged(reason: str) -> ArtifactError:
    return ArtifactError(f"the saved artifacts cannot be used: {reason}", hint="compile again")
