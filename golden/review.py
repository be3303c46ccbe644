"""What a person reads and answers in a terminal."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.check import CaseResult, CheckRun, update_command
from piecework.golden.diff import COSMETIC, GROUPS, Change, SourceDiff, compare_sources
from piecework.golden.snapshot import Comparison, State, shown

Show = Callable[[Text], None]
Ask = Callable[[str], str]
# The number in a name (of a layer, a piece, one of several alike values), and of a line. Values and shapes have none.
_NUMBER = re.compile(r"(?<=[A-Za-z])[._]\d+(?!\w*\.\d)|(?<= line )\d+")
_MANY = 4
_MARK_STYLES = {"+": "bold cyan", "-": "bold yellow", "~": "bold magenta"}
_LINE_STYLES = {"---": "bold", "+++": "bold", "@@": "dim", "+": "cyan", "-": "yellow"}

# Control, format (bidirectional overrides, zero-width) and surrogate characters, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

CHOICES = {
    "a": "accept this one",
    "r": "reject this one (delete the proposal)",
    "s": "skip: decide later",
    "d": "show the whole text, not only what changed",
    "A": "accept this and all that follow",
    "R": "reject this and all that follow",
    "S": "skip this and all that follow",
    "?": "this help",
}
PROMPT = "(a)ccept (r)eject (s)kip (d)etails, capitals for all, ? for help: "
_NAMED = 8  # more cases than this are accepted without naming each

Outcome = dict[str, list[Path]]  # accepted, rejected and skipped → the goldens
Problems = Mapping[Path, Sequence[str]]  # golden → what is wrong with the text proposed for it


def review(
    proposals: Sequence[Comparison],
    problems: Problems,
    show: Show,
    ask: Ask,
    name: Callable[[Path], str] = str,
) -> Outcome:
    """Go through ``proposals`` and do what is answered.

    Args:
        proposals: goldens (maybe not there yet) with the texts proposed for them.
        show: prints one line.
        ask: prints a prompt and returns the answer; "" or the end of input (EOFError) skips.
        name: how to call a golden.
    """
    outcome: Outcome = {"accepted": [], "rejected": [], "skipped": []}
    answer_for_all = ""
    for number, proposal in enumerate(proposals, 1):
        show(Text(f"[{number}/{len(proposals)}] {name(proposal.path)}", style="bold reverse"))
        wrong = problems.get(proposal.path, ())
        for line in (*map(_problem, wrong), *_described(proposal)):
            show(line)
        answer = answer_for_all or _answer(proposal, show, ask)
        if answer.isupper():
            answer_for_all = answer
        if answer in "aA" and wrong:
            text = "not accepted: the text is wrong, see above; it stays proposed"
            show(Text(text, style="bold red"))
            answer = "s"
        word, act = _ACTIONS[answer.lower()]
        act(proposal.path)
        outcome[word].append(proposal.path)
    return outcome


_ACTIONS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a": ("accepted", snapshot.accept),
    "r": ("rejected", snapshot.reject),
    "s": ("skipped", lambda golden: None),
}


def _problem(text: str) -> Text:
    return Text(f"  ! {text}", style="bold red")


def _described(proposal: Comparison) -> Iterator[Text]:
    """What changed in meaning, then in text."""
    if proposal.before:
        names = proposal.path.name, proposal.proposal.name
        yield from difference(proposal.before, proposal.after, names)
    else:
        yield Text("new golden", style="bold")
        yield from _whole(proposal)


def _whole(proposal: Comparison) -> Iterator[Text]:
    yield from (Text(f"  {line}") for line in visible(proposal.after).splitlines())


def _answer(proposal: Comparison, show: Show, ask: Ask) -> str:
    while True:
        try:
            answer = ask(PROMPT).strip()
        except EOFError:
            return "S"
        if answer == "d":
            for line in _whole(proposal):
                show(line)
        elif answer in ("", "s"):
            return "s"
        elif answer in CHOICES and answer != "?":
            return answer
        else:
            for key, meaning in CHOICES.items():
                show(Text(f"  {key}  {meaning}"))


def commands(
    proposals: Sequence[Comparison], problems: Problems, name: Callable[[Path], str] = str
) -> Iterator[str]:
    """What to type to see and accept each without a terminal."""
    for each in proposals:
        golden, new = (shlex.quote(name(path)) for path in (each.path, each.proposal))
        if each.before:
            yield f"piecework golden diff {golden} {new}"
        if wrong := problems.get(each.path):
            yield f"# {golden} can't be accepted: {wrong[0]}"
        else:
            yield f"piecework golden review --accept {golden}"


# --- a check's result ----------------------------------------------------------------------------------


def run_lines(run: CheckRun) -> Iterator[Text]:
    """What a check or an update found, ending with the commands that accept it."""
    for result in run.results:
        if result.status in ("same", "not compared"):
            continue
        yield Text(f"{result.name}: {result.status}", style="bold")
        yield from map(_problem, result.problems)
        found = result.comparison
        if found is not None and found.state is State.CHANGED:
            names = ("golden", "emitted")
            lines = difference(found.before, found.after, names, text=not result.written)
            yield from (Text("  ").append_text(line) for line in lines)
    for path in run.unreferenced:
        yield Text(f"{shown(path)}: no case refers to it", style="bold")
    counts = Counter(result.status for result in run.results)
    if run.unreferenced:
        counts["unreferenced"] = len(run.unreferenced)
    words = ", ".join(f"{number} {word}" for word, number in counts.items())
    yield Text(f"{len(run.results)} {'text' if len(run.results) == 1 else 'texts'}: {words}")
    yield from _next_steps(run)


def _next_steps(run: CheckRun) -> Iterator[Text]:
    left = [r for r in run.changed if not r.written]
    if run.proposed and left:
        yield Text("Proposals lie beside the goldens; to go through them: piecework golden review")
    for path in run.unreferenced:
        yield Text(f"To remove what no case refers to: git rm -r {shown(path)}")
    if run.broken:
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


# --- differences as a person sees them -------------------------------------------------------------


def visible(text: str) -> str:
    """``text`` with every character that is not seen as itself written as an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each if each in "\t\n" or unicodedata.category(each) not in _HIDDEN else ascii(each)[1:-1]
        for each in text
    )


def difference(
    before: str, after: str, names: tuple[str, str], *, context: int = 3, text: bool = True
) -> Iterator[Text]:
    """What changed in meaning, then in ``text``."""
    try:
        diff = compare_sources(before, after)
    except UsageError:
        yield Text("the golden is not Python; it would be replaced as a whole", style="bold")
        return
    yield from summary_lines(diff)
    if text and not diff.same_text:
        yield Text("")
        yield from unified_lines(diff, *names, context)


def summary(diff: SourceDiff) -> Iterator[tuple[str, list[tuple[Change, str]]]]:
    """Each group with its changes; many alike are the first one and how many more."""
    for group, changes in diff.by_group().items():
        loose = [_key(change, _NUMBER.sub("", change.message)) for change in changes]
        counts = Counter(loose)
        alike: dict[tuple[str, ...], list[Change]] = {}
        for change, key in zip(changes, loose, strict=True):
            key = key if counts[key] >= _MANY else _key(change, change.message)
            alike.setdefault(key, []).append(change)
        rows = []
        for first, *others in alike.values():
            same = all(each.message == first.message for each in others)
            more = f"{len(others)} more{'' if same else ' like it'}" if others else ""
            rows.append((first, " and ".join(filter(None, (first.lines, more)))))
        yield group, rows


def _key(change: Change, message: str) -> tuple[str, ...]:
    return change.mark, change.function, message


def summary_lines(diff: SourceDiff) -> Iterator[Text]:
    """The difference in meaning: one heading per group, one line per change."""
    yield Text(diff.headline, style="bold")
    for group, rows in summary(diff):
        style = "dim" if group in COSMETIC else ""
        yield Text(f"  {GROUPS[group]}", style=f"{style} bold".strip())
        for change, where in rows:
            line = Text("    ", style=style)
            line.append(change.mark, style=_MARK_STYLES.get(change.mark, "bold"))
            line.append(f" {change.function}: " if change.function else " ")
            line.append(visible(change.message))
            if where:
                line.append(f"  ({where})", style="dim")
            yield line


def unified_lines(diff: SourceDiff, before: str, after: str, context: int = 3) -> Iterator[Text]:
    """The textual difference in the unified format."""
    for line in visible(diff.unified(before, after, context)).split("\n")[:-1]:
        styles = (style for start, style in _LINE_STYLES.items() if line.startswith(start))
        yield Text(line, style=next(styles, ""))
