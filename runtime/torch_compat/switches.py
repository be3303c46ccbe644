"""torch's switches for its compiler, by environment, configuration and ``set_stance``.

Each means here what it means for ``torch.compile``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

#: The stance in which nothing that is compiled runs.
FORCE_EAGER = "force_eager"


def stance_holder() -> object:
    """What has the current stance as ``_stance``, another object after each change; imports nothing."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return frames if hasattr(frames, "_stance") else _Frames()


class _Frames:
    """Dynamo's module of that name, whenever it is imported; until then nobody has set a stance."""

    @property
    def _stance(self) -> object:
        return getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)


def stance_name() -> str:
    """The current stance, such as ``"default"`` or ``"force_eager"``."""
    return str(getattr(stance_holder()._stance, "stance", "default"))  # type: ignore[attr-defined]


def compiler_off() -> str | None:
    """The switch that keeps ``torch.compile`` from compiling anything now; None for none."""
    by_variable = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    if getattr(sys.modules.get("torch._dynamo.config"), "disable", by_variable):
        return "TORCH_COMPILE_DISABLE=1" if by_variable else "torch._dynamo.config.disable"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE=1"
    stance = stance_name()
    if stance in (FORCE_EAGER, "eager_on_recompile"):
        return f'torch.compiler.set_stance("{stance}")'
    return None


def may_recompile() -> bool:
    return compiler_off() is None and stance_name() != "fail_on_recompile"


def in_default_stance(call: Callable[[], T]) -> T:
    """``call()`` while torch compiles whatever it is given: this compilation was asked for."""
    stance = stance_holder()._stance  # type: ignore[attr-defined]
    if stance is None or (stance.stance == "default" and stance.backend is None):
        return call()

    # Outside of any region that torch compiles: inside one, a stance can't be set.
    @torch.compiler.disable
    def run() -> T:
        with torch.compiler.set_stance("default"):
            return call()

    return run()
