"""What a model may ask of an argument beside its values: each attribute and argument-less method of ``torch.Tensor``, against tensors that differ in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

import piecework
from piecework.errors import CaptureError, PieceworkError

#: A trace answers for the stand-ins that it computes with, or torch takes these for granted and guards nothing for them; or deprecated.
OF_STAND_INS = {
    *("_has_symbolic_sizes_strides", "_python_dispatch", "storage_type()", "storage_offset()"),
    *("is_leaf", "grad_fn", "retains_grad", "_base", "_is_view()", "_backward_hooks"),
}
ANSWERS = (type(None), bool, int, float, str, tuple, type, torch.dtype, torch.device, torch.layout)


def _asked() -> dict[str, object]:
    """What can be asked → the answer of a plain tensor, where that is a value."""
    found: dict[str, object] = {}
    plain = torch.randn(4, 3)
    with warnings.catch_warnings(action="ignore"):
        for name in dir(torch.Tensor):
            try:
                value = getattr(plain, name)
                answer = value() if callable(value) else value
            except Exception:  # noqa: BLE001 - it needs arguments, or another kind of tensor
                continue
            if isinstance(answer, ANSWERS):
                found[f"{name}()" if callable(value) else name] = answer
    return {name: answer for name, answer in found.items() if name not in OF_STAND_INS}


ASKED = _asked()


def _variants() -> dict[str, torch.Tensor]:
    found = {
        "offset": torch.randn(9, 3)[2:6],
        "leaf": torch.randn(4, 3, requires_grad=True),
        "result": torch.randn(4, 3, requires_grad=True) * 1,
        "hooked": torch.randn(4, 3, requires_grad=True),
        "transposed": torch.randn(3, 4).t(),
        "double": torch.randn(4, 3).double(),
        "shared": torch.randn(4, 3).share_memory_(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "parameter": torch.nn.Parameter(torch.randn(4, 3)),
        "frozen": torch.nn.Parameter(torch.randn(4, 3), requires_grad=False),
        "negated": torch._neg_view(torch.randn(4, 3)),
        "larger": torch.randn(6, 3),
        "single": torch.randn(1, 3),
        "graded": torch.randn(4, 3),
    }
    found["hooked"].register_hook(lambda grad: grad)
    found["graded"].grad = torch.ones(4, 3)
    with torch.inference_mode():
        found["inference"] = torch.randn(4, 3)
    return found


def _asking(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    answer = ASKED[name]
    condition = f"x.{name}" if answer is None or isinstance(answer, bool) else f"x.{name} == ANSWER"
    names: dict[str, object] = {"ANSWER": answer}
    exec(f"def forward(x):\n    return x * 2 if {condition} else x * 3\n", names)
    return names["forward"]  # type: ignore[return-value]


def _check(name: str, example: torch.Tensor) -> None:
    forward = _asking(name)
    with warnings.catch_warnings(action="ignore"):
        try:
            forward(example)
            stitched = piecework.compile(forward, (example,), config={"backend": "eager"})
        except (RuntimeError, CaptureError):
            return
        for kind, variant in _variants().items():
            try:
                actual = stitched(variant)
            except PieceworkError:
                continue
            expected = forward(variant)
            assert actual.dtype == expected.dtype, f"{name}, {kind}"
            assert torch.equal(actual, expected), f"{name}, {kind}"


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", sorted(name for name in ASKED if not name.startswith("_")))
def test_what_is_asked_of_a_tensor_is_answered_for_each_call(name: str) -> None:
    for kind in ("larger", "leaf", "parameter", "expanded", "offset"):
        _check(name, _variants()[kind])
