"""Compilers of pieces: the interface, compilers by name, what a failure leaves behind, options per batch range."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers import (
    CompiledPiece,
    InductorAdaptor,
    InductorStandaloneAdaptor,
    make_compiler,
)
from piecework.runtime.config.compilation import CompilationConfig

HERE = "compilers_under_test"
sys.modules.setdefault(HERE, sys.modules[__name__])


@piecework.splitting_op("compilers_test::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(left - 2 * right)


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        mix(left, right, out)
        return (x + self.leave(out)).masked_fill(x > 3, float("-inf"))


class Picky:
    """Fails on a piece that holds what ``refuses`` names; else as eager."""

    name = "picky"
    refuses: ClassVar[str] = ""
    seen: ClassVar[int] = 0

    def compute_hash(self, config: CompilationConfig) -> str:
        return f"picky {self.refuses}"

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        Picky.seen += 1
        if Picky.refuses and any(Picky.refuses in str(node.target) for node in graph.graph.nodes):
            raise ValueError(f"no rule for {Picky.refuses}\nand a second line")
        return CompiledPiece(graph.forward)


class NoName(Picky):
    name = None  # type: ignore[assignment]


def factory() -> Picky:
    return Picky()


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CompilationConfig:
    monkeypatch.setattr(Picky, "refuses", "")
    monkeypatch.setattr(Picky, "seen", 0)
    return CompilationConfig(backend=f"{HERE}:Picky", debug_dump_path=tmp_path)


# --- by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{HERE}:Picky", f"{HERE}.Picky", f"{HERE}:factory"])
def test_a_compiler_of_ones_own_by_qualified_name(picky: CompilationConfig, name: str) -> None:
    model, x = Model(), torch.randn(4, 8)
    stitched = piecework.compile(model, (x,), config=picky.replace(backend=name))
    torch.testing.assert_close(stitched(x), model(x))
    assert Picky.seen == 2 and stitched.report().compiler == "picky"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("indutcor", "no compiler 'indutcor'"),
        ("nowhere_at_all:Compiler", "can't be imported"),
        (f"{HERE}:HERE", "can't be made without arguments: TypeError"),
        ("builtins:object", "has no compile, compute_hash, name"),
        (f"{HERE}:NoName", "has no name"),
    ],
)
def test_a_compiler_that_is_none_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_compiler(CompilationConfig(backend=name))
    assert caught.value.where == "backend"


# --- failures ----------------------------------------------------------------------------------------


def test_a_failure_names_the_piece(picky: CompilationConfig, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(Picky, "refuses", "masked_fill")
    model, x = Model(), torch.randn(4, 8)
    with pytest.raises(PieceCompileError) as caught:
        piecework.compile(model, (x,), config=picky)
    error = caught.value
    assert error.message == "picky failed on submod_2: ValueError: no rule for masked_fill"
    assert "leave" in str(error.where)
    assert isinstance(error.__cause__, ValueError)
    assert "TORCHDYNAMO_REPRO_AFTER=aot" in str(error.hint)


# --- Inductor's options ------------------------------------------------------------------------------


def test_a_single_size_gets_its_own_options_on_top() -> None:
    config = CompilationConfig(
        inductor_compile_config={"max_autotune": False, "cpp.threads": 3},
        single_size_inductor_config={"max_autotune": True, "coordinate_descent_tuning": True},
    )
    compiler = InductorStandaloneAdaptor(config)
    tuned = compiler.options_for(Range(8, 8))
    assert (
        tuned["max_autotune"] and tuned["coordinate_descent_tuning"] and tuned["cpp.threads"] == 3
    )
    for wide in (Range(1, 16), None):
        options = compiler.options_for(wide)
        assert options["max_autotune"] is False and "coordinate_descent_tuning" not in options


@pytest.mark.parametrize(
    "fields",
    [
        {"inductor_compile_config": {"max_autotun": True}},
        {"single_size_inductor_config": {"triton.nothing": True}},
        {"inductor_passes": {"post_grad_custom_pass": "builtins:len"}},
        {"use_inductor_graph_partition": True, "inductor_compile_config": {"cpp_wrapper": True}},
        {
            "use_inductor_graph_partition": True,
            "inductor_compile_config": {"graph_partition": False},
        },
    ],
)
def test_options_that_inductor_can_not_honour_are_errors(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_compiler(CompilationConfig(**fields))
    name = next(iter(fields[next(reversed(fields))]))  # type: ignore[call-overload]
    assert str(caught.value.where).endswith(name)


def test_the_hash_follows_what_changes_code() -> None:
    def hashed(**fields: object) -> str:
        config = CompilationConfig(**fields)
        return InductorStandaloneAdaptor(config).compute_hash(config)

    base = hashed()
    assert base == hashed() == hashed(compile_workers=4)
    changed = [
        hashed(single_size_inductor_config={"max_autotune": True}),
        hashed(inductor_compile_config={"max_autotune": True}),
        hashed(
            inductor_passes={
                "post_grad_custom_post_pass": "piecework.runtime.compilers.passes:InductorPass"
            }
        ),
        hashed(use_inductor_graph_partition=True, splitting_ops=["a::b"]),
        hashed(use_inductor_graph_partition=True, splitting_ops=["a::c"]),
        InductorAdaptor().compute_hash(CompilationConfig()),
    ]
    assert len({base, *changed}) == len(changed) + 1


# --- through Inductor --------------------------------------------------------------------------------

mixed = torch.library.custom_op("compilers_test::scaled", mutates_args=("out",))


@mixed
def scaled(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 3)


class WritesInside(Model):
    """The second piece calls an operator that writes, and is no splitting op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        out = torch.empty_like(y)
        scaled(y, out)
        return out + 1


def count_wheres(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.where.self))


@pytest.mark.inductor
@pytest.mark.parametrize("backend", ["inductor", "inductor_compile_fx"])
def test_inductor_runs_the_passes_and_gives_the_same_results(backend: str) -> None:
    config = CompilationConfig(
        backend=backend,
        pass_config={"report_matches": True},
        inductor_passes={"post_grad_custom_post_pass": count_wheres},
        inductor_compile_config={"force_disable_caches": True},
    )
    model, x = WritesInside(), torch.randn(4, 8) * 4
    with piecework.counters.expect(num_inductor_compiles=2):
        stitched = piecework.compile(model, (x,), config=config)
    for batch in (4, 7):
        x = torch.randn(batch, 8) * 4
        torch.testing.assert_close(stitched(x), model(x))
    passes = stitched.report().passes
    assert passes is not None
    assert passes.matches("count_wheres") == 1
    assert "pass count_wheres: 1 matches in 2 graphs" in str(stitched.report())


@pytest.mark.inductor
def test_inductors_failure_names_the_piece_and_restores_everything(tmp_path: Path) -> None:
    from torch._inductor import config as inductor_config

    from piecework.runtime.compilers.passes import get_pass_context

    def broken(graph: torch.fx.Graph) -> None:
        if count_wheres(graph):
            raise ValueError("this pass is broken")

    config = CompilationConfig(
        debug_dump_path=tmp_path,
        inductor_compile_config={"force_disable_caches": True},
        inductor_passes={"post_grad_custom_post_pass": broken},
        compile_ranges_endpoints=[16],
    )
    before = inductor_config.post_grad_custom_post_pass
    with pytest.raises(PieceCompileError) as caught:
        piecework.compile(Model(), (torch.randn(4, 8),), config=config)
    assert "failed on submod_2 for batches [1, 16]" in caught.value.message
    assert "pass broken failed: ValueError: this pass is broken" in caught.value.message
    assert inductor_config.post_grad_custom_post_pass is before
    assert get_pass_context().compile_range is None
