"""Which statement kernels are captured for: they carry its name, layer and line."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from piecework.runtime import torch_compat
from piecework.scope import set_for

_STATEMENT: contextvars.ContextVar[Mapping[str, object] | None] = contextvars.ContextVar(
    "statement", default=None
)


@contextmanager
def kernels_of(what: str, layer: str, line: int, graph: str) -> Iterator[None]:
    """Mark what is captured in the block as the work of one statement.

    Args:
        what: the piece or the operator that it calls.
        layer: its module; inside a statement that calls a shared function, that statement's counts.
        line: where it is in the emitted source.
        graph: mode and batch of what is captured.
    """
    layer = str((_STATEMENT.get() or {}).get("layer") or layer)
    name = f"{what} {layer}".strip()
    statement = {"name": name, "layer": layer, "line": line, "graph": graph}
    with set_for(_STATEMENT, statement), torch_compat.mark_kernels(statement):
        yield


def marked_as_the_statement() -> AbstractContextManager[None]:
    """The marks of the statement around a capture that begins inside it."""
    return torch_compat.mark_kernels(_STATEMENT.get() or {})
