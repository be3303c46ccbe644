"""The page: self-contained, safe with hostile text, readable colours, anchors that exist, a map that draws what changed."""

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from piecework.cli.golden import golden_app
from piecework.golden.diff import compare_sources
from piecework.golden.page import Entry, page, pieces_of, side_by_side
from piecework.golden.review import visible

CASES = Path(__file__).parent.parent.parent / "golden" / "cases"


def chain(count: int, *, missing: int | None = None, literal: int | None = None) -> str:
    """``count`` pieces with a call outside after each; one may be left out, one literal changed."""
    numbers = [number for number in range(count) if number != missing]
    rows = "".join(f"#   [{at}] submod_{2 * number}\n" for at, number in enumerate(numbers))
    lines, value = "", "x"
    for at, number in enumerate(numbers):
        lines += f"    q{number}, o{number} = __vllm_submods__[{at}]({value})\n"
        value = f"o{number}"
        lines += f"    attn(q{number}, {value}, {7 if number == literal else 0})\n"
    return (
        f"# piecework stitching source, format 1\n#\n# __vllm_submods__:\n{rows}\nimport torch\n\n"
        "attn = torch.ops.ns.attn\n\n\ndef execution_fn(x, *, __vllm_submods__):\n"
        f"{lines}    return {value}\n"
    )


def entry(before: str, after: str) -> Entry:
    return Entry("a case", "before.py", "after.py", compare_sources(before, after))


class Reader(HTMLParser):
    """Collects what a browser would see: anchors, links, and whether tags nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.resources: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        elif "src" in found or "href" in found or "xlink:href" in found:
            self.resources.append(str(found))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


@pytest.fixture(scope="module")
def text() -> str:
    return page([entry(chain(12), chain(12, missing=4, literal=9)), entry(chain(2), chain(3))])


def test_the_page_is_self_contained_and_well_formed(text: str) -> None:
    reader = Reader(text)
    assert reader.open == []
    assert reader.resources == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    assert len(reader.ids) == len(set(reader.ids)), "anchors are unique over all entries"
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids)
    assert len(reader.links) > 10


def statuses(before: str, after: str) -> list[str]:
    return [row["status"] for row in pieces_of(compare_sources(before, after), "e")]


def test_the_table_shows_what_changed_and_folds_what_is_equal(text: str) -> None:
    found = statuses(chain(12), chain(12, missing=4, literal=9))
    assert (found.count("removed"), found.count("changed"), found[0]) == (2, 1, "folded")
    assert statuses(chain(30), chain(30)) == ["folded"]
    assert "a piece takes 15 arguments and gives 5 results" in text


def test_a_comment_is_no_change_of_a_call() -> None:
    before = chain(3)
    line = next(line for line in before.splitlines() if line.startswith("    attn("))
    after = before.replace(line, f"    # layers.1.attn  model.py\n{line}", 1)
    assert [each.group for each in compare_sources(before, after).changes] == ["provenance"]
    assert {*statuses(before, after)} == {"same"}


HOSTILE = "</span><script>alert(1)</script>{{ 7919 * 7919 }}{% if x %}<!--&amp;\"'>"


def test_hostile_text_stays_text() -> None:
    before = f"# {HOSTILE}\n\ndef execution_fn(x):\n    y = f(x, {HOSTILE!r})\n    return y\n"
    after = before.replace("f(x", "g(x")
    written = page(
        [Entry(HOSTILE, HOSTILE, HOSTILE, compare_sources(before, after))], title=HOSTILE
    )
    reader = Reader(written)
    assert "script" not in reader.tags and reader.open == []
    assert "{{ 7919 * 7919 }}" in written and "62710561" not in written


@settings(deadline=None, max_examples=60)
@given(st.text(), st.text())
def test_side_by_side_keeps_every_character(before: str, after: str) -> None:
    rows = [row for block in side_by_side(before, after) for row in block.rows]
    before, after = visible(before), visible(after)
    left = [row for row in rows if row.before_number is not None]
    right = [row for row in rows if row.after_number is not None]
    assert [row.before_number for row in left] == list(range(1, len(before.splitlines()) + 1))
    assert [_plain(row.before) for row in left] == before.splitlines()
    assert [row.after_number for row in right] == list(range(1, len(after.splitlines()) + 1))
    assert [_plain(row.after) for row in right] == after.splitlines()


def _plain(cell: str) -> str:
    return html.unescape(re.sub(r"</?(span|mark)[^>]*>", "", cell))


@pytest.mark.parametrize("golden", sorted(CASES.glob("*/expected.py")), ids=lambda p: p.parent.name)
def test_every_golden_can_be_shown(golden: Path) -> None:
    source = golden.read_text()
    reader = Reader(page([entry(source, source.replace("return ", "return not "))]))
    assert reader.open == [] and {link[1:] for link in reader.links} <= set(reader.ids)


def test_invisible_and_control_characters_are_shown(tmp_path: Path) -> None:
    """A bidirectional override makes code look like other code; an escape sequence drives a terminal."""
    after = "def execution_fn(x):\n    # \u202e\x1b[2J\u200b\n    return x\n"
    assert visible(after).splitlines()[1] == r"    # \u202e\x1b[2J\u200b"
    assert visible("tab\tand \N{LATIN SMALL LETTER E WITH ACUTE}\n") == "tab\tand \xe9\n"
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text("def execution_fn(x):\n    return x\n")
    new.write_text(after)
    out = tmp_path / "page.html"
    output = CliRunner().invoke(golden_app, ["diff", str(old), str(new), "--html", str(out)]).output
    for text in (output, out.read_text()):
        assert r"\u202e\x1b" in text and not {"\u202e", "\x1b", "\u200b"} & set(text)


# --- colours ---------------------------------------------------------------------------------------

ON_PAGE = ("text", "muted", "accent", "keyword", "string", "comment", "number", "table")
ON_CODE = ("text", "keyword", "string", "comment", "number", "table")
PAIRS = [
    *((colour, "page") for colour in ON_PAGE),
    *((colour, "panel") for colour in (*ON_PAGE, "added-text", "removed-text", "changed-text")),
    *((colour, back) for colour in ON_CODE for back in ("added-back", "removed-back")),
    *((colour, back) for colour in ON_CODE for back in ("added-mark", "removed-mark")),
    *((f"{kind}-text", f"{kind}-back") for kind in ("added", "removed", "changed")),
    ("muted", "changed-back"),
]


def _themes() -> dict[str, dict[str, str]]:
    source = page([])
    light, dark = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for name, block in (("light", light), ("dark", dark))
    }


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_enough_contrast(theme: str) -> None:
    """WCAG 2 level AA: 4.5 to 1 for text of this size."""
    colours = _themes()[theme]
    assert set(_themes()["light"]) == set(_themes()["dark"])
    low = {}
    for text_colour, back in PAIRS:
        bright, dim = sorted((_luminance(colours[text_colour]), _luminance(colours[back])))[::-1]
        ratio = (bright + 0.05) / (dim + 0.05)
        if ratio < 4.5:
            low[text_colour, back] = round(ratio, 2)
    assert low == {}


# --- the commands ------------------------------------------------------------------------------------


def test_diff_on_plain_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old.py", tmp_path / "model" / "stitched.py"
    new.parent.mkdir()
    old.write_text(chain(3))
    new.write_text(chain(3))
    runner = CliRunner()
    same = runner.invoke(golden_app, ["diff", str(old), str(new.parent)])
    assert (same.exit_code, same.output) == (0, "identical\n")
    new.write_text(chain(3, literal=1))
    out = tmp_path / "page.html"
    differs = runner.invoke(golden_app, ["diff", str(old), str(new), "--html", str(out)])
    assert differs.exit_code == 1
    assert differs.output.index("attn, argument 2: 0 → 7") < differs.output.index("@@")
    assert out.read_text().startswith("<!DOCTYPE html>")
    short = runner.invoke(golden_app, ["diff", str(old), str(new), "--summary"])
    assert "@@" not in short.output and "arguments: 1" in short.output
    data = json.loads(runner.invoke(golden_app, ["diff", str(old), str(new), "--json"]).output)
    assert data["same_text"] is False and "@@" in data["unified"]
    (change,) = data["changes"]
    assert (change["group"], change["kind"], change["after_line"]) == ("arguments", "changed", 17)


def test_diff_misuse(tmp_path: Path) -> None:
    good, bad, empty = tmp_path / "good.py", tmp_path / "bad.py", tmp_path / "empty"
    good.write_text(chain(1))
    bad.write_bytes(b"\xff\xfe\x00")
    empty.mkdir()
    words = {
        str(tmp_path / "missing.py"): "cannot be read",
        str(bad): "not text",
        str(empty): "holds no emitted source",
        str(tmp_path / "page.html"): "not a stitching source",
    }
    (tmp_path / "page.html").write_text("<html>")
    for path, message in words.items():
        result = CliRunner().invoke(golden_app, ["diff", str(good), path])
        assert result.exit_code == 2 and message in result.output, path
    result = CliRunner().invoke(
        golden_app, ["diff", str(good), str(good), "--html", str(good / "x.html")]
    )
    assert result.exit_code == 2 and "cannot be written" in result.output


def test_report_shows_only_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "cases"
    for name in ("report_a", "report_b", "report_new", "report_odd"):
        (root / name).mkdir(parents=True)
        (root / name / "graph.py").write_text((CASES / "attributes" / "graph.py").read_text())
        golden = (CASES / "attributes" / "expected.py").read_text()
        (root / name / "expected.py").write_text(golden)
    broken = (root / "report_b" / "expected.py").read_text().replace("return ", "return not ")
    (root / "report_b" / "expected.py").write_text(broken)
    (root / "report_new" / "expected.py").unlink()
    (root / "report_odd" / "expected.py").write_text("<this is not python>")
    result = CliRunner().invoke(golden_app, ["report", "-o", "out/page.html", "--root", str(root)])
    assert (result.exit_code, result.output) == (1, "3 of 4 goldens differ; page: out/page.html\n")
    written = (tmp_path / "out" / "page.html").read_text()
    assert "report_b" in written and "report_a" not in written
    assert written.count("<strong>new golden</strong>") == 1
    assert "<strong>the golden is not Python" in written and "&lt;this" in written
    reader = Reader(written)
    assert reader.open == [] and {link[1:] for link in reader.links} <= set(reader.ids)
    assert not list(root.rglob("*.new"))
