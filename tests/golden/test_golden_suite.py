"""`piecework golden` in somebody else's repository, whose goldens are those of tests: in, files and commands; out, exit codes, pages and goldens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import piecework
from piecework.cli.golden import golden_app
from piecework.golden import check
from piecework.golden.check import suite_under

SOURCE = """# __vllm_submods__:
#   [0] submod_0  {digest}

def execution_fn(x, *, __vllm_submods__):
    y = __vllm_submods__[0](x)
    return y
"""

TEST = """
import logging
from acme_models.model import SOURCE

def test_source(stitched_golden):
    logging.getLogger("torch").warning("LOG" * 1000)
    stitched_golden(SOURCE)
    stitched_golden(SOURCE.replace("y", "z"), name="entry")

def test_without_goldens():
    raise AssertionError("not run by piecework golden")
"""


def _model(place: Path, digest: str) -> None:
    text = SOURCE.format(digest=digest)
    (place / "acme_models" / "model.py").write_text(f"SOURCE = {text!r}\n")


def _repository(place: Path) -> None:
    (place / "acme_models").mkdir()
    (place / "acme_models" / "__init__.py").touch()
    _model(place, "aaaa")
    (place / "tests").mkdir()
    (place / "tests" / "test_acme.py").write_text(TEST)


def _golden(place: Path, *arguments: str, ci: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``piecework golden`` as its console script does: the working folder is not on the path."""
    code = "import sys; from piecework.cli import main; sys.path[:] = [p for p in sys.path if p]; main()"
    parent = str(Path(piecework.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code, "golden", *arguments],
        cwd=place,
        env={**os.environ, "CI": ci, "PYTHONPATH": parent},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_repository_with_goldens_of_tests_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "")

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(golden_app, arguments)
        return done.exit_code, done.output + capfd.readouterr().out

    assert run("update")[0] == 1
    store = tmp_path / "tests" / "__stitched__" / "test_acme"
    assert sorted(p.name for p in store.iterdir()) == ["test_source--entry.py", "test_source.py"]
    code, output = run("check")
    assert code == 0 and "1 passed, 1 deselected" in output
    _model(tmp_path, "bbbb")
    code, output = run("report", "-o", "page.html")
    assert (code, output) == (1, "2 goldens differ; page: page.html\n")
    assert "submod_0 computes something else" in (tmp_path / "page.html").read_text()
    code, output = run("check", "tests/test_acme.py::test_source")
    section = output[output.index("= goldens that differ =") :]
    assert section.count("submod_0 computes something else") == 2
    assert "To accept: pytest tests/test_acme.py::test_source --piecework-update" in section
    assert "+++" in output and "LOGLOG" not in output and "+++" not in section


@pytest.mark.parametrize("command", ["update", "report"])
def test_in_continuous_integration_no_test_is_run_for_what_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    _repository(tmp_path)
    monkeypatch.setenv("CI", "1")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(golden_app, [command])
    assert result.exit_code == 2 and "continuous integration" in result.output
    assert not (tmp_path / "tests" / "__stitched__").exists()


CASE = """
from acme_models.model import SOURCE

def texts():
    return {"entry": SOURCE}
"""


def test_cases_import_packages_of_the_working_folder(tmp_path: Path) -> None:
    _repository(tmp_path)
    case = tmp_path / "golden" / "cases" / "acme"
    case.mkdir(parents=True)
    (case / "graph.py").write_text(CASE)
    updated = _golden(tmp_path, "update")
    assert updated.returncode == 1, updated.stdout + updated.stderr
    assert (case / "expected_entry.py").is_file()


def test_an_empty_folder_has_nothing_to_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "site" / "golden" / "check.py"))
    assert check.default_root() is None


PRINTED = """
class GraphModule(torch.nn.Module):
    def forward(self, L_x_: "f32[s0, 4]"):
        submod_0 = self.submod_0(L_x_);  L_x_ = None
        return submod_0

    class submod_0(torch.nn.Module):
        def forward(self, x: "f32[s0, 4]"):
            # No stacktrace found for following nodes
            linear = torch._C._nn.linear(x, x, None)
            y: "f32[s0, 4]" = {act}(linear).contiguous();  linear = None
            return (y,)
"""


def test_diff_of_folders_says_what_a_piece_calls_now(tmp_path: Path) -> None:
    for name, act in (("before", "torch._C._nn.gelu"), ("after", "torch.relu")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stitched.py").write_text(SOURCE.format(digest=name))
        (tmp_path / name / "graph.py").write_text(PRINTED.format(act=act))
        (tmp_path / name / "manifest.json").write_text("{}")
    places = [str(tmp_path / name) for name in ("before", "after")]
    found = CliRunner().invoke(golden_app, ["diff", *places, "--summary"])
    words = "submod_0 computes something else (torch.relu in place of torch._C._nn.gelu)"
    assert found.exit_code == 1 and words in found.output
    (tmp_path / "after" / "graph.py").write_text("not a graph (")
    found = CliRunner().invoke(golden_app, ["diff", *places, "--summary"])
    assert "computes something else  (" in found.output, "without a graph it says that much"


def test_tests_with_goldens_are_found_where_somebody_keeps_them(tmp_path: Path) -> None:
    names = ["a/test_one.py", "a/two_test.py", "a/helper.py", "b/conftest.py", "b/test_three.py"]
    for name in [*names, "b/deep/test_four.py", "build/test_built.py", ".venv/test_other.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def test_it(stitched_golden): ...\n")
    (tmp_path / "a" / "test_plain.py").write_text("def test_it(): ...\n")
    found = {path.relative_to(tmp_path).as_posix() for path in suite_under(tmp_path)}
    assert found == {"a/test_one.py", "a/two_test.py", "b"}


@pytest.mark.parametrize("passed", [True, False])
def test_a_check_of_tests_as_json_names_what_was_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    _repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    golden = tmp_path / "tests" / "__stitched__" / "test_acme" / "test_source.py"
    golden.parent.mkdir(parents=True)

    def run_suite(tests: list[Path], *, update: bool, quiet: bool) -> bool:
        assert (tests, update, quiet) == ([tmp_path / "tests" / "test_acme.py"], False, True)
        if not passed:
            golden.with_name("test_source.py.new").write_text(SOURCE)
        return passed

    monkeypatch.setattr(check, "run_suite", run_suite)
    result = CliRunner().invoke(golden_app, ["check", "--json"])
    proposed = [] if passed else ["tests/__stitched__/test_acme/test_source.py"]
    assert json.loads(result.output) == {"passed": passed, "proposed": proposed}
    assert result.exit_code == (0 if passed else 1)


def test_a_run_that_finds_no_golden_or_breaks_is_misuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_nothing.py").write_text("# no stitched_golden here\n")
    result = CliRunner().invoke(golden_app, ["check", "--json"])
    assert result.exit_code == 2 and "no test here uses stitched_golden" in result.output
    (tmp_path / "test_nothing.py").write_text("# stitched_golden\nimport nothing_that_exists\n")
    result = CliRunner().invoke(golden_app, ["check", "--json"])
    assert result.exit_code == 2 and "nothing_that_exists" in result.output
