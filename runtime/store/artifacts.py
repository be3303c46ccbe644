"""Compiled pieces by submodule and range, each distinct one kept once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from piecework.errors import ArtifactError
from piecework.runtime.store.files import sha256


class StandaloneCompiledArtifacts:
    """(submodule, range) -> SHA-256 -> bytes, and what a loader made of the bytes.

    Example:
        >>> artifacts = backend.collect_standalone_compile_artifacts()
        >>> artifacts.load_all(my_loader)
        >>> artifacts.get_loaded("submod_0", "[1, 16]")
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}
        self._data: dict[str, bytes] = {}
        self._loaded: dict[str, object] = {}

    def __getstate__(self) -> dict[str, object]:
        """The bytes without what was loaded from them, which is another process's to load."""
        return {**vars(self), "_loaded": {}}

    def insert(self, submod_name: str, range_name: str, data: bytes) -> str:
        """Keep `data` for a submodule and range, in place of what was there; return its SHA-256."""
        digest = self._digests[submod_name, range_name] = sha256(data)
        used = self._digests.values()
        self._data = {k: v for k, v in {**self._data, digest: data}.items() if k in used}
        self._loaded = {k: v for k, v in self._loaded.items() if k in used}
        return digest

    def get(self, submod_name: str, range_name: str) -> bytes:
        """The bytes; `ArtifactError` if there are none."""
        return self._data[self._digest(submod_name, range_name)]

    def get_loaded(self, submod_name: str, range_name: str) -> object:
        """What `load_all` made of the bytes; `ArtifactError` before it ran."""
        digest = self._digest(submod_name, range_name)
        if digest not in self._loaded:
            hint = "call load_all(loader) first"
            raise ArtifactError("the artifact is not loaded yet", hint=hint)
        return self._loaded[digest]

    def load_all(self, loader: Callable[[bytes], object], max_workers: int | None = None) -> None:
        """Run `loader` once on each distinct artifact that is not loaded yet, in parallel threads.

        The first failure is raised as `ArtifactError`; what did load stays loaded.
        """
        with ThreadPoolExecutor(max_workers, thread_name_prefix="piecework-load") as pool:
            waiting = self._data.keys() - self._loaded.keys()
            made = {digest: pool.submit(loader, self._data[digest]) for digest in waiting}
        self._loaded |= {d: each.result() for d, each in made.items() if not each.exception()}
        for (submod_name, range_name), digest in self._digests.items():
            if digest not in self._loaded and (error := made[digest].exception()):
                why = f"an artifact could not be loaded: {type(error).__name__}: {error}"
                hint = "compile again; the bytes are intact but do not suit this torch or machine"
                raise ArtifactError(why, where=f"{submod_name} {range_name}", hint=hint) from error

    def size_bytes(self) -> int:
        """Bytes kept, each distinct artifact counted once."""
        return sum(map(len, self._data.values()))

    def num_artifacts(self) -> int:
        """Distinct artifacts."""
        return len(self._data)

    def num_entries(self) -> int:
        """(submodule, range) pairs."""
        return len(self._digests)

    def submodule_names(self) -> tuple[str, ...]:
        """The submodules, in the order of their first insertion."""
        return tuple(dict.fromkeys(submod for submod, _ in self._digests))

    def _digest(self, submod_name: str, range_name: str) -> str:
        found = self._digests.get((submod_name, range_name))
        if found is None:
            known = ", ".join(map(" ".join, self._digests)) or "none"
            where, hint = f"{submod_name}, {range_name}", f"there are: {known}"
            raise ArtifactError("there is no such artifact", where=where, hint=hint)
        return found
