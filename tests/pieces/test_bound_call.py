"""Dynamo's graphs by the names of the user's code, with their weights held ready."""

import gc
import weakref

import pytest
import torch
from torch import nn

from piecework import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.bound_call import name_inputs

OPTIONS = {"backend": "eager"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.shift = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * self.scale + self.shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, rest: list[torch.Tensor]) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + rest[0]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(model, **options) -> tuple[object, list[PieceworkBackend]]:
    made: list[PieceworkBackend] = []

    def backend(graph, inputs):
        made.append(PieceworkBackend(CompilationConfig(**OPTIONS), "model"))
        return made[-1](graph, inputs)

    return torch.compile(model, backend=backend, **options), made


def call(model) -> torch.Tensor:
    x = torch.arange(12.0).reshape(3, 4)
    with torch.no_grad():
        return model(x, [x + 1])


def test_names_are_the_users_and_weights_are_no_parameters():
    model, made = compiled(Model(), dynamic=True)
    call(model)
    code = made[0].program.source.code
    assert "def execution_fn(s0, x, rest_0, *, __vllm_submods__)" in code
    for path in ("layers.0.up.weight", "layers.1.scale", "layers.1.shift"):
        assert path in code
    assert "l_self_modules" not in code


def test_aot_compile_has_the_same_names():
    """There Dynamo keeps no record of the sources on the graph."""
    seen = []

    def backend(graph, inputs):
        seen.append(
            (name_inputs(graph), [n.name for n in graph.graph.find_nodes(op="placeholder")])
        )
        return graph

    x = torch.ones(3, 4)
    run = torch.compile(Model().forward, backend=backend, fullgraph=True, dynamic=True)
    with pytest.raises(RuntimeError, match="SerializableCallable"):
        run.aot_compile(((x, [x + 1]), {}))
    ((paths, names),) = seen
    assert {"layers.0.up.weight", "layers.1.scale", "layers.1.shift"} < set(paths)
    assert {"x", "rest_0", "s0", "layers_0_up_weight"} < set(names)


def test_a_weight_that_changes_is_seen():
    model = Model()
    run, made = compiled(model, dynamic=True)

    def replaced():
        model.layers[1].up.weight = nn.Parameter(torch.eye(4))

    def of_a_buffer():
        model.layers[0].scale = torch.full((4,), 3.0)

    for change in (int, lambda: model.layers[0].up.weight.mul_(2), replaced, of_a_buffer):
        with torch.no_grad():
            change()
        torch.testing.assert_close(call(run), call(model))
    assert len(made) == 1  # bound again, not compiled again


def test_two_models_of_one_class_have_their_own_weights():
    first, second = Model(), Model()
    how = {"backend": "piecework", "dynamic": True, "options": OPTIONS}
    runs = [torch.compile(each, **how) for each in (first, second)]
    for _ in range(2):
        for run, model in zip(runs, (first, second), strict=True):
            torch.testing.assert_close(call(run), call(model))


def test_a_dead_model_leaves_no_weights():
    model = Model()
    call(torch.compile(model, backend="piecework", options=OPTIONS))
    held = [weakref.ref(each) for each in (model, model.layers[0].up.weight, model.layers[1].scale)]
    del model
    gc.collect()
    assert [each() for each in held] == [None] * 3


def test_a_function_has_its_arguments_names():
    run, made = compiled(lambda x, table: x @ table["w"])
    x = torch.ones(3, 4)
    torch.testing.assert_close(run(x, {"w": x.T}), x @ x.T)
    assert "def execution_fn(x, table_w, *, __vllm_submods__)" in made[0].program.source.code


def test_ranges_pick_their_pieces():
    model = Model()
    options = {**OPTIONS, "compile_ranges_endpoints": [4]}
    x = torch.ones(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    run = torch.compile(model, backend="piecework", options=options)
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.ones(rows, 4)
            torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(run(x, [x]), model(x, [x]))
