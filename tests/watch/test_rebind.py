"""Weights are bound once: whatever happens to them afterwards is either seen, or refused until rebind()."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, InputError
from piecework.runtime import torch_compat


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(8))
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.norm) + self.shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.tensor([1, 5, 3])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def stitched(model: Model) -> piecework.StitchedModule:
    found = piecework.compile(model, (torch.arange(4),), splitting_ops=[], config=EAGER)
    assert_current(model, found)
    return found


def assert_current(model: nn.Module, stitched: piecework.StitchedModule) -> None:
    torch.testing.assert_close(stitched(IDS), model(IDS).detach())


def assert_refused(stitched: piecework.StitchedModule, said: str, x: torch.Tensor = IDS) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            stitched(x)


# --- in place --------------------------------------------------------------------------------------------


def test_load_state_dict_is_seen_at_once(model: Model, stitched: piecework.StitchedModule) -> None:
    other = Model()
    before = stitched(IDS)
    model.load_state_dict(other.state_dict())
    assert_current(model, stitched)
    assert not torch.allclose(stitched(IDS), before)


# --- replaced --------------------------------------------------------------------------------------------


def test_a_replaced_buffer_or_submodule_needs_a_rebind(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    for owner, name, new in (
        (model.blocks[5], "shift", torch.rand(8)),
        (model.blocks[2], "linear", nn.Linear(8, 8)),
        (model.blocks, "9", Block()),
    ):
        setattr(owner, name, new)
        assert_refused(stitched, rf"{name}\S* was replaced")
        stitched.rebind()
        assert_current(model, stitched)


def replace_the_dictionary_unseen(owner: nn.Module, name: str, new: nn.Parameter) -> None:
    owner.__dict__["_parameters"] = {**owner._parameters, name: new}


def replace_by_swapping_params(owner: nn.Module, name: str, new: nn.Parameter) -> None:
    """What ``.to()`` does under ``set_overwrite_module_params_on_conversion``."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        owner.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def replace_everything_above(owner: nn.Module, name: str, new: nn.Parameter) -> None:
    """All tables of a module at once, as ``__setstate__`` does."""
    other = copy.deepcopy(owner)
    setattr(other, name, new)
    owner.__setstate__(other.__dict__)


REPLACEMENTS = [
    setattr,
    lambda owner, name, new: owner._parameters.update({name: new}),
    lambda owner, name, new: delattr(owner, name) or setattr(owner, name, new),
    lambda owner, name, new: owner.load_state_dict({name: new}, strict=False, assign=True),
    replace_the_dictionary_unseen,
    replace_by_swapping_params,
    replace_everything_above,
]


@pytest.fixture(params=["guards of torch", "no guards of torch"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fast test of dictionaries, and as under a torch that has none."""
    if request.param == "no guards of torch":
        monkeypatch.setattr(torch_compat, "dict_guard", lambda dicts: None)


@pytest.mark.usefixtures("either_way")
def test_whoever_replaces_a_weight_the_next_call_refuses_it(model: Model) -> None:
    stitched = piecework.compile(model, (torch.arange(4),), splitting_ops=[], config=EAGER)
    for replace in REPLACEMENTS:
        for path in ("blocks.0.norm", "blocks.6.linear.weight", "blocks.11.linear.bias"):
            assert_current(model, stitched)
            owner = model.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            replace(owner, name, nn.Parameter(torch.rand_like(getattr(owner, name))))
            # The message names the weight, or the table or sibling of it that went first.
            known = re.escape(path.rpartition(".")[0])
            with pytest.raises(InputError, match=rf"{known}\.\w+ was replaced.* call rebind"):
                stitched(IDS)
            stitched.rebind()
            assert_current(model, stitched)


def test_a_functional_call_is_refused(model: Model, stitched: piecework.StitchedModule) -> None:
    """It writes into the modules' dictionaries and puts back what was there."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return stitched(ids)

    outer = Outer()
    for path in ("embed.weight", "blocks.6.linear.weight", "blocks.11.shift"):
        other = {f"model.{path}": torch.rand_like(model.state_dict()[path])}
        for _ in range(10):  # as often as it takes for the dictionaries to be known as busy
            with pytest.raises(InputError, match=f"{path} was replaced|head.weight was replaced"):
                torch.func.functional_call(outer, other, (IDS,))
            assert_current(model, stitched)


def test_a_parametrized_weight_is_refused(model: Model, stitched: piecework.StitchedModule) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.blocks[5].linear, "weight", Double())
    assert_refused(stitched, r"blocks.5.linear\S* was replaced")
    with pytest.raises(
        BindError, match=r"weight blocks.5.linear.weight is computed at each access"
    ):
        stitched.rebind()


def test_a_write_elsewhere_in_the_model_is_no_change(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    """Neither once nor in every call, and afterwards replaced weights are refused as before."""
    model.blocks[4].note = "once"
    assert_current(model, stitched)
    for step in range(30):
        model.blocks[4].note = step
        model.blocks[5].linear.weight = model.blocks[5].linear.weight
        assert_current(model, stitched)
    for path in ("blocks.5.linear", "blocks.6.linear"):
        linear = model.get_submodule(path)
        linear._parameters["weight"] = nn.Parameter(torch.rand(8, 8))
        assert_refused(stitched, rf"{path}.weight was replaced")
        stitched.rebind()
        assert_current(model, stitched)


# --- where a weight can lie -------------------------------------------------------------------------------


class Table:
    def __init__(self) -> None:
        self.rows = torch.rand(8)


class Slotted:
    __slots__ = ("rows",)

    def __init__(self) -> None:
        self.rows = torch.rand(8)


of_this_module = torch.rand(8)


class Everywhere(nn.Module):
    of_class = torch.rand(8)

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.rand(8)
        self.listed = [torch.rand(8), torch.rand(8)]
        self.paired = (torch.rand(8), Table())
        self.keyed = {"a": torch.rand(8), 3: [torch.rand(8)]}
        self.table = Table()
        self.slotted = Slotted()
        self.unregistered = [nn.Linear(8, 8)]
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.rand(8))])
        self.alias = [self.parameters_[0]]
        self.inner = nn.Linear(8, 8)
        self.inner.rows = [torch.rand(8)]
        rows = torch.rand(8)
        self.closed = lambda x: x * rows
        self.register_buffer("returned", torch.rand(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.unregistered[0](self.inner(x)) + self.plain * self.listed[1]
        x = x + self.paired[0] * self.paired[1].rows + self.keyed["a"] * self.keyed[3][0]
        x = x + self.table.rows * self.slotted.rows + self.alias[0] * self.inner.rows[0]
        return self.closed(x) * of_this_module * type(self).of_class, self.returned


@pytest.mark.parametrize(
    "place",
    [
        "model.plain",
        "model.listed",
        "model.paired",
        "model.keyed['a']",
        "model.keyed[3][0]",
        "model.table.rows",
        "model.slotted.rows",
        "model.unregistered[0].weight",
        "model.alias[0]",
        "model.inner.rows[0]",
        "of_this_module",
        "type(model).of_class",
        "model.closed.__closure__[0].cell_contents",
        "model.returned",
    ],
)
def test_a_weight_is_watched_wherever_it_lies(
    place: str, everywhere: tuple[Everywhere, piecework.StitchedModule]
) -> None:
    model, stitched = everywhere
    x = torch.rand(3, 8)
    scope = {"model": model, "copy": copy, "torch": torch, "nn": nn}
    change = (
        "copy.deepcopy({0}) if not isinstance({0}, torch.Tensor) else {1}(torch.rand_like({0}))"
    )
    kind = "nn.Parameter" if "unregistered" in place else "torch.clone"
    if place == "of_this_module":
        scope = globals()
    try:
        torch.testing.assert_close(stitched(x), without_grad(model, x))
        exec(f"kept = {place}; {place} = {change.format(place, kind)}", scope)
        name = re.escape(place.removeprefix("model.").removesuffix(".cell_contents"))
        assert_refused(stitched, rf"{name}\S* was replaced", x)
        if place == "model.alias[0]":  # another tensor than the one in the ParameterList
            with pytest.raises(BindError, match="were one tensor"):
                stitched.rebind()
        else:
            stitched.rebind()
            torch.testing.assert_close(stitched(x), without_grad(model, x))
        assert place == "model.alias[0]" or stitched(x)[1] is model.returned
    finally:
        exec(f"{place} = kept", scope)
        stitched.rebind()


@pytest.fixture(scope="module")
def everywhere() -> tuple[Everywhere, piecework.StitchedModule]:
    model = Everywhere()
    example = (torch.rand(4, 8),)
    return model, piecework.compile(model, example, splitting_ops=[], config=EAGER)


def without_grad(model: nn.Module, x: torch.Tensor) -> object:
    with torch.no_grad():
        return model(x)


# --- tied -------------------------------------------------------------------------------------------------


def test_another_weight_of_the_same_model_is_untied(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    model.head.weight = nn.Parameter(torch.rand(16, 8))
    assert_refused(stitched, r"head.weight was replaced")
    with pytest.raises(
        BindError, match="were one tensor when the model was traced and are two now"
    ):
        stitched.rebind()
    model.head.weight = model.embed.weight
    stitched.rebind()
    assert_current(model, stitched)


# --- moved and converted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "blocks.8.linear"])
def test_a_converted_module_is_refused_and_comes_back(
    model: Model, stitched: piecework.StitchedModule, path: str
) -> None:
    model.get_submodule(path).double()
    assert_refused(stitched, "has dtype torch.float64; the trace had torch.float32|was replaced")
    with pytest.raises(BindError, match=r"has dtype torch.float64; the trace had torch.float32"):
        stitched.rebind()
    model.float()
    stitched.rebind()
    assert_current(model, stitched)


def test_data_of_another_layout_or_lazily_negated_is_refused(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    weight = model.blocks[3].linear.weight
    kept = weight.data
    for data, said in (
        (torch.rand(9, 8), r"has shape \(9, 8\); the trace had \(8, 8\)"),
        (torch.rand(8, 8).t(), r"has stride \(1, 8\); the trace had \(8, 1\)"),
        (torch._neg_view(torch.rand(8, 8)), "is a lazily negated or conjugated view now"),
    ):
        weight.data = data
        assert_refused(stitched, f"blocks.3.linear.weight {said}")
        weight.data = kept
        assert_current(model, stitched)


def test_a_failed_rebind_changes_nothing(model: Model, stitched: piecework.StitchedModule) -> None:
    good, bad = model.blocks[0].norm, nn.Parameter(torch.rand(9))
    model.blocks[0].norm = bad
    with pytest.raises(BindError, match=r"blocks.0.norm has shape \(9,\); the trace had \(8,\)"):
        stitched.rebind()
    model.blocks[0].norm = good
    assert_current(model, stitched)


# --- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_weights_that_only_products_read_are_still_refused(model: Model) -> None:
    config = piecework.CompilationConfig(backend="inductor")
    stitched = piecework.compile(model, (torch.arange(4),), splitting_ops=[], config=config)
    strict = stitched.traces[0].entry.made.strict
    assert "blocks.4.linear.weight" in strict and "blocks.4.norm" not in strict
    torch.testing.assert_close(stitched(IDS), model(IDS).detach())
    for path in ("blocks.4.norm", "blocks.4.linear.weight", "blocks.4.linear.bias", "embed.weight"):
        parameter = model.get_parameter(path)
        kept = parameter.data
        parameter.data = kept.double()
        assert_refused(stitched, f"weight {path} has dtype torch.float64")
        parameter.data = kept
        torch.testing.assert_close(stitched(IDS), model(IDS).detach())
