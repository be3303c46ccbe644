"""One difference between two emitted sources. In: what `diff` found. Out: frozen values that the terminal, JSON and the report show.

A change carries its sentence and its lines; nothing here compares or formats a whole report.
"""

from __future__ import annotations

from dataclasses import dataclass

# In the order in which a reviewer wants them: what callers see, what runs, what lives, then what only reads differently.
GROUPS = {
    "signature": "Signature",
    "pieces": "Pieces",
    "calls": "Calls between pieces",
    "functions": "Inlined functions",
    "arguments": "Arguments",
    "constants": "Constants",
    "liveness": "Liveness",
    "module": "Module",
    "names": "Names and numbers",
    "provenance": "Comments",
    "layout": "Layout",
}

# Groups that cannot change what the source does.
COSMETIC = frozenset({"names", "provenance", "layout"})

# What a change speaks of, as each side writes it: (before, after), "" on a side that has none.
Subjects = tuple[tuple[str, str], ...]

MARKS = {"added": "+", "removed": "-", "changed": "~", "merged": "⇉", "split": "⇇", "moved": "↕"}


@dataclass(frozen=True, slots=True)
class Change:
    """``kind`` is a key of `MARKS`; lines are 1-based, None where the side has none; ``function`` is "" for the module."""

    group: str
    kind: str
    message: str
    function: str = ""
    before_line: int | None = None
    after_line: int | None = None
    subjects: Subjects = ()

    @property
    def mark(self) -> str:
        return MARKS[self.kind]

    @property
    def lines(self) -> str:
        """``line 14 → 16``, as far as there is one."""
        match self.before_line, self.after_line:
            case None, None:
                return ""
            case before, None:
                return f"line {before} before"
            case None, after:
                return f"line {after}"
            case before, after:
                return f"line {after}" if before == after else f"line {before} → {after}"

    def as_json(self) -> dict[str, object]:
        return {
            "group": self.group,
            "kind": self.kind,
            "message": self.message,
            "function": self.function,
            "before_line": self.before_line,
            "after_line": self.after_line,
            "subjects": [list(each) for each in self.subjects],
        }
