"""A model that can't be compiled with every dimension dynamic: served with the batch alone dynamic, one trace for each other size."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import CaptureError, PieceCompileError
from piecework.runtime.compilers import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig

HERE = "narrower_sizes_under_test"
sys.modules.setdefault(HERE, sys.modules[__name__])
CALLS = itertools.count()


class FixedImages:
    """A compiler that fails where anything but the first dimension of an input is a symbol."""

    name = "fixed_images"

    def compute_hash(self, config: CompilationConfig) -> str:
        return self.name

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        for value in example_inputs:
            if isinstance(value, torch.Tensor) and any(
                isinstance(size, torch.SymInt) for size in value.shape[1:]
            ):
                raise RuntimeError(f"a size of an image is unknown: {tuple(value.shape)}")
        return CompiledPiece(graph)


class Never(FixedImages):
    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        raise RuntimeError(f"call {next(CALLS)}")


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.patches(images).flatten(2).softmax(-1).mean(-1)


class Odd(Images):
    """One that Dynamo can't trace unless the height is a number."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        table = {8: 1.0, 16: 2.0}
        return super().forward(images) * table[images.shape[2]]


def compiled(model: nn.Module, backend: str = f"{HERE}:FixedImages") -> piecework.StitchedModule:
    config = {"backend": backend, "dynamic_shapes_config": {"max_traces": 8}}
    return piecework.compile(model.eval(), (torch.randn(4, 3, 8, 8),), config=config)


def check(stitched: piecework.StitchedModule, model: nn.Module, *shape: int) -> None:
    images = torch.randn(shape[0], 3, *shape[1:])
    torch.testing.assert_close(stitched(images), model(images), rtol=0, atol=0)


def test_a_compiler_that_fails_with_all_sizes_unknown_gets_the_batch_alone() -> None:
    model = Images()
    stitched = compiled(model)
    for rows in (4, 1, 2, 5):
        check(stitched, model, rows, 8, 8)
    traces = len(stitched.traces)
    assert traces <= 2  # a batch of one may have its own
    for height, width in ((12, 8), (8, 12)):  # other images get a trace of their own
        for rows in (3, 4):
            check(stitched, model, rows, height, width)
    assert len(stitched.traces) == traces + 2


def test_a_model_that_looks_a_size_up() -> None:
    model = Odd()
    stitched = compiled(model, "eager")
    for rows, height in ((4, 8), (1, 8), (5, 8), (4, 16), (2, 16)):
        check(stitched, model, rows, height, 8)
    with pytest.raises(KeyError):
        model(torch.randn(4, 3, 12, 8))
    with pytest.raises(piecework.errors.PieceworkError):
        stitched(torch.randn(4, 3, 12, 8))


def test_the_first_failure_is_told_if_nothing_helps() -> None:
    with pytest.raises(PieceCompileError, match="RuntimeError: call 0"):
        compiled(Images(), f"{HERE}:Never")

    class Broken(Images):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(images)

    with pytest.raises(CaptureError, match="graph_break"):
        compiled(Broken(), "eager")


def test_marks_are_not_narrowed() -> None:
    images = torch.randn(4, 3, 8, 8)
    torch._dynamo.mark_dynamic(images, 0)
    torch._dynamo.mark_dynamic(images, 2)
    with pytest.raises(PieceCompileError, match="a size of an image is unknown"):
        piecework.compile(Images().eval(), (images,), config={"backend": f"{HERE}:FixedImages"})
