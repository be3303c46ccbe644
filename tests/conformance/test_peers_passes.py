"""Graph passes as peers have them: in, aten graphs and passes; out, what is removed, what stays, and what identifies a pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from piecework.errors import ConfigError
from piecework.runtime import (
    CallableInductorPass,
    CompilationConfig,
    InductorPass,
    PostGradPassManager,
    Range,
    pass_context,
)
from piecework.runtime.passes import NoOpEliminationPass, as_inductor_pass, get_pass_context

aten = torch.ops.aten


def count(graph: torch.fx.Graph, *targets: object) -> int:
    return sum(node.target in targets for node in graph.nodes)


def cleaned(
    function: Callable[..., object], *inputs: torch.Tensor, dynamic: bool = True
) -> tuple[torch.fx.Graph, object]:
    """The graph that Inductor would compile, without what does nothing, and its result; rows of the first input are dynamic."""
    graphs: list[torch.fx.Graph] = []

    def compiler(gm: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        NoOpEliminationPass()(gm.graph)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        graphs.append(gm.graph)
        return gm

    if dynamic:
        torch._dynamo.mark_dynamic(inputs[0], 0)
    run = torch.compile(function, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    result = run(*inputs)
    return graphs[0], result


@pytest.mark.parametrize(("rows", "table"), [(8, 8), (8, 16), (32, 33)])
def test_views_and_slices_of_everything_go_and_the_rest_stays(rows: int, table: int) -> None:
    def function(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + positions[: x.shape[0]]
        x = x.reshape(-1, 32, 2).reshape(-1, 64).reshape(-1, 64).reshape(-1, 32, 2)
        return x[0 : x.shape[0]] + 1

    given = torch.randn(rows, 64), torch.randn(table, 64)
    graph, result = cleaned(function, *given)
    torch.testing.assert_close(result, function(*given))
    assert count(graph, aten.view.default, aten.reshape.default, aten._unsafe_view.default) == 1
    assert count(graph, aten.slice.Tensor) == 1


def test_a_slice_scatter_over_everything_goes() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.slice_scatter(torch.ones_like(x), x, 0, 0, x.shape[0]) + 1

    x = torch.randn(4, 6)
    graph, result = cleaned(function, x)
    torch.testing.assert_close(result, function(x))
    assert count(graph, aten.slice_scatter.default) == 0


def test_an_end_of_minus_one_drops_the_last_row_and_stays() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[0:-1, :], torch.slice_scatter(x.clone(), torch.ones(15, 16), 0, 0, -1)

    x = torch.randn(16, 16)
    graph, result = cleaned(function, x, dynamic=False)
    torch.testing.assert_close(result, function(x))
    assert count(graph, aten.slice_scatter.default) == 1
    assert count(graph, aten.slice.Tensor) == 1


def test_equal_splits_become_one() -> None:
    def function(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, _, _ = qkv.split([8, 4, 4], -1)
        _, k, _ = qkv.split([8, 4, 4], -1)
        _, _, v = qkv.split([8, 4, 4], -1)
        return q + 1, k + 2, v + 3

    qkv = torch.randn(5, 16)
    graph, result = cleaned(function, qkv)
    torch.testing.assert_close(result, function(qkv))
    assert count(graph, aten.split_with_sizes.default) == 1


# --- what a pass may know ------------------------------------------------------------------------------


def test_a_pass_sees_the_range_and_the_outer_one_after_it() -> None:
    assert get_pass_context().compile_range is None
    with pass_context(Range(1, 10)):
        assert get_pass_context().compile_range == Range(1, 10)
        with pass_context(Range(20, 20)):
            assert get_pass_context().compile_range == Range(20, 20)
        assert get_pass_context().compile_range == Range(1, 10)
    assert get_pass_context().compile_range is None


def test_the_range_is_gone_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="on purpose"), pass_context(Range(9, 9)):
        raise RuntimeError("on purpose")
    assert get_pass_context().compile_range is None


# --- identities ----------------------------------------------------------------------------------------


def one(graph: torch.fx.Graph) -> None:
    """Does nothing."""


def other(graph: torch.fx.Graph) -> None:
    """Does nothing either, in another way."""
    len(graph.nodes)


class Recorder(InductorPass):
    def __init__(self, only: int | None = None) -> None:
        self.only = only
        self.ran = 0

    def state(self) -> dict[str, object]:
        return {"only": self.only}

    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        return self.only is None or (compile_range is not None and self.only in compile_range)

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran += 1


def test_hashes_of_sources_are_stable_and_differ() -> None:
    for same in ("text", one, Recorder):
        assert InductorPass.hash_source(same) == InductorPass.hash_source(same)
    found = {InductorPass.hash_source(each) for each in ("alpha", "beta", one, other, Recorder)}
    assert len(found) == 5
    assert all(len(each) == 64 and int(each, 16) >= 0 for each in found)


def test_hashes_of_settings_have_no_order() -> None:
    assert InductorPass.hash_dict({"a": 1, "b": 2}) == InductorPass.hash_dict({"b": 2, "a": 1})
    assert InductorPass.hash_dict({"a": 1}) != InductorPass.hash_dict({"a": 2})


def test_a_function_as_a_pass() -> None:
    seen: list[object] = []
    graph = torch.fx.Graph()
    CallableInductorPass(seen.append)(graph)
    assert seen == [graph]
    assert CallableInductorPass(one).uuid() == CallableInductorPass(one).uuid()
    assert CallableInductorPass(one).uuid() != CallableInductorPass(other).uuid()
    assert CallableInductorPass(one, uuid="custom").uuid() == "custom"


def test_what_is_no_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match="callable"):
        as_inductor_pass(object(), where="inductor_passes")


@pytest.mark.parametrize("make", [Recorder, lambda: CallableInductorPass(one)])
def test_the_managers_identity_follows_its_passes_and_the_configuration(make) -> None:  # type: ignore[no-untyped-def]
    def uuid(times: int = 1, **pass_config: bool) -> str:
        config = CompilationConfig(pass_config=pass_config)
        passes = [*PostGradPassManager.from_config(config).passes, *[make()] * times]
        return PostGradPassManager(passes).uuid()

    with pass_context(Range(1, 8)):
        assert uuid() == uuid() and len(uuid()) == 64
        assert len({uuid(), uuid(times=2), uuid(eliminate_noops=False)}) == 3


# --- the manager ---------------------------------------------------------------------------------------


def empty() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output(())
    return graph


def test_a_pass_runs_for_the_ranges_that_it_is_for() -> None:
    always, small = Recorder(), Recorder(only=4)
    manager = PostGradPassManager([always, small])
    for compile_range in (Range(1, 8), Range(9, 16), Range(4, 4)):
        with pass_context(compile_range):
            manager(empty())
    assert (always.ran, small.ran) == (3, 2)


def test_passes_run_in_the_order_that_they_were_given() -> None:
    order: list[str] = []
    manager = PostGradPassManager(
        [CallableInductorPass(lambda graph, name=name: order.append(name)) for name in "abc"]
    )
    manager(empty())
    assert order == ["a", "b", "c"]


def test_the_passes_that_are_always_there_run_whatever_is_added() -> None:
    config = CompilationConfig()
    names = [each.name for each in PostGradPassManager.from_config(config).passes]
    added = config.replace(inductor_passes={"post_grad_custom_post_pass": Recorder(only=1)})
    found = [each.name for each in PostGradPassManager.from_config(added).passes]
    assert "DefunctionalizationPass" in names and set(names) < set(found)
