"""Graph passes of a user's own, run inside Inductor: what one is, who runs it, and what it may know of the compilation."""

from __future__ import annotations

from piecework.runtime.passes.interface import (
    CallableInductorPass,
    InductorPass,
    PassContext,
    as_inductor_pass,
    get_pass_context,
    pass_context,
)
from piecework.runtime.passes.manager import PassReport, PassRun, PostGradPassManager

__all__ = [
    "CallableInductorPass",
    "InductorPass",
    "PassContext",
    "PassReport",
    "PassRun",
    "PostGradPassManager",
    "as_inductor_pass",
    "get_pass_context",
    "pass_context",
]
