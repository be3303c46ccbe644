"""The value of the fixture `stitched_golden`, and which goldens the tests of a session asked for.

A golden is written only if the run asks for it, and the test that wrote one fails once. One is called unreferenced only if every
test that could use it was found and ran to its end. Nothing heavy is imported before a source is compared.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from piecework.errors import UsageError
from piecework.golden import snapshot
from piecework.golden.snapshot import STORE_NAME, Comparison, State, shown

_UNSAFE = re.compile(r"[^\w.\-]+", re.ASCII)
_LONGEST = 100
_PARAMETERS = re.compile(r"([\w.]{1,80})\[(\w(?:[\w.\-]{0,60}\w)?)\]", re.ASCII)


def golden_path(test_file: Path, test_name: str, name: str | None = None) -> Path:
    """Where the golden of a test lies: ``__stitched__/<test file>/<test name>.py``."""
    stem = safe_name(test_name) + (f"--{safe_name(name)}" if name is not None else "")
    return test_file.parent / STORE_NAME / test_file.stem / f"{stem}.py"


def safe_name(name: str) -> str:
    """``name`` as a file name, with a digest where two names could look the same."""
    if found := _PARAMETERS.fullmatch(name):
        return "-".join(found.groups())
    safe = _UNSAFE.sub("-", name)[:_LONGEST]
    if safe == name:
        return safe
    return f"{safe.strip('-.')}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


@dataclass(slots=True)
class References:
    """What one pytest session knows; the sessions of several workers are merged."""

    # test file → tests found in it → whether they ran to their end
    tests: dict[str, dict[str, bool]] = field(default_factory=dict)
    partial: set[str] = field(default_factory=set)  # files of which only some tests were asked for
    # golden that was compared → the test that used it first
    used: dict[str, str] = field(default_factory=dict)

    def as_data(self) -> tuple[dict[str, dict[str, bool]], list[str], dict[str, str]]:
        """Plain data, for the way from a worker."""
        return self.tests, [*self.partial], self.used

    def merge(self, data: tuple[dict[str, dict[str, bool]], list[str], dict[str, str]]) -> None:
        """Take over what `as_data` gave in another process."""
        tests, partial, used = data
        for file, theirs in tests.items():
            mine = self.tests.setdefault(file, {})
            mine |= {name: ended or mine.get(name, False) for name, ended in theirs.items()}
        self.partial.update(partial)
        self.used.update(used)

    def unreferenced(self) -> list[Path]:
        """Goldens beside the collected files that no test asks for."""
        found: set[Path] = set()
        for folder in {Path(file).parent for file in self.tests}:
            for store in sorted((folder / STORE_NAME).glob("*/")):
                found.update(self._strays(folder / f"{store.name}.py", store))
        return sorted(found)

    def _strays(self, test_file: Path, store: Path) -> list[Path]:
        goldens = sorted(store.glob("*.py"))
        file = str(test_file)
        if not test_file.is_file():
            return goldens  # the test file is gone
        if file not in self.tests or file in self.partial:
            return []
        waiting = [safe_name(name) for name, ended in self.tests[file].items() if not ended]
        return [
            golden
            for golden in goldens
            if str(golden) not in self.used
            and not any(golden.stem == s or golden.stem.startswith(f"{s}--") for s in waiting)
        ]


@dataclass(slots=True)
class StitchedGolden:
    """Compares emitted sources with the goldens of one test."""

    test_file: Path
    test_name: str
    node_id: str
    root: Path
    update: bool
    references: References
    compared: set[Path] = field(default_factory=set)
    differs: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, stitched: object, *, name: str | None = None) -> None:
        """Compare ``stitched`` with its golden; the test fails at its end if they differ.

        Args:
            stitched: what `piecework.compile` returned, its source, that of its entry or of a replay, a stitching graph, or text.
            name: tells apart several sources of one test.

        Raises:
            UsageError: this is nothing that has a source, or the golden was compared before.
        """
        __tracebackhide__ = True
        # Only now is torch needed; somebody who stitched something has it loaded.
        from piecework.golden.texts import text_of, undefined_names

        emitted = text_of(stitched, "stitched_golden")
        golden = golden_path(self.test_file, self.test_name, name)
        owner = self.references.used.setdefault(str(golden), self.node_id)
        if owner != self.node_id or golden in self.compared:
            hint = "give each a name: stitched_golden(source, name='prefill')"
            raise UsageError(
                "two sources have one golden", where=shown(golden, self.root), hint=hint
            )
        self.compared.add(golden)
        problems = undefined_names(emitted)
        if problems:
            pytest.fail("the emitted source is wrong: " + "; ".join(problems), pytrace=False)
        comparison = snapshot.compare(golden, emitted.code)
        if comparison.state is not State.SAME:
            self._settle(comparison)
        elif not snapshot.in_ci():
            snapshot.propose(comparison)  # removes a proposal that is out of date

    def _settle(self, comparison: Comparison) -> None:
        """Write what may be written, and note why the test fails."""
        from piecework.golden.review import difference

        golden = shown(comparison.path, self.root)
        missing = comparison.state is State.MISSING
        head = "there is no golden yet:" if missing else "the emitted source differs from"
        lines, summary = [f"{head} {golden}"], [f"{head} {golden}"]
        if not missing:
            before, after, names = comparison.before, comparison.after, (golden, "emitted")
            for said, text in ((lines, True), (summary, False)):
                said += [line.plain for line in difference(before, after, names, text=text)]
        if self.update:
            snapshot.write(comparison.path, comparison.after)
            comparison.proposal.unlink(missing_ok=True)
            for said in (lines, summary):
                said.append(f"{golden} was written; run again, and review and commit it.")
        else:
            if not snapshot.in_ci():
                snapshot.propose(comparison)
                beside = shown(comparison.proposal, self.root)
                lines.append(f"The emitted source lies beside it: {beside}")
            lines.append(f"To accept it: pytest {shlex.quote(self.node_id)} --piecework-update")
        self.differs.append(("\n".join(lines), "\n".join(summary)))
