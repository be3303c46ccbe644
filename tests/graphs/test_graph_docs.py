"""The page on static graphs: its examples run, one after the other."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "static-graphs.md"


def test_the_examples_run(capsys, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    module = types.ModuleType("static_graph_docs")  # tracing looks globals up in their module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    scope = module.__dict__
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert scope["report"].captured
    assert scope["why"].value == "larger than every captured size"
    assert scope["dropped"]
    assert "What runs captured" in capsys.readouterr().out
