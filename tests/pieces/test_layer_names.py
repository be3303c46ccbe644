"""Layers that differ only in a name given to an operator: compiled once, each still called with its own name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import mix
from torch import nn

import piecework
from piecework.codegen import split_graph
from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces import layer_names
from piecework.runtime.pieces.layer_names import name_tensor, share_layer_names
from piecework.runtime.pieces.manager import CompilerManager

CALLED: list[str] = []


@torch.library.custom_op("names_test::note", mutates_args=("total",))
def note(
    x: torch.Tensor, total: torch.Tensor, layer: str, scale: float = 1.0, kind: str = "plain"
) -> torch.Tensor:
    CALLED.append(f"{layer}/{kind}")
    total.add_(len(layer))
    return x * scale


@note.register_fake
def _(
    x: torch.Tensor, total: torch.Tensor, layer: str, scale: float = 1.0, kind: str = "plain"
) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("names_test::widen", mutates_args=())
def widen(x: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.cat([x] * (2 if layer == "wide" else 1), -1)


@widen.register_fake
def _(x: torch.Tensor, layer: str) -> torch.Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * (2 if layer == "wide" else 1))


class Layers(nn.Module):
    """``names[i]`` is given to the operator in layer i."""

    def __init__(self, names: list[str], op: Callable[..., torch.Tensor] | None = None) -> None:
        super().__init__()
        self.names = names
        self.lift = nn.Linear(4, 4)
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            out = torch.empty_like(x)
            mix(x, out)
            if self.op is not None:
                x = self.lift(out) + self.op(out, name).sum(-1, keepdim=True)
            else:
                total = torch.zeros_like(x)
                x = self.lift(note(out, total, name, kind=f"kind {name}")) + total
        return x


def split(model: nn.Module) -> tuple[torch.fx.GraphModule, list, torch.fx.GraphModule]:  # type: ignore[type-arg]
    """The stitching graph of ``model``, its items, and the graph it comes from."""
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True, dynamic=True)(torch.randn(3, 4))
    split_gm, items = split_graph(found[0], ["models::mix"])
    return split_gm, items, found[0]


def keys(items: list) -> list[str]:  # type: ignore[type-arg]
    pieces = [item.graph for item in items if not item.is_splitting_graph]
    return [structure_of(piece, describe_input=input_signature).key for piece in pieces]


@pytest.fixture(autouse=True)
def fresh() -> None:
    CALLED.clear()


def test_equal_layers_become_one_program_and_keep_their_names() -> None:
    names = [f"layers.{i}" for i in range(11)]
    model = Layers(names)
    split_gm, items, graph = split(model)
    placeholders = graph.graph.find_nodes(op="placeholder")
    assert len(set(keys(items))) == len(names) + 1  # the first one only allocates
    share_layer_names(split_gm, items)
    assert len(set(keys(items))) == 3  # the last one allocates no buffer for a next
    x = torch.randn(3, 4)
    parts = {"weight": model.lift.weight, "bias": model.lift.bias, "": x}
    inputs = [
        3 if node.name.startswith("s") else next(v for k, v in parts.items() if k in node.name)
        for node in placeholders
    ]
    CALLED.clear()
    with torch.no_grad():
        (result,) = split_gm(*inputs)
        ours = list(CALLED)
        CALLED.clear()
        torch.testing.assert_close(result, model(x))
    assert ours == CALLED == [f"{name}/kind {name}" for name in names]


def test_a_name_that_decides_a_shape_is_not_shared() -> None:
    for names in (["narrow", "wide", "narrow too", "x"], ["wide", "narrow", "narrow too", "x"]):
        split_gm, items, _ = split(Layers(names, widen))
        before = keys(items)[1:]  # the first one only allocates
        share_layer_names(split_gm, items)
        after = dict(zip(names, keys(items)[1:], strict=True))
        assert len(set(before)) == 4 and after["wide"] == before[names.index("wide")]
        assert after["narrow"] == after["narrow too"] != after["wide"]


def test_torchs_own_string_arguments_are_left_alone() -> None:
    op = torch.ops.aten.div.Tensor_mode
    split_gm, items, _ = split(Layers(["floor", "trunc"], lambda x, n: op(x, 3, rounding_mode=n)))
    before = keys(items)
    share_layer_names(split_gm, items)
    assert keys(items) == before


def test_the_operators_schema_and_fake_follow_the_original() -> None:
    note_op = torch.ops.names_test.note.default
    op = layer_names.named_operator(note_op, "layer")
    assert op is layer_names.named_operator(note_op, "layer")
    text = str(op._schema)
    assert "Tensor(a1!) total, str layer" in text and "*, Tensor layer_as_bytes)" in text
    x, total = torch.randn(2, 4), torch.zeros(2, 4)
    result = op(x, total, "first", 3.0, layer_as_bytes=name_tensor("real one"))
    torch.testing.assert_close(result, x * 3)
    assert CALLED == ["real one/plain"] and total[0, 0] == len("real one")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, total, data = map(mode.from_tensor, (x, total, name_tensor("real one")))
        fake = op(x, total, "first", layer_as_bytes=data)
    assert fake.shape == (2, 4) and len(CALLED) == 1


def test_a_users_pass_keeps_the_operators_it_looks_for() -> None:
    config = CompilationConfig(inductor_passes={"post_grad_custom_post_pass": "builtins:len"})
    assert CompilerManager(CompilationConfig()).may_share_names()
    assert not CompilerManager(config).may_share_names()
    assert not CompilerManager(CompilationConfig(backend="eager")).may_share_names()


@pytest.mark.inductor
def test_any_number_of_named_layers_costs_a_constant_number_of_compiles() -> None:
    model, x = Layers([f"layers.{i}" for i in range(12)]), torch.randn(3, 4)
    config = CompilationConfig(compile_sizes=[5], compile_ranges_endpoints=[16])
    stitched = piecework.compile(model, (x,), config=config)
    # The first allocates a buffer, each layer one for the next, the last one none.
    assert stitched.report().unique == 3
    for batch in (5, 3, 40):
        x = torch.randn(batch, 4)
        CALLED.clear()
        result = stitched(x)
        assert [f"layers.{i}/kind layers.{i}" for i in range(12)] == CALLED
        torch.testing.assert_close(result, model(x))
    assert "name_layers_3" in stitched.source.code
