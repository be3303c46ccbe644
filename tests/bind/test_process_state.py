"""Models whose code asks torch about the process: the stitched model gives what the model gives, or refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import CaptureError, InputError

READ: dict[str, Callable[[], object]] = {
    "deterministic": lambda: torch.are_deterministic_algorithms_enabled(),
    "filled": lambda: torch.utils.deterministic.fill_uninitialized_memory,
    "benchmark": lambda: torch.backends.cudnn.benchmark,
    "mkldnn": lambda: torch.backends.mkldnn.enabled,
    "tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "autocast dtype": lambda: torch.get_autocast_dtype("cpu") == torch.float16,
    "autocast cache": lambda: torch.is_autocast_cache_enabled(),
    "recursion": lambda: sys.getrecursionlimit() > 8500,
    "digits": lambda: sys.get_int_max_str_digits() > 8500,
}


def set_backend(backend: object, name: str, on: bool) -> None:
    """Set one of torch's flags, also where torch's own test lists were imported, which forbid it."""
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        setattr(backend, name, on)


WRITE: dict[str, Callable[[bool], object]] = {
    "deterministic": torch.use_deterministic_algorithms,
    "filled": lambda on: setattr(torch.utils.deterministic, "fill_uninitialized_memory", on),
    "benchmark": lambda on: set_backend(torch.backends.cudnn, "benchmark", on),
    "mkldnn": lambda on: set_backend(torch.backends.mkldnn, "enabled", on),
    "tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "autocast dtype": lambda on: torch.set_autocast_dtype(
        "cpu", torch.float16 if on else torch.bfloat16
    ),
    "autocast cache": torch.set_autocast_cache_enabled,
    "recursion": lambda on: sys.setrecursionlimit(9000 if on else 8000),
    "digits": lambda on: sys.set_int_max_str_digits(9000 if on else 8000),
}


class Asking(torch.nn.Module):
    """Adds one where the process is set so."""

    def __init__(self, read: Callable[[], object]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.read() else x - 1


@pytest.mark.parametrize("ask", [torch.is_grad_enabled, lambda: torch.is_grad_enabled()])
def test_code_that_asks_for_the_grad_mode_is_served_where_it_is_as_in_the_trace(
    ask: Callable[[], object],
) -> None:
    model, x = Asking(ask).eval(), torch.randn(3)
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


class Viewing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x._base is None else x - 1


def test_code_that_asks_what_a_tensor_is_a_view_of_is_refused() -> None:
    with pytest.raises(CaptureError, match="_base"):
        piecework.compile(Viewing(), (torch.randn(3),), config=EAGER)


@pytest.fixture(params=sorted(READ))
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    frames, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    before = bool(READ[request.param]())
    WRITE[request.param](before)  # other tests and libraries set limits too
    yield request.param
    WRITE[request.param](before)
    sys.setrecursionlimit(frames)
    sys.set_int_max_str_digits(digits)


def test_a_setting_of_torch_that_the_code_asks_for_is_watched(setting: str) -> None:
    model, x = Asking(READ[setting]).eval(), torch.randn(3)
    was = bool(READ[setting]())
    stitched = piecework.compile(model, (x,), config=EAGER)
    WRITE[setting](not was)
    assert bool(READ[setting]()) is not was
    with pytest.raises(InputError, match="when the model was traced"):
        stitched(x)
    WRITE[setting](was)
    assert torch.equal(stitched(x), model(x))


def test_a_setting_that_nobody_asks_for_may_change(setting: str) -> None:
    model, x = torch.nn.Linear(3, 3).eval(), torch.randn(2, 3)
    stitched = piecework.compile(model, (x,), config=EAGER)
    WRITE[setting](not READ[setting]())
    assert torch.equal(stitched(x), model(x))


VARIABLES: dict[str, Callable[[], object]] = {
    "item": lambda: os.environ["PIECEWORK_TRIED"] != "1",
    "get": lambda: os.environ.get("PIECEWORK_TRIED", "1") != "1",
    "in": lambda: "PIECEWORK_OTHER" in os.environ,
    "getenv": lambda: os.getenv("PIECEWORK_TRIED", "1") != "1",
    "getenv of nothing": lambda: os.getenv("PIECEWORK_OTHER") is not None,
    "getenv with a default": lambda: os.getenv("PIECEWORK_OTHER", "1") != "1",
}


@pytest.mark.parametrize("way", VARIABLES)
def test_a_variable_of_the_environment_that_the_code_asks_for_is_watched(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_TRIED", "1")
    monkeypatch.delenv("PIECEWORK_OTHER", raising=False)
    model, x = Asking(VARIABLES[way]).eval(), torch.randn(3)
    try:
        stitched = piecework.compile(model, (x,), config=EAGER)
    except CaptureError:
        return
    assert torch.equal(stitched(x), x - 1)
    for name in ("PIECEWORK_TRIED", "PIECEWORK_OTHER"):
        monkeypatch.setenv(name, "2")
    assert torch.equal(model(x), x + 1)
    with pytest.raises(InputError, match="when the model was traced"):
        stitched(x)
