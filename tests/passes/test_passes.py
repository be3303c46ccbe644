"""Graph passes of a user's own: what identifies one, which ranges it runs for, and what the manager reports."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.compilers.passes import (
    CallableInductorPass,
    InductorPass,
    PostGradPassManager,
    as_inductor_pass,
    get_pass_context,
    pass_context,
)
from piecework.runtime.config.compilation import CompilationConfig

aten = torch.ops.aten


class Scaled(InductorPass):
    def __init__(self, factor: float, op: object = aten.mul.Tensor) -> None:
        self.factor = factor
        self.op = op

    def __call__(self, graph: torch.fx.Graph) -> int:
        return len(graph.find_nodes(op="call_function", target=self.op))


class OnlySmall(Scaled):
    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        return compile_range is not None and compile_range.end <= 16


def test_the_uuid_follows_state() -> None:
    assert Scaled(2.0).uuid() == Scaled(2.0).uuid()
    different = [Scaled(2.0), Scaled(3.0), Scaled(2.0, aten.add.Tensor), OnlySmall(2.0)]
    assert len({each.uuid() for each in different}) == len(different)
    changed = Scaled(2.0)
    before = changed.uuid()
    changed.extra = {"threshold": [1, 2]}  # type: ignore[attr-defined]
    assert changed.uuid() != before


def test_the_uuid_follows_code() -> None:
    """Of a class or a function; `tests/store/test_digest.py` tells what of code counts."""

    def made(value: object) -> tuple[InductorPass, InductorPass]:
        class Made(InductorPass):
            def __call__(self, graph: torch.fx.Graph) -> object:
                return value

        return Made(), as_inductor_pass(lambda graph: value, where="")

    for one, same, other in zip(made(1), made(1), made(2), strict=True):
        assert one.uuid() == same.uuid() != other.uuid()


def test_a_pass_without_a_stable_form_is_an_error() -> None:
    with pytest.raises(ConfigError, match="stable form"):
        Scaled(2.0, torch.randn(2)).uuid()


def test_a_function_with_its_identity_in_the_order_of_the_field() -> None:
    def look(graph: torch.fx.Graph) -> None:
        pass

    given = CallableInductorPass(look, "look, version 3")
    assert given.uuid() == "look, version 3" and given.name == "look"
    assert CallableInductorPass(look, name="other").name == "other"
    one, two = (CallableInductorPass(look, ("look", 3)).uuid() for _ in range(2))
    assert one == two != "look"
    assert CallableInductorPass(look).uuid() != CallableInductorPass(look, "").uuid()
    with pytest.raises(ConfigError, match="stable form"):
        _ = CallableInductorPass(look, object()).uuid()


def test_qualified_names_classes_and_functions_are_passes() -> None:
    assert isinstance(as_inductor_pass(len, where="x"), CallableInductorPass)
    made = as_inductor_pass("piecework.runtime.compilers.passes:InductorPass", where="x")
    assert type(made) is InductorPass
    for wrong in ("builtins:Nothing", "piecework.runtime.compilers.passes:POST_GRAD_SLOT", Scaled):
        with pytest.raises(ConfigError, match=r"inductor_passes\.slot"):
            as_inductor_pass(wrong, where="inductor_passes.slot")


def small_graph() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output((graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2)),))
    return graph


def look(graph: torch.fx.Graph) -> None:
    """A pass that does not count."""


def test_the_manager_runs_in_order_what_applies_and_counts() -> None:
    seen: list[Range | None] = []

    def note(graph: torch.fx.Graph) -> None:
        seen.append(get_pass_context().compile_range)

    manager = PostGradPassManager([Scaled(2.0), OnlySmall(1.0), CallableInductorPass(note)])
    with pass_context(Range(1, 16)):
        manager(small_graph())
        with pass_context(Range(17, 64)):
            manager(small_graph())
    manager(small_graph())
    assert seen == [Range(1, 16), Range(17, 64), None]
    assert manager.report().matches("OnlySmall") == 1
    said = [line.partition(",")[0] for line in str(manager.report()).splitlines()]
    assert said == [
        "pass Scaled: 3 matches in 3 graphs",
        "pass OnlySmall: 1 matches in 1 graphs",
        "pass note: matches not counted in 3 graphs",
    ]


def test_the_managers_uuid_follows_the_range_and_the_order() -> None:
    passes = [Scaled(2.0), OnlySmall(1.0)]
    with pass_context(Range(1, 16)):
        small = PostGradPassManager(passes).uuid()
        assert small == PostGradPassManager([Scaled(2.0), OnlySmall(1.0)]).uuid()
        assert small != PostGradPassManager(passes[::-1]).uuid()
    assert small != PostGradPassManager(passes).uuid()


def broken(graph: torch.fx.Graph) -> None:
    raise ValueError("no such pattern")


def drops(graph: torch.fx.Graph) -> None:
    graph.output_node().args = ((),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (broken, "pass broken failed: ValueError: no such pattern"),
        (drops, "pass drops left a graph with 0 results"),
    ],
)
def test_a_pass_that_fails_is_named(given: object, said: str) -> None:
    with pytest.raises(PieceCompileError, match=said):
        PostGradPassManager([as_inductor_pass(given, where="")])(small_graph())


def test_inductors_slot_is_taken_also_without_a_pass() -> None:
    config = CompilationConfig()
    manager = PostGradPassManager.from_config(config)
    assert manager.passes == ()
    # Inductor keeps code under the facts that the slot's uuid holds.
    (slot,) = manager.inductor_options(config).items()
    assert slot[0] == "post_grad_custom_post_pass"
    with pass_context(None, "s0 >= 2"):
        under = slot[1].uuid()
    assert under != slot[1].uuid()


def test_a_pass_for_another_slot_is_gated_counted_and_identified() -> None:
    passes = {"post_grad_custom_post_pass": f"{__name__}:look"}
    config = CompilationConfig(inductor_passes={**passes, "joint_custom_pre_pass": OnlySmall(1.0)})
    manager = PostGradPassManager.from_config(config)
    assert [each.name for each in manager.passes] == ["look"]
    run = manager.inductor_options(config)["joint_custom_pre_pass"]
    run(small_graph())
    assert manager.report().runs == ()
    with pass_context(Range(1, 8)):
        run(small_graph())
        assert run.uuid() != PostGradPassManager([OnlySmall(2.0)]).uuid()
    assert manager.report().matches("OnlySmall") == 1
