"""A check or an update as lines for a terminal, or as plain data. In: a `CheckRun`. Out: styled lines that end with what to type next.

Nothing is printed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from piecework.errors import UsageError
from piecework.golden.check import CaseResult, CheckRun, shown, update_command
from piecework.golden.compare.diff import compare_sources
from piecework.golden.show.diff_text import summary_lines, unified_lines
from piecework.golden.text.snapshot import State

# More cases than this are accepted without naming each.
_NAMED = 8


def run_lines(run: CheckRun) -> Iterator[Text]:
    """What a check or an update found, ending with the commands that accept it."""
    for result in run.results:
        if result.passed:
            continue
        word = "updated" if result.written else result.status
        yield Text(f"{result.name}: {word}", style="bold")
        for problem in result.problems:
            yield Text(f"  ! {problem}", style="bold red")
        yield from (Text("  ").append_text(line) for line in _case_summary(result))
    for path in run.unreferenced:
        yield Text(f"{shown(path)}: no case refers to it", style="bold")
    yield from _totals(run)
    yield from _next_steps(run)


def _case_summary(result: CaseResult) -> Iterator[Text]:
    comparison = result.comparison
    if comparison is None or comparison.state is not State.CHANGED:
        return
    try:
        diff = compare_sources(comparison.before, comparison.after)
    except UsageError:
        yield Text("the golden is not Python")
        return
    yield from summary_lines(diff)
    if not result.written:
        yield from unified_lines(diff, "golden", "emitted")


def _totals(run: CheckRun) -> Iterator[Text]:
    counts = Counter("updated" if r.written else r.status for r in run.results)
    if run.unreferenced:
        counts["unreferenced"] = len(run.unreferenced)
    words = ", ".join(f"{number} {word}" for word, number in counts.items())
    noun = "text" if len(run.results) == 1 else "texts"
    yield Text(f"{len(run.results)} {noun}: {words}")


def _next_steps(run: CheckRun) -> Iterator[Text]:
    left = [r for r in run.changed if not r.written]
    if run.proposed and left:
        yield Text("Proposals lie beside the goldens; to go through them: piecework golden review")
    for path in run.unreferenced:
        yield Text(f"To remove what no case refers to: git rm -r {shown(path)}")
    if any(r.problems for r in run.results):
        yield Text("Broken cases are not accepted; repair what they report.")
    accepted = [r for r in left if not r.problems]
    if accepted:
        everything = len(accepted) > _NAMED and len(accepted) == len(left)
        names = [] if everything else list(dict.fromkeys(r.case.name for r in accepted))
        yield Text(f"To accept: {update_command(names, run.root)}")


def run_as_json(run: CheckRun) -> dict[str, object]:
    """The run as plain data."""
    return {
        "passed": run.passed,
        "root": str(run.root),
        "unreferenced": [str(path) for path in run.unreferenced],
        "cases": [_case_as_json(result, run) for result in run.results],
    }


def _case_as_json(result: CaseResult, run: CheckRun) -> dict[str, object]:
    entry: dict[str, object] = {
        "name": result.case.name,
        "kind": result.kind,
        "status": result.status,
        "written": result.written,
        "problems": list(result.problems),
        "golden": str(result.golden),
    }
    comparison = result.comparison
    if comparison is not None and not result.same and not result.problems:
        entry["accept"] = update_command([result.case.name], run.root)
    if comparison is not None and comparison.state is State.CHANGED:
        try:
            entry["diff"] = compare_sources(comparison.before, comparison.after).as_json()
        except UsageError as error:
            entry["diff"] = {"error": str(error)}
    return entry
