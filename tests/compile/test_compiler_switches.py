"""Torch's switches for its compiler: in, a switch and an entry point; out, the model as it is, said once, and what was compiled as torch decides it."""

import logging
import os
from unittest import mock

import pytest
import torch
from models import EAGER

import piecework
from piecework.errors import BindError, InputError
from piecework.runtime.counters import counters
from piecework.runtime.decorators import stitched_of


def disabled():
    return torch._dynamo.config.patch(disable=True)


def stance(name):
    return lambda: torch.compiler.set_stance(name)


SWITCHES = {
    "config": disabled,
    "variable": lambda: mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"),
    "force_eager": stance("force_eager"),
    "eager_on_recompile": stance("eager_on_recompile"),
}
BACKED = {"backend": "eager", "dynamic_shapes_config": {"type": "backed"}}  # one trace, not several
off = pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


@off
def test_a_compiled_model_runs_as_it_is_and_is_compiled_when_the_switch_is_back(switch, caplog):
    model, x = Plain().eval(), torch.randn(3, 4)
    with caplog.at_level(logging.WARNING, "piecework"), switch():
        stitched = piecework.compile(model, (x,), config=EAGER)
        results = [stitched(x), stitched(torch.randn(3, 4, requires_grad=True)), stitched(x)]
        assert torch.equal(results[0], model(x))
        assert results[1].requires_grad  # as the model does it
        assert stitched.capture([1, 2]) is stitched
        with pytest.raises(BindError, match="at its first call") as refused:
            _ = stitched.source
        with pytest.raises(BindError, match="nothing is captured"):
            stitched.coverage()
    assert refused.value.where
    assert [r.getMessage().count("runs as it is") for r in caplog.records] == [1]
    assert torch.equal(stitched(x), model(x)) and not stitched(x).requires_grad
    assert "execution_fn" in stitched.source.code


@off
@pytest.mark.parametrize("mode", ["PIECEWORK_COMPILE", "DYNAMO_TRACE_ONCE", "STOCK_TORCH_COMPILE"])
def test_a_decorated_class_runs_as_it_is(switch, mode, caplog):
    decorated = piecework.support_torch_compile(dynamic_arg_dims={"x": 0})(type("D", (Plain,), {}))
    model = decorated(compilation_config={"mode": mode, "backend": "eager"}).eval()
    x = torch.randn(3, 4)
    before = counters.num_graphs_seen
    with caplog.at_level(logging.WARNING, "piecework"), switch():
        for _ in range(3):
            assert torch.equal(model(x), model.linear(x).relu())
        assert model(x).requires_grad
    assert stitched_of(model) is None and counters.num_graphs_seen == before
    assert sum("runs as it is" in r.getMessage() for r in caplog.records) == 1
    assert torch.equal(model(x), model.linear(x).relu())
    assert (stitched_of(model) is None) == (mode == "STOCK_TORCH_COMPILE")


@pytest.mark.parametrize("mode", ["PIECEWORK_COMPILE", "STOCK_TORCH_COMPILE"])
def test_force_eager_later_runs_the_model_and_default_runs_what_was_compiled(mode):
    config = {**BACKED, "mode": mode}
    model, runs, x = Plain().eval(), [], torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=config)
    stitched(x)
    model.linear.register_forward_hook(lambda *_: runs.append(1))
    with torch.compiler.set_stance("force_eager"):
        assert stitched(x).requires_grad and runs == [1]
        stitched(torch.randn(1, 2, 4))  # what no compiled form takes
        assert len(runs) == 2
    if mode == "PIECEWORK_COMPILE":
        with pytest.raises(InputError):
            stitched(torch.randn(1, 2, 4))


def test_force_eager_later_holds_for_decorated_models_and_static_graphs():
    decorated = piecework.support_torch_compile(dynamic_arg_dims={"x": 0})(type("D", (Plain,), {}))
    model, x = decorated(compilation_config=BACKED).eval(), torch.randn(3, 4)
    model(x)
    stitched_of(model).capture([4], progress=False)
    replays = lambda: sum(r.calls for r in stitched_of(model).call_report())  # noqa: E731
    before = replays()
    with torch.compiler.set_stance("force_eager"):
        assert model(x).requires_grad
        assert model(torch.randn(1, 2, 4)).shape == (1, 2, 4)
    assert replays() == before
    assert not model(x).requires_grad and replays() == before + 1


def test_a_switch_that_only_stops_compilations_leaves_what_is_compiled():
    x = torch.randn(3, 4)
    stitched = piecework.compile(Plain().eval(), (x,), config=EAGER)
    for switch in (disabled, SWITCHES["variable"]):
        with switch():
            assert not stitched(x).requires_grad
            assert stitched(torch.randn(1, 2, 4)).requires_grad  # fits no trace, so runs as it is
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not stitched(x).requires_grad
        with pytest.raises(InputError):
            stitched(torch.randn(1, 2, 4))


@off
def test_no_other_trace_is_made_while_a_switch_is_off(switch):
    class Branches(Plain):
        def forward(self, x):
            return super().forward(x) * (2 if x.shape[0] > 1 else 3)

    model = Branches().eval()
    stitched = piecework.compile(model, (torch.randn(3, 4),), config=EAGER)
    one = torch.randn(1, 4)
    with switch():
        assert stitched(one).requires_grad and torch.equal(stitched(one), model(one))
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(InputError):
        stitched(one)
    assert len(stitched.traces) == 1
    assert not stitched(one).requires_grad and len(stitched.traces) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert not stitched(one).requires_grad  # now there is one


def test_eager_on_recompile_serves_what_fits_and_runs_the_rest_as_it_is():
    model, x = Plain().eval(), torch.randn(3, 4)
    stitched = piecework.compile(model, (x,), config=BACKED)
    with torch.compiler.set_stance("eager_on_recompile"):
        assert not stitched(x).requires_grad
        assert stitched(torch.randn(1, 2, 4)).requires_grad
        double = torch.randn(3, 4, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(stitched(double), model(double))
        model.linear.weight = torch.nn.Parameter(torch.zeros(4, 4))  # a weight that was replaced
        assert torch.equal(stitched(x), model(x))
        stitched.rebind()
        assert torch.equal(stitched(x), model(x)) and not stitched(x).requires_grad
    assert not stitched(x).requires_grad
