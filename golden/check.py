"""The four checks of a golden case.

A text is equal, has no undefined name, does what `torch.fx.Interpreter` does, and is the same under two hash seeds. `check_cases`
writes proposals only where it is told to; goldens are written by `update_cases` alone, and only texts that passed the other checks.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from piecework.errors import EmitError, UsageError
from piecework.golden import snapshot
from piecework.golden.cases import (
    ENTRY,
    GRAPH_FILE,
    Case,
    CaseTexts,
    discover,
    kind_of,
    select,
    unreferenced,
)
from piecework.golden.execute import call_differences, differences
from piecework.golden.snapshot import Comparison, State, shown
from piecework.golden.texts import STITCHED, EmittedText, undefined_names

_SEEDS = ("1", "2")


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What the checks said of one text of a case."""

    case: Case
    comparison: Comparison | None  # golden and emitted text; None if nothing could be emitted
    problems: tuple[str, ...] = ()  # what is wrong with the emitted text itself, golden or not
    written: bool = False  # the golden was replaced
    kind: str = STITCHED  # which text; "stitched" is the stitching source

    @property
    def name(self) -> str:
        """The case, and the kind of text if it is not stitching source."""
        return self.case.name if self.kind == STITCHED else f"{self.case.name}: {self.kind}"

    @property
    def golden(self) -> Path:
        return self.case.golden(self.kind)

    @property
    def same(self) -> bool:
        """True if the golden says what is emitted, or nothing about these versions."""
        quiet = (State.SAME, State.NOT_COMPARED)
        return self.comparison is not None and self.comparison.state in quiet

    @property
    def status(self) -> str:
        """Same, changed, new, not compared, broken, or updated."""
        if self.problems or self.comparison is None:
            return "broken"
        return "updated" if self.written else self.comparison.state.value


@dataclass(frozen=True, slots=True)
class CheckRun:
    """All results of one run over ``root``."""

    root: Path
    results: tuple[CaseResult, ...]
    unreferenced: tuple[Path, ...] = ()
    proposed: bool = False

    @property
    def passed(self) -> bool:
        return not self.unreferenced and all(r.same and not r.problems for r in self.results)

    @property
    def changed(self) -> tuple[CaseResult, ...]:
        """Cases whose golden differs from what is emitted, or is missing."""
        return tuple(r for r in self.results if r.comparison is not None and not r.same)

    @property
    def broken(self) -> tuple[CaseResult, ...]:
        return tuple(result for result in self.results if result.status == "broken")


def check_cases(
    root: Path,
    names: Sequence[str] = (),
    *,
    propose: bool,
    two_seeds: bool = True,
    progress: Callable[[str], None] | None = None,
) -> CheckRun:
    """Check cases; leave a ``.new`` beside goldens that differ if ``propose`` is true.

    Args:
        root: the folder of cases.
        names: cases to check; all by default. Unreferenced goldens are looked for only when all are checked.
        propose: write proposals, and remove those that are out of date.
        two_seeds: emit in a second process with another hash seed too.
        progress: called with the name of each case before it is checked.

    Raises:
        UsageError: ``root`` is no folder, or a name is no case.
    """
    cases = select(discover(root), names)
    if not cases and not names and not unreferenced(root, {}):
        raise UsageError(
            "there are no golden cases here",
            where=str(root),
            hint="a case is a folder with a graph.py that defines build()",
        )
    elsewhere = emit_in_other_process(root, [case.name for case in cases]) if two_seeds else None
    results: list[CaseResult] = []
    emitted: dict[str, set[str]] = {}
    for case in cases:
        if progress is not None:
            progress(case.name)
        for result in check_case(case, None if elsewhere is None else elsewhere[case.name]):
            results.append(result)
            if result.comparison is not None:
                emitted.setdefault(case.name, set()).add(result.kind)
                if propose:
                    snapshot.propose(result.comparison)
    strays = () if names else tuple(unreferenced(root, emitted))
    return CheckRun(root, tuple(results), strays, propose)


def check_case(
    case: Case, texts_elsewhere: Mapping[str, str] | None = None
) -> tuple[CaseResult, ...]:
    """The four checks of each text of one case."""
    try:
        loaded = case.load()
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - a case's own code may raise anything
        problem = f"does not emit: {type(error).__name__}: {error}"
        return (CaseResult(case, None, (problem,)),)
    results: list[CaseResult] = []
    for kind, text in loaded.by_kind.items():
        problems = _problems_of(loaded, kind, text)
        if texts_elsewhere is not None and texts_elsewhere.get(kind) != text.code:
            there = texts_elsewhere.get(kind) or next(iter(texts_elsewhere.values()), "nothing")
            where = _first_difference(text.code, there)
            problems.append(f"differs under another hash seed: {where}")
        comparison = snapshot.compare(case.golden(kind), text.code)
        if not loaded.compared and comparison.state is State.CHANGED:
            comparison = replace(comparison, state=State.NOT_COMPARED)
        results.append(CaseResult(case, comparison, tuple(problems), kind=kind))
    return tuple(results)


def _problems_of(loaded: CaseTexts, kind: str, text: EmittedText) -> list[str]:
    """What is wrong with a text by itself: undefined names, or other results than its graph's."""
    try:
        problems = undefined_names(text)
    except SyntaxError as error:
        return [f"does not parse: {error}"]
    if loaded.stitched is not None and kind == STITCHED:
        problems += differences(loaded.stitched)
    elif loaded.stitched is not None and kind == ENTRY:
        problems += call_differences(loaded.stitched)
    return problems


def update_cases(
    root: Path,
    names: Sequence[str] = (),
    *,
    two_seeds: bool = True,
    progress: Callable[[str], None] | None = None,
) -> CheckRun:
    """Check, then write every golden that differs and whose text passed the other checks.

    The results still say what differed before; `CaseResult.written` says what was replaced.
    """
    run = check_cases(root, names, propose=True, two_seeds=two_seeds, progress=progress)
    results: list[CaseResult] = []
    for result in run.results:
        if result.comparison is not None and not result.same and not result.problems:
            snapshot.accept(result.golden)
            result = replace(result, written=True)
        results.append(result)
    return replace(run, results=tuple(results))


def accept_golden(golden: Path) -> None:
    """Make the proposal for ``golden`` the golden; that of a case is checked first.

    Raises:
        UsageError: there is no proposal, its text is wrong, or it is not what the case emits now.
    """
    if (golden.parent / GRAPH_FILE).is_file():
        where = shown(golden)
        results = check_case(Case(golden.parent.name, golden.parent))
        result = next((each for each in results if each.kind == kind_of(golden)), None)
        if result is None:
            raise UsageError("the case emits no such text", where=where)
        if result.problems or result.comparison is None:
            problem = f"the text is wrong and was not accepted: {result.problems[0]}"
            raise UsageError(problem, where=where)
        proposal = snapshot.proposal_of(golden)
        if proposal.is_file() and proposal.read_text(encoding="utf-8") != result.comparison.after:
            hint = "run piecework golden check again"
            raise UsageError("the proposal is out of date", where=where, hint=hint)
    snapshot.accept(golden)


def update_command(names: Sequence[str], root: Path) -> str:
    """What to type to accept what the cases named, or all, emit now."""
    default = default_root()
    known = default is not None and default.resolve() == root.resolve()
    words = ["piecework", "golden", "update", *names, *([] if known else ["--root", shown(root)])]
    return shlex.join(words)


def default_root() -> Path | None:
    """``golden/cases`` in the working folder, else that of an editable installation."""
    for base in (Path.cwd(), Path(__file__).parent.parent):
        root = base / "golden" / "cases"
        if root.is_dir():
            return root
    return None


# --- another hash seed ---------------------------------------------------------------------------------


def emit_in_other_process(root: Path, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Emit cases in a process whose hash seed is not this one's.

    Raises:
        EmitError: the process failed as a whole.
    """
    seed = next(seed for seed in _SEEDS if seed != os.environ.get("PYTHONHASHSEED"))
    done = subprocess.run(
        [sys.executable, "-m", "piecework.golden.check", str(root), *names],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise EmitError(f"emitting under hash seed {seed} failed:\n{tail}", where=str(root))
    # Whatever a model prints while it is captured comes before the last line.
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _emit_all(root: str, *names: str) -> None:
    texts: dict[str, dict[str, str]] = {}
    for case in select(discover(Path(root)), names):
        try:
            by_kind = case.load().by_kind
            texts[case.name] = {kind: text.code for kind, text in by_kind.items()}
        except Exception as error:  # noqa: BLE001 - told per case, and compared like a text
            texts[case.name] = {STITCHED: f"{type(error).__name__}: {error}"}
    print(json.dumps(texts))


def _first_difference(here: str, there: str) -> str:
    ours, theirs = here.splitlines(), there.splitlines()
    for number, (left, right) in enumerate(zip(ours, theirs, strict=False), 1):
        if left != right:
            return f"line {number} is {left.strip()!a} here and {right.strip()!a} there"
    return f"{len(ours)} lines here, {len(theirs)} there: {there[:200]!a}"


if __name__ == "__main__":
    _emit_all(*sys.argv[1:])
