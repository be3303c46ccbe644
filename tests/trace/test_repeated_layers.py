"""Layers that are alike are traced once, by torch's nested compile regions. In: stacks of layers that differ in this and that. Out: the program of a trace of every layer, watched in every layer, and no mark left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import PieceworkError
from piecework.runtime import torch_compat

torch.manual_seed(0)


def example(rows: int = 4) -> torch.Tensor:
    x = torch.randn(rows, 8)
    torch._dynamo.mark_dynamic(x, 0)
    return x


SHARES = torch_compat.compile_region(example) is not None
needs_shared_traces = pytest.mark.skipif(not SHARES, reason="this torch shares no traces")


class Layer(nn.Module):
    def __init__(self, index: int, scale: float = 1.0, *, adapter: bool = False) -> None:
        super().__init__()
        self.index, self.scale = index, scale
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 16)
        self.down = nn.Sequential(nn.GELU(), nn.Linear(16, 8))
        self.adapter = nn.Linear(8, 8) if adapter else None
        self.register_buffer("bias", torch.full((8,), float(index)))

    def forward(self, x: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        y = self.down(self.up(self.norm(x))) * self.scale * gain
        return x + y + self.bias if self.adapter is None else x + self.adapter(y)


class Indexed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.index + 1)


class Counts(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bias.add_(1)
        return super().forward(x)


class View(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 8)


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def compiled(model: nn.Module, names: Sequence[str] = ("layers",)) -> piecework.StitchedModule:
    return piecework.compile(
        model, (example(),), config={"backend": "eager", "repeated_layers": list(names)}
    )


def stack(kind: type[Layer] = Layer, count: int = 5, **given: object) -> Stack:
    return Stack([kind(i, **given) for i in range(count)]).eval()  # type: ignore[arg-type]


def adapters() -> Stack:
    return Stack([Layer(i, adapter=i % 2 == 1) for i in range(6)]).eval()


def scales() -> Stack:
    return Stack([Layer(i, scale=(1.0, 2.0)[i % 2]) for i in range(6)]).eval()


@needs_shared_traces
@pytest.mark.parametrize(
    ("build", "shared"),
    [
        (stack, "one trace served 4 of 5"),
        (adapters, "one trace served 4 of 6"),
        (scales, "one trace served 4 of 6"),
        (lambda: stack(Indexed), "one trace served 0 of 5"),
        (lambda: stack(Counts), "one trace served"),
        (lambda: stack(View), "every layer was traced"),
    ],
)
def test_the_program_is_that_of_a_trace_of_every_layer(
    build: Callable[[], Stack], shared: str
) -> None:
    model = build()
    forwards = {type(layer): type(layer).forward for layer in model.layers}
    alike, each = compiled(model), compiled(model, ())
    assert str(alike.report().layers).startswith(shared)
    assert each.report().layers == ""
    assert all(kind.forward is own for kind, own in forwards.items())
    one, other = (stitched.program.graph.graph for stitched in (alike, each))
    assert [n.target for n in one.nodes if n.op == "call_function"] == [
        n.target for n in other.nodes if n.op == "call_function"
    ]
    assert [w.path for w in alike.traces[0].entry.now.weights.traced] == [
        w.path for w in each.traces[0].entry.now.weights.traced
    ]
    comments = [[line for line in s.source.code.splitlines() if "#" in line] for s in (alike, each)]
    assert comments[0] == comments[1]
    for rows in (4, 7):
        x = torch.randn(rows, 8)
        expected = copy.deepcopy(model)(x)
        torch.testing.assert_close(alike(x), expected)


@needs_shared_traces
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "scale", 3.0),
        lambda layer: setattr(layer.down, "0", nn.ReLU()),
        lambda layer: layer.up.register_forward_hook(lambda *_: None),
        lambda layer: setattr(layer, "adapter", nn.Linear(8, 8)),
    ],
)
@pytest.mark.parametrize("index", [0, 3])
def test_what_changes_in_any_layer_is_noticed(
    change: Callable[[Layer], object], index: int
) -> None:
    model = stack()
    stitched = compiled(model)
    assert "one trace served 4 of 5" in str(stitched.report())
    change(model.layers[index])  # type: ignore[arg-type]
    with pytest.raises(PieceworkError, match=rf"layers\.{index}"):
        stitched(example())


def test_weights_of_every_layer_are_its_own() -> None:
    model = stack()
    stitched = compiled(model)
    with torch.no_grad():
        model.layers[3].up.weight.mul_(2)  # type: ignore[union-attr]
    x = example()
    torch.testing.assert_close(stitched(x), model(x))
    model.layers[2].up.weight = nn.Parameter(torch.zeros(16, 8))  # type: ignore[union-attr]
    with pytest.raises(PieceworkError, match=r"layers\.2\.up\.weight was replaced"):
        stitched(x)
    stitched.rebind()
    torch.testing.assert_close(stitched(x), model(x))


@needs_shared_traces
def test_a_region_that_the_user_marked_is_written_out() -> None:
    class Marked(Layer):
        forward = torch.compiler.nested_compile_region(Layer.forward)

    model = stack(Marked)
    stitched = compiled(model, ())
    assert "one trace served 4 of 5" in str(stitched.report())
    x = example(3)
    torch.testing.assert_close(stitched(x), model(x))


def test_the_report_says_why_every_layer_was_traced() -> None:
    assert "no module nowhere holds two" in str(compiled(stack(), ["nowhere"]).report())
    if not SHARES:
        assert "every layer was traced: this torch" in str(compiled(stack()).report())


@needs_shared_traces
def test_a_size_that_a_layer_fixes() -> None:
    model = stack()
    config = {"backend": "eager", "repeated_layers": ["layers"]}
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=config)
    assert "every layer was traced: " in str(stitched.report())
    x = torch.randn(3, 8)
    torch.testing.assert_close(stitched(x), model(x))
