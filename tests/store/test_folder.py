"""A saved program's files: every byte is verified, the old artifact or the new one is there whoever writes and whoever is killed, and nothing else is overwritten."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from piecework.errors import ArtifactError, CacheError, ConfigError
from piecework.runtime.store import folder
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import (
    FORMAT,
    KIND,
    MANIFEST,
    decode,
    directory_of,
    encode,
    folder_of,
    has_artifact,
    open_folder,
    packed,
    write_folder,
)

SECRET = b"sixteen or more bytes of it"


def files_for(number: int) -> dict[str, bytes]:
    """Files that tell their number, so that a mixture is told from a whole one."""
    return {
        "trace_0/stitched.py": f"# {number}\n".encode() * 20,
        "pieces/abc.py": f"{number}".encode(),
        "same.txt": b"the same",
    }


def write(path: Path, number: int = 0, key: bytes | None = None) -> Path:
    write_folder(path, files_for(number), {"number": number}, key)
    return path


def number_in(path: Path) -> int:
    """Which one lies there; all of it."""
    found = open_folder(path, None)
    number = found.facts["number"]
    assert isinstance(number, int) and found.files == files_for(number)
    return number


def refusal(path: Path, key: bytes | None = None) -> str:
    with pytest.raises(ArtifactError) as found:
        open_folder(path, key)
    assert found.value.hint
    return str(found.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def plain_files(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if each.is_file() and ".locks" not in each.parts)


def test_what_is_written_is_read_and_replaced(path: Path) -> None:
    found = open_folder(path, None)
    assert found.facts == {"number": 0} and found.text("pieces/abc.py") == "0"
    with pytest.raises(ArtifactError, match="lists no such file"):
        found.read("other")
    before = plain_files(path)
    assert len(before) == 4
    for number in (1, 2):
        write(path, number)
        assert number_in(path) == number and len(plain_files(path)) == 4
    assert set(plain_files(path)) & set(before) == {path / MANIFEST, *path.glob("same.*")}


def test_names_and_parts(tmp_path: Path) -> None:
    facts = {"shared": 1, "parts": [{"own": 0}, {"own": 1}]}
    write_folder(tmp_path / "a", {"part_1/x": b"1", "pieces/y": b"2"}, facts, None)
    _, second = open_folder(tmp_path / "a", None).parts()
    assert second.facts == {"shared": 1, "own": 1}
    assert second.files == {"x": b"1", "pieces/y": b"2"}
    assert directory_of("a") == Path.cwd() / "a"
    for wrong in (3, "", None):
        with pytest.raises(ConfigError):
            directory_of(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="URL") as caught:
        directory_of("s3://bucket/model")
    assert "copy the directory" in str(caught.value.hint)


def test_one_bytes_holds_the_same() -> None:
    data = packed(files_for(3), {"number": 3}, SECRET, KIND)
    found = folder_of(data, SECRET)
    assert found.files == files_for(3) and found.facts == {"number": 3}
    changed = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(0, len(data), 9)]
    for each in (*changed, *(data[:cut] for cut in (0, 4, 100, len(data) - 1)), data + b"x"):
        with pytest.raises(ArtifactError):
            folder_of(each, SECRET)


# --- damage ------------------------------------------------------------------------------------------


def test_flipped_bytes_cut_and_missing_files_are_refused(path: Path) -> None:
    chance = random.Random(0)
    for file in plain_files(path):
        data = file.read_bytes()
        for cut in {0, len(data) // 2, len(data) - 1}:
            file.write_bytes(data[:cut])
            assert "damaged" in refusal(path)
        for _ in range(4):
            changed = bytearray(data)
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(bytes(changed))
            assert "damaged" in refusal(path)
        file.unlink()
        assert "missing" in refusal(path)
        file.write_bytes(data)
    assert number_in(path) == 0


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    """The manifest with a change, as somebody who knows how it is made would write it."""
    facts = decode((path / MANIFEST).read_bytes(), None, MANIFEST)
    change(facts)
    (path / MANIFEST).write_bytes(encode(facts, None))


@pytest.mark.parametrize("name", ["../outside.py", "/etc/passwd", "pieces/../x", "a\0b"])
def test_a_file_outside_the_directory_is_refused(path: Path, name: str) -> None:
    rewritten(path, lambda facts: facts["files"].update({name: ["0" * 64, 1]}))
    assert "outside the artifact" in refusal(path)


def test_a_manifest_of_something_else_is_refused(path: Path) -> None:
    for change, said in (
        (lambda facts: facts.update(format=FORMAT + 1), f"format {FORMAT + 1}"),
        (lambda facts: facts.update(kind="a cake"), "of 'a cake'"),
    ):
        rewritten(path, change)
        assert said in refusal(path)
        write(path)


def test_no_artifact(tmp_path: Path) -> None:
    assert not has_artifact(tmp_path / "none")
    assert "no artifact" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "no artifact" in refusal(tmp_path / "file")


def test_a_directory_or_a_file_that_others_can_write_is_refused(path: Path) -> None:
    for each, mode in ((next(path.glob("pieces/*")), 0o644), (path, 0o755)):
        each.chmod(mode | 0o022)
        assert "others can write" in refusal(path)
        each.chmod(mode)
    assert number_in(path) == 0


def test_a_key_signs_and_verifies(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = write(tmp_path / "signed", 1, SECRET)
    assert open_folder(signed, SECRET).facts == open_folder(signed, None).facts == {"number": 1}
    assert "signature" in refusal(signed, b"another key of sixteen bytes")
    assert "signature" in refusal(path, SECRET)
    rewritten(signed, lambda facts: facts.update(number=2))
    assert "signature" in refusal(signed, SECRET)
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
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ArtifactError, match="something else"):
            write(tmp_path / name)
    with pytest.raises(ArtifactError, match="can't be written"):
        write(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    assert number_in(write(tmp_path / "empty")) == 0


@pytest.mark.parametrize("limit", [0, 200])
def test_a_full_disk_is_said_and_keeps_the_old_artifact(path: Path, limit: int) -> None:
    """The kernel refuses to let a file grow: what `save` says then names the disk, and not permissions."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(ArtifactError, match="the disk is full") as caught:
            write(path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "free some space" in str(caught.value.hint)
    assert number_in(path) == 0
    assert number_in(write(path, 1)) == 1 and len(plain_files(path)) == 4


def test_writers_at_once_leave_one_of_theirs_whole(path: Path) -> None:
    failures: list[BaseException] = []

    def writer(first: int) -> None:
        try:
            for number in range(first, first + 8):
                write(path, number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=writer, args=(100 * (i + 1),)) for i in range(3)]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        number_in(path)  # raises for what is not whole
    assert not failures and number_in(path) % 100 == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("count", [8, pytest.param(60, marks=pytest.mark.nightly)])
def test_a_killed_writer_leaves_the_old_artifact_or_the_new_one(tmp_path: Path, count: int) -> None:
    path, chance = tmp_path / "model", random.Random(0)
    for attempt in range(1, count):
        pipe, written = os.pipe()
        child = os.fork()
        if not child:
            try:
                for number in range(10_000 * attempt, 10_000 * (attempt + 1)):
                    write(path, number)
                    os.write(written, b".")
            finally:
                os._exit(1)
        os.read(pipe, 1)  # it writes: on a busy machine that takes a while
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        os.close(written)
        assert number_in(path) // 10_000 == attempt
    assert number_in(write(path, 7)) == 7 and len(plain_files(path)) == 4


def test_a_first_save_that_was_killed_can_be_saved_again(path: Path) -> None:
    (path / MANIFEST).unlink()
    assert not has_artifact(path) and "missing" in refusal(path)
    assert number_in(write(path, 1)) == 1 and len(plain_files(path)) == 4


def test_an_artifact_that_is_replaced_while_it_is_read_is_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, others = folder._read, [1]

    def late(*arguments: object) -> bytes:
        if others:
            write(path, others.pop())
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(folder, "_read", late)
    assert number_in(path) == 1
