"""Every byte region of every file, flipped, cut, zeroed or grown: quarantine, one warning, right bytes. Nothing is mocked."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from piecework.runtime.cache import CacheEntry, CacheStore, KeyFactors, verify_cache
from piecework.runtime.cache.literal_index import INDEX_NAME
from piecework.runtime.cache.manifest import (
    MANIFEST_NAME,
    Identity,
    decode_manifest,
    encode_manifest,
    sha256,
)

FACTORS = KeyFactors.collect(
    config={"dtype": "bf16", "mode": "3"},
    versions={"torch": "2.13.0", "python": "cpython 3.11"},
    sources={"model/layers.py": "0" * 64},
)
PAYLOADS = {f"piece {n}": random.Random(n).randbytes(300 + 211 * n) for n in range(4)}
TEXTS = {
    "stitched.py": "def execution_fn(x, *, __vllm_submods__):\n    return __vllm_submods__[0](x)\n",
    "computation_graph.py": "# the graph\n" * 8,
    "transformed_code.py": "# the code\n" * 8,
}
REGIONS = 30
Damage = Callable[[bytes, int, int], bytes]


def flip(data: bytes, begin: int, end: int) -> bytes:
    position = random.Random(f"{len(data)} {begin}").randrange(begin, end)
    bit = 1 << random.Random(begin).randrange(8)
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def cut(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin]


def zero(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes(end - begin) + data[end:]


def lose(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + data[end:]


def grow(data: bytes, begin: int, end: int) -> bytes:
    return data[:end] + b"\0" + data[end:]


def fill(entry: CacheEntry) -> list[bool]:
    """Use the entry as a run would; return which pieces had to be compiled."""
    compiled = []
    for name, data in PAYLOADS.items():
        result = entry.get_or_compile(name, lambda data=data: data)
        assert result.data == data
        assert result.saved
        compiled.append(result.compiled)
    for name, text in TEXTS.items():
        assert entry.read_text_file(name) in (text, None)
    assert entry.write_text_files(TEXTS)
    for name, text in TEXTS.items():
        assert entry.read_text_file(name) == text
    return compiled


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved") / "cache"
    assert all(fill(CacheStore.open(root, FACTORS)))
    return root


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of flushes to a busy disk would take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="piecework-", dir=memory))
    yield directory
    shutil.rmtree(directory)


def all_cases(saved: Path) -> list[tuple[str, str, int, int]]:
    cases = []
    for path in sorted(saved.rglob("*")):
        if not path.is_file() or ".locks" in path.parts:
            continue
        size = path.stat().st_size
        step = max(1, -(-size // REGIONS))
        for begin in range(0, size, step):
            end = min(begin + step, size)
            cases += [
                (str(path.relative_to(saved)), kind.__name__, begin, end)
                for kind in (flip, cut, zero, lose, grow)
            ]
    return cases


def check_case(saved: Path, root: Path, case: tuple[str, str, int, int], warned: list[str]) -> bool:
    """Damage one copy and use it twice; return whether the damage changed the file at all."""
    file, kind, begin, end = case
    damage: Damage = {"flip": flip, "cut": cut, "zero": zero, "lose": lose, "grow": grow}[kind]
    shutil.copytree(saved, root)
    target = root / file
    before = target.read_bytes()
    target.write_bytes(damage(before, begin, end))
    is_changed = target.read_bytes() != before
    try:
        entry = CacheStore.open(root, FACTORS)
        fill(entry)
        assert len(warned) == is_changed, warned
        assert entry.stats.quarantined == is_changed
        if is_changed:
            shelved = [path for path in (root / ".quarantine").rglob("*") if path.is_file()]
            assert any(path.name == target.name for path in shelved)
        # The next process finds everything whole again.
        assert not any(fill(CacheStore.open(root, FACTORS)))
        assert len(warned) == is_changed
        assert verify_cache(root).findings == ()
    finally:
        warned.clear()
        shutil.rmtree(root)
    return is_changed


@pytest.mark.parametrize("count", [224, pytest.param(560, marks=pytest.mark.nightly)])
def test_sampled_damage_of_every_file(
    saved: Path, place: Path, warned: list[str], count: int
) -> None:
    cases = all_cases(saved)
    files = {case[0] for case in cases}
    assert len(files) == len(PAYLOADS) + len(TEXTS) + 3  # factors, index, manifest
    picked = random.Random(0).sample(cases, count)
    assert {(case[0], case[1]) for case in picked} >= {
        (file, kind) for file in files for kind in ("flip", "cut")
    }
    changed = sum(check_case(saved, place / "case", case, warned) for case in picked)
    assert changed >= count * 500 // 560


@pytest.mark.nightly
def test_all_damage_of_every_file(saved: Path, place: Path, warned: list[str]) -> None:
    for case in all_cases(saved):
        check_case(saved, place / "case", case, warned)


@pytest.mark.parametrize("nothing", [False, True], ids=["removed", "emptied"])
def test_files_that_are_gone(saved: Path, place: Path, nothing: bool) -> None:
    """A lost file costs at most a compile; what else was saved with it stays right."""
    for path in sorted(saved.rglob("*")):
        if path.is_file() and ".locks" not in path.parts:
            root = place / "case"
            shutil.copytree(saved, root)
            target = root / path.relative_to(saved)
            target.write_bytes(b"") if nothing else target.unlink()
            fill(CacheStore.open(root, FACTORS))
            assert not any(fill(CacheStore.open(root, FACTORS)))
            assert verify_cache(root).findings == ()
            shutil.rmtree(root)


def directory_of(root: Path) -> Path:
    return root.joinpath(*Identity(FACTORS.hash, 0, 0, "backbone").parts)


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "writable"])
@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME, "stitched.py", "artifact"])
def test_something_else_in_a_files_place(
    saved: Path, tmp_path: Path, warned: list[str], kind: str, name: str
) -> None:
    """A pipe does not make it wait, a link is not followed, what others may write is not read."""
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    directory = directory_of(root)
    target = next((directory / "artifacts").iterdir()) if name == "artifact" else directory / name
    outside = tmp_path / "outside"
    outside.write_bytes(target.read_bytes())
    if kind == "writable":
        target.chmod(0o666)
    else:
        target.unlink()
        if kind == "directory":
            target.mkdir()
        elif kind == "fifo":
            os.mkfifo(target)
        else:
            target.symlink_to(outside)
    before = outside.read_bytes()
    fill(CacheStore.open(root, FACTORS))
    assert len(warned) == 1, warned
    assert outside.read_bytes() == before
    assert not target.is_symlink()
    assert not any(fill(CacheStore.open(root, FACTORS)))
    assert len(warned) == 1


def plant_index(root: Path, text: bytes) -> None:
    """Put an index there and make the manifest vouch for it, as somebody with write access could."""
    directory = directory_of(root)
    identity = Identity(FACTORS.hash, 0, 0, "backbone")
    manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes(), identity, None)
    files = dict(manifest.files) | {INDEX_NAME: (sha256(text),)}
    (directory / INDEX_NAME).write_bytes(text)
    planted = type(manifest)(identity, files, manifest.artifacts)
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(planted, None))


MARKER = "PIECEWORK_CACHE_CODE_RAN"
HOSTILE_INDEXES = {
    "call": f"__import__('os').environ.__setitem__('{MARKER}', '1')",
    "call in a value": "{'format': 1, 'key': 'x', 'entries': {'a': exec('1')}}",
    "deep brackets": "(" * 200_000 + ")" * 200_000,
    "deep dicts": "{0:" * 50_000 + "0" + "}" * 50_000,
    "unary minus": "-" * 1_000_000 + "1",
    "sum": "1" + "+1" * 500_000,
    "huge integer": "9" * 1_000_000,
    "huge hexadecimal": "0x" + "f" * 1_000_000,
    "integer just too long": "{'format': 1000000000000000}",
    "power": "9**9**9",
    "shift": "1<<10**9",
    "repeat": "'a'*10**9",
    "f-string": "f'{exit()}'",
    "bytes": "b'\\x00'",
    "walrus": "(x:=1)",
    "lambda": "lambda: 0",
    "comprehension": "{x: x for x in (1, 2)}",
    "escape": "{'\\x41': 1}",
    "triple quotes": "'''a\n'''",
    "null": "{'a':\0 1}",
    "utf-7 cookie": "# coding: utf-7\n+AHs-",
    "not ASCII": "{'é': 1}",
    "set": "{'format', 'key', 'entries'}",
    "list": "[]",
    "nothing": "",
    "true as format": "{'format': True, 'key': 'K', 'entries': {}}",
    "another key": "{'format': 1, 'key': 'K', 'entries': {}}",
    "duplicate": "{'format': 1, 'format': 1, 'key': 'K', 'entries': {}}",
    "negative": "{'format': 1, 'key': 'K', 'entries': {'a': ('" + "0" * 64 + "', -1)}}",
    "unhashable": "{{}: 1}",
    "unbalanced": "{'format': 1",
    "unbalanced the other way": "}" * 1000,
}


@pytest.mark.parametrize("text", HOSTILE_INDEXES.values(), ids=HOSTILE_INDEXES.keys())
def test_hostile_index(saved: Path, tmp_path: Path, warned: list[str], text: str) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    plant_index(root, text.encode())
    assert all(fill(CacheStore.open(root, FACTORS)))
    assert len(warned) == 1, warned
    assert INDEX_NAME in warned[0]
    assert MARKER not in os.environ


@pytest.mark.parametrize("size", [0, 999_999_999_999])
def test_index_that_names_a_foreign_artifact(saved: Path, tmp_path: Path, size: int) -> None:
    """An index may not lead outside of what the manifest lists, and a huge size allocates nothing."""
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    text = f'{{"format": 1, "key": "{FACTORS.hash}", "entries": {{"piece 0": ("{"0" * 64}", {size})}}}}'
    plant_index(root, text.encode())
    assert all(fill(CacheStore.open(root, FACTORS)))


HOSTILE_MANIFESTS = {
    "deep": b"[" * 1_000_000,
    "huge integer": b'{"format": ' + b"9" * 100_000 + b"}",
    "NaN": b'{"format": NaN}',
    "list": b"[]",
    "null": b"null",
    "surrogate": b'{"sha256": "\\ud800"}',
    "UTF-16": '{"format": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("raw", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_hostile_manifest(saved: Path, tmp_path: Path, warned: list[str], raw: bytes) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    (directory_of(root) / MANIFEST_NAME).write_bytes(raw)
    assert all(fill(CacheStore.open(root, FACTORS)))
    assert len(warned) == 1


def test_entry_copied_to_another_key_is_refused(
    saved: Path, tmp_path: Path, warned: list[str]
) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    other = KeyFactors.collect(config={"dtype": "fp32"}, versions={"torch": "2.13.0"})
    (root / FACTORS.hash).rename(root / other.hash)
    entry = CacheStore.open(root, other)
    assert entry.get("piece 0") is None
    assert "made for another entry" in warned[0]


def test_entry_copied_to_another_rank_or_tag_is_refused(saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    shutil.copytree(directory_of(root), root / FACTORS.hash / "rank_1_0" / "backbone")
    shutil.copytree(directory_of(root), root / FACTORS.hash / "rank_0_0" / "draft")
    assert CacheStore.open(root, FACTORS, rank=1).get("piece 0") is None
    assert CacheStore.open(root, FACTORS, tag="draft").get("piece 0") is None
    assert CacheStore.open(root, FACTORS).get("piece 0") == PAYLOADS["piece 0"]


def test_only_one_of_many_readers_warns(saved: Path, tmp_path: Path, warned: list[str]) -> None:
    root = tmp_path / "cache"
    shutil.copytree(saved, root)
    entries = [CacheStore.open(root, FACTORS) for _ in range(4)]
    for path in (directory_of(root) / "artifacts").iterdir():
        path.write_bytes(b"x")
    for entry in entries:
        fill(entry)
    assert len(warned) == 1, warned
