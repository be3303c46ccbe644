"""The class decorator: what compiles, when, how often, and what inherits it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import EAGER, mix
from torch import nn
from torch.utils._pytree import register_dataclass

import piecework
from piecework import CompilationConfig, counters, ignore_torch_compile, support_torch_compile
from piecework.errors import CaptureError, ConfigError, InputError
from piecework.runtime.decorators import stitched_of
from piecework.runtime.model_tag import set_model_tag

NONE = CompilationConfig(mode="NONE")


@dataclasses.dataclass
class Intermediate:
    tensors: dict[str, torch.Tensor]


@support_torch_compile
class Model(nn.Module):
    """Takes what its annotations say; configured by a class attribute."""

    compilation_config = EAGER

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(8, width)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.nn.functional.gelu(self.linear(x))
        out = torch.empty_like(y)
        mix(y, out)
        return out if residual is None else out + residual


def same(model: nn.Module, *args: Any) -> None:
    torch.testing.assert_close(model(*args), model.forward(*args))


def stitched(model: nn.Module) -> piecework.StitchedModule:
    found = stitched_of(model)
    assert found is not None
    return found


# --- when and how often ------------------------------------------------------------------------------


def test_an_instance_compiles_at_its_first_call_and_once() -> None:
    model = Model()
    assert stitched_of(model) is None
    with counters.expect(num_models_seen=1, num_graphs_seen=1):
        for batch in (4, 2, 9):
            same(model, torch.randn(batch, 8))
    assert "mix(" in stitched(model).source.code
    assert stitched(model).report().splitting == 1


def test_the_model_is_emitted_as_piecework_compile_emits_it() -> None:
    model = Model()
    x = torch.randn(4, 8)
    model(x)
    bare = Model.__mro__[1]
    assert bare is nn.Module  # no class was put in between
    direct = piecework.compile(model, (x,), config=EAGER)
    assert stitched(model).source.code == direct.source.code


def test_threads_share_one_compilation() -> None:
    model = Model()
    inputs = [torch.randn(n, 8) for n in (2, 3, 4, 5)]
    gate = threading.Barrier(len(inputs))

    def call(x: torch.Tensor) -> torch.Tensor:
        gate.wait()
        return model(x)

    with counters.expect(num_graphs_seen=1), ThreadPoolExecutor(len(inputs)) as threads:
        for x, result in zip(inputs, threads.map(call, inputs), strict=True):
            torch.testing.assert_close(result, model.forward(x))


def test_a_failed_first_call_leaves_nothing_behind() -> None:
    @support_torch_compile
    class Breaks(nn.Module):
        compilation_config = EAGER
        broken = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.broken and x.sum() > 0:
                return x
            return x + 1

    model, x = Breaks(), torch.randn(4)
    for _ in range(2):
        with pytest.raises(CaptureError, match="can't be captured as one graph"):
            model(x)
        assert stitched_of(model) is None and not vars(x)
    model.broken = False
    same(model, x)
    assert stitched_of(model) is not None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(CaptureError, match="unexpected keyword"):
        Model()(torch.randn(4, 8), other=1)


# --- dynamic dimensions ------------------------------------------------------------------------------


def test_containers_of_tensors_are_dynamic_in_and_out() -> None:
    @support_torch_compile
    class Stage(nn.Module):
        compilation_config = EAGER

        def forward(self, x: torch.Tensor, before: Intermediate | None = None) -> Intermediate:
            assert before is not None
            return Intermediate({"hidden": x + before.tensors["hidden"], "x": x})

    model = Stage()
    register_dataclass(Intermediate)
    with counters.expect(num_graphs_seen=1):
        for batch in (4, 2, 7):
            x, hidden = torch.randn(batch, 8), torch.randn(batch, 8)
            result = model(x, before=Intermediate({"hidden": hidden}))
            assert type(result) is Intermediate and result.tensors["x"] is x
            torch.testing.assert_close(result.tensors["hidden"], x + hidden)


def test_declared_dimensions_are_the_only_dynamic_ones() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": [0, -1]})
    class Scale(nn.Module):
        compilation_config = EAGER

        def forward(self, x, factor):  # type: ignore[no-untyped-def]
            return x * factor

    model = Scale()
    same(model, torch.randn(4, 3, 8), torch.randn(3, 1))
    same(model, torch.randn(5, 3, 9), torch.randn(3, 1))
    with pytest.raises(InputError, match="argument x"):
        model(torch.randn(5, 4, 9), torch.randn(3, 1))
    with pytest.raises(InputError, match="argument factor"):
        model(torch.randn(5, 3, 9), torch.randn(4, 1))


def test_an_unbacked_dimension_serves_every_size() -> None:
    @support_torch_compile(mark_unbacked_dims={"x": 0})
    class Doubles(nn.Module):
        compilation_config = EAGER

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1) * 2

    for first in (1, 0, 5):
        model = Doubles()
        for batch in (first, 0, 1, 2, 9):
            same(model, torch.randn(batch, 3))


def test_a_dimension_out_of_range_is_an_error_at_the_first_call() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 2})
    class Flat(Adds):
        pass

    with pytest.raises(ConfigError, match=r"dimension 2 of x .* 2 dimensions .*\.forward"):
        Flat()(torch.randn(4, 8))


# --- configuration -----------------------------------------------------------------------------------


@support_torch_compile
class TakesConfig(nn.Module):
    def __init__(self, compilation_config: CompilationConfig | None = None) -> None:
        super().__init__()
        self.seen = compilation_config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


@support_torch_compile
class Adds(nn.Module):
    """Adds one, and keeps what options it was given."""

    compilation_config = EAGER

    def __init__(self, width: int = 1, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_the_keyword_is_taken_whether_init_asks_for_it_or_not() -> None:
    model = Model(compilation_config=NONE)
    model(torch.randn(4, 8))
    assert model.compilation_config is NONE and stitched_of(model) is None
    asked = TakesConfig(compilation_config=EAGER)
    assert asked.seen is EAGER is asked.compilation_config
    loose = Adds(2, compilation_config=EAGER, other=3)
    assert loose.options == {"other": 3} and loose.compilation_config is EAGER
    assert TakesConfig(EAGER).seen is EAGER
    through_super = Redecorated(width=16, compilation_config=NONE)
    assert through_super.compilation_config is NONE and through_super.linear.out_features == 16


def test_the_attribute_is_read_at_the_first_call() -> None:
    model = Model()
    model.compilation_config = "eager"
    with pytest.raises(ConfigError, match="got 'eager'"):
        model(torch.randn(4, 8))
    model.compilation_config = NONE
    model(torch.randn(4, 8))
    assert stitched_of(model) is None


@pytest.mark.parametrize("enabled", [True, False])
def test_enable_if_is_asked_once_with_the_configuration(enabled: bool) -> None:
    asked: list[CompilationConfig] = []

    @support_torch_compile(enable_if=lambda config: asked.append(config) or enabled)
    class Gated(Adds):
        pass

    model = Gated()
    assert asked == []
    for batch in (2, 3):
        same(model, torch.randn(batch))
    assert asked == [EAGER] and (stitched_of(model) is not None) is enabled


# --- inheritance -------------------------------------------------------------------------------------


class Plain(Model):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, residual) * 2


class Renamed(Model):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return self.linear(hidden)


@ignore_torch_compile
class Ignored(Model):
    pass


class IgnoredToo(Ignored):
    pass


@support_torch_compile
class Again(Ignored):
    pass


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Redecorated(Model):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, residual) - 1


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [(Plain, 1), (Renamed, 1), (Ignored, 0), (IgnoredToo, 0), (Again, 1), (Redecorated, 1)],
)
def test_what_a_subclass_inherits(kind: type[Model], graphs: int) -> None:
    model = kind()
    with counters.expect(num_graphs_seen=graphs):
        for batch in (4, 7):
            same(model, torch.randn(batch, 8))
    assert (stitched_of(model) is not None) is bool(graphs)


def test_a_decorated_module_inside_another_becomes_part_of_it() -> None:
    @support_torch_compile
    class Outer(nn.Module):
        compilation_config = EAGER

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Model(), Model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, x = Outer(), torch.randn(4, 8)
    expected = model.second.forward(model.first.forward(x))
    with counters.expect(num_graphs_seen=1):
        torch.testing.assert_close(model(x), expected)
    assert stitched_of(model.first) is None
    assert stitched(model).report().splitting == 2


def test_torch_compile_around_a_decorated_module_traces_the_model() -> None:
    model, x = Model(), torch.randn(4, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with counters.expect(num_graphs_seen=0):
        torch.testing.assert_close(compiled(x), model.forward(x))
    assert stitched_of(model) is None


def test_an_own_call_stays_around_what_is_compiled() -> None:
    calls: list[int] = []

    class Logged(Adds):
        def __call__(self, *args: object, **kwargs: object) -> object:
            calls.append(1)
            return super().__call__(*args, **kwargs) * 10

    model = Logged()
    model.register_forward_hook(lambda module, args, result: result + 5)
    with counters.expect(num_graphs_seen=1):
        for batch in (2, 3):
            x = torch.randn(batch)
            torch.testing.assert_close(model(x), (x + 6) * 10)
    assert calls == [1, 1]
    assert stitched(model).source.module.banner[0] == "model: Logged"


# --- copies, modes, weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_compiles_for_itself(duplicate: Any) -> None:
    model, x = Model(), torch.randn(4, 8)
    same(model, x)
    other = duplicate(model)
    assert stitched_of(other) is None
    if duplicate is not copy.copy:
        with torch.no_grad():
            other.linear.weight.add_(1)
    with counters.expect(num_graphs_seen=1):
        same(other, x)
    assert stitched(model).model is model and stitched(other).model is other
    same(model, x)


def test_the_tag_at_construction_holds_at_the_first_call() -> None:
    with set_model_tag("drafter"):
        made_inside, called_inside = Model(), Model()
    outside = Model()
    same(made_inside, torch.randn(4, 8))
    with set_model_tag("target"):
        same(called_inside, torch.randn(4, 8))
    same(outside, torch.randn(4, 8))
    names = [stitched(m).report().model for m in (made_inside, called_inside, outside)]
    assert names == ["drafter.Model", "target.Model", "Model"]


def test_a_failure_in_a_piece_carries_the_piece() -> None:
    @piecework.splitting_op("decorators::fails")
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of pages")

    fails.register_fake(torch.empty_like)

    @support_torch_compile
    class Uses(nn.Module):
        compilation_config = EAGER

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return fails(x + 1)

    with pytest.raises(RuntimeError, match="out of pages") as caught:
        Uses()(torch.randn(4))
    assert any("fails(" in note for note in caught.value.__notes__)


@pytest.mark.inductor
def test_inductor_runs_a_decorated_class() -> None:
    model = Model(compilation_config=CompilationConfig())
    with counters.expect(num_inductor_compiles=1):
        for batch in (4, 9):
            same(model, torch.randn(batch, 8))


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from piecework.examples import decorated

    model = decorated.main(backend="eager")
    printed = capsys.readouterr().out
    assert "def execution_fn(" in printed and "2 pieces, 2 unique" in printed
    assert stitched(model).report().splitting == 1
