"""Where artifacts lie: directories and URLs hold the old artifact or the new one, whoever writes and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

import piecework
from piecework.errors import ArtifactError
from piecework.runtime.artifact.folder import open_folder, write_folder
from piecework.runtime.artifact.store import Store, store_of
from piecework.runtime.cache import atomic
from piecework.runtime.counters import counters

EAGER = {"backend": "eager"}
X = torch.randn(3, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}/below/model"


def content(number: int) -> dict[str, bytes]:
    return {f"part_{i}": f"{number} {i}".encode() * 50 for i in range(4)}


def number_in(store: Store) -> int:
    """Which `content` is there; all of it must be of one number."""
    found = {data.split()[0] for data in open_folder(store, None).files.values()}
    assert len(found) == 1
    return int(found.pop())


def write(store: Store, number: int) -> None:
    write_folder(store, content(number), {"number": number}, None)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_model_is_saved_to_a_url_and_loaded_from_it(
    kind: str, url: str, tmp_path: Path, warned: list[str]
) -> None:
    place = url if kind == "memory" else f"file://{tmp_path}/model"
    first, second = Small(), Small()
    piecework.compile(first, (X,), config=EAGER, artifact=place)
    before = counters.num_graphs_seen
    stitched = piecework.compile(second, (X,), config=EAGER, artifact=place)
    assert counters.num_graphs_seen == before and not warned
    assert torch.equal(stitched(X), second(X))
    assert torch.equal(piecework.load(place, first)(X), first(X))
    stitched.save(place)
    assert torch.equal(piecework.load(place, first)(X), first(X))
    assert (tmp_path / "model" / "manifest.json").is_file() == (kind == "file")
    system, path = fsspec.core.url_to_fs(place)
    assert [each.rpartition("/")[2] for each in system.ls(system._parent(path), detail=False)] == [
        "model"
    ]


def test_a_key_signs_what_lies_at_a_url(url: str, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name * 32)
    stitched = piecework.compile(Small(), (X,), config=EAGER)
    stitched.save(url, key_file=tmp_path / "a")
    piecework.load(url, Small(), key_file=tmp_path / "a")
    with pytest.raises(ArtifactError, match="another key"):
        piecework.load(url, Small(), key_file=tmp_path / "b")


def test_urls_that_cannot_be_opened_are_errors_with_a_hint(
    url: str, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    for place, said in ((url, "no artifact"), ("nosuchthing://a/b", "URL can't be opened")):
        with pytest.raises(ArtifactError, match=said) as found:
            piecework.load(place, Small())
        assert found.value.hint
    model = Small()
    stitched = piecework.compile(model, (X,), config=EAGER, artifact="nosuchthing://a/b")
    assert torch.equal(stitched(X), model(X)) and "not saved" in warned.pop()
    assert "URL can't be opened" in warned.pop()
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ArtifactError, match="URL can't be opened") as found:
        piecework.load(url, Small())
    assert "fsspec" in str(found.value.hint)


def test_a_store_that_does_not_answer_is_an_error_and_the_model_is_compiled(
    url: str, monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise TimeoutError("no route to host")

    kind = type(store_of(url).system)  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "exists", unreachable)
    model = Small()
    stitched = piecework.compile(model, (X,), config=EAGER, artifact=url)
    assert torch.equal(stitched(X), model(X))
    assert [("no route to host" in each) for each in warned] == [True, True]


def test_what_is_no_artifact_is_not_overwritten(url: str) -> None:
    stitched = piecework.compile(Small(), (X,), config=EAGER)
    system, path = fsspec.core.url_to_fs(url)
    system.pipe_file(path, b"PK\3\4 a thesis")
    with pytest.raises(ArtifactError, match="something else"):
        stitched.save(url)
    with pytest.raises(ArtifactError, match="damaged"):
        piecework.load(url, Small())
    with pytest.raises(ArtifactError, match="something else"):
        stitched.save(url.rpartition("/")[0])  # a folder
    system.rm(path)
    stitched.save(url)


def test_a_damaged_archive_is_refused(url: str) -> None:
    model, chance = Small(), random.Random(0)
    piecework.compile(model, (X,), config=EAGER).save(url)
    system, path = fsspec.core.url_to_fs(url)
    data, expected, refused = system.cat_file(path), model(X), 0
    places = [chance.randrange(len(data)) for _ in range(150)]
    damaged = [data[:place] for place in (0, 1, len(data) // 2, len(data) - 1)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        damaged.append(bytes(changed))
    for each in damaged:
        system.pipe_file(path, each)
        try:
            stitched = piecework.load(url, model)
        except ArtifactError as error:
            assert error.hint
            refused += 1
        else:  # a time stamp of the archive, a space of the manifest
            assert torch.equal(stitched(X), expected)
    assert refused > 120


@pytest.mark.parametrize("step", ["makedirs", "pipe_file", "mv", "copy", "rm"])
def test_a_store_that_fails_while_it_is_written_holds_the_old_artifact(
    step: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(url)
    write(store, 1)
    kind, done = type(store.system), []  # type: ignore[attr-defined]
    original = getattr(kind, step)

    def failing(*args: object, **kwargs: object) -> object:
        if step == "pipe_file":  # half of it
            original(args[0], args[1], args[2][:100])
        done.append(step)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(kind, step, failing)
        with pytest.raises(ArtifactError, match="Input/output"):
            write(store, 2)
    assert done and number_in(store) in ({1, 2} if step == "rm" else {1})
    write(store, 3)
    assert number_in(store) == 3


@pytest.mark.parametrize("kind", ["memory", "directory"])
def test_writers_at_once_leave_one_of_theirs_whole(kind: str, url: str, tmp_path: Path) -> None:
    store = store_of(url if kind == "memory" else tmp_path / "model")
    write(store, 0)
    failures: list[BaseException] = []

    def writer(first: int) -> None:
        try:
            for number in range(first, first + 15):
                write(store, number)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=writer, args=(100 * (i + 1),)) for i in range(3)]
    for each in threads:
        each.start()
    while any(each.is_alive() for each in threads):
        number_in(store)  # raises for what is not whole
    assert not failures and number_in(store) % 100 == 14
    if kind == "directory":
        assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_the_old_artifact_or_the_new_one(tmp_path: Path) -> None:
    store, chance = store_of(tmp_path / "model"), random.Random(0)
    write(store, 0)
    for attempt in range(1, 41):
        pipe, written = os.pipe()
        child = os.fork()
        if not child:
            try:
                for number in range(10_000 * attempt, 10_000 * (attempt + 1)):
                    write(store, number)
                    os.write(written, b".")
            finally:
                os._exit(1)
        os.read(pipe, 1)  # it writes: on a busy machine that takes a while
        time.sleep(chance.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(pipe)
        os.close(written)
        assert number_in(store) // 10_000 == attempt
    write(store, 7)
    assert number_in(store) == 7


def test_without_an_exchange_of_two_names_directories_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: None)
    store = store_of(tmp_path / "model")
    for number in range(3):
        write(store, number)
        assert number_in(store) == number and os.listdir(tmp_path) == ["model"]
    moved = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self.name.startswith(".model.") and Path(target).name == "model":
            raise OSError(39, "Directory not empty")
        return moved(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(ArtifactError, match="can't be written"):
        write(store, 9)
    assert number_in(store) == 2 and os.listdir(tmp_path) == ["model"]


def test_an_artifact_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    store = store_of(tmp_path / "model")
    write(store, 1)
    opened: list[Callable[..., bytes]] = []

    class Replaced:
        name = store.name

        def open(self) -> Callable[[str, int], bytes]:
            read = store.open()
            opened.append(read)
            if len(opened) > 1:
                return read

            def late(name: str, limit: int) -> bytes:
                data = read(name, limit)
                if name == "manifest.json":
                    write(store, 2)
                return data

            return late

    assert number_in(Replaced()) == 2  # type: ignore[arg-type]
