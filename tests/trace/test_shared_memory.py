"""Inputs of a piece that lie in the same memory. In: models that write to one of them, cut in between. Out: what eager does, to results and to arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import piecework
from piecework.codegen.graph.structure import input_signature, structure_of


@piecework.splitting_op("shared_memory_test::through")
def through(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@through.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def write_to_a_part_of_an_argument(x: torch.Tensor) -> torch.Tensor:
    part = x[1:]
    between = through(x * 2)
    part.add_(1)
    return between + x


def write_to_a_part_of_a_result(x: torch.Tensor) -> torch.Tensor:
    whole = x * 2
    part = whole[1:]
    between = through(whole)
    part.add_(1)
    return between + whole


def read_a_part_of_what_is_written(x: torch.Tensor) -> torch.Tensor:
    whole = x * 2
    flat = whole.view(-1)
    between = through(whole)
    whole.add_(1)
    return between.sum() + flat


class Cache(nn.Module):
    """Two views of one buffer, written to on both sides of the cut; every size is fixed but the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(2, 16, 8))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        keys, values = self.cache[0], self.cache[1]
        between = through(x)
        keys.index_copy_(0, rows, between)
        values.index_copy_(0, rows, between * 2)
        return through(keys + values).sum(0) + self.cache.sum(0).sum(0)


@pytest.mark.sample(2)
@pytest.mark.inductor
@pytest.mark.parametrize("backend", ["inductor", "inductor_compile_fx", "eager"])
@pytest.mark.parametrize(
    "function",
    [write_to_a_part_of_an_argument, write_to_a_part_of_a_result, read_a_part_of_what_is_written],
)
def test_writes_are_seen_through_every_name_of_the_memory(
    function: Callable[[torch.Tensor], torch.Tensor], backend: str
) -> None:
    config = piecework.CompilationConfig(backend=backend)
    stitched = piecework.compile(function, (torch.randn(5, 3),), config=config)
    for rows in (2, 5, 9):
        given = torch.randn(rows, 3)
        mine, theirs = given.clone(), given.clone()
        torch.testing.assert_close(stitched(mine), function(theirs))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.inductor
def test_views_of_the_models_memory_are_of_the_right_memory() -> None:
    model, given = Cache(), (torch.randn(4, 8), torch.tensor([3, 1, 7, 2]))
    reference = copy.deepcopy(model)
    stitched = piecework.compile(model, given)
    for _ in range(2):
        torch.testing.assert_close(stitched(*given), reference(*given))
    torch.testing.assert_close(model.cache, reference.cache)


@pytest.mark.inductor
def test_a_piece_that_inductor_would_get_wrong_runs_as_it_is_and_says_so(caplog) -> None:  # type: ignore[no-untyped-def]
    stitched = piecework.compile(write_to_a_part_of_a_result, (torch.randn(5, 3),))
    backends = stitched.program.backends.values()
    first, second = (next(iter(each.entries.values())).compiled for each in backends)
    assert first.artifact is not None
    assert second.artifact is None
    assert "memory that several of its inputs share" in second.indirect_because
    assert "submod_2 is not compiled" in caplog.text


def test_equal_pieces_over_other_memory_are_different_programs() -> None:
    def key(left: torch.Tensor, right: torch.Tensor) -> str:
        graph = torch.fx.symbolic_trace(lambda left, right: (left.add_(1), right * 2))
        for node, value in zip(
            graph.graph.find_nodes(op="placeholder"), (left, right), strict=True
        ):
            node.meta["example_value"] = value
        return structure_of(graph, describe_input=input_signature).key

    x, y = torch.zeros(4), torch.zeros(4)
    assert key(x, x.view(4)) != key(x, y)
    assert key(x, y) == key(y, x)
    assert key(x, x.view(4)) == key(y, y.view(4))


@pytest.mark.inductor
def test_a_variance_over_the_batch_knows_the_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).train()
    reference = copy.deepcopy(model)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return through(model(x)) * 2

    stitched = piecework.compile(forward, (torch.randn(4, 3),))
    for rows in (4, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(stitched(x), through(reference(x)) * 2)
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)
