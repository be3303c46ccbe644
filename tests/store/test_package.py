"""A saved program's file: every byte is verified, the old artifact or the new one is there whoever is killed, and nothing else is overwritten."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ArtifactError, CacheError, ConfigError
from piecework.runtime.store.files import sha256, signing_key
from piecework.runtime.store.package import KIND, Package, file_of, packed, write_package

SECRET = b"sixteen or more bytes of it"
FILES = {"trace_0/stitched.py": b"# text\n" * 20, "kernels/abc.so": b"\0\1\2", "empty": b""}


def write(path: Path, number: int = 0, key: bytes | None = None) -> Path:
    write_package(path, FILES, {"number": number}, key)
    return path


def number_in(path: Path) -> object:
    found = Package.read(path, None)
    assert found.files == FILES
    return found.facts["number"]


def refusal(path: Path, key: bytes | None = None) -> str:
    with pytest.raises(ArtifactError) as found:
        Package.read(path, key)
    assert found.value.hint
    return str(found.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "folder" / "model")


def test_what_is_written_is_read_and_replaced(path: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        write(path, number)
        assert number_in(path) == number
    with pytest.raises(ArtifactError, match="lists no file other"):
        Package.read(path, None).file("other")
    assert os.listdir(path.parent) == ["model"] and path.stat().st_mode & 0o777 == 0o644
    link = tmp_path / "link"
    link.symlink_to(path)
    assert number_in(write(link, 3)) == number_in(path) == 3 and link.is_symlink()


def test_parts_and_places(tmp_path: Path) -> None:
    facts = {"shared": 1, "parts": [{"own": 0}, {"own": 1}]}
    write_package(tmp_path / "a", {"part_1/x": b"1", "pieces/y": b"2"}, facts, None)
    _, second = Package.read(tmp_path / "a", None).parts()
    assert second.facts["shared"] == second.facts["own"] == 1
    assert second.files == {"x": b"1", "pieces/y": b"2"}
    assert file_of("a") == Path.cwd() / "a"
    for wrong in (3, "", None, "s3://bucket/model"):
        with pytest.raises(ConfigError, match="is a file"):
            file_of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [None, SECRET])
def test_every_changed_byte_and_every_cut_is_refused(key: bytes | None) -> None:
    data = packed(FILES, {"number": 3}, key, KIND)
    assert Package.of(data, key).files == FILES
    changed = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(len(data))]
    for each in (*changed, *(data[:cut] for cut in range(len(data))), data + b"x"):
        with pytest.raises(ArtifactError):
            Package.of(each, key)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers()), min_size=1))
def test_facts_come_back(facts: dict[str, object]) -> None:
    facts = {f"x{name}": value for name, value in facts.items()}
    for key in (None, SECRET):
        assert Package.of(packed(FILES, facts, key, KIND), key).facts == facts


@pytest.mark.parametrize("manifest", [b'{"kind": "a cake", "format": 5, "files": {}}', b"[]", b"["])
def test_a_sealed_file_of_another_kind_is_refused(manifest: bytes) -> None:
    body = manifest + b"\n"
    with pytest.raises(ArtifactError, match=r"a cake|manifest"):
        Package.of(f"piecework {sha256(body)} -\n".encode() + body, None)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "no artifact"),
        (lambda path: path.chmod(0o666), "others can write"),
        (lambda path: path.write_text("x"), "no file of piecework's"),
        (lambda path: (path.unlink(), path.mkdir()), "no plain file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "no plain file"),
    ],
)
def test_no_artifact_and_one_that_others_can_write(
    path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(path)
    assert said in refusal(path)


def test_a_key_signs_and_verifies(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = write(tmp_path / "signed", 1, SECRET)
    assert Package.read(signed, SECRET).facts == Package.read(signed, None).facts
    assert "signature" in refusal(signed, b"another key of sixteen bytes")
    assert "signature" in refusal(path, SECRET)
    file = tmp_path / "secret"
    file.write_bytes(SECRET)
    assert signing_key(file) == SECRET and signing_key() is None
    monkeypatch.setenv("PIECEWORK_CACHE_KEY_FILE", str(file))
    assert signing_key() == SECRET
    file.write_bytes(b"short")
    with pytest.raises(CacheError, match="5 bytes"):
        signing_key(file)
    with pytest.raises(CacheError, match="can't be read"):
        signing_key(tmp_path / "none")


# --- writing -----------------------------------------------------------------------------------------


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("folder", "file"):
        with pytest.raises(ArtifactError, match="something else"):
            write(tmp_path / name)
    with pytest.raises(ArtifactError, match="can't be written"):
        write(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("limit", [0, 200])
def test_a_full_disk_is_said_and_keeps_the_old_artifact(path: Path, limit: int) -> None:
    """The kernel refuses to let a file grow: what `save` says then names the disk, and not permissions."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(ArtifactError, match="File too large") as caught:
            write(path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "free some space" in str(caught.value.hint)
    assert number_in(path) == 0 and os.listdir(path.parent) == ["model"]
