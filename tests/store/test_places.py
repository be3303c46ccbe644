"""Directories that cannot be trusted, cannot be written or are full. Real mounts, limits and permissions; no doubles."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import store_child
from processes import python
from store_child import FACTORS

from piecework.errors import CacheError
from piecework.runtime.store.cache import open_entry, verify
from piecework.runtime.store.files import default_root

IS_ROOT = os.geteuid() == 0
COUNT = 3


def run_child(*arguments: object) -> tuple[dict[str, object], list[str]]:
    """What a process found, whose results were right, and what it warned of."""
    done = python(store_child.__file__, *arguments)
    outcome = json.loads(done.stdout)
    assert outcome["right"] is True
    return outcome, done.stderr.splitlines()


# --- read-only ---------------------------------------------------------------------------------


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="piecework-cache-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_directory_of_root_is_read_by_others_without_saving(open_directory: Path) -> None:
    """A cache that root has made for all: permissions, and not a mount, forbid to save."""
    if not IS_ROOT:
        pytest.skip("only root can give up its rights")
    root = open_directory / "cache"
    run_child("use", root, COUNT - 1)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    outcome, (warning,) = run_child("use_as_nobody", root, COUNT)
    assert outcome["compiled"] == ["piece 2"]
    assert "going on without saving" in warning


# --- full --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 20_000])
def test_files_may_not_grow(tmp_path: Path, limit: int) -> None:
    """The kernel refuses a write half-way through a file (EFBIG); what was written of it is gone again."""
    root = tmp_path / "cache"
    outcome, (warning,) = run_child("use_with_small_files", root, COUNT, limit)
    assert outcome["saved"] != [True] * COUNT
    assert "going on without saving" in warning
    assert [path for path in root.rglob("*") if path.name.startswith(".tmp-")] == []
    assert verify(root).findings == ()
    assert run_child("use", root, COUNT)[1] == []


# --- directories that others control -----------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_root_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(mode)
    with pytest.raises(CacheError, match="others can write") as caught:
        open_entry(root, FACTORS)
    assert caught.value.where == str(root)
    assert "chmod go-w" in str(caught.value)
    assert list(root.iterdir()) == []


def test_directories_inside_that_others_can_write_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    open_entry(root, FACTORS).put("a", b"data")
    open_entry(root, FACTORS).get("a")
    for path in [path for path in root.rglob("*") if path.is_dir()]:
        path.chmod(0o777)
        with pytest.raises(CacheError, match="others can write"):
            open_entry(root, FACTORS)
        path.chmod(0o700)
    assert open_entry(root, FACTORS).get("a") == b"data"


def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root can give files away")
    root = tmp_path / "cache"
    open_entry(root, FACTORS).put("a", b"data")
    os.chown(root, 65534, -1)
    with pytest.raises(CacheError, match="belongs to another user"):
        open_entry(root, FACTORS)
    os.chown(root, 0, -1)
    assert open_entry(root, FACTORS).get("a") == b"data"


# --- links -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 4])
def test_link_out_of_the_tree_is_refused(tmp_path: Path, depth: int) -> None:
    """Each directory of an entry in turn is a link to a perfectly good one elsewhere."""
    root = tmp_path / "cache"
    entry = open_entry(root, FACTORS)
    entry.put("a", b"data")
    parts = (*entry.directory.relative_to(root).parts, "artifacts")
    inside = root.joinpath(*parts[:depth])
    outside = tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    before = sorted(path.relative_to(outside) for path in outside.rglob("*"))
    with pytest.raises(CacheError, match="a link stands") as caught:
        open_entry(root, FACTORS)
    assert caught.value.where == str(inside)
    assert verify(root).artifacts == 0
    assert sorted(path.relative_to(outside) for path in outside.rglob("*")) == before


def test_lock_that_is_a_link_truncates_nothing(tmp_path: Path) -> None:
    root, victim = tmp_path / "cache", tmp_path / "victim"
    entry = open_entry(root, FACTORS)
    entry.get_or_compile("a", lambda: b"data")
    victim.write_bytes(b"precious")
    for lock in (root / ".locks").iterdir():
        lock.unlink()
        lock.symlink_to(victim)
    result = open_entry(root, FACTORS).get_or_compile("b", lambda: b"more")
    assert (result.data, result.saved) == (b"more", False)
    assert victim.read_bytes() == b"precious"


def test_root_may_be_our_own_link(tmp_path: Path) -> None:
    """A link that leads to the cache is the user's choice; what it leads to is checked."""
    real, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(real)
    real.mkdir(0o700)
    assert open_entry(link, FACTORS).put("a", b"data")
    real.chmod(0o777)
    with pytest.raises(CacheError, match="others can write"):
        open_entry(link, FACTORS)


# --- impossible places and names -----------------------------------------------------------------


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="a file stands"):
        open_entry(tmp_path / "file", FACTORS)
    with pytest.raises(CacheError):
        open_entry(tmp_path / "file" / "below", FACTORS)


def test_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path.home() / ".cache" / "piecework"
    for chosen, xdg, expected in (
        ("", "", home),
        ("", "/x", Path("/x/piecework")),
        ("", "relative", home),
        ("/y", "/x", Path("/y")),
    ):
        monkeypatch.setenv("PIECEWORK_CACHE_DIR", chosen)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert default_root() == expected
