"""A CPU without a C++ compiler: what to install is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import torch, piecework
try:
    piecework.compile(torch.nn.GELU(), (torch.randn(3, 8),))
except piecework.errors.PieceCompileError as error:
    print(error.hint)
"""


@pytest.mark.inductor
def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    places = {"PATH": str(tmp_path / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept")}
    without = {name: value for name, value in os.environ.items() if name not in ("CXX", "CC")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=without | places,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "install g++" in done.stdout and "CXX" in done.stdout, done.stdout + done.stderr
