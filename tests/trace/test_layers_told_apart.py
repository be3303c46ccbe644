"""Layers that are one program by themselves, and are told apart by what is around them. In: stacks of such layers. Out: the graph of a flat trace, and eager's results."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from flat_trace import require_one_graph
from torch import nn

import piecework
from piecework.runtime.regions.marks import Marks
from piecework.runtime.trace import shared

FOUND = piecework.CompilationConfig(backend="eager", repeated_layers="found")
X = torch.randn(4, 8)
DEPTH, MODEL = [0], [None]
LEVEL = 0


@piecework.splitting_op("told_apart::mix", mutates_args=("out",))
def mix(x: torch.Tensor, out: torch.Tensor, window: int) -> None:
    out.copy_(x * (window + 1))


mix_first = functools.partial(mix, window=0)


class Layer(nn.Module):
    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.index, self.a, self.b, self.act = index, nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU()

    def base(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(self.act(self.a(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module], **held: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.w = nn.Parameter(torch.randn(8, 8))
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stack(layer: type[Layer], model: type[Stack] = Stack, **held: object) -> Stack:
    made = [layer(i) for i in range(5)]
    for each in made:
        for name, value in held.items():
            setattr(each, name, value)
    return model(made, **held)


def asks(question: Callable[[Layer], bool]) -> type[Layer]:
    class Asking(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * (2 if question(self) else 1)

    return Asking


def scaled(factor: Callable[[Layer], object]) -> type[Layer]:
    class Scaled(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * factor(self)

    return Scaled


class Given(Layer):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.base(x) @ w


def gives(which: Callable[[Stack, int], torch.Tensor]) -> type[Stack]:
    class Giving(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x, which(self, i))
            return x

    return Giving


def between(write: Callable[[Stack, int, torch.Tensor], None]) -> type[Stack]:
    """Writes something before each layer, and writes it back behind the last."""

    class Writing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            given = x
            for i, layer in enumerate(self.layers):
                write(self, i, given)
                x = layer(x)
            write(self, 0, None)
            return x

    return Writing


class Context:
    def __init__(self) -> None:
        self.depth, self.scale, self.box, self.seen = 0, None, [0], None


# --- by another layer -----------------------------------------------------------------------------------


def with_parent(question: Callable[[Layer], bool]) -> Stack:
    made = stack(asks(question))
    for layer in made.layers:
        layer.parent = (made,)
    return made


def by_parent() -> Stack:
    return with_parent(lambda layer: layer.parent[0].layers[0] is layer)


def by_parents_part() -> Stack:
    return with_parent(lambda layer: layer.parent[0].layers[0].act is layer.act)


def by_last() -> Stack:
    return with_parent(lambda layer: layer.parent[0].layers[-1] is layer)


def by_sibling() -> Stack:
    class Sibling(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.parent[0].layers[0].a(x)

    made = stack(Sibling)
    for layer in made.layers:
        layer.parent = (made,)
    return made


def by_class() -> Stack:
    kind = asks(lambda layer: layer.parent[0].layers[0] is layer)
    made = stack(kind)
    kind.parent = (made,)
    return made


def by_global() -> Stack:
    MODEL[0] = made = stack(asks(lambda layer: MODEL[0].layers[0] is layer))
    return made


def by_closure() -> Stack:
    held: list[object] = []
    made = stack(asks(lambda layer: held[0] is layer))
    held.append(made.layers[0])
    return made


def by_weak_reference() -> Stack:
    made = stack(asks(lambda layer: layer.special() is layer))
    for layer in made.layers:
        layer.special = weakref.ref(made.layers[2])
    return made


# --- by what is written meanwhile -----------------------------------------------------------------------


def by_attribute() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        model.context.depth = i

    return stack(scaled(lambda self: self.context.depth + 1), between(write), context=Context())


def by_tensor() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        model.context.scale = x if i % 2 or x is None else model.w[:1]

    return stack(scaled(lambda self: self.context.scale), between(write), context=Context())


def by_list() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        model.context.box[0] = i

    return stack(scaled(lambda self: self.context.box[0] + 1), between(write), context=Context())


def by_fresh_list() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        if i == 0:
            model.context.seen = None if x is None else []
        else:
            model.context.seen.append(i)

    return stack(scaled(lambda self: len(self.context.seen) + 1), between(write), context=Context())


def by_global_list() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        DEPTH[0] = i

    return stack(scaled(lambda self: DEPTH[0] + 1), between(write))


def by_global_number() -> Stack:
    def write(model: Stack, i: int, x: torch.Tensor | None) -> None:
        global LEVEL
        LEVEL = i

    return stack(scaled(lambda self: LEVEL + 1), between(write))


def by_first_come() -> Stack:
    class First(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.base(x) * (2 if self.context.depth == 0 else 1)
            self.context.depth = 1
            return y

    class Clearing(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            self.context.depth = 0
            return x

    return stack(First, Clearing, context=Context())


# --- by tensors that they hold --------------------------------------------------------------------------


def given_the_firsts() -> Stack:
    return stack(Given, gives(lambda model, i: model.layers[0].a.weight))


def given_the_firsts_at_first() -> Stack:
    return stack(Given, gives(lambda model, i: model.w if i else model.layers[0].a.weight))


def given_its_own_once() -> Stack:
    class Same(Layer):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return self.b(x) * (2 if w is self.a.weight else 1) + w.sum()

    return stack(Same, gives(lambda model, i: model.layers[3].a.weight if i == 3 else model.w))


def given_its_own_view() -> Stack:
    return stack(Given, gives(lambda model, i: model.layers[0].a.weight.t()))


# --- by a literal that is another one's -----------------------------------------------------------------


def by_constant() -> Stack:
    class Twice(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mix(self.a(x), out := torch.empty_like(x), self.index)
            mix(self.b(out), last := torch.empty_like(x), 0)
            return last

    return stack(Twice)


def by_constant_beside() -> Stack:
    class Beside(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            again, one, two = mix, torch.empty_like(x), torch.empty_like(x)
            mix(self.a(x), one, self.index), again(self.b(x), two, 0)
            return one + two

    return stack(Beside)


def by_constant_in_a_partial() -> Stack:
    class Beside(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = torch.empty_like(x), torch.empty_like(x)
            mix(self.a(x), one, self.index), mix_first(self.b(x), two)
            return one + two

    return stack(Beside)


def by_part_of_that_name() -> Stack:
    class Inner(nn.Linear):
        index = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mix(x @ self.weight, out := torch.empty_like(x), self.index)
            return out

    class Outer(Layer):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.inner = Inner(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mix(self.a(x), out := torch.empty_like(x), self.index)
            return self.inner(out)

    return stack(Outer)


def by_the_other_branch() -> Stack:
    class Branch(Layer):
        def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
            out = torch.empty_like(x)
            if flag:
                mix(self.a(x), out, self.index)
            else:
                mix(self.a(x), out, 0)
            return self.b(out)

    class Reading(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x) * (layer.index + 1)
            return x

    return stack(Branch, Reading)


# --- by a function that a trace takes for given ---------------------------------------------------------


@torch.compiler.assume_constant_result
def factor_of(layer: Layer) -> int:
    return layer.index + 1


def by_given_method() -> Stack:
    class Asked(Layer):
        @torch.compiler.assume_constant_result
        def factor(self) -> int:
            return self.index + 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * self.factor()

    return stack(Asked)


def by_given_function() -> Stack:
    return stack(scaled(lambda layer: factor_of(layer)))


def by_given_property() -> Stack:
    kind = scaled(lambda layer: layer.factor)
    kind.factor = property(factor_of)
    return stack(kind)


def by_given_bound() -> Stack:
    made = stack(scaled(lambda layer: layer.factor()))
    for layer in made.layers:
        layer.factor = types.MethodType(factor_of, layer)
    return made


# --- by their calls -------------------------------------------------------------------------------------


def by_forward() -> Stack:
    class Forward(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer.forward(x)
            return x

    return stack(Layer, Forward)


GIVEN = (by_given_method, by_given_function, by_given_property, by_given_bound)
TOLD_APART: dict[Callable[[], Stack], str] = {
    **dict.fromkeys((by_parent, by_parents_part, by_last, by_sibling), "leads to another one"),
    **dict.fromkeys((by_class, by_weak_reference), "leads to another one"),
    by_closure: "leads to a",
    by_global: "global MODEL leads to a layer",
    **dict.fromkeys((by_attribute, by_tensor, by_list, by_fresh_list), "were written"),
    **dict.fromkeys((by_global_list, by_global_number, by_first_come), "were written"),
    **dict.fromkeys((given_the_firsts, given_the_firsts_at_first), "that a layer holds"),
    given_its_own_once: "that a layer holds",
    given_its_own_view: "share memory otherwise",
    **dict.fromkeys((by_constant, by_constant_beside), "has several origins"),
    by_constant_in_a_partial: "has several origins",
    by_the_other_branch: "has several origins",
    by_part_of_that_name: "differ in more than one way",
    **dict.fromkeys(GIVEN, "takes for given"),
    by_forward: "past the call of its module",
}


THE_MODEL_TELLS = (
    *(by_parent, by_parents_part, by_last, by_sibling, by_class, by_global),
    *(by_attribute, by_list, by_fresh_list, by_global_list, by_global_number, by_first_come),
    *(by_given_method, by_given_function, by_given_property),
)


@pytest.mark.sample(5)
@pytest.mark.parametrize("make", TOLD_APART, ids=lambda make: make.__name__)
def test_layers_that_are_told_apart_are_traced_one_by_one(make: Callable[[], Stack]) -> None:
    if make in GIVEN and torch.__version__ < "2.12":
        pytest.skip("this torch's Dynamo asks no function about a module")
    model = make().eval().requires_grad_(False)
    says = require_one_graph(model, (X.clone(),))
    assert says.startswith("every layer was traced: ")
    assert TOLD_APART[make] in says
    stitched = piecework.compile(model, (X.clone(),), config=FOUND)
    torch.testing.assert_close(stitched(X[:3].clone()), model(X[:3].clone()))


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", THE_MODEL_TELLS, ids=lambda make: make.__name__)
def test_what_was_not_seen_of_layers_the_model_itself_tells(
    make: Callable[[], Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "require_apart", lambda *_: None)
    monkeypatch.setattr(shared.SharedLayers, "_require_unwritten", lambda *_: None)
    monkeypatch.setattr(Marks, "_require_written", lambda *_: None)
    if make in GIVEN and torch.__version__ < "2.12":
        pytest.skip("this torch's Dynamo asks no function about a module")
    model = make().eval().requires_grad_(False)
    says = require_one_graph(model, (X.clone(),))
    assert says == "every layer was traced: layers that look alike compute something else"


# --- what does not tell them apart ----------------------------------------------------------------------


def first_is_called_otherwise_too() -> Stack:
    """The other layers are as the first one was when it was called last."""

    class Kinds(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype == torch.bfloat16:
                return (self.a(x.float()) * 2).to(torch.bfloat16)
            return self.a(x)

    class Mixed(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, g = self.layers[0](x), self.layers[0](x.to(torch.bfloat16))
            for layer in list(self.layers)[1:]:
                g = layer(g)
            return h + g.float()

    return stack(Kinds, Mixed)


def written_once_for_all() -> Stack:
    class Once(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.context.depth = 3
            x = super().forward(x)
            self.context.depth = 0
            return x

    return stack(scaled(lambda self: self.context.depth + 1), Once, context=Context())


def given_each_its_own() -> Stack:
    return stack(Given, gives(lambda model, i: model.layers[i].a.weight))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "make", [first_is_called_otherwise_too, written_once_for_all, given_each_its_own]
)
def test_layers_that_are_not_told_apart_share_a_trace(make: Callable[[], Stack]) -> None:
    model = make().eval().requires_grad_(False)
    assert require_one_graph(model, (X.clone(),)) == "one trace served 4 of 5 repeated layers"
    stitched = piecework.compile(model, (X.clone(),), config=FOUND)
    torch.testing.assert_close(stitched(X[:3].clone()), model(X[:3].clone()))
