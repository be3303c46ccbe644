"""Benchmarks run, and their contenders return what the model returns: each at its smallest, in a process of its own. Times are not looked at."""

from __future__ import annotations

import pytest
import torch
from processes import python

import piecework
from piecework.bench.contenders import FlatGraph

SMALLEST = {
    "stitching": "stitching.run([3], rounds=2)",
    "emission": "emission.run([40], rounds=1)",
    "host_overhead": "host_overhead.run([2], [4], rounds=2, stock=False, seconds=0.1)",
    "decode_step": "decode_step.run([2], [1], rounds=2, stock=False, seconds=0.1)",
}


@pytest.mark.inductor
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs(name: str, tmp_path) -> None:
    code = f"from piecework.bench import {name}; result = {SMALLEST[name]}; print(sorted({{row.contender for row in result.rows}}))"
    said = python("-c", code, cwd=tmp_path).stdout
    assert ("piecework" in said and "limit" in said) or name == "emission"


@pytest.mark.parametrize("batch", [3, 4])
def test_contenders_take_the_forms_of_their_batch(batch: int) -> None:
    model, x = torch.nn.Linear(8, 8).requires_grad_(False), torch.randn(batch, 8)
    config = {"backend": "eager", "compile_sizes": [4], "compile_ranges_endpoints": [16]}
    stitched = piecework.compile(model, (torch.randn(5, 8),), config=config)
    graph = FlatGraph(stitched, batch)
    assert torch.equal(graph.split_gm(*graph.inputs(x))[0], model(x))
