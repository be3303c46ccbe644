"""Layers that are alike are traced once. In: stacks of layers that differ in this and that. Out: always the graph of a flat trace, facts about every layer, and nothing left on the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from flat_trace import require_one_graph, traced
from torch import nn

import piecework
from piecework.bench import compile_time, llama_shaped
from piecework.errors import BindError, CaptureError, ConfigError, InputError
from piecework.runtime import stitched_of
from piecework.runtime.trace.sizes.example_sizes import AllDimensions

FOUND = piecework.CompilationConfig(backend="eager", repeated_layers="found")
X = torch.randn(4, 8)
SPECIAL: dict[str, object] = {}


@piecework.splitting_op("repeated::mix", mutates_args=("out",))
def mix(x: torch.Tensor, out: torch.Tensor, name: str, window: int) -> None:
    out.copy_(x * window + len(name))


@piecework.splitting_op("repeated::grow")
def grow(x: torch.Tensor, by: int) -> torch.Tensor:
    return x.new_ones(x.shape[0], 8 + by)


grow.register_fake(lambda x, by: x.new_ones(x.shape[0], 8 + by))


class Part(nn.Module):
    """What the layers below have; each has its own number and name."""

    def __init__(self, index: int, scale: float = 1.0, window: int = 3, adapter: bool = False):
        super().__init__()
        self.index, self.name, self.scale, self.window = index, f"layers.{index}", scale, window
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU()
        self.adapter = nn.Linear(8, 8) if adapter else None


class Plain(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix(self.a(x), out := torch.empty_like(x), self.name, self.window)
        y = self.b(self.act(out)) * self.scale
        return x + y if self.adapter is None else x + y + self.adapter(x)


class Stack(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def stack(layers: Sequence[nn.Module], kind: type[Stack] = Stack) -> Stack:
    return kind(layers).eval().requires_grad_(False)


def plain(count: int = 5) -> list[nn.Module]:
    return [Plain(i) for i in range(count)]


# --- what is shared -------------------------------------------------------------------------------------


def alternating() -> list[nn.Module]:
    return [Plain(i, window=(0, 7)[i % 2]) for i in range(8)]


def two_scales() -> list[nn.Module]:
    return [Plain(i, scale=1.0 + i % 2) for i in range(8)]


def one_adapter() -> list[nn.Module]:
    return [Plain(i, adapter=i == 2) for i in range(6)]


def tied(first: str, second: str) -> Callable[[], list[nn.Module]]:
    def make() -> list[nn.Module]:
        layers = plain()
        layers[3].get_submodule(first).weight = layers[1].get_submodule(second).weight
        return layers

    return make


def tied_to_itself() -> list[nn.Module]:
    layers = plain()
    layers[3].a.weight = layers[3].b.weight
    return layers


def hooked() -> list[nn.Module]:
    layers = plain()
    layers[2].a.register_forward_hook(lambda module, given, out: out + 1)
    return layers


def called_again() -> list[nn.Module]:
    layers = plain(4)
    return [*layers, layers[0], layers[3], layers[0]]


class InPlace(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(self.a(x))
        return self.b(x)


class Viewing(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)[:, :8].view(-1, 8)


class Wasteful(Part):
    """It multiplies by a weight for nothing, and makes a tensor of numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b(x)
        return self.a(x) * torch.tensor([1.0, -0.0, float("nan"), 2.0] * 2) + torch.rand_like(x) * 0


class Casting(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(self.a(x)).float()


class Settings:
    def __init__(self, index: int) -> None:
        self.index, self.name = index, "same"


class Configured(Part):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.config = Settings(index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = {"out": (out := torch.empty_like(x))}
        mix(self.a(x), name=self.config.name, window=self.config.index, **given)
        return self.b(out)


def of(kind: Callable[[int], nn.Module]) -> Callable[[], list[nn.Module]]:
    return lambda: [kind(i) for i in range(5)]


SHARED: dict[str, tuple[Callable[[], list[nn.Module]], str]] = {
    "plain": (plain, "one trace served 4 of 5 repeated layers"),
    "alternating windows": (alternating, "one trace served 7 of 8 repeated layers"),
    "two scales": (two_scales, "one trace served 6 of 8 repeated layers"),
    "an adapter on one": (one_adapter, "one trace served 4 of 5 repeated layers"),
    "tied": (tied("a", "a"), "one trace served 4 of 5 repeated layers"),
    "tied to itself": (tied_to_itself, "one trace served 3 of 4 repeated layers"),
    "a hook in one": (hooked, "one trace served 3 of 4 repeated layers"),
    "called again": (called_again, "one trace served 3 of 4 repeated layers"),
    "in place": (of(InPlace), "one trace served 4 of 5 repeated layers"),
    "a view": (of(Viewing), "one trace served 4 of 5 repeated layers"),
    "autocast": (of(Casting), "one trace served 4 of 5 repeated layers"),
    "for nothing": (of(Wasteful), "one trace served 4 of 5 repeated layers"),
    "settings of each": (of(Configured), "one trace served 4 of 5 repeated layers"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("sizes", [None, AllDimensions], ids=["as marked", "every size"])
@pytest.mark.parametrize("name", SHARED)
def test_shared_graph_is_the_flat_one(name: str, sizes: type | None) -> None:
    make, says = SHARED[name]
    assert require_one_graph(stack(make()), (X.clone(),), sizes=sizes) == says


def test_residual_that_is_its_input_at_first() -> None:
    class Residual(Part):
        def forward(self, x, residual, table=None, nothing=None, flag=True):
            residual = residual + (h := self.a(x))
            return self.b(h) * table[0], residual

    class Outer(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            residual, table = x, (x * 2, 3)
            for layer in self.layers:
                x, residual = layer(x, residual, table=table)
            return self.norm(x + residual)

    says = require_one_graph(stack([Residual(i) for i in range(6)], Outer), (X,))
    assert says == "one trace served 4 of 5 repeated layers"  # the first is given one tensor twice


@pytest.mark.parametrize("build", [llama_shaped.build, compile_time.build])
def test_benchmark_models(build: Callable[..., object]) -> None:
    if build is llama_shaped.build:
        model, x = llama_shaped.build(6, llama_shaped.light_attention()), llama_shaped.token_ids(6)
    else:
        model, x = compile_time.build(6)
    assert require_one_graph(model, (x,)) == "one trace served 5 of 6 repeated layers"


# --- what is not ----------------------------------------------------------------------------------------


class Branching(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x) if self.index % 2 else x - self.a(x)


class ByName(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if self.name in ("layers.2",) else self.b(self.a(x))


class Computed(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) * getattr(self, "IN".lower() + "dex")


class Asked(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) * getattr(self, "index")  # noqa: B009


class Halved(Part):
    @property
    def half(self) -> int:
        return self.index // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mix(self.a(x), out := torch.empty_like(x), "same", self.half)
        return self.b(out)


class Matched(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        match self:
            case Matched(index=2):
                return self.a(x)
        return self.b(x)


class Closed(Part):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.times = lambda x: x * index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.times(self.a(x))


def times(x: torch.Tensor, by: int) -> torch.Tensor:
    return x * (by if by > 2 else 7)


class Bound(Part):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.times = functools.partial(times, by=index)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.times(self.a(x))


class Tagging(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x))
        y = y * 2 if getattr(x, "tag", 0) else y
        y.tag = 1
        return y


class Growing(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(grow(self.a(x), self.index)[:, :8])


class Looking(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + (x if SPECIAL.get("layer") is self else 0)


class Returning(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a(x)
        return x


class Counting(Part):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.nonzero(self.a(x)).sum()


REFUSED = {
    "a branch by number": (Branching, "does more with index than hand it to an operator"),
    "a branch by name": (ByName, "does more with name than hand it to an operator"),
    "a computed name": (Computed, "looks attributes up by names that it computes"),
    "a name in a text": (Asked, "may ask for index by its name"),
    "computed with": (Halved, "does more with index than hand it to an operator"),
    "a pattern": (Matched, "looks attributes up by names that it computes"),
    "a closure": (Closed, "is no attribute of a plain object"),
    "a bound argument": (Bound, "is no attribute of a plain object"),
    "attributes of tensors": (Tagging, "attributes or objects were written"),
    "a size by number": (Growing, "depends on a layer's name or number"),
    "returns its input": (Returning, "returns one of its arguments"),
    "sizes by data": (Counting, "depends on data"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_layers_are_traced_as_before(name: str) -> None:
    kind, why = REFUSED[name]
    says = require_one_graph(stack([kind(i) for i in range(5)]), (X.clone(),))
    assert says.startswith("every layer was traced: ")
    assert why in says


def test_layer_that_a_global_leads_to() -> None:
    layers = [Looking(i) for i in range(5)]
    SPECIAL["layer"] = layers[2]
    try:
        assert "global SPECIAL leads to a layer" in require_one_graph(stack(layers), (X,))
    finally:
        SPECIAL.clear()


def test_list_that_layers_write_to() -> None:
    class Appending(Part):
        def forward(self, x: torch.Tensor, outs: list[torch.Tensor]) -> torch.Tensor:
            outs.append(x := self.b(self.a(x)))
            return x

    class Outer(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outs: list[torch.Tensor] = []
            for layer in self.layers:
                x = layer(x, outs)
            return self.norm(x) + sum(outs)

    says = require_one_graph(stack([Appending(i) for i in range(5)], Outer), (X,))
    assert "given something else than tensors" in says


def test_scale_of_each_layer_is_its_own() -> None:
    model = stack([Plain(i, scale=1.0 + i) for i in range(5)])
    assert require_one_graph(model, (X,)) == ""


def test_state_that_another_layer_would_write() -> None:
    class Resetting(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.index = 0  # nothing new for the first layer
            return self.b(self.a(x))

    with pytest.raises(CaptureError, match=r"changes the model's own state: layers\.1\.index"):
        traced(stack([Resetting(i) for i in range(5)]), (X,), {}, "found")


# --- afterwards -----------------------------------------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    model = stack(plain())
    before = [dict(layer.__dict__) for layer in model.layers]
    stitched = piecework.compile(model, (X,), config=FOUND)
    assert stitched.report().layers == "one trace served 4 of 5 repeated layers"
    assert [dict(layer.__dict__) for layer in model.layers] == before
    torch.testing.assert_close(stitched(X), model(X))


def test_failing_trace_leaves_the_model_as_it_was() -> None:
    class Breaking(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return self.a(x)

    model = stack([Breaking(i) for i in range(5)])
    with pytest.raises(CaptureError):
        piecework.compile(model, (X,), config=FOUND)
    assert not any("forward" in layer.__dict__ for layer in model.layers)


def test_marked_layers_run_as_before() -> None:
    """What another thread does while the model is traced."""
    model = stack(plain())
    expected, seen = model(X), []

    @torch._dynamo.allow_in_graph
    def meanwhile(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: seen.append(model(X)))
        thread.start()
        thread.join()
        return x.clone()

    def whole(x: torch.Tensor) -> torch.Tensor:
        return meanwhile(model(x))

    piecework.compile(whole, (X,), config=FOUND)
    assert seen
    torch.testing.assert_close(seen[0], expected)


CHANGES: dict[str, Callable[[Stack], object]] = {
    "a scale": lambda m: setattr(m.layers[3], "scale", 5.0),
    "a name": lambda m: setattr(m.layers[3], "name", "other"),
    "an adapter": lambda m: setattr(m.layers[2], "adapter", nn.Linear(8, 8)),
    "a module's class": lambda m: setattr(m.layers[4], "act", nn.ReLU()),
    "a forward": lambda m: setattr(m.layers[4], "forward", lambda x: x),
    "a forward of the traced one": lambda m: setattr(m.layers[0], "forward", lambda x: x),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda module, given, out: out * 2),
    "a hook inside": lambda m: m.layers[1].b.register_forward_pre_hook(lambda module, given: None),
    "a weight": lambda m: setattr(m.layers[4].a, "weight", nn.Parameter(torch.ones(8, 8))),
    "a missing bias": lambda m: setattr(m.layers[1].b, "bias", None),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CHANGES)
def test_change_in_any_layer_is_noticed(name: str) -> None:
    model = stack(plain())
    stitched = piecework.compile(model, (X,), config=FOUND)
    stitched(X)
    CHANGES[name](model)
    with pytest.raises((InputError, BindError)):
        stitched(X)


def test_tie_that_comes_undone_is_noticed() -> None:
    model = stack(tied("a", "a")())
    stitched = piecework.compile(model, (X,), config=FOUND)
    stitched(X)
    model.layers[3].a.weight = nn.Parameter(torch.ones(8, 8), requires_grad=False)
    with pytest.raises((InputError, BindError)):
        stitched(X)


def test_other_weights_are_rebound() -> None:
    model = stack(plain())
    stitched = piecework.compile(model, (X,), config=FOUND)
    model.layers[4].a.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    stitched.rebind()
    torch.testing.assert_close(stitched(X), model(X))


def test_decorated_forward_is_watched() -> None:
    def decorated(times: list[float]) -> type[Part]:
        factor = times

        def wrap(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def forward(self: Part, x: torch.Tensor) -> torch.Tensor:
                return function(self, x) * factor[0]

            return forward

        return type("Decorated", (Part,), {"forward": wrap(lambda self, x: self.b(self.a(x)))})

    times = [2.0]
    kind = decorated(times)
    model = stack([kind(i) for i in range(5)])
    stitched = piecework.compile(model, (X,), config=FOUND)
    assert stitched.report().layers == "one trace served 4 of 5 repeated layers"
    torch.testing.assert_close(stitched(X), model(X))
    times[0] = 3.0
    with pytest.raises(InputError):
        stitched(X)


# --- which layers ---------------------------------------------------------------------------------------


def test_few_layers_are_shared_where_they_are_named() -> None:
    assert require_one_graph(stack(plain(3)), (X,)) == ""
    says = require_one_graph(stack(plain(3)), (X,), wish=("layers",))
    assert says == "one trace served 2 of 3 repeated layers"
    for name in ("norm", "leyers"):
        says = require_one_graph(stack(plain(5)), (X,), wish=(name,))
        assert says == f"every layer was traced: no module {name} holds two that are alike"


def test_equal_pieces_are_one_program_still() -> None:
    flat = piecework.compile(stack(plain(6)), (X,), config=FOUND.replace(repeated_layers="off"))
    shared = piecework.compile(stack(plain(6)), (X,), config=FOUND)
    assert shared.report().unique == flat.report().unique
    assert shared.report().pieces == flat.report().pieces


def test_layers_are_found_by_default() -> None:
    stitched = piecework.compile(stack(plain(5)), (X,), config={"backend": "eager"})
    assert str(stitched.report().layers) == "one trace served 4 of 5 repeated layers"


def decorated(wish: object) -> torch.nn.Module:
    @piecework.support_torch_compile(repeated_layers=wish)
    class Decorated(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    return Decorated(plain(3)).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "one trace served 2 of 3 repeated layers"),
        ({"repeated_layers": "found"}, ""),  # three are too few there
    ],
)
def test_a_class_says_which_layers_share_a_trace(config: dict[str, object], text: str) -> None:
    model = decorated(("layers",))
    model.compilation_config = {"backend": "eager", **config}
    torch.testing.assert_close(model(X), stack(model.layers)(X))
    assert stitched_of(model).report().layers == text


def test_a_class_says_it_wrongly() -> None:
    with pytest.raises(ConfigError, match="repeated_layers"):
        decorated("sometimes")


def test_wish_is_checked() -> None:
    with pytest.raises(ConfigError, match="repeated_layers"):
        piecework.CompilationConfig(repeated_layers="sometimes")
