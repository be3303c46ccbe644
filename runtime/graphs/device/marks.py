"""What runs now, for whoever captures it. In: a statement of emitted source. Out: the kernels that are captured for it carry its name, layer and line.

A statement may be captured as a part of a graph, or hold the capture of one: both ways its kernels are marked.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType

from piecework.runtime import torch_compat
from piecework.scope import set_for

_NONE: Mapping[str, object] = MappingProxyType({})
_STATEMENT: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "statement", default=_NONE
)


@contextmanager
def kernels_of(what: str, layer: str, line: int, graph: str) -> Iterator[None]:
    """Mark what is captured in the block as the work of one statement.

    Args:
        what: the piece or the operator that it calls.
        layer: the module that it stands for; inside a statement that calls a function shared by layers, that one's counts.
        line: where it is in the emitted source.
        graph: mode and batch of what is captured.
    """
    layer = str(_STATEMENT.get().get("layer") or layer)
    name = f"{what} {layer}".strip()
    statement = {"name": name, "layer": layer, "line": line, "graph": graph}
    with set_for(_STATEMENT, statement), torch_compat.mark_kernels(statement):
        yield


def marked_as_the_statement() -> AbstractContextManager[None]:
    """Mark what is captured in the block as the work of the statement around it; for a capture that begins inside one."""
    return torch_compat.mark_kernels(_STATEMENT.get())
