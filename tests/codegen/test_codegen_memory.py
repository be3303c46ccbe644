"""A process that emits and compiles again and again keeps nothing of piecework's for what is gone."""

from __future__ import annotations

import gc
import linecache
import tracemalloc
import weakref
from pathlib import Path

import torch
import torch.fx
from fx_graphs import module_of

import piecework
from piecework.codegen import compile_execution_fn, generate_source, verify

CODEGEN = str(Path(piecework.__file__).parent / "codegen" / "*")
CODEGEN_BIND = CODEGEN.replace("*", "stitch/bind.py")
OWN = "<piecework:"


def emit_and_run(number: int) -> None:
    """Another text, other constants and another function each time."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    parts = graph.call_method("chunk", (x, 2))
    parts.meta["example_value"] = (torch.ones(2), torch.ones(2))
    left = graph.call_function(torch.add, (parts, number), name=f"value_{number}")
    graph.output((left, torch.device("cpu"), lambda: number))
    left.args = (x, number)
    gm = module_of(graph)
    source = generate_source(gm)
    verify(source, gm)
    function = compile_execution_fn(source.code, {}, (), source.consts)
    result = function(torch.ones(4))
    assert isinstance(result, tuple) and float(result[0][0]) == 1 + number


def own_files() -> set[str]:
    return {name for name in linecache.cache if name.startswith(OWN)}


def test_emission_keeps_nothing() -> None:
    files: set[str] = set()
    tracemalloc.start(1)
    try:
        # Black keeps some hundred objects and replaces them in time, so that its first calls are traced as well.
        for number in range(100):
            emit_and_run(number)
        gc.collect()
        files = own_files()
        before = tracemalloc.take_snapshot()
        for number in range(100, 300):
            emit_and_run(number)
        gc.collect()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    assert own_files() <= files
    # tracemalloc itself keeps the names of files whose frames it saw, and `bind` makes those.
    ours = (tracemalloc.Filter(True, CODEGEN), tracemalloc.Filter(False, CODEGEN_BIND))
    grown = after.filter_traces(ours).compare_to(before.filter_traces(ours), "lineno")
    kept = [str(each) for each in grown if each.count_diff >= 200]
    assert not kept, "once per emission: " + "; ".join(kept)


def test_a_stitched_module_goes_with_its_last_reference() -> None:
    def compiled() -> list[weakref.ref[object]]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        config = piecework.CompilationConfig(backend="eager")
        stitched = piecework.compile(model, (torch.ones(2, 4),), config=config)
        stitched(torch.ones(3, 4))
        return [weakref.ref(each) for each in (stitched, stitched.split_gm, model, stitched.entry)]

    files = own_files()
    gone = [reference for _ in range(3) for reference in compiled()]
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert own_files() <= files
