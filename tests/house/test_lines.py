"""Lines are a budget: no part of the project grows beyond what it has, and a ceiling is only ever lowered."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Folders -> lines of Python at most; what golden cases emit is counted too.
CEILINGS = {
    ("runtime", "codegen"): 27_000,
    ("integrations",): 4_950,
    ("golden", "bench", "cli"): 11_000,
    ("tests",): 34_600,
}
SLACK = 400  # a ceiling further above than this is lowered


def lines_of(folder: str) -> int:
    return sum(path.read_text().count("\n") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folders", CEILINGS, ids="+".join)
def test_no_part_grows(folders: tuple[str, ...]) -> None:
    lines, ceiling = sum(map(lines_of, folders)), CEILINGS[folders]
    found = f"{' + '.join(folders)} has {lines} lines"
    assert lines <= ceiling, f"{found}; what a change adds, it finds elsewhere"
    assert lines > ceiling - SLACK, f"{found}: lower the ceiling to that"
