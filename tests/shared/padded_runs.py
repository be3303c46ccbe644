"""A function under padding. In: a function of tensors and example arguments. Out: what the rows analysis says of it, and whether a padded run agrees.

The graph has one call, with the batch in dimension 0 of some tensors; operators are taken apart by the analysis itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from piecework.runtime.analysis.rows.verdict import Verdict, rows_of

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A function and what it is called with.

    Attributes:
        function: takes the leaves of its arguments.
        leaves: the arguments, flat; tensors and anything else.
        batched: which leaves carry the batch in dimension 0; all of one size there.
    """

    function: Function
    leaves: tuple[Any, ...]
    batched: tuple[int, ...]

    @property
    def rows(self) -> int:
        return int(self.leaves[self.batched[0]].shape[0])

    def with_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
        """The leaves, copied, with the batched ones changed."""
        copied = [each.clone() if isinstance(each, torch.Tensor) else each for each in self.leaves]
        return [
            change(each).contiguous() if number in self.batched else each
            for number, each in enumerate(copied)
        ]


def graph_of(case: Case) -> tuple[torch.fx.GraphModule, set[str]]:
    """One call as a graph with a symbolic batch, and the name of its symbol."""
    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env)
    graph = torch.fx.Graph()
    symbols: set[str] = set()
    nodes: list[Any] = []
    batch = None
    for number, each in enumerate(case.leaves):
        if not isinstance(each, torch.Tensor):
            nodes.append(each)
            continue
        node = graph.placeholder(f"arg{number}")
        if number in case.batched:
            if batch is None:
                kinds = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (each.dim() - 1)
                fake = mode.from_tensor(
                    each.contiguous(),
                    symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds),
                    source=ConstantSource("batch"),
                )
                batch = fake.shape[0]
                symbols.add(str(batch.node.expr))
            else:
                with mode:
                    fake = torch.empty((batch, *each.shape[1:]), dtype=each.dtype)
        else:
            fake = mode.from_tensor(each, static_shapes=True)
        node.meta["example_value"] = fake
        nodes.append(node)
    graph.output(graph.call_function(case.function, tuple(nodes)))
    return torch.fx.GraphModule(torch.nn.Module(), graph), symbols


def verdict_of(case: Case) -> Verdict:
    # Each case has a shape environment of its own, so nothing is found in torch's cache, and looking takes longest.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        graph, symbols = graph_of(case)
        return rows_of(graph, symbols)


def flat(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def disagreement(case: Case, verdict: Verdict) -> str | None:
    """What a padded run changes although the verdict says that nothing does; None if it agrees or says so.

    Raises:
        Exception: whatever the function raises for one of the two batches.
    """
    if verdict.refused is not None:
        return None
    alone = case.with_rows(lambda x: x)
    expected = flat(case.function(*alone))
    for tail in _tails(case):
        padded = case.with_rows(lambda x, tail=tail: torch.cat([x, tail(x)]))
        found = flat(case.function(*padded))
        reasons = verdict.results[0]
        if reasons is None:
            for number, (one, two) in enumerate(zip(expected, found, strict=True)):
                said = _difference(one, two)
                if said is not None:
                    return f"result {number}: {said}"
        for name, reason in verdict.written.items():
            number = int(name.removeprefix("arg"))
            if reason is None:
                said = _difference(alone[number], padded[number])
                if said is not None:
                    return f"written argument {number}: {said}"
        written = set(verdict.written)
        for number, each in enumerate(case.leaves):
            unwritten = isinstance(each, torch.Tensor) and f"arg{number}" not in written
            if unwritten and not _same(alone[number], each):
                return f"argument {number} is written to, and nothing says so"
    return None


def _tails(case: Case) -> Sequence[Callable[[torch.Tensor], torch.Tensor]]:
    """Rows to pad with: those of the batch in another order, twice as many, and none that were there."""
    return (
        lambda x: x.flip(0),
        lambda x: torch.cat([x, x.flip(0)[:1]]),
        lambda x: x.flip(0) * 3 if x.is_floating_point() or x.is_complex() else x[:1],
    )


def _difference(one: Any, two: Any) -> str | None:
    """Whether ``two`` is not what ``one`` is, in front."""
    if not isinstance(one, torch.Tensor):
        return None if one == two or one is two else f"{one} became {two}"
    if one.dim() != two.dim():
        return f"shape {tuple(one.shape)} became {tuple(two.shape)}"
    for dim, size in enumerate(one.shape):
        if two.shape[dim] < size:
            return f"shape {tuple(one.shape)} became {tuple(two.shape)}"
        two = two.narrow(dim, 0, size)
    return None if _same(one, two) else "values changed"


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype.is_floating_point or one.dtype.is_complex:
        return torch.allclose(one, two, rtol=1e-3, atol=1e-4, equal_nan=True)
    return torch.equal(one, two)
