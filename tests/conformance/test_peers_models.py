"""Models that compile piece by piece as peers have them: in, decorated classes and shapes; out, how often what was traced, cut and compiled."""

from __future__ import annotations

import pytest
import torch
from models import EAGER, mix
from torch import nn

import piecework
from piecework import (
    CompilationConfig,
    counters,
    ignore_torch_compile,
    support_torch_compile,
)
from piecework.errors import InputError
from piecework.runtime import CompilationCounter, set_model_tag, stitched_of


def attention(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    mix(x, out)
    return out


class Base(nn.Module):
    compilation_config = EAGER

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x + x) * 3


def compiles(model: nn.Module, x: torch.Tensor, graphs: int, submodules: int, pieces: int) -> None:
    with counters.expect(
        num_graphs_seen=graphs,
        num_piecewise_graphs_seen=submodules,
        num_piecewise_capturable_graphs_seen=pieces,
        num_backend_compilations=pieces,
    ):
        model(x)


def test_a_model_with_two_operators_outside_is_five_submodules() -> None:
    @support_torch_compile
    class Silly(nn.Module):
        compilation_config = EAGER

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = attention(x + 1 + 2)
            x = attention(x - 2 - 1)
            return x + 1

    model = Silly()
    compiles(model, torch.randn(100, 2), 1, 5, 3)
    assert torch.equal(model(torch.zeros(2, 2)), torch.full((2, 2), 2.0 * (2 * 3 - 3) + 1))


def test_a_subclass_may_leave_compilation_and_its_subclass_take_it_up() -> None:
    compiled = support_torch_compile(type("A", (Base,), {}))
    ignored = ignore_torch_compile(type("B", (compiled,), {}))
    again = support_torch_compile(type("C", (ignored,), {}))
    x = torch.randn(4, 2)
    compiles(compiled(), x, 1, 3, 2)
    compiles(ignored(), x, 0, 0, 0)
    compiles(again(), x, 1, 3, 2)


@pytest.mark.parametrize("outer", [False, True])
def test_a_class_may_compile_under_a_condition(outer: bool) -> None:
    @support_torch_compile(enable_if=lambda model: not outer)
    class Part(Base):
        pass

    @support_torch_compile(enable_if=lambda model: outer)
    class Whole(nn.Module):
        compilation_config = EAGER

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Part(), Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(attention(self.one(x)))

    x = torch.randn(4, 2)
    if outer:
        compiles(Whole(), x, 1, 7, 4)
    else:
        compiles(Whole(), x, 2, 6, 4)


def test_models_of_one_program_are_compiled_apart() -> None:
    @support_torch_compile
    class One(Base):
        pass

    @support_torch_compile
    class Two(nn.Module):
        compilation_config = EAGER

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attention(x + x) * 3 + x

    with set_model_tag("one"):
        one = One()
    with set_model_tag("two"):
        two = Two()
    x = torch.randn(4, 2)
    with counters.expect(num_graphs_seen=2, num_piecewise_graphs_seen=6):
        found = two(one(x))
    torch.testing.assert_close(found, 12 * x * 12 + 12 * x)
    assert stitched_of(one) is not stitched_of(two)


def test_results_with_and_without_compilation_are_equal() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(attention(self.enter(x)))

    model = Layer()
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    for rows in (1, 2, 32):
        x = torch.randn(rows, 8)
        assert torch.equal(stitched(x), model(x))


# --- sizes that the model branches on ------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] >= 4 else x * 100


@pytest.mark.parametrize(("first", "second"), [(20, 3), (3, 20)])
def test_a_branch_on_a_size_is_never_taken_for_a_size_of_the_other_side(
    first: int, second: int
) -> None:
    stitched = piecework.compile(Branches(), (torch.randn(first, 2),), config=EAGER)
    for rows in (first, second, 4, 1):
        x = torch.randn(rows, 2)
        assert torch.equal(stitched(x), Branches()(x))


def test_one_and_zero_are_served_where_the_model_serves_them() -> None:
    class Rows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.shape[0] >= 2 else x - 1

    stitched = piecework.compile(Rows(), (torch.randn(20, 10),), config=EAGER)
    for rows in (0, 1, 2):
        x = torch.randn(rows, 10)
        assert torch.equal(stitched(x), Rows()(x))


@pytest.mark.parametrize("kind", ["backed", "unbacked", "backed_size_oblivious"])
def test_each_kind_of_dynamic_shape_serves_every_batch(kind: str) -> None:
    config = EAGER.replace(dynamic_shapes_config={"type": kind})
    stitched = piecework.compile(nn.Linear(4, 4), (torch.randn(5, 4),), config=config)
    for rows in (2, 5, 17):
        x = torch.randn(rows, 4)
        assert torch.equal(stitched(x), stitched.model(x))


def test_a_shape_that_the_trace_excludes_is_an_error_and_not_a_wrong_result() -> None:
    stitched = piecework.compile(nn.Linear(4, 4), (torch.randn(5, 4),), config=EAGER)
    with pytest.raises(InputError):
        stitched(torch.randn(5, 3))


def test_whole_graph_modes_hand_the_graph_to_one_backend() -> None:
    backend = CompilationConfig(mode="STOCK_TORCH_COMPILE", backend="eager").init_backend()
    assert backend == "eager"


# --- counters ------------------------------------------------------------------------------------------


def test_counters_start_at_zero_and_a_snapshot_is_a_copy() -> None:
    counter = CompilationCounter()
    assert set(counter.snapshot().values()) == {0}
    before = counter.snapshot()
    counter.num_graphs_seen += 3
    assert before["num_graphs_seen"] == 0 and counter.snapshot()["num_graphs_seen"] == 3


def test_what_is_expected_is_the_change_within_the_block() -> None:
    counter = CompilationCounter(num_graphs_seen=10)
    with counter.expect(num_graphs_seen=2, num_backend_compilations=1):
        counter.num_graphs_seen += 2
        counter.num_backend_compilations += 1
    with counter.expect():
        counter.num_graphs_seen += 5


@pytest.mark.parametrize(("expected", "happens"), [(2, 1), (0, 1), (1, 2)])
def test_another_change_is_an_error_that_names_the_counter(expected: int, happens: int) -> None:
    counter = CompilationCounter()
    with (
        pytest.raises(AssertionError, match="num_graphs_seen"),
        counter.expect(num_graphs_seen=expected),
    ):
        counter.num_graphs_seen += happens
