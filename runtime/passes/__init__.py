"""Graph passes that run inside Inductor. In: a configuration and an aten graph. Out: the graph, changed, and what matched."""

from __future__ import annotations

from piecework.runtime.passes.cleanup import CleanUpPass
from piecework.runtime.passes.context import PassContext, get_pass_context, pass_context
from piecework.runtime.passes.defunctionalize import DefunctionalizationPass
from piecework.runtime.passes.interface import (
    CallableInductorPass,
    InductorPass,
    as_inductor_pass,
)
from piecework.runtime.passes.manager import PassReport, PassRow, PassRun, PostGradPassManager
from piecework.runtime.passes.noop import NoOpEliminationPass

__all__ = [
    "CallableInductorPass",
    "CleanUpPass",
    "DefunctionalizationPass",
    "InductorPass",
    "NoOpEliminationPass",
    "PassContext",
    "PassReport",
    "PassRow",
    "PassRun",
    "PostGradPassManager",
    "as_inductor_pass",
    "get_pass_context",
    "pass_context",
]
