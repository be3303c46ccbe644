"""The key: what changes it, what must not, and how a difference is told."""

import linecache
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import CacheError
from piecework.runtime.store.factors import KeyFactors
from piecework.runtime.store.surroundings import host_factors, source_factors, tree_digest, versions

TEXT = st.text(max_size=12)
TABLE = st.dictionaries(TEXT, TEXT, max_size=4)
KEYS = st.builds(KeyFactors, st.dictionaries(TEXT, TABLE, max_size=4))


@settings(deadline=None)
@given(KEYS, KEYS)
def test_hash_is_equal_exactly_when_the_factors_are(one: KeyFactors, other: KeyFactors) -> None:
    assert (one.hash == other.hash) == (one.differences(other) == ())
    assert KeyFactors.from_json(one.to_json()).to_json() == one.to_json()
    shuffled = KeyFactors({group: one.groups[group] for group in reversed(one.groups)})
    assert shuffled.hash == one.hash


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("bf16", "fp32", "config: x: bf16 -> fp32"),
        ("a" * 64, "b" * 64, "config: x has changed"),  # nobody can read two digests
        ("a" * 8, "b" * 8, "config: x: aaaaaaaa -> bbbbbbbb"),
        (None, "on", "config: x: none -> on"),
    ],
)
def test_a_difference_in_words(before: str | None, after: str | None, said: str) -> None:
    old, new = (
        KeyFactors({"config": {} if each is None else {"x": each}}) for each in (before, after)
    )
    assert [str(each) for each in new.differences(old)] == [said]


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"[]", b"[" * 100_000, b'{"format": 1, "factors": {}}', b'{"format": 2}'),
        KeyFactors({"config": {"x": 1}}).to_json(),  # type: ignore[dict-item]
    ],
)
def test_not_a_file_of_factors(raw: bytes) -> None:
    with pytest.raises(CacheError):
        KeyFactors.from_json(raw)


# --- sources -------------------------------------------------------------------------------------


def tree_of(top: Path) -> list[Path]:
    package = top / "models" / "llama"
    package.mkdir(parents=True)
    (top / "models" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("class Layer: ...\n")
    (top / "script.py").write_text("print()\n")
    return [package / "layers.py", top / "script.py"]


def test_sources_count_by_content_wherever_they_lie(tmp_path: Path) -> None:
    files = tree_of(tmp_path / "here")
    before = source_factors(files)
    assert list(before) == ["layers", "script"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = [tmp_path / "there" / file.relative_to(tmp_path / "here") for file in files]
    assert source_factors(moved) == before
    # Over a link, in another order, twice: the same.
    (tmp_path / "link").symlink_to(tmp_path / "there")
    linked = [tmp_path / "link" / file.relative_to(tmp_path / "here") for file in files]
    assert source_factors([*reversed(linked), *moved]) == before
    moved[0].write_text("class Layer: pass\n")
    changed = source_factors(moved)
    assert changed["layers"] != before["layers"]
    assert changed["script"] == before["script"]
    moved[1].unlink()
    with pytest.raises(CacheError, match="would go unseen"):
        source_factors(moved)


def test_dynamic_sources() -> None:
    def enter(name: str, text: str) -> None:
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)

    enter("<cell 1>", "x = 1\n")
    enter("<cell 2>", "x = 2\n")
    one = source_factors(["<cell 1>"])
    assert one != source_factors(["<cell 2>"])
    enter("<cell 3>", "x = 1\n")
    assert source_factors(["<cell 3>"]) == one  # the number of a cell is not its content
    with pytest.raises(CacheError, match="no source"):
        source_factors(["<nowhere>"])


def test_tree_digest(tmp_path: Path) -> None:
    tree_of(tmp_path / "here")
    before = tree_digest(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert tree_digest(tmp_path / "there") == before
    (tmp_path / "there" / "notes.txt").write_text("not a source")
    assert tree_digest(tmp_path / "there") == before
    (tmp_path / "there" / "script.py").rename(tmp_path / "there" / "renamed.py")
    assert tree_digest(tmp_path / "there") != before


# --- versions and machine ------------------------------------------------------------------------


def test_versions() -> None:
    found = versions()
    assert found["torch"].startswith(torch.__version__) and found["python"]
    assert len(found["piecework sources"]) == 64


def test_host_factors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : X\nflags\t\t: fpu vme avx2 avx512f tsc amx_tile retpoline\n")
    assert host_factors(cpuinfo)["cpu_features"] == "amx_tile avx2 avx512f"
    cpuinfo.write_text("Features : fp asimd sve2 atomics\n")
    assert host_factors(cpuinfo)["cpu_features"] == "asimd sve2"
    assert "cpu" in host_factors(tmp_path / "none")
