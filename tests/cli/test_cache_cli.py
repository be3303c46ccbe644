"""``piecework cache``: text, JSON and exit codes."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from piecework.cli.cache import cache_app, parse_age, parse_size
from piecework.errors import UsageError
from piecework.runtime.store.cache import INDEX_NAME, list_entries, open_entry
from piecework.runtime.store.factors import KeyFactors


def factors(dtype: str) -> KeyFactors:
    return KeyFactors({"config": {"dtype": dtype, "mode": "3"}, "versions": {"torch": "2.13.0"}})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two keys; the one with fp32 was used last."""
    root = tmp_path / "cache"
    for age, dtype in enumerate(("fp32", "bf16")):
        entry = open_entry(root, factors(dtype))
        entry.put("a", dtype.encode() * 500)
        os.utime(entry.directory / INDEX_NAME, (1e9 - age, 1e9 - age))
    return root


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cache_app, [str(argument) for argument in arguments])


def test_ls(root: Path) -> None:
    result = run("ls", "--cache-dir", root)
    assert result.exit_code == 0
    assert factors("fp32").hash[:12] in result.output
    assert "2 entries" in result.output
    data = json.loads(run("ls", "--cache-dir", root, "--json").output)
    keys = [entry["key"] for entry in data["entries"]]
    assert keys == [factors("fp32").hash, factors("bf16").hash]
    assert data["bytes"] == sum(entry["bytes"] for entry in data["entries"])


def test_ls_uses_the_default_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIECEWORK_CACHE_DIR", str(root))
    assert "2 entries" in run("ls").output
    monkeypatch.setenv("PIECEWORK_CACHE_DIR", str(root / "none"))
    result = run("ls")
    assert result.exit_code == 0
    assert "no entries" in result.output


def test_explain_the_key_used_last(root: Path) -> None:
    result = run("explain", "--cache-dir", root)
    assert result.exit_code == 1
    assert "config: dtype: bf16 -> fp32" in result.output
    data = json.loads(run("explain", "--cache-dir", root, "--json").output)
    assert data["differences"] == [
        {"group": "config", "name": "dtype", "cached": "bf16", "current": "fp32"}
    ]
    assert data["nearest"] == factors("bf16").hash


def test_explain_a_chosen_key(root: Path) -> None:
    old, new = factors("bf16").hash, factors("fp32").hash
    result = run("explain", old[:8], "--to", new[:8], "--cache-dir", root)
    assert result.exit_code == 1
    assert "config: dtype: fp32 -> bf16" in result.output
    assert run("explain", old, "--to", old, "--cache-dir", root).exit_code == 0


def test_explain_factors_of_a_run(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_bytes(factors("int8").to_json())
    result = run("explain", "--factors", path, "--cache-dir", root)
    assert result.exit_code == 1
    assert "-> int8" in result.output
    path.write_bytes(factors("bf16").to_json())
    result = run("explain", "--factors", path, "--cache-dir", root)
    assert result.exit_code == 0
    assert "is in the cache" in result.output


def test_verify(root: Path) -> None:
    result = run("verify", "--cache-dir", root)
    assert result.exit_code == 0
    assert "2 entries, 2 artifacts" in result.output
    artifact = next(root.rglob("*.bin"))
    artifact.write_bytes(b"x" + artifact.read_bytes()[1:])
    result = run("verify", "--cache-dir", root)
    assert result.exit_code == 1
    assert artifact.name in result.output
    data = json.loads(run("verify", "--cache-dir", root, "--json").output)
    assert [finding["file"] for finding in data["findings"]] == [f"artifacts/{artifact.name}"]
    assert artifact.exists()  # nothing is moved


def test_verify_signatures(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"k" * 32)
    open_entry(root, factors("fp32"), hmac_key=b"k" * 32).put("a", b"signed")
    # A signature is not looked at without the key.
    assert run("verify", "--cache-dir", root).exit_code == 0
    assert run("verify", "--cache-dir", root, "--hmac-key-file", secret).exit_code == 0
    secret.write_bytes(b"other" * 8)
    assert run("verify", "--cache-dir", root, "--hmac-key-file", secret).exit_code == 1
    assert run("verify", "--cache-dir", root, "--hmac-key-file", tmp_path / "no").exit_code == 2


def test_gc(root: Path) -> None:
    result = run("gc", "--max-age", "30d", "--dry-run", "--cache-dir", root)
    assert result.exit_code == 0
    assert "would remove 2 entries" in result.output
    assert len(list_entries(root)) == 2
    size = max(entry.bytes for entry in list_entries(root))
    data = json.loads(run("gc", "--max-size", size, "--cache-dir", root, "--json").output)
    assert data["removed"] == [f"{factors('bf16').hash}/rank_0_0/backbone"]
    assert data["kept_entries"] == 1
    assert [entry.identity.key for entry in list_entries(root)] == [factors("fp32").hash]


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("gc",), ("explain",)])
def test_missing_and_unsafe_directories_are_misuse(root: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, "--cache-dir", root / "none")
    assert result.exit_code == 2
    assert "CacheError: there is no such cache directory" in result.output
    root.chmod(0o777)
    result = run(*arguments, "--cache-dir", root)
    assert result.exit_code == 2
    assert "others can write" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "f" * 32),
        ("explain", ""),
        ("explain", "--to", "zz"),
        ("explain", "aa", "--factors", "x.json"),
        ("explain", "--factors", "no/such/file"),
        ("gc", "--max-size", "much"),
        ("gc", "--max-size", "-1"),
        ("gc", "--max-age", "long"),
        ("gc", "--unknown"),
        ("nonsense",),
    ],
)
def test_misuse(root: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(root.rglob("*"))
    assert run(*arguments, "--cache-dir", root).exit_code == 2
    assert sorted(root.rglob("*")) == before


def test_sizes_and_ages() -> None:
    for text, size in (("4096", 4096), ("1k", 1024), ("1.5 MB", 3 << 19), ("2GiB", 2 << 30)):
        assert parse_size(text) == size
    for text, seconds in (("90", 90), ("2m", 120), ("1.5h", 5400), ("1W", 604800)):
        assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1 2", "1y", "nan", "--1"])
def test_impossible_sizes_and_ages(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)
    with pytest.raises(UsageError):
        parse_age(text)
