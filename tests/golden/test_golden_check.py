"""`check` and `update` on folders of small cases: what is found, what is written, and what is not."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import python
from typer.testing import CliRunner

from piecework.cli.golden import golden_app
from piecework.errors import UsageError
from piecework.golden import check as golden_check
from piecework.golden import snapshot
from piecework.golden.cases import discover
from piecework.golden.check import (
    CheckRun,
    accept_golden,
    check_case,
    check_cases,
    emit_in_other_process,
    update_cases,
)

GRAPH = """
import operator

import torch
import torch.fx


def build():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function({operation})
    graph.output(y)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs():
    return [(torch.arange(4.0),)]
"""
ADD = "operator.add, (x, 1)"
MULTIPLY = "operator.mul, (x, 2)"

MakeCase = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    def make(name: str, text: str) -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        (directory / "graph.py").write_text(text)
        # A second version within the clock's resolution is a new version.
        stamp = (directory / "graph.py").stat().st_mtime_ns
        counter = len(list(tmp_path.rglob("*"))) + len(text)
        os.utime(directory / "graph.py", ns=(stamp + counter, stamp + counter))
        return directory

    return make


def check(root: Path, *names: str, propose: bool = True) -> CheckRun:
    return check_cases(root, names, propose=propose, two_seeds=False)


def update(root: Path) -> CheckRun:
    return update_cases(root, two_seeds=False)


def statuses(run: CheckRun) -> dict[str, str]:
    return {result.case.name: result.status for result in run.results if result.kind == "stitched"}


def test_new_then_same_then_changed(make_case: MakeCase, tmp_path: Path) -> None:
    directory = make_case("golden_a", GRAPH.format(operation=ADD))
    expected, proposal = directory / "expected.py", directory / "expected.py.new"
    assert statuses(check(tmp_path)) == {"golden_a": "new"}
    assert "y = x + 1" in proposal.read_text().replace("add", "y") and not expected.exists()
    snapshot.accept(expected)
    assert not proposal.exists() and check(tmp_path).passed
    make_case("golden_a", GRAPH.format(operation=MULTIPLY))
    before = expected.read_text()
    assert statuses(check(tmp_path)) == {"golden_a": "changed"}
    assert expected.read_text() == before and proposal.is_file()
    assert statuses(update(tmp_path)) == {"golden_a": "updated"}
    assert statuses(update(tmp_path)) == {"golden_a": "same"} and not proposal.exists()
    make_case("golden_a", GRAPH.format(operation=ADD))
    assert statuses(check(tmp_path)) == {"golden_a": "changed"} and proposal.is_file()
    make_case("golden_a", GRAPH.format(operation=MULTIPLY))
    assert check(tmp_path).passed and not proposal.exists(), "out of date, so removed"


COUNTING = GRAPH.replace(
    "def build",
    "state = [0]\n\ndef count(x):\n    state[0] += 1\n    return x + state[0]\n\ndef build",
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (COUNTING.format(operation="count, (x,)"), "has other values"),
        (GRAPH.format(operation="torch.mm, (x, x)"), "the interpreter fails: RuntimeError"),
        (GRAPH.format(operation=ADD).partition("def inputs")[0], "inputs() gives nothing to run"),
        ("raise OSError('gone')", "does not emit: OSError: gone"),
        (GRAPH.format(operation="operator.add, (x, object)").replace("object", "type(x)(graph, 'n', 'call_function', print, (), {})"), "does not emit: UnsupportedNode"),
    ],
)  # fmt: skip
def test_a_text_that_fails_a_check_is_never_accepted(
    make_case: MakeCase, tmp_path: Path, text: str, problem: str
) -> None:
    directory = make_case("golden_d", text)
    run = update(tmp_path)
    assert statuses(run) == {"golden_d": "broken"} and not run.passed
    assert problem in run.results[0].problems[0]
    assert not (directory / "expected.py").exists()


def test_text_that_depends_on_the_hash_seed_is_found(make_case: MakeCase, tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(12))
    add = f"for name in set('{words}'.split()): y = graph.call_function(operator.add, (y, name))"
    text = GRAPH.format(operation=ADD)
    other = f"def texts():\n    return {{'replay': 'def replay(): return ' + repr(list(set('{words}'.split())))}}\n"
    make_case("golden_e", text.replace("    graph.output", f"    {add}\n    graph.output"))
    make_case("golden_f", text)
    make_case("golden_l", other)  # of another kind
    elsewhere = emit_in_other_process(tmp_path, ["golden_e", "golden_f", "golden_l"])
    found = {case.name: check_case(case, elsewhere[case.name]) for case in discover(tmp_path)}
    for name, (result,) in found.items():
        depends = any("differs under another hash seed: line" in p for p in result.problems)
        assert depends is (name != "golden_f")


TEXTS = """
def texts():
    return {{"replay_8": "def replay():\\n    return {value}\\n", "other": "def replay(): pass\\n"}}
"""


def test_a_case_may_emit_texts_of_other_kinds(make_case: MakeCase, tmp_path: Path) -> None:
    directory = make_case("golden_k", TEXTS.format(value=1))
    run = check(tmp_path)
    assert {result.name: result.status for result in run.results} == {
        "golden_k: replay_8": "new",
        "golden_k: other": "new",
    }
    golden = directory / "expected_replay_8.py"
    assert snapshot.pending([tmp_path]) == [directory / "expected_other.py", golden]
    accept_golden(golden)
    assert "return 1" in golden.read_text()
    update(tmp_path)
    assert check(tmp_path).passed
    make_case("golden_k", TEXTS.format(value="undefined"))
    (broken,) = update(tmp_path).broken
    assert broken.problems == ("line 2: 'undefined' is not defined",) and not broken.written
    with pytest.raises(UsageError, match="the text is wrong"):
        accept_golden(golden)
    make_case("golden_k", TEXTS.format(value=2).replace("other", "another"))
    run = check(tmp_path)
    assert run.unreferenced == (directory / "expected_other.py",)
    with pytest.raises(UsageError, match="emits no such text"):
        accept_golden(directory / "expected_other.py")


@pytest.mark.parametrize("kind", ["stitched", "a b", "../x", "Replay", "", 1])
def test_a_kind_that_can_not_be_a_files_name_is_refused(
    make_case: MakeCase, tmp_path: Path, kind: object
) -> None:
    make_case("golden_m", f"def texts():\n    return {{{kind!r}: 'def replay(): pass'}}\n")
    with pytest.raises(UsageError, match="can't be a kind of text"):
        check(tmp_path)


def test_unreferenced_goldens_fail(make_case: MakeCase, tmp_path: Path) -> None:
    directory = make_case("golden_g", GRAPH.format(operation=ADD))
    update(tmp_path)
    strays = [tmp_path / "gone" / "expected.py", tmp_path / "loose.py", directory / "expected_2.py"]
    strays[0].parent.mkdir()
    for stray in strays:
        stray.write_text("")
    run = check(tmp_path)
    assert all(result.status == "same" for result in run.results) and not run.passed
    assert sorted(run.unreferenced) == sorted([strays[0].parent, *strays[1:]])
    assert check(tmp_path, "golden_g").passed, "only looked for when everything is checked"


def test_misuse_is_refused(make_case: MakeCase, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no golden cases here"):
        check(tmp_path)
    make_case("golden_h", "def something(): ...")
    with pytest.raises(UsageError, match=r"must define build\(\), stitched\(\) or texts\(\)"):
        check(tmp_path)
    with pytest.raises(UsageError, match="no golden case 'other'"):
        check(tmp_path, "other")


def test_cases_import_packages_of_the_working_folder(make_case: MakeCase, tmp_path: Path) -> None:
    """As the console script runs, with which the working folder is not on the path."""
    (tmp_path / "acme.py").write_text("SOURCE = 'def replay(): pass'\n")
    (tmp_path / "golden" / "cases").mkdir(parents=True)
    text = "from acme import SOURCE\n\ndef texts():\n    return {'replay': SOURCE}\n"
    made = make_case("golden_p", text).rename(tmp_path / "golden" / "cases" / "golden_p")
    code = "import sys; sys.path[:] = [p for p in sys.path if p]; from piecework.cli import app; print(app(standalone_mode=False))"
    assert python("-c", code, "golden", "update", cwd=tmp_path, CI="").stdout.endswith("1\n")
    assert (made / "expected_replay.py").is_file()


def test_an_empty_folder_has_nothing_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(golden_check, "__file__", str(tmp_path / "site" / "golden" / "check.py"))
    assert golden_check.default_root() is None


def test_functions_of_the_case_are_imported_by_a_name_that_is_the_same_everywhere(
    make_case: MakeCase, tmp_path: Path
) -> None:
    text = GRAPH.replace("def build", "def twice(x):\n    return x * 2\n\ndef build")
    make_case("golden_i", text.format(operation="twice, (x,)"))
    run = check(tmp_path)
    assert run.results[0].problems == ()
    assert "import golden_case_golden_i" in run.results[0].comparison.after


CAPTURED = """
import piecework
import torch

TEXT_MADE_WITH = {"torch": "%s"}


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return torch.tanh(x) * self.count + x.shape[0]


def stitched():
    config = piecework.CompilationConfig(backend="eager")
    return piecework.compile(Scaled(), (torch.zeros(3, 2),), splitting_ops=[torch.tanh], config=config)


def inputs():
    return [%s]
"""


def test_a_captured_case_runs_with_weights_sizes_and_arguments(
    make_case: MakeCase, tmp_path: Path
) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    directory = make_case("golden_m", CAPTURED % (version, "(torch.randn(5, 2),)"))
    assert statuses(update(tmp_path)) == {"golden_m": "updated"}
    assert check(tmp_path).passed
    golden = directory / "expected.py"
    assert ".py:" not in golden.read_text() and "graph.py" in golden.read_text()
    golden.write_text(golden.read_text() + "# another torch named things differently\n")
    assert statuses(check(tmp_path)) == {"golden_m": "changed"}
    make_case("golden_m", CAPTURED % ("1.0", "(torch.randn(5, 2),)"))
    run = check(tmp_path)
    assert statuses(run) == {"golden_m": "not compared"} and run.passed
    assert not (directory / "expected.py.new").exists()
    make_case("golden_m", CAPTURED % ("1.0", "((torch.randn(5, 2), torch.randn(5, 2)),)"))
    with pytest.raises(UsageError, match=r"placeholder 's0' is neither .*golden_m/graph\.py"):
        check(tmp_path)


def test_an_entry_that_returns_something_else_is_found(make_case: MakeCase, tmp_path: Path) -> None:
    wrong = "\n\ninner = stitched\n\ndef stitched():\n    module = inner()\n    scope = module.entry.__globals__\n    scope['bound'] = (lambda *a, **k: (torch.zeros(1),), *scope['bound'][1:])\n    return module\n"
    make_case("golden_n", CAPTURED % ("1.0", "(torch.randn(5, 2),)") + wrong)
    broken = [result for result in check(tmp_path).results if result.problems]
    assert [result.kind for result in broken] == ["entry"]
    assert "is none of what the graph returns" in broken[0].problems[0]


# --- the command line ----------------------------------------------------------------------------


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(golden_app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_check_ends_with_the_command_that_accepts(
    make_case: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_case("golden_j", GRAPH.format(operation=ADD))
    root = ("--fast", "--root", str(tmp_path))
    code, output = invoke("check", *root)
    assert code == 1
    command = output.strip().splitlines()[-1]
    assert command.startswith("To accept: piecework golden update golden_j --root ")
    arguments = command.removeprefix("To accept: piecework golden ").split()
    code, output = invoke(*arguments)
    assert code == 1 and "golden_j: updated" in output
    assert invoke(*arguments, "--fast")[0] == 0
    assert invoke("check", *root) == (0, "1 text: 1 same\n")
    make_case("golden_j", GRAPH.format(operation=MULTIPLY))
    monkeypatch.setenv("CI", "true")
    code, output = invoke("check", *root)
    assert code == 1 and "mul: x + 1 → x * 2" in output and "+    mul = x * 2" in output
    assert "Proposals" not in output and not list(tmp_path.rglob("*.new"))
    code, output = invoke("update", *root)
    assert code == 2 and "continuous integration" in output
    assert "x + 1" in (tmp_path / "golden_j" / "expected.py").read_text()


def test_accepting_a_proposal_of_a_case_checks_it_first(
    make_case: MakeCase, tmp_path: Path
) -> None:
    directory = make_case("golden_l", COUNTING.format(operation="count, (x,)"))
    check(tmp_path)
    code, output = invoke("review", "--accept", str(directory / "expected.py"))
    assert code == 2 and "has other values" in output
    make_case("golden_l", GRAPH.format(operation=ADD))
    code, output = invoke("review", "--accept", str(directory / "expected.py"))
    assert code == 2 and "out of date" in output
    check(tmp_path)
    assert invoke("review", "--accept", str(directory / "expected.py.new"))[0] == 0
    assert check(tmp_path).passed


def test_check_as_json(make_case: MakeCase, tmp_path: Path) -> None:
    make_case("golden_k", GRAPH.format(operation=ADD))
    invoke("update", "--fast", "--root", str(tmp_path))
    make_case("golden_k", GRAPH.format(operation=MULTIPLY))
    code, output = invoke("check", "--json", "--fast", "--root", str(tmp_path))
    data = json.loads(output)
    (case,) = data["cases"]
    assert (code, data["passed"], case["status"]) == (1, False, "changed")
    assert case["diff"]["changes"][0]["group"] == "arguments"
    assert case["accept"].startswith("piecework golden update golden_k")


@pytest.mark.parametrize(
    "arguments",
    [("check", "--root", "nowhere"), ("check", "--bad"), ("diff", "a"), ("report", "x")],
)
def test_misuse_has_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code, _ = invoke(*arguments, *(("--root", str(tmp_path)) if arguments[0] == "report" else ()))
    assert code == 2


@pytest.mark.parametrize(
    ("value", "in_ci"), [("true", True), ("1", True), ("", False), ("0", False), ("false", False)]
)
def test_what_counts_as_continuous_integration(value: str, in_ci: bool) -> None:
    assert snapshot.in_ci({"CI": value}) is in_ci
    assert snapshot.in_ci({}) is False


def test_every_command_and_option_in_the_documentation_exists() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "golden.md").read_text()
    words = set(re.findall(r"piecework golden ([a-z]+)", text))
    assert words == {"check", "update", "review", "diff", "report"}
    helps = "".join(invoke(word, "--help")[1] for word in words)
    for option in set(re.findall(r"`(--[a-z]+)", text)) - {"--piecework"}:
        assert option in helps, option
