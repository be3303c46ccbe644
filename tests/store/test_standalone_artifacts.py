"""(submodule, range) -> SHA-256 -> bytes: deduplicated, and loaded in parallel."""

import hashlib
import threading

import pytest

from piecework.errors import ArtifactError
from piecework.runtime.store.artifacts import StandaloneCompiledArtifacts


def sample() -> StandaloneCompiledArtifacts:
    artifacts = StandaloneCompiledArtifacts()
    artifacts.insert("submod_0", "1-16", b"first")
    artifacts.insert("submod_2", "1-16", b"layer")
    artifacts.insert("submod_4", "1-16", b"layer")
    artifacts.insert("submod_2", "17-256", b"layer, large")
    return artifacts


def test_equal_bytes_are_kept_once() -> None:
    artifacts = sample()
    assert artifacts.num_entries() == 4
    assert artifacts.num_artifacts() == 3
    assert artifacts.size_bytes() == len(b"first" + b"layer" + b"layer, large")
    assert artifacts.submodule_names() == ("submod_0", "submod_2", "submod_4")
    assert artifacts.get("submod_4", "1-16") is artifacts.get("submod_2", "1-16")
    assert artifacts.insert("submod_6", "1-16", b"layer") == hashlib.sha256(b"layer").hexdigest()


def test_replacing_forgets_what_nobody_uses() -> None:
    artifacts = sample()
    artifacts.load_all(bytes.upper)
    artifacts.insert("submod_2", "1-16", b"new")
    assert artifacts.get("submod_4", "1-16") == b"layer"
    artifacts.insert("submod_4", "1-16", b"new")
    assert artifacts.num_artifacts() == 3
    assert artifacts.size_bytes() == len(b"first" + b"new" + b"layer, large")
    with pytest.raises(ArtifactError, match="not loaded yet"):
        artifacts.get_loaded("submod_4", "1-16")


def test_load_all_runs_the_loader_once_for_each_and_in_parallel() -> None:
    artifacts = sample()
    loaded: list[bytes] = []
    # Each of the three waits for the others: without parallel threads this would not end.
    together = threading.Barrier(3, timeout=30)

    def load(data: bytes) -> str:
        together.wait()
        loaded.append(data)
        return data.decode()

    artifacts.load_all(load, max_workers=3)
    artifacts.load_all(load, max_workers=3)
    assert sorted(loaded) == [b"first", b"layer", b"layer, large"]
    assert artifacts.get_loaded("submod_4", "1-16") == "layer"
    assert artifacts.get_loaded("submod_2", "1-16") is artifacts.get_loaded("submod_4", "1-16")


def test_load_failure_names_the_pieces_and_keeps_the_rest() -> None:
    artifacts = sample()

    def load(data: bytes) -> str:
        if data == b"layer":
            raise ValueError("built for another machine")
        return data.decode()

    with pytest.raises(ArtifactError, match="built for another machine") as caught:
        artifacts.load_all(load)
    assert caught.value.where == "submod_2 1-16"
    assert isinstance(caught.value.__cause__, ValueError)
    assert artifacts.get_loaded("submod_0", "1-16") == "first"
    artifacts.load_all(bytes.decode)
    assert artifacts.get_loaded("submod_2", "1-16") == "layer"


def test_missing() -> None:
    with pytest.raises(ArtifactError, match=r"there are: submod_0 1-16, .*submod_2 17-256"):
        sample().get("submod_2", "257-512")
