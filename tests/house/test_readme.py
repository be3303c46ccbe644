"""The README's first example is true: its model becomes the function that it shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from snippets import snippets

import piecework

README = Path(piecework.__file__).parent / "README.md"


@pytest.mark.inductor
def test_the_first_example_becomes_the_function_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shown = (each.text for each in snippets(README)[:2])
    (tmp_path / "model.py").write_text(model)
    spec = importlib.util.spec_from_file_location("readme_model", tmp_path / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "readme_model", module)
    spec.loader.exec_module(module)
    code = module.stitched.source.code
    emitted = code[code.index("def execution_fn(") :].partition("\n\n\n")[0]
    assert emitted.strip() == shown.strip()
    assert len([line for line in model.splitlines() if line.strip()]) <= 12
