"""Which sizes ``capture`` captures: tables of what the field documents, from configuration, limits and arguments."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs import CUDAGraphMode
from piecework.runtime.graphs.plan.batch_shape import BatchShape, ResultRule, StagedInput
from piecework.runtime.graphs.plan.options import CaptureOptions, plan_capture

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
BOTH, FOURS = "FULL_AND_PIECEWISE", {"max_num_seqs": 1, "uniform_decode_query_len": 4}
STEPS = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


def shape(low: int = 1, high: int | None = None) -> BatchShape:
    x = StagedInput(0, "x", torch.zeros(1), 0, (1,))
    rules, symbols = (ResultRule((0,)),), frozenset({"s0"})
    return BatchShape(("x",), (x,), {}, (), {}, rules, symbols, low, high, (), "s0")


def plan(sizes=None, at=None, config=None, **options):
    chosen = CompilationConfig(backend="eager", **(config or {}))
    return plan_capture(at or shape(), chosen, sizes, CaptureOptions(**options))[0]


# configuration, sizes given, limits → sizes
TABLE = [
    ({}, None, None, STEPS),
    ({"max_cudagraph_capture_size": 1}, None, None, [1]),
    ({"max_cudagraph_capture_size": 3}, None, None, [1, 2, 3]),
    ({"max_cudagraph_capture_size": 4}, None, None, [1, 2, 4]),
    ({"max_cudagraph_capture_size": 20}, None, None, [1, 2, 4, 8, 16, 20]),
    ({"max_cudagraph_capture_size": 24}, None, None, [1, 2, 4, 8, 16, 24]),
    ({"max_cudagraph_capture_size": 6}, None, {}, [1, 2, 4, 6]),
    ({"cudagraph_capture_sizes": [8, 2, 8]}, None, None, [2, 8]),
    ({"cudagraph_capture_sizes": [8, 2]}, [5, 3, 5], None, [3, 5]),
    # the largest is min(2 * max_num_seqs * query length, 512, max_num_batched_tokens)
    ({}, None, {"max_num_seqs": 8}, [1, 2, 4, 8, 16]),
    ({}, None, {"max_num_seqs": 1024}, STEPS),
    ({}, None, {"max_num_seqs": 16, "max_num_batched_tokens": 16}, [1, 2, 4, 8, 16]),
    ({"max_cudagraph_capture_size": 8}, None, {"max_num_seqs": 64}, [1, 2, 4, 8]),
    ({"cudagraph_capture_sizes": [1, 24]}, None, {"max_num_seqs": 8}, [1, 24]),
    # speculation: whole requests up to the most, beside the usual steps
    (
        {"cudagraph_mode": "FULL"},
        None,
        {"max_num_seqs": 4, "uniform_decode_query_len": 3},
        [1, 2, 3, 4, 6, 8, 12, 16, 24],
    ),
    (
        {"cudagraph_mode": "FULL_AND_PIECEWISE"},
        [1, 2, 3, 10],
        {"max_num_seqs": 4, "uniform_decode_query_len": 4},
        [1, 2, 3, 10],  # decode batches alone are rounded
    ),
    (
        {"cudagraph_mode": "PIECEWISE"},
        [1, 2, 3],
        {"max_num_seqs": 4, "uniform_decode_query_len": 4},
        [1, 2, 3],
    ),
]


@pytest.mark.parametrize(("config", "sizes", "runtime", "expected"), TABLE)
def test_sizes(config, sizes, runtime, expected) -> None:
    options = {} if runtime is None else {"runtime": runtime}
    assert list(plan(sizes, config=config, **options).capture_sizes) == expected


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda: plan([]), StaticGraphError, "no size to capture"),
        (lambda: plan([0]), ConfigError, "positive whole numbers, not 0"),
        (lambda: plan([4, 9], shape(2, 8)), ConfigError, "size 9 can't be captured.*from 2 to 8"),
        (lambda: plan(None, shape(600)), StaticGraphError, "no size to capture"),
        (lambda: plan([1, 9000, 10000], runtime={}), ConfigError, "no batch reaches 9000, 10000 "),
        (lambda: plan([2], mode=BOTH, runtime=FOURS), ConfigError, "multiple of 4"),
        (lambda: plan([2], axes={"a": ()}), ConfigError, "every axis needs at least one value"),
        (lambda: plan([2], lora_counts=(2, 1)), ConfigError, "must ascend"),
    ],
)
def test_what_can_not_be_captured_is_said(call, error, why: str) -> None:
    with pytest.raises(error, match=why):
        call()
