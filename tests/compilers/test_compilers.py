"""Compilers of pieces: the interface, those by name and those that break it, what a failure leaves behind, options per batch range."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from models import Block, Told, mix_pair
from processes import python

import piecework
from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers import (
    CompiledPiece,
    InductorAdaptor,
    InductorStandaloneAdaptor,
    make_compiler,
)
from piecework.runtime.compilers.passes import get_pass_context
from piecework.runtime.config.compilation import CompilationConfig

HERE = "compilers_under_test"
sys.modules.setdefault(HERE, sys.modules[__name__])


class Model(Block):
    """Its second piece masks."""

    def __init__(self) -> None:
        super().__init__(mix_pair, after=lambda y: y.masked_fill(y > 3, 0.0))


class Picky(Told):
    """Keeps nothing."""

    name = "picky"


class NoName(Picky):
    name = None


class OnlyToBytes(Picky):
    def to_bytes(self, piece: CompiledPiece) -> object:
        return b"piece"


class BareFunction(Picky):
    def compile(self, graph, *rest):  # type: ignore[no-untyped-def]
        return graph.forward


def factory() -> Picky:
    return Picky()


def compile_with(name: str, **fields: object) -> piecework.StitchedModule:
    """A model compiled by a compiler of this module, whose results are right."""
    model, x = Model(), torch.randn(4, 8)
    config = CompilationConfig(backend=name if "." in name else f"{HERE}:{name}", **fields)
    stitched = piecework.compile(model, (x,), config=config)
    torch.testing.assert_close(stitched(x), model(x))
    return stitched


@pytest.mark.parametrize("name", ["Picky", f"{HERE}.Picky", "factory"])
def test_a_compiler_of_ones_own_by_qualified_name(name: str) -> None:
    with piecework.counters.expect(num_backend_compilations=2):
        assert compile_with(name).report().compiler == "picky"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("indutcor", "no compiler 'indutcor'"),
        ("nowhere_at_all:Compiler", "can't be imported"),
        (f"{HERE}:HERE", "can't be made without arguments: TypeError"),
        ("builtins:object", "has no compile, compute_hash, name"),
        (f"{HERE}:NoName", "has no name"),
        (f"{HERE}:OnlyToBytes", "has no from_bytes"),
    ],
)
def test_a_compiler_that_is_none_is_an_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_compiler(CompilationConfig(backend=name))
    assert caught.value.where == "backend"


def test_what_is_no_compiled_piece_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'picky' made a method, not a Compiled"):
        compile_with("BareFunction")


def test_a_failure_names_the_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(graph: torch.fx.GraphModule, *_: object) -> None:
        if any("masked_fill" in str(node.target) for node in graph.graph.nodes):
            raise ValueError("no rule for masked_fill\nand a second line")

    monkeypatch.setattr(Picky, "hear", refuse)
    with pytest.raises(PieceCompileError) as caught:
        compile_with("Picky")
    error = caught.value
    assert error.message == "picky failed on submod_2: ValueError: no rule for masked_fill"
    assert "leave" in str(error.where)
    assert isinstance(error.__cause__, ValueError)
    assert "TORCHDYNAMO_REPRO_AFTER=aot" in str(error.hint)


def count_wheres(graph: torch.fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=torch.ops.aten.where.self))


def broken(graph: torch.fx.Graph) -> None:
    if count_wheres(graph):
        raise KeyError("p")


@pytest.mark.inductor
def test_a_pass_that_fails_is_named_with_its_piece_and_everything_is_restored() -> None:
    """Inductor wraps what a pass raises; the message is the pass's own all the same."""
    from torch._inductor import config as inductor_config

    config = CompilationConfig(
        inductor_compile_config={"force_disable_caches": True},
        inductor_passes={"post_grad_custom_post_pass": broken},
        compile_ranges_endpoints=[16],
    )
    before = inductor_config.post_grad_custom_post_pass
    with pytest.raises(PieceCompileError) as caught:
        piecework.compile(Model(), (torch.randn(4, 8),), config=config)
    expected = "inductor failed on submod_2 for batches [1, 16]: pass broken failed: KeyError: 'p'"
    assert caught.value.message.startswith(expected)
    assert inductor_config.post_grad_custom_post_pass is before
    assert get_pass_context().compile_range is None


NO_COMPILER = """
import torch, piecework
try:
    piecework.compile(torch.nn.GELU(), (torch.randn(3, 8),))
except piecework.errors.PieceCompileError as error:
    print(error.hint)
"""


@pytest.mark.inductor
def test_a_missing_compiler_of_the_system_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    places = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kept")}
    done = python("-c", NO_COMPILER, **places)
    assert "install g++" in done.stdout and "CXX" in done.stdout, done.stdout + done.stderr


INSIDE = {"use_inductor_graph_partition": True}


def test_a_single_size_gets_its_own_options_on_top() -> None:
    config = CompilationConfig(
        inductor_compile_config={"max_autotune": False, "cpp.threads": 3},
        single_size_inductor_config={"max_autotune": True, "coordinate_descent_tuning": True},
    )
    compiler, names = InductorStandaloneAdaptor(config), [*config.single_size_inductor_config]
    found = [
        {name: options[name] for name in ("cpp.threads", *names) if name in options}
        for options in map(compiler.options_for, (Range(8, 8), Range(1, 16), None))
    ]
    wide = {"cpp.threads": 3, "max_autotune": False}
    tuned = {"cpp.threads": 3, "max_autotune": True, "coordinate_descent_tuning": True}
    assert found == [tuned, wide, wide]


@pytest.mark.parametrize(
    "fields",
    [
        {"inductor_compile_config": {"max_autotun": True}},
        {"inductor_compile_config": {"triton.cudagraphs": True}},
        {"inductor_passes": {"post_grad_custom_pass": "builtins:len"}},
        {**INSIDE, "inductor_compile_config": {"cpp_wrapper": True}},
        {**INSIDE, "inductor_compile_config": {"graph_partition": False}},
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

    base, tuned = hashed(), {"max_autotune": True}
    a_pass = "piecework.runtime.compilers.passes:InductorPass"
    assert base == hashed() == hashed(compile_workers=4)
    changed = [
        hashed(single_size_inductor_config=tuned),
        hashed(inductor_compile_config=tuned),
        hashed(inductor_passes={"post_grad_custom_post_pass": a_pass}),
        *(hashed(**INSIDE, splitting_ops=[each]) for each in ("a::b", "a::c")),
        InductorAdaptor().compute_hash(CompilationConfig()),
    ]
    assert len({base, *changed}) == len(changed) + 1


@torch.library.custom_op("compilers_test::scaled", mutates_args=("out",))
def scaled(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x * 3)


class WritesInside(Model):
    """The second piece calls an operator that writes, and is no splitting op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        out = torch.empty_like(y)
        scaled(y, out)
        return out + 1


@pytest.mark.inductor
@pytest.mark.parametrize("backend", ["inductor", "inductor_compile_fx"])
def test_inductor_runs_the_passes_and_gives_the_same_results(backend: str) -> None:
    config = CompilationConfig(
        backend=backend,
        pass_config={"report_matches": True},
        inductor_passes={"post_grad_custom_post_pass": count_wheres},
        inductor_compile_config={"force_disable_caches": True},
    )
    model = WritesInside()
    with piecework.counters.expect(num_inductor_compiles=2):
        stitched = piecework.compile(model, (torch.randn(4, 8) * 4,), config=config)
    for batch in (4, 7):
        x = torch.randn(batch, 8) * 4
        torch.testing.assert_close(stitched(x), model(x))
    assert stitched.report().compiler == backend
    passes = stitched.report().passes
    assert passes is not None
    assert passes.matches("count_wheres") == 1
    assert "pass count_wheres: 1 matches in 2 graphs" in str(stitched.report())
