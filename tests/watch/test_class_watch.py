"""Classes that change after the trace. In: methods that the forward names or not, and torch's own changes. Out: refused where a call could come by; served elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import InputError

X = torch.randn(4, 8)


class Base(nn.Module):
    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Model(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(self.linear(x))


@pytest.mark.parametrize(
    ("name", "is_seen"),
    [("unknown", False), ("scaled", True), ("forward", True), ("__call__", True)],
)
@pytest.mark.parametrize("owner", [Base, Model])
def test_a_method_is_watched_where_a_call_may_come_by(
    owner: type, name: str, is_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model().eval()
    stitched = piecework.compile(model, (X,), config={"backend": "eager"})
    right = stitched(X)
    with monkeypatch.context() as here:
        here.setattr(owner, name, lambda self, x=None: x, raising=False)
        if is_seen and getattr(Model, name) is vars(owner)[name]:  # what a subclass has wins
            with pytest.raises(InputError, match=name):
                stitched(X)
        else:
            assert torch.equal(stitched(X), right)
    assert torch.equal(stitched(X), right)


def test_dynamo_that_first_runs_in_a_process_leaves_loaded_models_alone(tmp_path: Path) -> None:
    """It wraps ``__init__`` and ``__setstate__`` of every module then."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    piecework.compile(model, (X,), config={"backend": "eager"}).save(tmp_path / "made")
    text = f"""
import piecework, torch
model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), torch.ones(4, 8)
stitched = piecework.load({str(tmp_path / "made")!r}, model)
right = stitched(x)
before = torch.nn.Module.__setstate__
torch.compile(lambda y: y + 1, backend="eager")(x)
assert torch.nn.Module.__setstate__ is not before, "the test is void"
assert torch.equal(stitched(x), right)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
