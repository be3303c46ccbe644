"""A real entry, with what Inductor made of a model, damaged anywhere: one warning, right results, and whole again afterwards."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import Block, Layers, mix_pair

import piecework
from piecework.runtime.store.entry import INDEX_NAME
from piecework.runtime.store.upkeep import verify

UNIQUE = 3


def flip(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes([data[begin] ^ 0x10]) + data[begin + 1 :]


def cut(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin]


def zero(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes(end - begin) + data[end:]


def grow(data: bytes, begin: int, end: int) -> bytes:
    return data[:end] + b"\0" + data[end:]


Case = tuple[Path, Callable[[bytes, int, int], bytes], int, int]


def files_of(root: Path) -> list[Path]:
    """The index and the artifacts; texts are for people."""
    inside = (*root.rglob("*.bin"), *root.rglob(INDEX_NAME))
    return sorted(path.relative_to(root) for path in inside)


def cases_of(root: Path, regions: int) -> list[Case]:
    """Each kind of damage in each of ``regions`` parts of each file."""
    found: list[Case] = []
    for file in files_of(root):
        size = (root / file).stat().st_size
        step = max(1, -(-size // regions))
        spans = [(begin, min(begin + step, size)) for begin in range(0, size, step)]
        found += [(file, kind, *span) for span in spans for kind in (flip, cut, zero, grow)]
    return found


@pytest.mark.inductor
@pytest.mark.parametrize("count", [4, pytest.param(500, marks=pytest.mark.nightly)])
def test_damage_anywhere_costs_at_most_a_compilation(
    own_compile_cache: Path, tmp_path: Path, warned: list[str], count: int
) -> None:
    model, x = Layers([Block(mix_pair), Block(mix_pair)]), torch.randn(4, 8)

    def compiled() -> int:
        """Compile, check the results, and return how many pieces the compiler made."""
        torch._dynamo.reset()
        before = piecework.counters.snapshot()
        stitched = piecework.compile(model, (x,))
        with torch.no_grad():
            torch.testing.assert_close(stitched(x[:3]), model(x[:3]))
        after = piecework.counters.snapshot()
        new = after["num_inductor_compiles"] - before["num_inductor_compiles"]
        found = after["num_compiled_artifacts_loaded"] - before["num_compiled_artifacts_loaded"]
        assert new + found == UNIQUE
        return new

    assert compiled() == UNIQUE
    saved = tmp_path / "saved"
    shutil.copytree(own_compile_cache, saved)
    files = files_of(saved)
    assert len(files) == UNIQUE + 1
    chance = random.Random(count)
    cases = cases_of(saved, regions=20)
    if count < len(files) * 4:  # one of each file, in turn
        picked = [chance.choice([case for case in cases if case[0] == file]) for file in files]
    else:
        picked = chance.sample(cases, count)
        assert {case[0] for case in picked} == set(files)
    for file, damage, begin, end in picked:
        shutil.rmtree(own_compile_cache)
        shutil.copytree(saved, own_compile_cache)
        target = own_compile_cache / file
        whole = target.read_bytes()
        target.write_bytes(damage(whole, begin, end))
        is_damaged = target.read_bytes() != whole
        new = compiled()
        # An artifact costs itself, and the index all of them.
        if target.suffix == ".bin":
            assert new == is_damaged
        else:
            assert new in (0, UNIQUE)
        assert len(warned) == is_damaged, (file, damage.__name__, begin, warned)
        assert (own_compile_cache / ".quarantine").exists() == is_damaged
        warned.clear()
        assert compiled() == 0
        assert warned == [] and verify(own_compile_cache).findings == ()
