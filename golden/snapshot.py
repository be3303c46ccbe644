"""One golden file and its proposal, which lies beside it as ``.new``.

In continuous integration nothing is written; elsewhere a golden changes only by `accept` or `write`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from piecework.errors import UsageError

NEW_SUFFIX = ".new"
STORE_NAME = "__stitched__"
_SKIPPED = frozenset({"node_modules", "site-packages", "build", "dist"})


class State(Enum):
    """How a golden compares with what was emitted."""

    SAME = "same"
    CHANGED = "changed"
    MISSING = "new"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, slots=True)
class Comparison:
    """``before`` is "" where there is no golden yet."""

    path: Path
    state: State
    before: str
    after: str

    @property
    def proposal(self) -> Path:
        return proposal_of(self.path)


def proposal_of(golden: Path) -> Path:
    """Where a proposal for ``golden`` lies."""
    return golden.with_name(golden.name + NEW_SUFFIX)


def golden_of(proposal: Path) -> Path:
    """The golden that ``proposal`` is for; a path without the suffix is the golden itself."""
    return proposal.with_name(proposal.name.removesuffix(NEW_SUFFIX))


def in_ci(environment: Mapping[str, str] = os.environ) -> bool:
    """True where nothing may be written: the variable CI is set, as every CI service does."""
    return environment.get("CI", "").strip().lower() not in ("", "0", "false", "no")


def shown(path: Path, folder: Path | None = None) -> str:
    """``path`` relative to ``folder``, by default the working one, if it lies below it."""
    folder = folder or Path.cwd()
    inside = (folder / path).is_relative_to(folder)
    return str((folder / path).relative_to(folder) if inside else path)


def compare(path: Path, text: str) -> Comparison:
    """Compare the golden at ``path`` with ``text``; nothing is written."""
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Comparison(path, State.MISSING, "", text)
    except UnicodeDecodeError:
        before = path.read_text(encoding="utf-8", errors="replace")
    return Comparison(path, State.SAME if before == text else State.CHANGED, before, text)


def propose(comparison: Comparison) -> None:
    """Leave the emitted text beside a golden that differs."""
    if comparison.state in (State.SAME, State.NOT_COMPARED):
        comparison.proposal.unlink(missing_ok=True)
    else:
        write(comparison.proposal, comparison.after)


def proposed(golden: Path) -> Comparison:
    """A golden and its proposal.

    Raises:
        UsageError: there is no proposal.
    """
    return compare(golden, _existing(golden).read_text(encoding="utf-8"))


def write(path: Path, text: str) -> None:
    """Replace ``path`` in one step, so that an interrupted run leaves the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def accept(golden: Path) -> None:
    """Make the proposal for ``golden`` the golden; a `UsageError` if there is none."""
    _existing(golden).replace(golden)


def reject(golden: Path) -> None:
    """Delete the proposal for ``golden``; a `UsageError` if there is none."""
    _existing(golden).unlink()


def _existing(golden: Path) -> Path:
    proposal = proposal_of(golden)
    if not proposal.is_file():
        raise UsageError(
            "there is no proposal for this golden",
            where=str(golden),
            hint="`piecework golden check`, or the test, leaves one where the text differs",
        )
    return proposal


def pending(places: Iterable[Path]) -> list[Path]:
    """Goldens with a proposal under ``places``."""
    return sorted({golden for place in places for golden in _pending_under(place)})


def _pending_under(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield from [golden_of(place)] if place.suffix == NEW_SUFFIX else []
        return
    for name, subfolders, files in os.walk(place):
        # Only those that are somebody's own.
        subfolders[:] = [s for s in subfolders if not s.startswith(".") and s not in _SKIPPED]
        folder = Path(name)
        in_store = STORE_NAME in folder.parts
        for file in files:
            if file.endswith(f".py{NEW_SUFFIX}") and (in_store or file.startswith("expected")):
                yield golden_of(folder / file)
