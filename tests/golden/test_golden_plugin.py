"""The fixture `stitched_golden`, as somebody else's test-suite uses it."""

from pathlib import Path

import pytest
import torch
from processes import python

import piecework
from piecework.golden.fixture import References, StitchedGolden, golden_path

pytest_plugins = "pytester"

SOURCE = """
def execution_fn(x, *, __vllm_submods__):
    y = __vllm_submods__[0](x, {literal})
    return y
"""

TEST = f'''
SOURCE = """{SOURCE}"""

def test_model(stitched_golden):
    stitched_golden(SOURCE.format(literal=LITERAL))
'''


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def _write_test(pytester: pytest.Pytester, literal: str, text: str = TEST) -> None:
    pytester.makepyfile(test_own=f"LITERAL = {literal}\n{text}")


def _golden(pytester: pytest.Pytester, name: str = "test_model") -> Path:
    return pytester.path / "__stitched__" / "test_own" / f"{name}.py"


def _run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # Hypothesis's plugin imports much anew in each of these runs.
    return pytester.runpytest_inprocess(
        "-p", "no:hypothesispytest", "-p", "no:anyio", "--import-mode=importlib", *arguments
    )


def test_a_missing_golden_fails_leaves_a_proposal_and_ends_with_the_command(
    pytester: pytest.Pytester,
) -> None:
    _write_test(pytester, "1")
    result = _run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "there is no golden yet: __stitched__/test_own/test_model.py",
            "*lies beside it: __stitched__/test_own/test_model.py.new",
            "To accept it: pytest test_own.py::test_model --piecework-update",
        ]
    )
    assert not _golden(pytester).exists()
    proposal = _golden(pytester).with_name("test_model.py.new")
    assert proposal.read_text() == SOURCE.format(literal=1)
    _run(pytester, "--piecework-update").assert_outcomes(failed=1)  # written, and fails once
    assert _golden(pytester).read_text() == SOURCE.format(literal=1) and not proposal.exists()
    _run(pytester, "--piecework-update").assert_outcomes(passed=1)
    _run(pytester).assert_outcomes(passed=1)


def test_a_mismatch_says_what_changed_in_meaning_and_in_text(pytester: pytest.Pytester) -> None:
    _write_test(pytester, "1")
    _run(pytester, "--piecework-update")
    _write_test(pytester, "22")
    result = _run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "the emitted source differs from __stitched__/test_own/test_model.py",
            "arguments: 1",
            "*[[]0[]], argument 1: 1 → 22*",
            "-    y = __vllm_submods__[[]0[]](x, 1)",
            "+    y = __vllm_submods__[[]0[]](x, 22)",
            "To accept it: pytest test_own.py::test_model --piecework-update",
        ]
    )
    assert _golden(pytester).read_text() == SOURCE.format(literal=1)
    _write_test(pytester, "1")
    _run(pytester).assert_outcomes(passed=1)
    assert not _golden(pytester).with_name("test_model.py.new").exists(), "out of date, so removed"


def test_nothing_is_written_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    _write_test(pytester, "1")
    before = sorted(pytester.path.rglob("*.py*"))
    result = _run(pytester, "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.no_fnmatch_line("*lies beside*")
    result.stdout.fnmatch_lines(["To accept it: pytest test_own.py::test_model --piecework-update"])
    assert not (pytester.path / "__stitched__").exists()
    assert [p for p in sorted(pytester.path.rglob("*.py*")) if p.suffix == ".py"] == before
    refused = _run(pytester, "--piecework-update")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--piecework-update: goldens are not written in continuous*"])


def test_several_sources_of_one_test_need_names(pytester: pytest.Pytester) -> None:
    text = f'''
SOURCE = """{SOURCE}"""

def test_model(stitched_golden):
    stitched_golden(SOURCE.format(literal=1), name="prefill")
    stitched_golden(SOURCE.format(literal=2), name="de/code")

def test_twice(stitched_golden):
    stitched_golden(SOURCE.format(literal=1))
    stitched_golden(SOURCE.format(literal=2))
'''
    _write_test(pytester, "1", text)
    for _ in range(2):  # one update run writes all goldens of a test
        result = _run(pytester, "--piecework-update")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*UsageError: two sources have one golden*"])
    names = sorted(path.name for path in _golden(pytester).parent.iterdir())
    assert names[0].startswith("test_model--de-code-") and "/" not in names[0]
    assert names[1:] == ["test_model--prefill.py", "test_twice.py"]


@pytest.mark.parametrize("parameter", ["a-b", "a b", "../../up", "x" * 300, "\N{SNOWMAN}", "-", ""])
def test_parameters_make_safe_distinct_file_names(
    pytester: pytest.Pytester, parameter: str
) -> None:
    text = f'''
import pytest
SOURCE = """{SOURCE}"""

@pytest.mark.parametrize("value", [{parameter!a}, "other"], ids=[{parameter!a}, "other"])
def test_model(stitched_golden, value):
    stitched_golden(SOURCE.format(literal=1))

class TestNested:
    def test_model(self, stitched_golden):
        stitched_golden(SOURCE.format(literal=2))
'''
    _write_test(pytester, "1", text)
    _run(pytester, "--piecework-update").assert_outcomes(failed=3)
    _run(pytester).assert_outcomes(passed=3)
    found = sorted(path for path in pytester.path.rglob("*") if path.suffix == ".py")
    goldens = [path for path in found if path.parent == _golden(pytester).parent]
    assert len(goldens) == 3 and len(found) == 4
    assert "TestNested.test_model.py" in [path.name for path in goldens]


def test_unreferenced_goldens_fail_the_run(pytester: pytest.Pytester) -> None:
    _write_test(pytester, "1")
    _run(pytester, "--piecework-update")
    stray = _golden(pytester, "test_gone")
    stray.write_text(SOURCE)
    orphan = pytester.path / "__stitched__" / "test_deleted" / "test_model.py"
    orphan.parent.mkdir()
    orphan.write_text(SOURCE)
    result = _run(pytester)
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "*goldens that no test asks for*",
            "__stitched__/test_deleted/test_model.py",
            "__stitched__/test_own/test_gone.py",
            "To remove them: rm __stitched__/test_deleted/test_model.py __stitched__/test_own/test_gone.py",
        ]
    )


@pytest.mark.parametrize(
    "arguments", [("-k", "other"), ("test_own.py::test_other",), ("-x",), ("-m", "not slow")]
)
def test_a_golden_whose_test_did_not_finish_is_not_called_unreferenced(
    pytester: pytest.Pytester, arguments: tuple[str, ...]
) -> None:
    text = f'''
import pytest
SOURCE = """{SOURCE}"""
FAIL = False

def test_other():
    assert not FAIL

@pytest.mark.slow
def test_model(stitched_golden):
    stitched_golden(SOURCE.format(literal=1))

def test_skipped(stitched_golden):
    if FAIL:
        pytest.skip("not now")
    stitched_golden(SOURCE.format(literal=1), name="late")
'''
    _write_test(pytester, "1", text)
    pytester.makeini("[pytest]\nmarkers = slow: a marker")
    _run(pytester, "--piecework-update")
    assert len(list(_golden(pytester).parent.iterdir())) == 2
    file = pytester.path / "test_own.py"
    file.write_text(file.read_text().replace("FAIL = False", "FAIL = True"))
    result = _run(pytester, *arguments)
    result.stdout.no_fnmatch_line("*no test asks for*")


def test_workers_share_what_they_saw(pytester: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    _write_test(pytester, "1")
    pytester.makepyfile(test_more=f"LITERAL = 2\n{TEST}")
    _run(pytester, "--piecework-update")
    result = _run(pytester, "-n", "2")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.OK
    _golden(pytester, "test_gone").write_text(SOURCE)
    result = _run(pytester, "-n", "2")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["__stitched__/test_own/test_gone.py"])


def test_a_source_with_an_undefined_name_is_never_accepted(pytester: pytest.Pytester) -> None:
    text = """
def test_model(stitched_golden):
    stitched_golden("def execution_fn(x, *, __vllm_submods__):\\n    return y\\n")

def test_text(stitched_golden):
    stitched_golden("x = (")

def test_number(stitched_golden):
    stitched_golden(3)
"""
    _write_test(pytester, "1", text)
    result = _run(pytester, "--piecework-update")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(
        [
            "the emitted source is wrong: line 2: 'y' is not defined",
            "*UsageError: not a stitching source*",
            "*UsageError: a int has no emitted source*",
        ]
    )
    assert not list(pytester.path.rglob("__stitched__/*/*.py"))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + x


def test_a_compiled_model_is_compared_without_line_numbers(tmp_path: Path) -> None:
    stitched = piecework.compile(
        Model().eval(),
        (torch.zeros(3, 4),),
        splitting_ops=[torch.tanh],
        config=piecework.CompilationConfig(backend="eager"),
    )

    def said(source: object, update: bool = False, name: str | None = None) -> str:
        node = ("test_model", "test_own.py::test_model")
        file = tmp_path / "test_own.py"
        checked = StitchedGolden(file, *node, tmp_path, update, References())
        checked(source, name=name)
        return "".join(text for text, _ in checked.differs)

    assert "test_golden_plugin.py:" in stitched.source.code
    assert "test_model.py was written" in said(stitched, update=True)
    written = golden_path(tmp_path / "test_own.py", "test_model").read_text()
    assert "test_golden_plugin.py" in written and "test_golden_plugin.py:" not in written
    assert said(stitched) == ""
    assert "there is no golden yet" in said(stitched.source, name="source")
    assert "bound weight" in said(stitched.split_gm)


def test_a_run_that_does_not_use_the_fixture_imports_nothing_heavy(tmp_path: Path) -> None:
    """The plugin is loaded by every pytest run of everybody who has piecework installed."""
    (tmp_path / "test_other.py").write_text("def test_nothing(): pass\n")
    code = (
        "import sys, pytest\nbefore = set(sys.modules)\n"
        f"assert pytest.main(['-q', '-p', 'no:cacheprovider', {str(tmp_path)!r}]) == 0\n"
        "assert 'piecework.golden.plugin' in sys.modules\n"
        "heavy = {'torch', 'jinja2', 'black', 'pydantic', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy - before, heavy"
    )
    python("-c", code, cwd=tmp_path)


def test_goldens_are_not_collected_as_tests(pytester: pytest.Pytester) -> None:
    text = TEST.replace("return y", "return __vllm_consts__[0](y)").replace(
        'SOURCE = """', 'SOURCE = """\nname = __vllm_consts__[0]\n', 1
    )
    _write_test(pytester, "1", text)
    _run(pytester, "--piecework-update")
    assert "__vllm_consts__" in _golden(pytester).read_text()
    _run(pytester).assert_outcomes(passed=1)


def test_a_test_sees_all_of_its_goldens_before_it_fails(pytester: pytest.Pytester) -> None:
    test = f'''
SOURCE = """{SOURCE}"""

def test_model(stitched_golden):
    stitched_golden(SOURCE.format(literal=LITERAL), name="one")
    print("BETWEEN")
    stitched_golden(SOURCE.format(literal=-LITERAL), name="two")
'''
    _write_test(pytester, "1", test)
    result = _run(pytester, "--piecework-update")
    result.assert_outcomes(failed=1)
    names = [_golden(pytester, f"test_model--{name}") for name in ("one", "two")]
    assert [str(SOURCE.format(literal=n)) for n in (1, -1)] == [p.read_text() for p in names]
    _write_test(pytester, "5", test)
    result = _run(pytester, "--show-capture=all")
    result.assert_outcomes(failed=1)
    assert all(path.with_name(f"{path.name}.new").is_file() for path in names)
    text = result.stdout.str()
    assert text.index("BETWEEN") < text.index("= goldens that differ =")
    section = text[text.index("= goldens that differ =") :]
    assert "argument 1: 1 → 5" in section and "argument 1: -1 → -5" in section
    assert "To accept: pytest test_own.py::test_model --piecework-update" in section
    _run(pytester, "--piecework-update")
    result = _run(pytester)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*goldens that differ*")


def test_a_test_that_breaks_after_a_golden_that_differs_says_both(
    pytester: pytest.Pytester,
) -> None:
    _write_test(pytester, "1", TEST + "    raise KeyError('broken')\n")
    result = _run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*KeyError: 'broken'*", "*goldens that differ*", "there is no *"])
