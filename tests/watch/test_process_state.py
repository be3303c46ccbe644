"""Models whose code asks torch about the process: the stitched model gives what the model gives, or refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import InputError


def set_benchmark(on: bool) -> None:
    """Also where torch's own test lists were imported, which forbid it."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        torch.backends.cudnn.benchmark = on


#: What code may ask of the process, and what sets it.
SETTINGS: dict[str, tuple[Callable[[], object], Callable[[bool], object]]] = {
    "deterministic": (
        lambda: torch.are_deterministic_algorithms_enabled(),
        torch.use_deterministic_algorithms,
    ),
    "benchmark": (lambda: torch.backends.cudnn.benchmark, set_benchmark),
    "recursion": (
        lambda: sys.getrecursionlimit() > 8500,
        lambda on: sys.setrecursionlimit(9000 if on else 8000),
    ),
}


class Asking(torch.nn.Module):
    """Adds one where the process is set so."""

    def __init__(self, read: Callable[[], object]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.read() else x - 1


def test_code_that_asks_for_the_grad_mode_is_served_where_it_is_as_in_the_trace() -> None:
    model, x = Asking(lambda: torch.is_grad_enabled()).eval(), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    with pytest.raises(InputError, match="no_grad"):
        stitched(x)
    with torch.no_grad():
        assert torch.equal(stitched(x), model(x))


class Checkpointing(torch.nn.Module):
    gradient_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return torch.utils.checkpoint.checkpoint(torch.sin, x)
        return torch.sin(x)


def test_code_that_asks_whether_to_checkpoint_is_served_in_any_grad_mode() -> None:
    model, x = Checkpointing().eval(), torch.randn(3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    assert torch.equal(stitched(x), model(x))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_the_code_asks_for_is_watched_where_stock_watches_it(
    name: str, request: pytest.FixtureRequest
) -> None:
    read, write = SETTINGS[name]
    was, frames = bool(read()), sys.getrecursionlimit()
    request.addfinalizer(lambda: (write(was), sys.setrecursionlimit(frames)))
    write(was)  # other tests and libraries set limits too
    model, x = Asking(read).eval(), torch.randn(3)
    torch.compiler.reset()
    stock = torch.compile(model, backend="eager", fullgraph=True)
    stitched = piecework.compile(model, (x,), config=EAGER)
    with torch.no_grad():
        assert torch.equal(stock(x), stitched(x))
        write(not was)
        assert bool(read()) is not was
        if torch.equal(stock(x), model(x)):
            with pytest.raises(InputError, match="when the model was traced"):
                stitched(x)
        write(was)
        assert torch.equal(stitched(x), model(x))


GLOBAL: dict[str, Callable[[bool], object]] = {
    "default_dtype": lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
    "deterministic_algorithms": torch.use_deterministic_algorithms,
    "allow_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "allow_fp16_reduce": lambda on: setattr(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", not on
    ),
    "allow_bf16_reduce": lambda on: setattr(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", not on
    ),
}


@pytest.mark.parametrize("name", GLOBAL)
def test_global_state_that_torchs_own_guard_compares_is_watched(name: str) -> None:
    GLOBAL[name](False)  # torch 2.15 tells a precision that was set from one that never was
    model, x = torch.nn.Linear(3, 3).eval(), torch.randn(2, 3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    right = stitched(x)
    GLOBAL[name](True)
    try:
        told = "(allow_tf32|cuda_matmul_precision)" if name == "allow_tf32" else name
        with pytest.raises(InputError, match=f"torch's {told} was .* when the model was traced"):
            stitched(x)
    finally:
        GLOBAL[name](False)
    assert torch.equal(stitched(x), right)
