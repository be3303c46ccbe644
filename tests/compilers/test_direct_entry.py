"""Past Inductor's wrappers, and what they leave undone: inputs at odd addresses."""

from __future__ import annotations

from functools import wraps

import pytest
import torch

import piecework
from piecework.runtime import torch_compat


class CompiledFxGraph:
    """As far as it is looked at: a callable, and what AOTAutograd recorded of it."""

    def __init__(self) -> None:
        self.current_callable = lambda args: [args[0] + 1]


def test_an_input_at_an_odd_address_is_copied_and_what_is_written_to_it_comes_back():
    graph = CompiledFxGraph()
    graph.inputs_to_check, graph.mutated_input_idxs = [0, 1], {1}
    graph._defers_input_alignment = False
    aligned: list[bool] = []

    def call(args):
        aligned.extend(each.data_ptr() % 16 == 0 for each in args)
        return [args[1].add_(args[0])]

    graph.current_callable = call
    torch_compat.realign_inputs(lambda: graph)
    x, y = torch.ones(9)[1:], torch.zeros(9)[1:]
    assert x.data_ptr() % 16 and y.data_ptr() % 16
    graph.current_callable([x, y])
    assert aligned == [True, True] and y.tolist() == [1.0] * 8


@pytest.mark.inductor
@pytest.mark.parametrize("inside", [False, True])
def test_every_compiled_graph_is_realigned_once(monkeypatch, inside):
    from torch._inductor import output_code

    found: list[object] = []
    before = output_code.maybe_realign_inputs

    def noting(ran, graph, *rest):
        found.append(graph)
        return before(ran, graph, *rest)

    monkeypatch.setattr(output_code, "maybe_realign_inputs", noting)
    config = piecework.CompilationConfig(use_inductor_graph_partition=inside, splitting_ops=[])
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Softmax(-1))
    for _ in ("compiled", "from the cache"):
        stitched = piecework.compile(model, (torch.randn(4, 8),), config=config)
        x = torch.randn(41)[1:].view(5, 8)
        torch.testing.assert_close(stitched(x), model(x))
        torch.compiler.reset()
    assert len(found) == 2 and len({id(each) for each in found}) == 2


def test_operators_of_python_that_inductor_lowers_by_itself_are_nobodys_own(monkeypatch):
    """Else torch 2.11 would compile without a cache from the second compilation of a process on."""
    import operator

    from torch._inductor import lowering

    from piecework.runtime.torch_compat.settings import global_passes

    @wraps(operator.add)
    def add(a, b):
        return a + b

    def mine(a, b):
        return a - b

    before = set(global_passes())
    monkeypatch.setitem(lowering.lowerings, operator.add, add)
    monkeypatch.setitem(lowering.lowerings, operator.sub, mine)
    assert set(global_passes()) - before == {f"lowerings.{operator.sub}"}


def _wrapped(name: str, held: str, **cells: object):
    """An artifact whose graph lies in one wrapper of that name, which holds ``cells`` beside it."""
    names, scope = ", ".join(cells), {}
    body = f"    def w():\n        return {held}, {names}\n    return w"
    exec(f"def make({held}, {names}):\n{body}", scope)
    wrapper = scope["make"](CompiledFxGraph(), *cells.values())
    wrapper.__code__ = wrapper.__code__.replace(co_qualname=name)
    return type("Artifact", (), {"_compiled_fn": staticmethod(wrapper)})()


FORWARD = "aot_module_simplified.<locals>.forward"
RUNTIME = "_create_runtime_wrapper.<locals>.runtime_wrapper"
EFFECTS = "EffectTokensWrapper.post_compile.<locals>.inner_fn"


@pytest.mark.parametrize(
    ("name", "held", "cells", "why"),
    [
        (FORWARD, "compiled_fn", {"params_buffers_flat": []}, ""),
        (FORWARD, "compiled_fn", {"params_buffers_flat": [1]}, "more than call"),
        (RUNTIME, "compiled_fn", {"epilogue_args_idx": [0]}, "more than call"),
        (EFFECTS, "compiled_fn", {"num_tokens": 1}, "more than call"),
        ("some_other.<locals>.wrapper", "compiled_fn", {"x": 1}, "unknown"),
        (RUNTIME, "elsewhere", {"trace_joint": False}, "unknown"),
    ],
)
def test_only_wrappers_that_are_known_to_do_nothing_are_passed(name, held, cells, why):
    call, reason = torch_compat.direct_entry(_wrapped(name, held, **cells), 1, 1, vouched=True)
    assert (call is None) is bool(why) and why in reason
    assert torch_compat.direct_entry(object(), 1, 1, vouched=True)[0] is None
