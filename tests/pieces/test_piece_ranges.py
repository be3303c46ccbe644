"""Batch ranges and single sizes: what is compiled for each, and which form a forward of each size runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import EAGER, Told, mix
from torch import nn

import piecework
from piecework.errors import BindError, ConfigError, InputError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.manager import create_concrete_args
from piecework.runtime.pieces.piecewise import PiecewiseBackend


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.leave = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        out = torch.empty_like(y)
        mix(y, out)
        return self.leave(out) + side.sum()


GIVEN: list[tuple[str, list[object]]] = []  # to the compiler, by range
RAN: list[str] = []  # the range of each form that ran


@pytest.fixture
def compile_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Model, Any]]:
    """Compiles a model, and records what the compiler is given and which form of a piece runs."""

    def hear(graph: Any, inputs: list[object], compile_range: Range) -> Callable[..., object]:
        GIVEN.append((str(compile_range), list(inputs)))
        return lambda *args: RAN.append(str(compile_range)) or graph.forward(*args)

    def run(**fields: object) -> tuple[Model, piecework.StitchedModule]:
        GIVEN.clear()
        model, config = Model(), CompilationConfig(backend="models:Told", **fields)
        made = piecework.compile(model, (torch.randn(4, 8), torch.randn(5)), config=config)
        RAN.clear()  # pieces are tried when they are compiled
        return model, made

    monkeypatch.setattr(Told, "hear", hear)
    return run


@pytest.mark.parametrize(
    ("batch", "served_by"),
    [(2, "[1, 16]"), (8, "[8, 8]"), (16, "[1, 16]"), (17, "[17, 256]"), (999, "[257, …]")],
)
def test_each_batch_runs_its_form_in_every_piece(compile_model, batch: int, served_by: str) -> None:  # type: ignore[no-untyped-def]
    model, stitched = compile_model(compile_ranges_endpoints=[16, 256], compile_sizes=[1, 8])
    x, side = torch.randn(batch, 8), torch.randn(3)
    torch.testing.assert_close(stitched(x, side), model(x, side))
    assert [served_by] * 2 == RAN


def test_a_single_size_is_concrete_and_other_symbols_stay(compile_model) -> None:  # type: ignore[no-untyped-def]
    compile_model(compile_ranges_endpoints=[16], compile_sizes=[8])
    last_single = [inputs for name, inputs in GIVEN if name == "[8, 8]"][-1]
    shapes = [tuple(value.shape) for value in last_single if isinstance(value, torch.Tensor)]
    assert (8, 8) in shapes
    symbolic = [shape for shape in shapes if any(isinstance(s, torch.SymInt) for s in shape)]
    assert len(symbolic) == 1 and len(symbolic[0]) == 1  # `side` keeps its own symbol
    general = [inputs for name, inputs in GIVEN if name == "[1, 16]"][-1]
    sizes = [size for each in general if isinstance(each, torch.Tensor) for size in each.shape]
    assert sum(isinstance(size, torch.SymInt) for size in sizes) > 1


def test_concrete_arguments_keep_strides_and_offset() -> None:
    base, backend = torch.randn(6, 20), PieceworkBackend(CompilationConfig(backend="eager"))
    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(base[1:5, 2:10])
    args = create_concrete_args(backend.program.graph, 7, backend.program.batch.symbol)
    (tensor,) = [a for a in args if isinstance(a, torch.Tensor)]
    assert tensor.shape[0] == 7
    assert tensor.storage_offset() == base[1:5, 2:10].storage_offset()


def test_ranges_without_a_batch_dimension_are_refused() -> None:
    x, side = torch.randn(4, 8), torch.randn(5)
    for tensor in (x, side):
        torch._dynamo.mark_static(tensor)
    config = CompilationConfig(backend="eager", compile_sizes=[4])
    with pytest.raises(ConfigError, match="no input has a dynamic batch dimension"):
        piecework.compile(Model(), (x, side), config=config)


def test_a_piece_takes_a_graph_or_runnables_and_not_both() -> None:
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    for graph, runnables in ((None, None), (gm, {None: gm.forward}), (gm, None)):
        with pytest.raises(BindError, match="either a graph and a backend, or runnables"):
            PiecewiseBackend(graph, EAGER, 0, 1, [], None, compiled_runnables=runnables)


def test_a_loaded_piece_runs_what_it_was_given() -> None:
    forms = {Range(1, 4): lambda n, x: ("small", x), Range(5, 9): lambda n, x: ("large", x)}
    piece = PiecewiseBackend(None, EAGER, 0, 1, [0], None, compiled_runnables=forms)
    assert piece(3, "x") == ("small", "x")
    assert piece(9, "x") == ("large", "x")
    with pytest.raises(InputError, match=r"a batch of 10 is outside.*\[1, 4\], \[5, 9\]"):
        piece(10, "x")
    with pytest.raises(BindError, match="has no bytes"):
        piece.to_bytes()


@pytest.mark.inductor
def test_inductor_compiles_sizes_and_ranges() -> None:
    model = Model()
    config = CompilationConfig(compile_ranges_endpoints=[16], compile_sizes=[8])
    with piecework.counters.expect(num_inductor_compiles=6):
        stitched = piecework.compile(model, (torch.randn(4, 8), torch.randn(5)), config=config)
    with torch.no_grad():
        for batch in (2, 8, 40):
            x, side = torch.randn(batch, 8), torch.randn(3)
            torch.testing.assert_close(stitched(x, side), model(x, side))
    artifacts = stitched.backend.collect_standalone_compile_artifacts()
    assert artifacts.submodule_names() == tuple(stitched.program.backends)
    ranges = list(map(str, stitched.program.compile_ranges))
    assert artifacts.num_entries() == len(artifacts.submodule_names()) * len(ranges)
    assert all(piece.to_bytes() for piece in stitched.program.backends.values())
    name, piece = next(iter(stitched.program.backends.items()))
    assert piece.graph is not None
    compiler = stitched.backend.compiler_manager.compiler
    artifacts.load_all(lambda data: compiler.from_bytes(data, piece.graph))
    assert callable(artifacts.get_loaded(name, ranges[0]).runnable)


def test_sizes_that_the_trace_excludes_are_an_error() -> None:
    x = torch.randn(8, 8)
    torch._dynamo.mark_dynamic(x, 0, min=4, max=64)
    config = CompilationConfig(backend="eager", compile_sizes=[2, 8, 100])
    said = r"from 4 to 64, and none of them is in \[2, 2\], \[100, 100\]"
    with pytest.raises(ConfigError, match=said):
        piecework.compile(nn.Linear(8, 8), (x,), config=config)
