"""What is kept and loaded as peers have it: in, compiled bytes and saved models; out, the same again, or an error, and nothing compiled twice."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework import counters
from piecework.errors import ArtifactError, InputError
from piecework.runtime import StandaloneCompiledArtifacts


def reference(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[0] <= 42
    assert x.shape[0] % 2 == 0
    for _ in range(3):
        x = x + x.shape[0]
    return x


class Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = reference(x)
        return y, y * 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[piecework.StitchedModule, Path]:
    """A model and what was saved of it."""
    path = tmp_path_factory.mktemp("peers") / "pair"
    stitched = piecework.compile(Pair(), (torch.randn(10, 10),), config=EAGER)
    stitched.save(path)
    return stitched, path


# --- bytes of compiled pieces --------------------------------------------------------------------------


def test_it_starts_empty() -> None:
    kept = StandaloneCompiledArtifacts()
    assert (kept.num_entries(), kept.num_artifacts(), kept.size_bytes()) == (0, 0, 0)


def test_bytes_are_kept_under_their_hash_and_found_by_piece_and_shape() -> None:
    kept = StandaloneCompiledArtifacts()
    data = b"compiled"
    assert kept.insert("submod_0", "s1", data) == hashlib.sha256(data).hexdigest()
    assert kept.get("submod_0", "s1") == data


def test_equal_bytes_are_kept_once_whoever_has_them() -> None:
    kept, data = StandaloneCompiledArtifacts(), b"shared" * 1000
    places = [("one", "1"), ("two", "1"), ("one", "2"), ("three", "3")]
    for place in places:
        kept.insert(*place, data)
    assert (kept.num_entries(), kept.num_artifacts(), kept.size_bytes()) == (4, 1, len(data))
    assert all(kept.get(*place) == data for place in places)


def test_sizes_add_up() -> None:
    kept = StandaloneCompiledArtifacts()
    kept.insert("one", "1", b"x" * 100)
    kept.insert("two", "2", b"y" * 200)
    kept.insert("three", "3", b"x" * 100)
    assert (kept.size_bytes(), kept.num_artifacts(), kept.num_entries()) == (300, 2, 3)


def test_what_was_never_kept_is_an_error() -> None:
    with pytest.raises(ArtifactError):
        StandaloneCompiledArtifacts().get("nothing", "1")


def test_loading_runs_once_for_each_artifact() -> None:
    kept = StandaloneCompiledArtifacts()
    for name in ("one", "two"):
        kept.insert(name, "1", name.encode())
    kept.insert("three", "1", b"one")
    loaded: list[bytes] = []

    def load(data: bytes) -> str:
        loaded.append(data)
        return data.decode()

    kept.load_all(load)
    kept.load_all(load)
    assert sorted(loaded) == [b"one", b"two"]
    assert kept.get_loaded("three", "1") == "one"


def test_a_pickle_has_the_bytes_and_not_what_was_loaded() -> None:
    kept = StandaloneCompiledArtifacts()
    for name in ("one", "two"):
        for shape in ("1", "2"):
            kept.insert(name, shape, f"{name} {shape}".encode())
    kept.load_all(bytes.decode)
    again = pickle.loads(pickle.dumps(kept))
    assert (again.num_entries(), again.size_bytes()) == (kept.num_entries(), kept.size_bytes())
    assert all(again.get(n, s) == kept.get(n, s) for n in ("one", "two") for s in ("1", "2"))
    with pytest.raises(ArtifactError, match="not loaded"):
        again.get_loaded("one", "1")


# --- saved models --------------------------------------------------------------------------------------


def test_a_saved_model_loads_without_a_trace_or_a_compiler(
    pair: tuple[piecework.StitchedModule, Path],
) -> None:
    first, path = pair
    x = torch.randn(10, 10)
    with counters.expect(num_graphs_seen=0, num_backend_compilations=0):
        fresh, loaded = first(x), piecework.load(path, Pair())(x)
    assert type(fresh) is type(loaded) is tuple and len(loaded) == 2
    assert all(torch.equal(a, b) for a, b in zip(fresh, loaded, strict=True))


def test_loading_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        piecework.load(tmp_path / "nothing", Pair())


def test_what_the_trace_assumed_of_sizes_is_loaded_too(
    pair: tuple[piecework.StitchedModule, Path],
) -> None:
    first, path = pair
    for stitched in (first, piecework.load(path, Pair())):
        assert torch.equal(stitched(torch.zeros(42, 2))[0], reference(torch.zeros(42, 2)))
        with pytest.raises(InputError):
            stitched(torch.zeros(44, 2))


def test_a_loaded_model_never_compiles_behind_ones_back(
    pair: tuple[piecework.StitchedModule, Path],
) -> None:
    again, x = piecework.load(pair[1], Pair()), torch.randn(10, 10)
    torch._dynamo.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(again(x)[0], reference(x))


def test_an_artifact_of_a_compile_call_is_made_once_and_loaded_after(tmp_path: Path) -> None:
    x = torch.randn(10, 10)
    with counters.expect(num_graphs_seen=1):
        piecework.compile(nn.ReLU(), (x,), config=EAGER, artifact=tmp_path / "a")
    with counters.expect(num_graphs_seen=0):
        piecework.compile(nn.ReLU(), (x,), config=EAGER, artifact=tmp_path / "a")


def test_a_slice_by_a_size_survives(tmp_path: Path) -> None:
    class Sliced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[slice(0, x.shape[0] - 1)]

    piecework.compile(Sliced(), (torch.randn(10, 10),), config=EAGER).save(tmp_path / "a")
    again = piecework.load(tmp_path / "a", Sliced())
    for rows in (3, 10):
        x = torch.randn(rows, 10)
        assert torch.equal(again(x), x[: rows - 1])
