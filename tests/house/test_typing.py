"""What a type checker sees of piecework. In: programs as a user writes them. Out: mypy's verdict under ``--strict``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
import piecework
from piecework import CompilationConfig, StitchedModule
from piecework.errors import InputError


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        mix(self.layer(x), out)
        return out


@piecework.splitting_op("user::mix", mutates_args=("out",))
def mix(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


config = CompilationConfig(backend="eager", splitting_ops=["user::mix"])
stitched: StitchedModule = piecework.compile(Model(), (torch.randn(4, 8),), config=config)
print(stitched.source.code, stitched.report().pieces, list(stitched.parameters()))
stitched.capture([1, 2, 4], progress=False).rebind()
for row in stitched.coverage():
    print(row.mode)
try:
    stitched(torch.randn(4, 9))
except InputError as error:
    print(error.hint)
again = piecework.load("model.artifact", Model())
print(again(torch.randn(4, 8)).shape, torch.nn.functional.relu(again(torch.randn(4, 8))))
print(again.profile(torch.randn(4, 8)))
"""
WRONG = """
import torch
import piecework

stitched = piecework.compile(torch.nn.Linear(8, 8), (torch.randn(4, 8),), splitting_ops=3)
stitched.capture(4)
piecework.load("model.artifact")
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "piecework").symlink_to(ROOT)
    monkeypatch.setenv("MYPYPATH", str(tmp_path / "path"))
    monkeypatch.chdir(tmp_path)  # away from the project's own settings

    def run(text: str) -> str:
        (tmp_path / "program.py").write_text(text)
        options = ["--strict", "--follow-imports=silent", "--cache-dir", str(ROOT / ".mypy_cache")]
        # In a process of its own: mypy raises the recursion limit of the one that it runs in.
        command = [sys.executable, "-m", "mypy", *options, "program.py"]
        return subprocess.run(command, capture_output=True, text=True).stdout

    return run


def test_a_program_as_users_write_it_is_typed(check) -> None:  # type: ignore[no-untyped-def]
    assert check(PROGRAM).startswith("Success")


def test_a_wrong_program_is_seen(check) -> None:  # type: ignore[no-untyped-def]
    said = check(WRONG)
    assert "splitting_ops" in said and 'to "capture"' in said
    assert 'argument "model"' in said and "Found 3 errors" in said
