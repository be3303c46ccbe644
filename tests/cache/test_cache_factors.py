"""The key: what changes it, what must not, and how a difference is told."""

import linecache
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import CacheError
from piecework.runtime.cache import CacheStore, Factor, KeyFactors, explain
from piecework.runtime.cache.collect import (
    environment_factors,
    host_factors,
    installed_versions,
    source_factors,
    tree_digest,
)
from piecework.runtime.cache.explanation import read_factors_file, saved_keys
from piecework.runtime.cache.factors import GROUPS

TEXT = st.text(max_size=12)
TABLE = st.dictionaries(TEXT, TEXT, max_size=4)
KEYS = st.builds(
    KeyFactors.collect,
    config=TABLE,
    versions=TABLE,
    device=TABLE,
    environment=TABLE,
    sources=TABLE,
    model=TABLE,
)


# --- KeyFactors ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(KEYS, st.randoms())
def test_order_does_not_count(key: KeyFactors, random: object) -> None:
    shuffled = list(key.factors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert KeyFactors(tuple(shuffled)) == key
    assert KeyFactors(tuple(shuffled)).hash == key.hash


@settings(deadline=None)
@given(KEYS, KEYS)
def test_hash_is_equal_exactly_when_the_factors_are(one: KeyFactors, other: KeyFactors) -> None:
    assert (one.hash == other.hash) == (one == other)
    assert (one.differences(other) == ()) == (one == other)


@settings(deadline=None)
@given(KEYS, st.data())
def test_every_single_change_is_seen_and_named(key: KeyFactors, data: st.DataObject) -> None:
    """No stale hit: a changed, added or removed factor changes the hash, and is the one difference."""
    if not key.factors:
        key = KeyFactors((Factor("model", "name", "x"),))
    index = data.draw(st.integers(0, len(key.factors) - 1))
    old = key.factors[index]
    rest = key.factors[:index] + key.factors[index + 1 :]
    value = data.draw(TEXT.filter(lambda text: text != old.value))
    changed = KeyFactors((*rest, Factor(old.group, old.name, value)))
    (difference,) = changed.differences(key)
    assert (difference.group, difference.name) == (old.group, old.name)
    assert (difference.cached, difference.current) == (old.value, value)
    assert changed.hash != key.hash
    (gone,) = KeyFactors(rest).differences(key)
    assert (gone.cached, gone.current) == (old.value, None)
    (new,) = key.differences(KeyFactors(rest))
    assert (new.cached, new.current) == (None, old.value)


@settings(deadline=None)
@given(KEYS)
def test_json_round_trip(key: KeyFactors) -> None:
    assert KeyFactors.from_json(key.to_json()) == key
    assert KeyFactors.from_json(key.to_json()).to_json() == key.to_json()


def test_hash_does_not_depend_on_the_process() -> None:
    script = (
        "from piecework.runtime.cache.factors import KeyFactors\n"
        "print(KeyFactors.collect(config={'b': '1', 'a': '2'}, versions={'torch': '2.13'}).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {
        KeyFactors.collect(config={"a": "2", "b": "1"}, versions={"torch": "2.13"}).hash
    }


def test_config_as_a_hash_or_as_fields() -> None:
    assert KeyFactors.collect(config="abc", versions={}).factors == (
        Factor("config", "hash", "abc"),
    )


def test_groups_are_ordered() -> None:
    key = KeyFactors(tuple(Factor(group, "x", "1") for group in reversed(GROUPS)))
    assert tuple(factor.group for factor in key.factors) == GROUPS


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ((Factor("colour", "x", "1"),), "unknown group"),
        ((Factor("model", "x", "1"), Factor("model", "x", "2")), "given twice"),
        ((Factor("model", "x", 1),), "not text"),  # type: ignore[arg-type]
        ((Factor("model", "x", None),), "not text"),  # type: ignore[arg-type]
    ],
)
def test_impossible_factors(factors: tuple[Factor, ...], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        KeyFactors(factors)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"format": 2, "factors": {}}',
        b'{"format": 1}',
        b'{"format": 1, "factors": []}',
        b'{"format": 1, "factors": {"model": []}}',
        b'{"format": 1, "factors": {"model": {"x": 1}}}',
        b'{"format": 1, "factors": {"nonsense": {"x": "1"}}}',
        '{"format": 1, "factors": {"model": {"ü": "1"}}}'.encode(),
        b'{"format": 1, "factors": {"model": {"x": ' + b"9" * 10_000 + b"}}}",
    ],
)
def test_not_a_file_of_factors(raw: bytes) -> None:
    with pytest.raises(CacheError):
        KeyFactors.from_json(raw)


# --- environment -------------------------------------------------------------------------------


def test_environment_allow_list() -> None:
    environ = {
        "PATH": "/bin",
        "HOME": "/home/somebody",
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        "TORCHINDUCTOR_SOMETHING_NEW": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/x",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CUTLASS_DIR": "/opt/cutlass",
        "TORCHINDUCTOR_WORKER_START": "fork",
        "TRITON_CACHE_DIR": "/tmp/y",
        "TRITON_DEFAULT_FP_FUSION": "0",
        "MY_KERNELS": "fast",
    }
    assert environment_factors(environ) == {
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        "TORCHINDUCTOR_SOMETHING_NEW": "1",
        "TRITON_DEFAULT_FP_FUSION": "0",
    }


def test_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    assert environment_factors()["TORCHINDUCTOR_FREEZING"] == "1"
    monkeypatch.delenv("TORCHINDUCTOR_FREEZING")
    assert "TORCHINDUCTOR_FREEZING" not in environment_factors()


# --- sources -------------------------------------------------------------------------------------


def make_tree(top: Path) -> list[Path]:
    package = top / "models" / "llama"
    package.mkdir(parents=True)
    (top / "models" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text("class Layer: ...\n")
    (top / "script.py").write_text("print()\n")
    return [package / "layers.py", top / "script.py"]


def test_moving_the_sources_changes_nothing(tmp_path: Path) -> None:
    files = make_tree(tmp_path / "here")
    before = source_factors(files)
    assert list(before) == ["models/llama/layers.py", "script.py"]
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = [tmp_path / "there" / file.relative_to(tmp_path / "here") for file in files]
    assert source_factors(moved) == before
    # Over a link, in another order, twice: the same.
    (tmp_path / "link").symlink_to(tmp_path / "there")
    linked = [tmp_path / "link" / file.relative_to(tmp_path / "here") for file in files]
    assert source_factors([*reversed(linked), *moved]) == before


def test_changing_renaming_or_adding_a_source_is_seen(tmp_path: Path) -> None:
    files = make_tree(tmp_path)
    before = source_factors(files)
    files[0].write_text("class Layer: pass\n")
    changed = source_factors(files)
    assert changed["models/llama/layers.py"] != before["models/llama/layers.py"]
    assert changed["script.py"] == before["script.py"]
    other = files[0].rename(files[0].with_name("renamed.py"))
    assert set(source_factors([other, files[1]])) == {"models/llama/renamed.py", "script.py"}
    assert source_factors(files[1:]) == {"script.py": before["script.py"]}


def test_two_sources_of_one_name_both_count(tmp_path: Path) -> None:
    for folder, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "script.py").write_text(text)
    files = [tmp_path / folder / "script.py" for folder in ("a", "b")]
    named = source_factors(files)
    assert list(named) == ["script.py", "script.py#2"]
    assert source_factors(reversed(files)) == named
    assert len(source_factors([*files, tmp_path / "c" / "script.py"])) == 2
    files[1].write_text("3")
    assert source_factors(files) != named


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


def test_unreadable_source(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="would go unseen") as caught:
        source_factors([tmp_path / "gone.py"])
    assert caught.value.where == str(tmp_path / "gone.py")


def test_tree_digest(tmp_path: Path) -> None:
    make_tree(tmp_path / "here")
    before = tree_digest(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert tree_digest(tmp_path / "there") == before
    (tmp_path / "there" / "notes.txt").write_text("not a source")
    assert tree_digest(tmp_path / "there") == before
    (tmp_path / "there" / "script.py").rename(tmp_path / "there" / "renamed.py")
    assert tree_digest(tmp_path / "there") != before


# --- versions and machine ------------------------------------------------------------------------


def test_installed_versions() -> None:
    versions = installed_versions(("pytest", "no-such-distribution"))
    assert versions["pytest"] == pytest.__version__
    assert versions["no-such-distribution"] == "absent"
    assert versions["python"].endswith(f"{sys.version_info[0]}.{sys.version_info[1]}")


def test_host_factors(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : X\nflags\t\t: fpu vme avx2 avx512f tsc amx_tile retpoline\n")
    assert host_factors(cpuinfo)["cpu_features"] == "amx_tile avx2 avx512f"
    cpuinfo.write_text("Features : fp asimd sve2 atomics\n")
    assert host_factors(cpuinfo)["cpu_features"] == "asimd sve2"
    assert "cpu" in host_factors(tmp_path / "none")


# --- explain -------------------------------------------------------------------------------------


def key(config: dict[str, str], torch: str = "2.13.0", layer: str = "1" * 64) -> KeyFactors:
    return KeyFactors.collect(
        config=config, versions={"torch": torch}, sources={"model/layer.py": layer}
    )


BASE = {"dtype": "bf16", "mode": "3"}


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        (key(BASE | {"dtype": "fp32"}), "config: dtype: bf16 -> fp32"),
        (key(BASE, torch="2.14.0"), "versions: torch: 2.13.0 -> 2.14.0"),
        (key(BASE, layer="2" * 64), "sources: model/layer.py has changed"),
        (key(BASE | {"extra": "on"}), "config: extra is new (on)"),
        (key({"mode": "3"}), "config: dtype is gone (was bf16)"),
    ],
)
def test_explain_says_exactly_what_changed(
    tmp_path: Path, current: KeyFactors, expected: str
) -> None:
    root = tmp_path / "cache"
    CacheStore.open(root, key(BASE)).put("a", b"data")
    far = key({"dtype": "int8", "mode": "0"}, torch="2.11.0", layer="3" * 64)
    CacheStore.open(root, far).put("a", b"data")
    explanation = explain(current, root)
    assert not explanation.found
    assert explanation.nearest is not None
    assert explanation.nearest.hash == key(BASE).hash
    assert [str(difference) for difference in explanation.differences] == [expected]
    assert expected in str(explanation)
    assert explanation.keys_seen == 2


def test_explain_a_key_that_is_there(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    CacheStore.open(root, key(BASE)).put("a", b"data")
    explanation = explain(key(BASE), root)
    assert explanation.found
    assert str(explanation) == f"{key(BASE).hash[:12]} is in the cache"


def test_explain_an_empty_cache(tmp_path: Path) -> None:
    explanation = explain(key(BASE), tmp_path / "none")
    assert explanation.nearest is None
    assert not explanation.found
    assert "is not in the cache, which has no key" in str(explanation)


def test_explain_of_equally_near_keys_takes_the_one_used_last(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for age, dtype in enumerate(("fp16", "fp32", "fp64")):
        entry = CacheStore.open(root, key(BASE | {"dtype": dtype}))
        entry.put("a", b"data")
        assert entry.directory is not None
        os.utime(entry.directory / "manifest.json", (1e9 - age, 1e9 - age))
    explanation = explain(key(BASE), root)
    assert explanation.nearest is not None
    assert explanation.nearest.hash == key(BASE | {"dtype": "fp16"}).hash


def test_digests_are_not_spelled_out() -> None:
    """Nobody can read two of them; a short one in a value stays, for it may be a version."""
    old, new = (key(BASE | {"compiler": digest * 64, "rev": digest * 8}) for digest in "ab")
    assert [str(each) for each in new.differences(old)] == [
        "config: compiler has changed",
        "config: rev: aaaaaaaa -> bbbbbbbb",
    ]
    (added,) = key({"compiler": "a" * 64}).differences(key({}))
    assert str(added) == "config: compiler is new (aaaaaaaaaaaa)"


def test_damaged_factors_are_passed_over(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    for dtype in ("fp16", "fp32", "fp64"):
        CacheStore.open(root, key(BASE | {"dtype": dtype})).put("a", b"data")
    first, second, _ = sorted(root.rglob("cache_key_factors.json"))
    first.write_text("{")
    second.write_bytes(key({"forged": "1"}).to_json())
    assert len(saved_keys(root)) == 1


def test_read_factors_file(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_bytes(key(BASE).to_json())
    assert read_factors_file(path) == key(BASE)
    with pytest.raises(CacheError, match="cannot be read"):
        read_factors_file(tmp_path / "none")
    path.write_text("nonsense")
    with pytest.raises(CacheError, match="not a file of key factors"):
        read_factors_file(path)
