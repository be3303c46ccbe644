"""A call keeps nothing alive afterwards, and never more than the interpreter (target B7)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from models import Block, Layers

import piecework

alive: list[int] = []
seen: list[weakref.ref[torch.UntypedStorage]] = []


@piecework.splitting_op("lifetimes::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Copies, and counts the bytes of all activations handed to it so far that are still there."""
    torch.add(left, right, out=out)
    known = {ref() for ref in seen} - {None}
    for tensor in (left, right, out):
        if tensor.untyped_storage() not in known:
            known.add(tensor.untyped_storage())
            seen.append(weakref.ref(tensor.untyped_storage()))
    alive.append(sum(s.nbytes() for ref in seen if (s := ref()) is not None))


class Model(Layers):
    def __init__(self, layers: int = 6) -> None:
        torch.manual_seed(0)
        super().__init__(Block(mix) for _ in range(layers))


def peaks(call: Callable[[], object]) -> list[int]:
    """Bytes of activations alive at each operator of one call."""
    alive.clear()
    seen.clear()
    with torch.no_grad():
        call()
    return list(alive)


def stitch(x: torch.Tensor, backend: str = "eager", layers: int = 6) -> piecework.StitchedModule:
    config = {"backend": backend}
    return piecework.compile(Model(layers), (x,), splitting_ops=["lifetimes::mix"], config=config)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_no_more_is_alive_than_under_the_interpreter(backend: str) -> None:
    stitched, x = stitch(torch.randn(4, 8), backend), torch.randn(16, 8)
    nodes = stitched.split_gm.graph.find_nodes(op="placeholder")
    inputs = []
    for node, source in zip(nodes, stitched.traces[0].entry.inputs, strict=True):
        tensor = getattr(source, "tensor", None)
        symbolic = isinstance(node.meta["example_value"], torch.SymInt)
        inputs.append(tensor if tensor is not None else 16 if symbolic else x)
    interpreter = torch.fx.Interpreter(stitched.split_gm, garbage_collect_values=True)
    reference = peaks(lambda: interpreter.run(*inputs))
    ours = peaks(lambda: stitched(x))
    assert len(ours) == len(reference) == 6
    pairs = list(zip(ours, reference, strict=True))
    assert all(mine <= theirs for mine, theirs in pairs), pairs
    assert max(ours) < 3 * min(ours), "activations pile up with depth"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_nothing_is_alive_after_the_call(backend: str) -> None:
    stitched = stitch(torch.randn(4, 8), backend)
    batch = [torch.randn(16, 8)]
    arrived = weakref.ref(batch[0])
    gc.disable()
    try:
        peaks(lambda: stitched(batch[0]))
        assert [ref() for ref in seen if ref() is not None] == []
        batch.clear()
        assert arrived() is None
    finally:
        gc.enable()


def test_the_trace_keeps_no_example_tensor() -> None:
    x = torch.randn(4, 8)
    arrived = weakref.ref(x)
    stitched = stitch(x, layers=2)
    del x
    torch.compiler.reset()
    gc.collect()
    assert arrived() is None
    stitched(torch.randn(5, 8))


def choosing(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] > 4 else x - 1


def test_a_call_that_another_trace_serves_keeps_nothing() -> None:
    stitched = piecework.compile(choosing, (torch.randn(8, 8),), config={"backend": "eager"})
    stitched(torch.randn(2, 8))
    gc.collect()
    gc.disable()  # what a cycle keeps is not to be collected
    try:
        for rows in (8, 2, 8, 2):
            x = torch.randn(rows, 8)
            given = weakref.ref(x)
            with torch.no_grad():
                stitched(x)
            del x
            assert given() is None, rows
    finally:
        gc.enable()
    assert len(stitched.traces) == 2
