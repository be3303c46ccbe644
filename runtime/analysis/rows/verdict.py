"""Whether rows of a batch stay apart. In: a traced graph and the symbols of its batch size. Out: for each result, and each argument that is written to, why a padded batch would change it, or None.

The graph is run on fake values of its own, operator by operator as torch's dispatcher sees them, and each must be in the table; no
data is touched, and the trace learns nothing from it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.fx

from piecework.codegen.graph.origin import source_line, value_of
from piecework.runtime import torch_compat
from piecework.runtime.analysis.rows.follow import Follower
from piecework.runtime.analysis.rows.walk import Inspect, Walk
from piecework.runtime.analysis.state import Batch


@dataclass(frozen=True, slots=True)
class Verdict:
    """What padding would change.

    Attributes:
        refused: why nothing at all may be padded; None if results decide.
        results: for each value that the graph returns, why it would change.
        written: placeholders that something writes to, each with why what it holds afterwards would change.
        complaints: what ``inspect`` said.
        undeclared: an operator does not say what it does with rows, which is why nothing may be padded.
        by_context: an operator reads the batch's real size from the forward context.
    """

    refused: str | None
    results: tuple[str | None, ...] = ()
    written: Mapping[str, str | None] = field(default_factory=dict)
    complaints: tuple[str, ...] = ()
    undeclared: bool = False
    by_context: bool = False

    @property
    def reason(self) -> str | None:
        """The first reason not to pad, if any."""
        found = (self.refused, *self.results, *self.written.values())
        return next((each for each in found if each is not None), None)


def rows_of(
    graph: torch.fx.GraphModule,
    symbols: Collection[str],
    inspect: Inspect | None = None,
    *,
    outside: Collection[str] = (),
) -> Verdict:
    """Follow the rows of a batch through a graph.

    Args:
        graph: with fake values in its nodes, as Dynamo gives it, whole or a piece.
        symbols: torch's symbols of the batch size.
        inspect: asked about each operator, its rule and its answers; what it says is gathered.
        outside: operators by name whose results are taken for arguments, whatever they do with rows.
    """
    asked = (graph, frozenset(symbols), inspect, frozenset(outside))
    found = _follow(*asked, apart=True)
    # A number of ours may be one that the model's own checks don't expect.
    return found if found.refused is None or found.results else _follow(*asked, apart=False)


def _follow(
    graph: torch.fx.GraphModule,
    symbols: frozenset[str],
    inspect: Inspect | None,
    outside: frozenset[str],
    *,
    apart: bool,
) -> Verdict:
    nodes = graph.graph.find_nodes(op="placeholder")
    values = [value_of(node) for node in nodes]
    fresh = torch_compat.Refaked(values, symbols, apart=apart)
    names = [found for each in symbols if (found := fresh.name_of(each)) is not None]
    walk = Walk(fresh, Batch(names), inspect, outside)
    try:
        inputs = [fresh.value(value) for value in values]
    except TypeError as error:
        return Verdict(f"an argument is {error}")
    for value in inputs:
        walk.enter(value)
    follower = Follower(graph, walk)
    with fresh.watching(walk.operator):
        try:
            results = follower.run(*inputs)
        except Exception as error:  # noqa: BLE001 - on fakes anything is raised
            return Verdict(f"{_told(follower.node)} can't be followed: {_line(error)}")
    if fresh.fixed(symbols):
        return Verdict("the batch size is asked for as a number, or taken for another size")
    listed = results if isinstance(results, (list, tuple)) else [results]
    written = {
        node.name: walk.state_of(value).mixed
        for node, value in zip(nodes, inputs, strict=True)
        if isinstance(value, torch.Tensor) and walk.memory_of(value).written
    }
    return Verdict(
        walk.refused,
        tuple(map(walk.reason_of, listed)),
        written,
        tuple(walk.complaints),
        walk.undeclared,
        walk.by_context,
    )


def _told(node: torch.fx.Node | None) -> str:
    if node is None:
        return "the graph"
    line = source_line(node)
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name} ({line})" if line else name


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
