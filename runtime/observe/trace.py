"""Artifacts and timed scopes in torch's structured trace, made only if somebody traces."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from piecework.runtime import torch_compat


def artifact(name: str, text: Callable[[], str]) -> None:
    """Add the artifact ``piecework_<name>`` to the trace; ``text`` is called only if there is one."""
    torch_compat.trace_artifact(f"piecework_{name}", text)


def timed(name: str) -> AbstractContextManager[object]:
    """A scope ``piecework.<name>`` in torch's compile-time events."""
    return torch_compat.timed_scope(f"piecework.{name}")
