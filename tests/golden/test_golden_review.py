"""Review of proposals: what an answer does to files, what is shown first, and what happens without a terminal."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.text import Text
from typer.testing import CliRunner

from piecework.cli.golden import golden_app
from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.review import Outcome, commands, review

SOURCE = (
    "def execution_fn(x, *, __vllm_submods__):\n    y = __vllm_submods__[0](x, {})\n    return y\n"
)


@pytest.fixture(autouse=True)
def _not_in_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(tmp_path)


def propose(root: Path, names: Iterable[str]) -> list[Path]:
    """Goldens that say 1, with proposals that say 2."""
    goldens = []
    for name in names:
        golden = root / "__stitched__" / "test_own" / f"{name}.py"
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(SOURCE.format(1))
        snapshot.proposal_of(golden).write_text(SOURCE.format(2))
        goldens.append(golden)
    return goldens


def answers(
    goldens: list[Path], *given: str, problems: tuple[str, ...] = ()
) -> tuple[Outcome, list[str]]:
    """Review with these answers; the outcome and the lines shown. The end of input follows the last one."""
    shown: list[str] = []
    left = list(given)

    def ask(prompt: str) -> str:
        shown.append(prompt)
        if not left:
            raise EOFError
        return left.pop(0)

    def show(line: Text) -> None:
        shown.append(line.plain)

    wrong = dict.fromkeys(goldens, problems)
    outcome = review([snapshot.proposed(each) for each in goldens], wrong, show, ask)
    assert not left, "not all answers were asked for"
    return outcome, shown


def said(golden: Path) -> tuple[str, bool]:
    text = golden.read_text() if golden.exists() else ""
    return text, snapshot.proposal_of(golden).exists()


ONE, TWO = SOURCE.format(1), SOURCE.format(2)


def test_each_answer_does_what_it_says(tmp_path: Path) -> None:
    a, r, s, empty = goldens = propose(tmp_path, ["a", "r", "s", "t"])
    outcome, _ = answers(goldens, "a", "r", "s", "")
    assert outcome == {"accepted": [a], "rejected": [r], "skipped": [s, empty]}
    assert [said(g) for g in goldens] == [(TWO, False), (ONE, False), (ONE, True), (ONE, True)]


@pytest.mark.parametrize(
    ("capital", "rest"), [("A", (TWO, False)), ("R", (ONE, False)), ("S", (ONE, True))]
)
def test_capitals_decide_on_all_that_follow(
    tmp_path: Path, capital: str, rest: tuple[str, bool]
) -> None:
    first, *others = propose(tmp_path, ["a", "b", "c"])
    _, shown = answers([first, *others], "s", capital)
    assert said(first) == (ONE, True)
    assert [said(golden) for golden in others] == [rest, rest]
    assert sum("/3]" in line for line in shown) == 3, "each is still shown"


def test_the_end_of_input_skips_everything(tmp_path: Path) -> None:
    goldens = propose(tmp_path, ["a", "b"])
    outcome, _ = answers(goldens)
    assert outcome["skipped"] == goldens and [said(g) for g in goldens] == [(ONE, True)] * 2


def test_meaning_is_shown_before_text_and_help_and_details_ask_again(tmp_path: Path) -> None:
    goldens = propose(tmp_path, ["a"])
    _, shown = answers(goldens, "?", "nonsense", "d", "a")
    meaning = next(i for i, line in enumerate(shown) if "argument 1: 1 → 2" in line)
    text = next(i for i, line in enumerate(shown) if line.startswith("+    y"))
    assert meaning < text < shown.index("  A  accept this and all that follow")
    assert "  " + TWO.splitlines()[0] in shown
    assert said(goldens[0]) == (TWO, False)


def test_a_text_with_problems_is_not_accepted_even_among_all(tmp_path: Path) -> None:
    goldens = propose(tmp_path, ["a"])
    outcome, shown = answers(goldens, "A", problems=("inputs[0]: result has other values",))
    assert outcome["skipped"] == goldens and said(goldens[0]) == (ONE, True)
    assert any("! inputs[0]" in line for line in shown)


def test_new_goldens_and_goldens_that_are_not_python_are_shown(tmp_path: Path) -> None:
    new, odd = propose(tmp_path, ["new", "odd"])
    new.unlink()
    odd.write_text("this is not python")
    _, shown = answers([new, odd], "a", "a")
    assert "new golden" in shown and any("replaced as a whole" in line for line in shown)
    assert [said(new), said(odd)] == [(TWO, False)] * 2


def test_a_golden_without_a_proposal_is_misuse(tmp_path: Path) -> None:
    (golden,) = propose(tmp_path, ["a"])
    snapshot.reject(golden)
    for action in (snapshot.proposed, snapshot.accept, snapshot.reject):
        with pytest.raises(UsageError, match="no proposal"):
            action(golden)


def test_pending_finds_stores_and_cases_and_skips_other_folders(tmp_path: Path) -> None:
    (golden,) = propose(tmp_path / "tests", ["a"])
    case = tmp_path / "golden" / "cases" / "one" / "expected.py"
    for path in (
        case,
        tmp_path / "other" / "file.py",
        tmp_path / ".hidden" / "__stitched__" / "t" / "x.py",
        tmp_path / "site-packages" / "__stitched__" / "t" / "x.py",
    ):
        path.parent.mkdir(parents=True)
        snapshot.proposal_of(path).write_text(TWO)
    assert snapshot.pending([tmp_path]) == sorted([case, golden])
    assert snapshot.pending([snapshot.proposal_of(golden), tmp_path / "other"]) == [golden]


# --- the command ---------------------------------------------------------------------------------


def test_without_a_terminal_the_commands_are_printed_and_they_work(tmp_path: Path) -> None:
    goldens = propose(tmp_path, ["a", "with space"])
    runner = CliRunner()
    result = runner.invoke(golden_app, ["review", "."])
    assert result.exit_code == 1
    assert [said(g) for g in goldens] == [(ONE, True)] * 2
    lines = [line.strip() for line in result.output.splitlines()]
    names = [Path("__stitched__/test_own/a.py"), Path("__stitched__/test_own/with space.py")]
    assert lines[1:] == [
        f"piecework golden diff {names[0]} {names[0]}.new",
        f"piecework golden review --accept {names[0]}",
        f"piecework golden diff '{names[1]}' '{names[1]}.new'",
        f"piecework golden review --accept '{names[1]}'",
    ]
    (wrong,) = list(commands([snapshot.proposed(goldens[0])], {goldens[0]: ["it lies"]}))[1:]
    assert wrong.startswith("# ") and wrong.endswith("can't be accepted: it lies")
    accepted = runner.invoke(golden_app, ["review", "--accept", str(names[0])])
    rejected = runner.invoke(golden_app, ["review", "--reject", f"{names[1]}.new"])
    assert (accepted.exit_code, rejected.exit_code) == (0, 0)
    assert [said(g) for g in goldens] == [(TWO, False), (ONE, False)]
    assert runner.invoke(golden_app, ["review", "."]).output == "nothing to review\n"
    assert runner.invoke(golden_app, ["review", "--accept", str(names[0])]).exit_code == 2
    assert runner.invoke(golden_app, ["review", "nowhere"]).exit_code == 2


def test_nothing_is_reviewed_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (golden,) = propose(tmp_path, ["a"])
    monkeypatch.setenv("CI", "true")
    assert CliRunner().invoke(golden_app, ["review", "--accept", str(golden)]).exit_code == 2
    assert said(golden) == (ONE, True)


def test_in_a_real_terminal(tmp_path: Path) -> None:
    """A pseudo-terminal: the prompt appears, keys decide, the exit code says that one was skipped."""
    goldens = propose(tmp_path, ["a", "b", "c"])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from piecework.cli.golden import golden_app; golden_app()", "review", "."],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    output = ""
    for answer in ("a", "r", "s"):
        output += _read_until(ours, "? for help: ")
        os.write(ours, f"{answer}\n".encode())
    output += _read_until(ours, "skipped 1")
    assert process.wait(timeout=600) == 1
    os.close(ours)
    assert "\x1b[" in output, "styled in a terminal"
    assert "[3/3]" in output and "argument 1: 1 → 2" in output
    assert [said(g) for g in goldens] == [(TWO, False), (ONE, False), (ONE, True)]


def _read_until(terminal: int, text: str) -> str:
    output = b""
    deadline = time.monotonic() + 600
    while text.encode() not in output:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        assert ready or time.monotonic() < deadline, output.decode(errors="replace")
        if ready:
            output += os.read(terminal, 65536)
    return output.decode(errors="replace")
