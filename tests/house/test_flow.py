"""How far it is from ``compile()`` to emitted text, and from a call to its run, and how many files a small model goes through."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import piecework

ROOT = os.path.dirname(piecework.__file__) + os.sep
DEPTH, FILES, CALLS = 11, 95, 10


@piecework.splitting_op("flow::mix")
def mix(x: torch.Tensor) -> torch.Tensor:
    return x * 2


mix.register_fake(torch.empty_like)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mix(x + torch.relu(self.up(x)))


def _calls_before_the_text(stitched: Callable[..., object], x: torch.Tensor) -> int:
    """How many Python functions a call goes through until the stitching function runs."""
    names: list[str] = []

    def watch(frame: types.FrameType, event: str, _: object) -> None:
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        stitched(x)
    finally:
        sys.setprofile(None)
    return names.index("execution_fn")


@pytest.mark.parametrize("recording", [True, False])
def test_the_way_of_a_call(recording: bool) -> None:
    model, x = nn.Sequential(Layer(), Layer()).eval(), torch.randn(4, 8)
    stitched = piecework.compile(model, (x,), config={"backend": "eager"})
    with torch.set_grad_enabled(recording):
        for _ in range(4):
            stitched(x)
        assert _calls_before_the_text(stitched, x) <= CALLS


def _file(frame: types.FrameType) -> str:
    """Which of the package's files a frame runs; "" for another's."""
    name = frame.f_code.co_filename
    ours = name.startswith(ROOT) and not name.startswith((f"{ROOT}tests", f"{ROOT}.venv"))
    return name.removeprefix(ROOT) if ours else ""


def test_the_way_of_a_small_model() -> None:
    files: set[str] = set()
    depths: list[int] = []

    def watch(frame: types.FrameType, event: str, _: object) -> None:
        name = _file(frame)
        if event != "call" or not name:
            return
        files.add(name)
        if frame.f_code.co_name == "generate_source":
            stack = 0
            each: types.FrameType | None = frame
            while each is not None:
                stack += bool(_file(each))
                each = each.f_back
            depths.append(stack)

    def way() -> None:
        model, x = nn.Sequential(Layer(), Layer()).eval(), torch.randn(4, 8)
        piecework.compile(model, (x,), config={"backend": "eager"})(x)

    way()  # what is imported on the way is no part of it
    sys.setprofile(watch)
    try:
        way()
    finally:
        sys.setprofile(None)
    assert max(depths) <= DEPTH
    assert len(files) <= FILES, sorted(files)
