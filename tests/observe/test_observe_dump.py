"""`debug_dump_path`: the stages as files, the page that links them, failures, and that nothing happens without it."""

from __future__ import annotations

import ast
import itertools
import json
import logging
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Block, Layers, Told, mix_pair
from torch import nn

import piecework
from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.model_tag import set_model_tag
from piecework.runtime.observe.dump import Dump, Step, render_page


class Model(Layers):
    def __init__(self, layers: int = 3) -> None:
        super().__init__(Block(mix_pair) for _ in range(layers))


@pytest.fixture
def sabotage(tmp_path: Path) -> CompilationConfig:
    return CompilationConfig(backend="models:Told", debug_dump_path=tmp_path)


class PageText(HTMLParser):
    """Links, anchors, tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.ids, self.tags, self.sources = [], [], [], []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [given["href"]] if "href" in given else []
        self.ids += [given["id"]] if "id" in given else []
        self.sources += [given["src"]] if "src" in given else []

    def handle_data(self, data: str) -> None:
        self.text += data


def dumped(
    path: Path, *, layers: int = 3, **fields: object
) -> tuple[Path, piecework.StitchedModule]:
    config = CompilationConfig(**{"backend": "eager", "debug_dump_path": path, **fields})
    stitched = piecework.compile(Model(layers), (torch.randn(4, 8),), config=config)
    return path / "rank_0" / "Model", stitched


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, piecework.StitchedModule]:
    return dumped(tmp_path_factory.mktemp("dump"))


def test_every_stage_is_a_file(plain: tuple[Path, piecework.StitchedModule]) -> None:
    folder, stitched = plain
    numbered = "00_config.json 01_captured.py 02_split.py 03_plan.txt 04_stitched.py"
    files = sorted(p.name for p in folder.iterdir())
    assert files == [*numbered.split(), "index.html", "pieces", "times.json"]
    assert (folder / "04_stitched.py").read_text() == stitched.source.code
    assert "name='execution_fn'" in (folder / "03_plan.txt").read_text()
    for piece in stitched.pieces:
        ast.parse((folder / "pieces" / piece.name / "graph.py").read_text())
    read = CompilationConfig.model_validate_json((folder / "00_config.json").read_text())
    assert read == stitched.config
    captured, split = ((folder / f).read_text() for f in ("01_captured.py", "02_split.py"))
    assert "torch.ops.pairs.mix" in captured and "submod_0" not in captured
    assert all(f"class submod_{number}(" in split for number in range(3))
    for text in (captured, split, stitched.source.code):
        ast.parse(text)


def test_times_are_those_of_the_report(plain: tuple[Path, piecework.StitchedModule]) -> None:
    folder, stitched = plain
    times = json.loads((folder / "times.json").read_text())
    assert times["error"] is None and times["phases"] == dict(stitched.report().phases)
    assert [(p.name, p.key, p.modules, p.seconds) for p in stitched.pieces] == [
        (p["name"], p["key"], p["modules"], sum(r["seconds"] for r in p["ranges"]))
        for p in times["pieces"]
    ]
    same = {p["name"]: p["same_as"] for p in times["pieces"]}
    assert same == {"submod_0": "", "submod_2": "", "submod_4": "submod_2", "submod_6": ""}


def test_ranges_are_listed(tmp_path: Path) -> None:
    folder, _ = dumped(tmp_path, compile_sizes=[1, 8], compile_ranges_endpoints=[16])
    first = json.loads((folder / "times.json").read_text())["pieces"][0]
    batches = [each["batches"] for each in first["ranges"]]
    assert batches == ["[1, 1]", "[8, 8]", "[1, 16]", "[17, …]"]
    assert "[17, …]" in PageText((folder / "index.html").read_text()).text


def test_compilations_never_overwrite_each_other(tmp_path: Path) -> None:
    first, _ = dumped(tmp_path, layers=1)
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    dumped(tmp_path, layers=2)
    with set_model_tag("drafter"):
        dumped(tmp_path, layers=1)
    names = {p.name for p in (tmp_path / "rank_0").iterdir()}
    assert names == {"Model", "Model_1", "drafter.Model"}
    assert before == {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("rank", "dp_rank", "folder"), [(0, 0, "rank_0"), (3, 0, "rank_3"), (1, 2, "rank_1_dp_2")]
)
def test_ranks_have_folders_of_their_own(tmp_path, rank, dp_rank, folder) -> None:  # type: ignore[no-untyped-def]
    config = CompilationConfig(debug_dump_path=tmp_path)
    dump = Dump.open(config, "M", rank=rank, dp_rank=dp_rank)
    assert dump.folder == tmp_path / folder / "M"


@given(name=st.text(max_size=120))
@settings(deadline=None, max_examples=60)
def test_no_name_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    place = tmp_path_factory.mktemp("dump")
    folder = Dump.open(CompilationConfig(debug_dump_path=place), name, rank=0).folder
    assert folder is not None and folder.resolve().parent == (place / "rank_0").resolve()
    assert folder.is_dir() and not folder.name.startswith(".")


def test_a_file_in_place_of_the_folder_is_an_error_before_compiling(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused = pytest.raises(ConfigError, match=r"can't be written to .*\(debug_dump_path\)")
    with piecework.counters.expect(num_backend_compilations=0), refused:
        dumped(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_failed_compile_leaves_readable_stages(
    sabotage: CompilationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def second_fails(*_: object) -> None:
        if next(calls) % 2 == 0:  # in each trace that is tried
            raise ValueError("<no rule> & nothing")

    monkeypatch.setattr(Told, "hear", second_fails)
    with pytest.raises(PieceCompileError):
        piecework.compile(Model(), (torch.randn(4, 8),), config=sabotage)
    folder = tmp_path / "rank_0" / "Model"
    assert "torch.ops.pairs.mix" in (folder / "01_captured.py").read_text()
    assert not (folder / "04_stitched.py").exists()
    times = json.loads((folder / "times.json").read_text())
    assert "PieceCompileError" in times["error"] and "submod_2" in times["error"]
    keys = {p["name"]: p["key"] for p in times["pieces"]}
    assert keys.pop("submod_0") and keys == {"submod_2": "", "submod_4": "", "submod_6": ""}
    page = PageText((folder / "index.html").read_text())
    assert "The compilation failed." in page.text and "<no rule> & nothing" in page.text
    assert page.text.count("not compiled") >= 3


def test_a_dump_that_can_not_go_on_does_not_stop_the_compilation(  # type: ignore[no-untyped-def]
    sabotage: CompilationConfig, tmp_path: Path, monkeypatch, caplog
) -> None:
    folder = tmp_path / "rank_0" / "Model"
    blocked = folder / "03_plan.txt"
    monkeypatch.setattr(Told, "hear", lambda *_: blocked.mkdir(exist_ok=True))
    model, x = Model(), torch.randn(4, 8)
    with caplog.at_level(logging.WARNING, logger="piecework"):
        stitched = piecework.compile(model, (x,), config=sabotage)
    torch.testing.assert_close(stitched(x), model(x))
    (record,) = [r for r in caplog.records if "the dump of Model stops" in r.getMessage()]
    assert "03_plan.txt" in record.getMessage()
    assert (folder / "02_split.py").is_file() and not (folder / "index.html").exists()


def test_what_is_not_json_in_a_configuration_is_still_shown(tmp_path: Path) -> None:
    def local_pass(graph: torch.fx.Graph) -> None:
        """A pass that no other process could find by name."""

    config = CompilationConfig(debug_dump_path=tmp_path, inductor_passes={"mine": local_pass})
    folder = Dump.open(config, "M", rank=0).folder
    assert folder is not None
    shown = json.loads((folder / "00_config.json").read_text())
    assert "local_pass" in shown["repr"] and shown["not_json_because"]


def test_every_link_of_the_page_leads_somewhere_and_it_needs_nothing_else(
    plain: tuple[Path, piecework.StitchedModule],
) -> None:
    folder, _ = plain
    text = (folder / "index.html").read_text()
    page = PageText(text)
    assert len(page.ids) == len(set(page.ids))
    linked = {link for link in page.links if not link.startswith("#")}
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert linked == files - {"index.html"}
    assert "svg" in page.tags and not {"link", "script", "img", "iframe"} & set(page.tags)
    assert not page.sources and "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_no_text_of_a_model_is_markup() -> None:
    evil = "<script>alert('1')</script>&\"'"
    cell = {"batches": evil, "seconds": 1.0, "origin": evil, "code": evil}
    steps = [Step(evil, evil, graph=evil, key=evil, ranges=[cell]), Step(evil, evil, evil)]
    head = {"model": evil, "place": evil, "failure": evil}
    page = render_page(steps, stages={evil: evil}, phases={evil: 1.0}, **head)
    shown = PageText(page)
    assert "script" not in shown.tags and shown.text.count(evil) >= 8


@pytest.mark.inductor
def test_the_code_of_inductor_is_there_compiled_or_cached(tmp_path: Path) -> None:
    for number, origin in (("", "compiled"), ("_1", "cache")):
        dumped(tmp_path / "dump", layers=2, backend="inductor", cache_dir=tmp_path / "cache")
        folder = tmp_path / "dump" / "rank_0" / f"Model{number}"
        pieces = json.loads((folder / "times.json").read_text())["pieces"]
        assert [p["ranges"][0]["origin"] for p in pieces] == [origin] * 3
        for piece in pieces:
            text = (folder / "pieces" / piece["name"] / "inductor_output.py").read_text()
            ast.parse(text)
            assert "def call(" in text


@pytest.mark.parametrize("op", [nn.functional.interpolate, torch.roll, torch.ops.aten.sin])
def test_an_operator_that_is_a_function_has_its_name_on_the_page(
    tmp_path: Path, op: object
) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten.sin(torch.cat([x, torch.roll(x + 1, 1)]) * 2) + 1
        y = nn.functional.softmax(nn.functional.interpolate(y * 2, scale_factor=2.0) * 3, -1)
        return y + 1

    config = CompilationConfig(backend="eager", debug_dump_path=str(tmp_path))
    piecework.compile(model, (torch.randn(4, 3, 8),), splitting_ops=[op], config=config)
    (page,) = tmp_path.rglob("index.html")
    text = page.read_text()
    assert str(getattr(op, "__name__", op)).rpartition(".")[2] in text
    assert "&lt;function" not in text and "&lt;built-in" not in text and " at 0x" not in text
