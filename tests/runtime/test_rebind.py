"""Weights are bound once: whatever happens to them afterwards is either seen, or refused until rebind()."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import BindError, InputError

EAGER = piecework.CompilationConfig(backend="eager")


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


def assert_refused(stitched: piecework.StitchedModule, said: str) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=said):
            stitched(IDS)


# --- in place --------------------------------------------------------------------------------------------


def test_load_state_dict_is_seen_at_once(model: Model, stitched: piecework.StitchedModule) -> None:
    other = Model()
    before = stitched(IDS)
    model.load_state_dict(other.state_dict())
    assert_current(model, stitched)
    assert not torch.allclose(stitched(IDS), before)


def test_data_of_the_same_kind_is_seen_at_once(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    model.blocks[3].norm.data = torch.rand(8)
    assert_current(model, stitched)


def test_an_optimizer_step_is_seen_at_once(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).sum().backward()
    optimizer.step()
    assert_current(model, stitched)


# --- replaced --------------------------------------------------------------------------------------------


def test_assigned_state_needs_a_rebind(model: Model, stitched: piecework.StitchedModule) -> None:
    state = {name: tensor.clone() for name, tensor in Model().state_dict().items()}
    state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    model.head.weight = model.embed.weight
    assert_refused(stitched, "was replaced since the weights were bound")
    stitched.rebind()
    assert_current(model, stitched)


@pytest.mark.parametrize(
    "path", ["blocks.0.norm", "blocks.7.linear.weight", "blocks.11.linear.bias"]
)
def test_a_replaced_parameter_needs_a_rebind(
    model: Model, stitched: piecework.StitchedModule, path: str
) -> None:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, name, nn.Parameter(torch.rand_like(getattr(module, name))))
    assert_refused(stitched, rf"{path} was replaced")
    stitched.rebind()
    assert_current(model, stitched)


def test_a_replaced_buffer_or_submodule_needs_a_rebind(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    model.blocks[5].shift = torch.rand(8)
    assert_refused(stitched, r"blocks.5.shift was replaced")
    stitched.rebind()
    assert_current(model, stitched)
    model.blocks[2].linear = nn.Linear(8, 8)
    assert_refused(stitched, r"blocks.2.linear was replaced")
    stitched.rebind()
    assert_current(model, stitched)
    model.blocks[9] = Block()
    assert_refused(stitched, r"blocks.9 was replaced")
    stitched.rebind()
    assert_current(model, stitched)


def test_assigning_the_same_object_again_is_no_change(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    model.blocks[5].norm = model.blocks[5].norm
    assert_current(model, stitched)


def test_a_written_dictionary_is_noticed_in_the_end(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    """No hook tells of it: some call within one turn over the entries does."""
    model.blocks[6].linear._parameters["weight"] = nn.Parameter(torch.rand(8, 8))
    with pytest.raises(InputError, match=r"blocks.6.linear.weight was replaced"):
        for _ in range(100):
            stitched(IDS)
    stitched.rebind()
    assert_current(model, stitched)


def test_a_functional_call_is_noticed(model: Model, stitched: piecework.StitchedModule) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return stitched(ids)

    others = {f"model.{name}": torch.rand_like(p) for name, p in model.named_parameters()}
    with pytest.raises(InputError, match="was replaced"):
        torch.func.functional_call(Outer(), others, (IDS,))
    assert_current(model, stitched)


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


@pytest.mark.parametrize("path", ["", "blocks", "blocks.4", "blocks.8.linear"])
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


def test_a_moved_model_is_refused(model: Model, stitched: piecework.StitchedModule) -> None:
    model.to("meta")
    assert_refused(stitched, "was replaced")
    with pytest.raises(BindError, match="has device meta; the trace had cpu"):
        stitched.rebind()


def test_data_of_another_shape_is_refused(model: Model, stitched: piecework.StitchedModule) -> None:
    model.blocks[3].linear.weight.data = torch.rand(9, 8)
    assert_refused(stitched, r"blocks.3.linear.weight has shape \(9, 8\); the trace had \(8, 8\)")


def test_another_training_mode_is_refused(model: Model, stitched: piecework.StitchedModule) -> None:
    model.eval()
    assert_refused(stitched, "the model was traced with training=True and has False now")
    model.train()
    assert_current(model, stitched)


def test_a_failed_rebind_changes_nothing(model: Model, stitched: piecework.StitchedModule) -> None:
    good, bad = model.blocks[0].norm, nn.Parameter(torch.rand(9))
    model.blocks[0].norm = bad
    with pytest.raises(BindError, match=r"blocks.0.norm has shape \(9,\); the trace had \(8,\)"):
        stitched.rebind()
    model.blocks[0].norm = good
    assert_current(model, stitched)


def test_there_is_nothing_to_rebind_before_the_first_call(model: Model) -> None:
    with pytest.raises(BindError, match="there is no binding yet"):
        piecework.compile(model, splitting_ops=[], config=EAGER).rebind()


# --- compiled ------------------------------------------------------------------------------------------------


@pytest.mark.inductor
def test_weights_that_only_products_read_are_still_refused(model: Model) -> None:
    config = piecework.CompilationConfig(backend="inductor")
    stitched = piecework.compile(model, (torch.arange(4),), splitting_ops=[], config=config)
    assert "blocks.4.linear.weight" in stitched.captured.weights._strict
    assert "blocks.4.norm" not in stitched.captured.weights._strict
    torch.testing.assert_close(stitched(IDS), model(IDS).detach())
    for path in ("blocks.4.norm", "blocks.4.linear.weight", "blocks.4.linear.bias", "embed.weight"):
        parameter = model.get_parameter(path)
        kept = parameter.data
        parameter.data = kept.double()
        assert_refused(stitched, f"weight {path} has dtype torch.float64")
        parameter.data = kept
        torch.testing.assert_close(stitched(IDS), model(IDS).detach())


# --- lifetimes -------------------------------------------------------------------------------------------------


def test_a_stitched_module_lets_go_of_the_model_and_of_torchs_hooks(model: Model) -> None:
    from torch.nn.modules import module as registration

    hooks = registration._global_parameter_registration_hooks
    torch.compiler.reset()
    gc.collect()
    before = len(hooks)
    other = copy.deepcopy(model)
    stitched = piecework.compile(other, (torch.arange(4),), splitting_ops=[], config=EAGER)
    assert len(hooks) == before + 1
    gone = weakref.ref(other)
    del stitched, other
    torch.compiler.reset()
    gc.collect()
    assert gone() is None
    assert len(hooks) == before
