"""The pages as users read them. In: README and docs/*.md. Out: each Python snippet runs as it stands, by itself, and prints what the page shows."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import piecework
from piecework.runtime.compilers import CompilerInterface, EagerAdaptor, make_compiler
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces import manager
from piecework.runtime.splitting_op import registry

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(
    r"^```(\w*)[ \t]*(?:title=\"([^\"]*)\")?[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Snippet:
    """A fenced block of Python: its page and line, its title ("" without one), its text, and the text titled ``prints`` behind it, if any."""

    page: str
    line: int
    title: str
    text: str
    prints: str | None


def snippets(page: Path) -> tuple[Snippet, ...]:
    text = page.read_text("utf-8")
    blocks = list(FENCE.finditer(text))
    found = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        if block[1] in ("python", "py"):
            shown = after[3] if after is not None and after[2] == "prints" else None
            line = text.count("\n", 0, block.start()) + 1
            found.append(Snippet(page.name, line, block[2] or "", block[3], shown))
    return tuple(found)


PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if snippets(page)]

# What doesn't run, by page and title, and why.
NOT_RUN = {
    ("engine.md", "from the example"): "a part of examples/engine.py; compared below",
    ("README.md", "emitted"): "what piecework writes; compared below",
    ("performance.md", "emitted"): "what piecework writes, without what it needs around it",
}

# What a page's snippets need beside what piecework does.
NEEDS = {"weights.md": "peft"}

# What a page's snippets print among other things.
SHOWN = {"static-graphs.md": "static graphs hold"}


def as_written(config: CompilationConfig) -> CompilerInterface:
    """Pieces stay as they are where the page would have Inductor compile them: what it shows is emitted all the same."""
    if config.backend != "inductor":
        return make_compiler(config)
    compiler = EagerAdaptor()
    compiler.name = "inductor"
    return compiler


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Modules and operators of snippets are forgotten after the test."""
    yield
    for name in registry.names():
        code = getattr(registry._ops[name].implementation, "__code__", None)
        if "snippet" in getattr(code, "co_filename", ""):
            registry._ops.pop(name)._library._destroy()
    for name, module in list(sys.modules.items()):
        if "snippet" in str(getattr(module, "__file__", None)):
            del sys.modules[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_snippet_runs_by_itself(
    page: Path,
    tmp_path: Path,
    forgotten: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(manager, "make_compiler", as_written)
    files = tmp_path / "snippet_files"
    files.mkdir()
    monkeypatch.syspath_prepend(str(files))
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    everything = ""
    for number, each in enumerate(snippets(page)):
        if (each.page, each.title) in NOT_RUN:
            continue
        folder = tmp_path / f"snippet_{page.stem.replace('-', '_')}_{number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("continue\n"))  # for a debugger
        # One with a file's name is a file beside those that follow on its page, which may import it.
        path = files / each.title if each.title.endswith(".py") else folder / "model.py"
        path.write_text(each.text)
        printed = run(each, path, path.stem if each.title else folder.name, capsys)
        require_shown(each, printed)
        everything += printed
    assert SHOWN.get(page.name, "") in everything


@pytest.mark.inductor
def test_the_first_example_becomes_the_function_shown(
    tmp_path: Path, forgotten: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model, shown, *_ = snippets(ROOT / "README.md")
    folder = tmp_path / "snippet_readme"
    folder.mkdir()
    (folder / "model.py").write_text(model.text)
    run(model, folder / "model.py", "readme_model", capsys)
    code = sys.modules["readme_model"].stitched.source.code
    emitted = code[code.index("def execution_fn(") :].partition("\n\n\n")[0]
    assert emitted.strip() == shown.text.strip()
    assert len([line for line in model.text.splitlines() if line.strip()]) <= 12


def test_what_is_shown_of_the_engine_is_in_the_example() -> None:
    source = (ROOT / "examples" / "engine.py").read_text("utf-8")
    shown = [each.text for each in snippets(DOCS / "engine.md") if each.title]
    assert len(shown) == 4 and all(f"\n{each}" in source for each in shown)


def run(each: Snippet, path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a snippet prints as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    capsys.readouterr()
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        error.add_note(_place(each))
        raise
    return capsys.readouterr().out


def require_shown(each: Snippet, printed: str) -> None:
    """What the page shows is what came, line by line; a line ``…`` stands for any number of lines."""
    lines = [line.rstrip() for line in printed.strip().splitlines()]
    shown = [line.rstrip() for line in (each.prints or "…").strip().splitlines()]
    at, anywhere = 0, False
    for line in shown:
        if line == "…":
            anywhere = True
        elif anywhere:
            assert line in lines[at:], f"{line!r} is not printed {_place(each)}"
            at, anywhere = lines.index(line, at) + 1, False
        else:
            assert lines[at : at + 1] == [line], _place(each)
            at += 1
    assert anywhere or at == len(lines), f"{lines[at:]} is not shown {_place(each)}"


def _place(each: Snippet) -> str:
    return f"in the snippet of {each.page}, line {each.line}"


def test_what_does_not_run_is_there() -> None:
    titles = {(each.page, each.title) for page in PAGES for each in snippets(page)}
    assert set(NOT_RUN) <= titles


def messages() -> Iterator[str]:
    """Every text of the code that may be a message, with NUL for what it fills in; no docstrings."""
    for room in ("codegen", "runtime", "integrations", "cli", "errors.py"):
        place = ROOT / room
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            tree = ast.parse(path.read_text("utf-8"))
            alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and id(node) not in alone:
                    yield str(node.value)


def is_said(message: str, known: set[str]) -> bool:
    """Whether a text of the code is this message, ``…`` standing for what is filled in."""
    words = [part for part in re.split("…+", message) if part.strip()]
    pattern = re.compile(".*\0.*".join(map(re.escape, words)), re.DOTALL)
    find = pattern.search if message.startswith("…") else pattern.match
    return any(find(text) for text in known)


def test_every_quoted_message_is_one_of_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, flags=re.M)
    known = set(messages())
    assert len(quoted) > 50
    for message in quoted:
        assert is_said(message, known), f"nothing says {message!r}"
        *_, longest = sorted(re.findall(r"\w+", message), key=len)
        wrong = message.replace(longest, longest[::-1] + "x")
        assert not is_said(wrong, known), f"anything is {message!r}"


def test_the_navigation_names_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"[\w-]+\.md", text)
    at_root = {"index.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "LICENSE.md"}
    made = at_root | {"examples.md"}  # by docs/hooks.py
    assert sorted(named) == sorted({page.name for page in DOCS.glob("*.md")} | made)


def test_the_reference_has_every_public_name_once() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    named = re.findall(r"^::: piecework\.(\w+)$", page, flags=re.M)
    assert sorted(set(named) - {"errors"}) == sorted(piecework.__all__)
    assert len(named) == len(set(named))
