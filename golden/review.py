"""Review of proposed goldens, one by one. In: proposals, a way to show and a way to ask. Out: which were accepted, rejected and skipped.

Each is shown with its semantic difference first. Without somebody to ask, `commands` says what to type. Files are only touched by an answer.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.text import Text

from piecework.errors import UsageError
from piecework.golden.compare.diff import SourceDiff, compare_sources
from piecework.golden.show.diff_text import summary_lines, unified_lines
from piecework.golden.show.visible import visible
from piecework.golden.text import snapshot

Show = Callable[[Text], None]
Ask = Callable[[str], str]

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


@dataclass(frozen=True, slots=True)
class Proposal:
    """A golden (maybe not there yet) and the text proposed for it; ``problems`` forbid accepting it."""

    golden: Path
    before: str
    after: str
    problems: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What was decided, by golden."""

    accepted: list[Path] = field(default_factory=list)
    rejected: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)


def load(golden: Path, problems: Sequence[str] = ()) -> Proposal:
    """Read a golden and its proposal.

    Raises:
        UsageError: there is no proposal for it.
    """
    proposal = snapshot.proposal_of(golden)
    if not proposal.is_file():
        raise UsageError(
            "there is no proposal for this golden",
            where=str(golden),
            hint="`piecework golden check`, or the test, leaves one where the text differs",
        )
    before = golden.read_text(encoding="utf-8") if golden.is_file() else ""
    return Proposal(golden, before, proposal.read_text(encoding="utf-8"), tuple(problems))


def review(
    proposals: Sequence[Proposal], show: Show, ask: Ask, name: Callable[[Path], str] = str
) -> Outcome:
    """Go through ``proposals`` and do what is answered.

    Args:
        proposals: what to decide on, in order.
        show: prints one line.
        ask: prints a prompt and returns the answer; "" or the end of input (EOFError) skips.
        name: how to call a golden.
    """
    outcome = Outcome()
    answer_for_all = ""
    for number, proposal in enumerate(proposals, 1):
        show(Text(f"[{number}/{len(proposals)}] {name(proposal.golden)}", style="bold reverse"))
        for line in describe(proposal):
            show(line)
        answer = answer_for_all or _answer(proposal, show, ask)
        if answer.isupper():
            answer_for_all = answer
        _decide(proposal, answer.lower(), outcome, show)
    return outcome


def describe(proposal: Proposal) -> Iterator[Text]:
    """Problems, then the semantic difference, then the textual one."""
    for problem in proposal.problems:
        yield Text(f"  ! {problem}", style="bold red")
    if not proposal.before:
        yield Text("new golden", style="bold")
        yield from _whole(proposal)
        return
    diff = _diff(proposal)
    if diff is None:
        yield Text("the golden is not Python; it would be replaced as a whole", style="bold")
        return
    yield from summary_lines(diff)
    yield Text("")
    yield from unified_lines(diff, proposal.golden.name, f"{proposal.golden.name}.new")


def _whole(proposal: Proposal) -> Iterator[Text]:
    yield from (Text(f"  {line}") for line in visible(proposal.after).splitlines())


def _diff(proposal: Proposal) -> SourceDiff | None:
    try:
        return compare_sources(proposal.before, proposal.after)
    except UsageError:
        return None


def _answer(proposal: Proposal, show: Show, ask: Ask) -> str:
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


def _decide(proposal: Proposal, answer: str, outcome: Outcome, show: Show) -> None:
    if answer == "a" and proposal.problems:
        show(
            Text("not accepted: the text is wrong, see above; it stays proposed", style="bold red")
        )
        outcome.skipped.append(proposal.golden)
    elif answer == "a":
        snapshot.accept(proposal.golden)
        outcome.accepted.append(proposal.golden)
    elif answer == "r":
        snapshot.reject(proposal.golden)
        outcome.rejected.append(proposal.golden)
    else:
        outcome.skipped.append(proposal.golden)


def commands(proposals: Sequence[Proposal], name: Callable[[Path], str] = str) -> Iterator[str]:
    """What to type to see and accept each without a terminal; a proposal with problems has them in place of that."""
    for proposal in proposals:
        golden = shlex.quote(name(proposal.golden))
        if proposal.before:
            new = shlex.quote(name(snapshot.proposal_of(proposal.golden)))
            yield f"piecework golden diff {golden} {new}"
        if proposal.problems:
            yield f"# {golden} can't be accepted: {proposal.problems[0]}"
        else:
            yield f"piecework golden review --accept {golden}"
