"""What a trace must not change: whatever the forward keeps outside tensors would stop being kept.

Tensors written in place are part of the graph, and fine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
import torch.fx

from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.watch.places import readable

T = TypeVar("T")
_log = logging.getLogger(__name__)

HINT = (
    "write tensors in place (copy_, add_, +=, an index), return what is new, or keep state behind a splitting op: "
    "a captured graph runs none of the forward's Python"
)


class Unsettled(CaptureError):
    """All that a forward writes are plain attributes of modules, set to constants; often its first call does, and the next ones find it done."""

    stores: Sequence[tuple[torch.nn.Module, str, object]] = ()


def settled(run: Callable[[], T], undo: ExitStack) -> T:
    """What ``run`` gives, or gives once attributes of modules are set as a first call sets them; ``undo`` sets them back."""
    try:
        return run()
    except Unsettled as error:
        for module, name, value in error.stores:
            undo.callback(module.__dict__.__setitem__, name, module.__dict__[name])
            module.__dict__[name] = value
        _log.info("set as a first call does, and traced again: %s", error)
    return run()


def refuse_writes(
    gm: torch.fx.GraphModule, example_inputs: Sequence[object], arguments: Mapping[str, str]
) -> None:
    """Raise if the trace that is running wrote something that its graph does not write."""
    nodes = gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, example_inputs, strict=True)
    fakes = {id(each): node.meta["example_value"] for node, each in pairs}
    writes = torch_compat.writes_of_trace(
        lambda fake, now: torch_compat.is_same_view(fakes.get(id(now)), fake)
    )
    if not writes:
        return
    stores = [write.store for write in writes if write.store is not None]
    error = (Unsettled if len(stores) == len(writes) else CaptureError)(
        f"forward changes {_place_text(writes[0].place, arguments)}, which a captured graph would not do",
        where=writes[0].line or None,
        hint=HINT,
    )
    if isinstance(error, Unsettled):
        error.stores = stores
    raise error


def _place_text(place: str, arguments: Mapping[str, str]) -> str:
    """A place as a person would call it: ``the model's own state: calls`` for ``L['model'].calls``."""
    own = readable(re.sub(r"\.__dict__\['(\w+)'\]", r".\1", place), arguments)
    if place.startswith("L['model']"):
        return f"the model's own state: {own}"
    if place.startswith(("L['args']", "L['kwargs']")):
        return f"its argument {own}"
    return f"the global {own}" if place.startswith("G[") else own or "an object outside the graph"
