"""The README's first example is true: its model becomes the function that it shows."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

import pytest

import piecework

README = (Path(piecework.__file__).parent / "README.md").read_text()


@pytest.mark.inductor
def test_the_first_example_becomes_the_function_shown() -> None:
    model, shown = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2]
    linecache.cache["model.py"] = (len(model), None, model.splitlines(keepends=True), "model.py")
    scope: dict[str, object] = {"__name__": "readme_example"}
    exec(compile(model, "model.py", "exec"), scope)
    stitched = scope["stitched"]
    assert isinstance(stitched, piecework.StitchedModule)
    code = stitched.source.code
    emitted = code[code.index("def execution_fn(") :].partition("\n\n\n")[0]
    assert emitted.strip() == shown.strip()
    assert len([line for line in model.splitlines() if line.strip()]) <= 12
