"""Ordinary models: a sample of the lists that others made, by `torch.compile` and by piecework beside eager. Whole lists run at night.

The lists are read in processes of their own: torch's own list comes with its test suite's settings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("expecttest")
pytest.importorskip("transformers")

PARTS = 8  # one of them runs in every merge, all at night
BOTH = {"stock": "equal", "piecework": "equal"}


def run(
    folder: Path, *arguments: str, limit: float = 600, codes: Sequence[int] = (0,)
) -> dict[str, dict[str, str]]:
    """Row → contender → status, as the command reports them; fails where it says that stock serves more, unless ``codes`` has 1."""
    command = [sys.executable, "-m", "piecework.bench.models", "--out", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    assert done.returncode in codes, done.stdout[-6000:] + done.stderr[-3000:]
    rows = json.loads((folder / "models.json").read_text())["rows"]
    return {
        row["name"]: {name: each["status"] for name, each in row["outcome"]["verdicts"].items()}
        for row in rows
    }


@pytest.mark.parametrize("part", [1, pytest.param(5, marks=pytest.mark.nightly)])
def test_torch_modules(part: int, tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("--list", "module_db", "--backend", "eager", "--no-cut"),
        *("--together", "--part", f"{part}/{PARTS}"),
    )
    assert len(found) >= 13
    assert sum(each.get("piecework") == "equal" for each in found.values()) >= 13


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("source", "only"),
    [
        ("transformers", "^(bert|convnext)$"),
        # With the caches that they return.
        ("heads", "^(LlamaForCausalLM|MistralForSequenceClassification)$"),
    ],
)
def test_families(source: str, only: str, tmp_path: Path) -> None:
    found = run(
        tmp_path,
        *("--list", source, "--backend", "eager", "--together", "--no-cut"),
        *("--only", only),
    )
    assert found == {name: BOTH for name in found}
    assert len(found) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("source", ["module_db", "transformers", "heads", "encoders"])
def test_whole_lists(source: str, tmp_path: Path) -> None:
    """None is wrong, and of what stock serves nearly all is equal; a wrong one makes the exit code 1 too."""
    found = run(
        tmp_path,
        *("--list", source, "--backend", "eager", "--no-cut", "--jobs", "2"),
        limit=24 * 3600,
        codes=(0, 1),
    )
    tried = [each["piecework"] for each in found.values() if "piecework" in each]
    assert len(tried) > 40 and "wrong" not in tried
    assert tried.count("equal") >= 0.8 * len(tried)
