"""Torch's own switches for its compiler: ``TORCH_COMPILE_DISABLE=1`` (``torch._dynamo.config.disable``), ``TORCHDYNAMO_DISABLE=1`` and
``torch.compiler.set_stance``; what each of them means here is what it means for ``torch.compile``.
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
    """What has the current stance as its attribute ``_stance``: an object that is another one after each change. Nothing is imported for it."""
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
    """The switch because of which ``torch.compile`` would compile nothing now; None where it would."""
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
    """Whether something may be compiled for a call that nothing compiled before serves."""
    return compiler_off() is None and stance_name() != "fail_on_recompile"


def in_default_stance(call: Callable[[], T]) -> T:
    """``call()`` while torch compiles whatever it is given, with the backend that it is given.

    For a compilation that was asked for: it is no recompilation that ``fail_on_recompile`` is about, none of the runs that
    ``eager_then_compile`` counts, and ``force_backend`` names what stands for a user's own ``torch.compile``.
    """
    stance = stance_holder()._stance  # type: ignore[attr-defined]
    if stance is None or (stance.stance == "default" and stance.backend is None):
        return call()

    # Outside of any region that torch compiles: inside one, a stance can't be set.
    @torch.compiler.disable
    def run() -> T:
        with torch.compiler.set_stance("default"):
            return call()

    return run()
