"""The value of the fixture `stitched_golden`. In: something that was stitched, in a test. Out: nothing, or a failure that says what changed.

A golden is written only if the run asks for it, and the test that wrote one fails once.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from piecework.errors import UsageError
from piecework.golden.compare.diff import compare_sources
from piecework.golden.references import References, golden_path
from piecework.golden.show.diff_text import summary_lines, unified_lines
from piecework.golden.text import snapshot
from piecework.golden.text.scope import undefined_names
from piecework.golden.text.snapshot import Comparison, State


@dataclass(frozen=True, slots=True)
class Difference:
    """Why a test fails, and the same in a few lines."""

    text: str
    summary: str


@dataclass(slots=True)
class StitchedGolden:
    """Compares emitted sources with the goldens of one test. Where it has a list, what was ``found`` is for the test's end to say."""

    test_file: Path
    test_name: str
    node_id: str
    root: Path
    update: bool
    references: References
    compared: set[Path] = field(default_factory=set)
    found: list[Difference] | None = None

    def __call__(self, stitched: object, *, name: str | None = None) -> None:
        """Compare ``stitched`` with its golden; fail the test if they differ.

        Args:
            stitched: what `piecework.compile` returned, its source, that of its entry or of a replay, a stitching graph, or text.
            name: tells apart several sources of one test.

        Raises:
            UsageError: this is nothing that has a source, or the golden was compared before.
        """
        __tracebackhide__ = True
        # Only now is torch needed; somebody who stitched something has it loaded.
        from piecework.golden.text.texts import text_of

        emitted = text_of(stitched, "stitched_golden")
        golden = golden_path(self.test_file, self.test_name, name)
        self._claim(golden)
        try:
            problems = undefined_names(emitted.code, emitted.provided)
        except SyntaxError as error:
            problems = [f"it does not parse: {error}"]
        comparison = snapshot.compare(golden, emitted.code)
        if problems:
            pytest.fail("the emitted source is wrong: " + "; ".join(problems), pytrace=False)
        if comparison.state is State.SAME:
            if not snapshot.in_ci():
                snapshot.propose(comparison)  # removes a proposal that is out of date
            return
        found = self._settle(comparison)
        if self.found is None:
            pytest.fail(found.text, pytrace=False)
        self.found.append(found)

    def _claim(self, golden: Path) -> None:
        owner = self.references.use(golden, self.node_id)
        if owner != self.node_id or golden in self.compared:
            raise UsageError(
                "two sources have one golden",
                where=self._shown(golden),
                hint="give each a name: stitched_golden(source, name='prefill')",
            )
        self.compared.add(golden)

    def _settle(self, comparison: Comparison) -> Difference:
        """Write what may be written; returns why the test fails."""
        golden = self._shown(comparison.path)
        summary, text = self._explanation(comparison)
        lines = [*summary, *text]
        if self.update:
            snapshot.write(comparison.path, comparison.after)
            comparison.proposal.unlink(missing_ok=True)
            written = f"{golden} was written; run again, and review and commit it."
            return Difference("\n".join([*lines, written]), "\n".join([*summary, written]))
        if not snapshot.in_ci():
            snapshot.propose(comparison)
            lines.append(f"The emitted source lies beside it: {self._shown(comparison.proposal)}")
        lines.append(f"To accept it: pytest {shlex.quote(self.node_id)} --piecework-update")
        return Difference("\n".join(lines), "\n".join(summary))

    def _explanation(self, comparison: Comparison) -> tuple[list[str], list[str]]:
        """What changed in meaning, and in text."""
        golden = self._shown(comparison.path)
        if comparison.state is State.MISSING:
            return [f"there is no golden yet: {golden}"], []
        head = f"the emitted source differs from {golden}"
        try:
            diff = compare_sources(comparison.before, comparison.after)
        except UsageError:
            return [head, "the golden is not Python; it would be replaced as a whole"], []
        text = [line.plain for line in unified_lines(diff, golden, "emitted")]
        return [head, *(line.plain for line in summary_lines(diff))], text

    def _shown(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
