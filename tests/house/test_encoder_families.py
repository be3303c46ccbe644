"""The table of encoders: its page from what was found, one family in a merge run, all of them at night."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from piecework.bench.encoders import FILE, main, markdown, status
from piecework.bench.lists.isolated import RowResult
from piecework.bench.lists.trial import Outcome, Verdict

SHARE = 0.9  # of the families with a small model that runs


def test_what_became_of_a_family_is_told() -> None:
    refused = Outcome("", {"piecework": Verdict("refused", "why | so"), "stock": Verdict("equal")})
    rows = [
        RowResult(
            "encoders",
            "one",
            "text",
            [Outcome("", {"piecework": Verdict("equal")}, pieces=6, unique=3, traces=2)],
        ),
        RowResult("encoders", "two", "text", [refused]),
        RowResult("encoders", "three", "audio", [], "not built: no package"),
        RowResult("encoders", "four", "audio", [Outcome("", {}, skipped="eager can't")]),
        RowResult(
            "encoders",
            "five",
            "vision",
            [Outcome("stopped", {"piecework": Verdict("failed", "hung")})],
        ),
    ]
    assert [status(row)[0] for row in rows] == [
        "equal",
        "refused",
        "no model",
        "no model",
        "failed",
    ]
    text = markdown(rows, "eager", 9)
    assert "This run tried 5 of 9 families." in text
    assert "Of 5 families 3 have a small model" in text and "**1 of these are equal**" in text
    assert "| one | text | equal |  | 6 | 3 | 2 |  |" in text
    assert "| two | text | refused | equal |  |  |  | why \\| so |" in text


def test_a_family_is_tried_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--only", "^(distilbert|llava)$", "--out", str(tmp_path), "--together"]
    page = tmp_path / "page.md"
    assert main([*chosen, "--page", str(page)]) == 0
    assert "1/1 distilbert: equal" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / FILE).read_text())["rows"]
    assert row["outcomes"][0]["traces"] == 2
    assert "| distilbert | text | equal |" in page.read_text()
    page.unlink()
    assert main([*chosen, "--page", str(page), "--as-found"]) == 0 and page.exists()
    assert main(chosen) == 0 and not capsys.readouterr().out, "it is not tried again"


@pytest.mark.nightly
def test_the_families_of_the_registries(tmp_path: Path) -> None:
    code = main(["--out", str(tmp_path), "--jobs", "2", "--limit", "600"])
    rows = json.loads((tmp_path / FILE).read_text())["rows"]
    found = [
        outcome["verdicts"]["piecework"]["status"]
        for row in rows
        for outcome in row["outcomes"]
        if "piecework" in outcome["verdicts"]
    ]
    assert code == 0 and found.count("equal") >= SHARE * len(found) > 0
