"""A stitched module among modules. In: a model, stitched. Out: what a ``torch.nn.Module`` gives, the model's own."""

from __future__ import annotations

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError

X = torch.randn(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.layer(x)))


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


def stitch(model):
    return piecework.compile(model, (X,), config=EAGER)


def test_its_members_and_its_state_are_the_models(model: nn.Module) -> None:
    stitched = stitch(model)
    assert isinstance(stitched, nn.Module)
    for list_of in ("named_parameters", "named_buffers", "named_children"):
        ours, theirs = getattr(stitched, list_of)(), getattr(model, list_of)()
        assert [(name, id(value)) for name, value in ours] == [(n, id(v)) for n, v in theirs]
    assert list(stitched.state_dict()) == list(model.state_dict())
    assert stitched.layer is model.layer


def test_it_works_inside_another_module(model: nn.Module) -> None:
    parent = nn.Sequential(stitch(model), nn.Softmax(-1)).eval()
    assert torch.equal(parent(X), torch.softmax(model(X), -1))
    assert list(parent.state_dict()) == [f"0.{name}" for name in model.state_dict()]
    assert parent[0].forward(X).equal(model(X))


def test_weights_loaded_through_a_parent_serve_at_once(model: nn.Module) -> None:
    parent = nn.Sequential(stitch(model))
    other = Model().eval()
    parent.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(parent(X), other(X))
    back = Model().eval().state_dict()
    parent[0].load_state_dict(back)
    assert torch.equal(model.layer.weight, back["layer.weight"])


def test_its_mode_is_the_models(model: nn.Module) -> None:
    stitched = stitch(model)
    assert not stitched.training
    assert stitched.train() is stitched
    assert model.training and model.norm.training and stitched.training
    stitched.training = False
    assert not model.training
    assert stitched.eval() is stitched
    assert torch.equal(stitched(X), model(X))


def test_stock_torch_compile_takes_one_or_a_parent_of_one(model: nn.Module) -> None:
    stitched = stitch(model)
    assert torch.equal(torch.compile(stitched, backend="eager")(X), model(X))
    assert torch.equal(torch.compile(nn.Sequential(stitched), backend="eager")(X), model(X))


def test_a_function_makes_a_module_without_members() -> None:
    stitched = stitch(lambda x: x * 2)
    assert list(stitched.parameters()) == [] and stitched.state_dict() == {}
    assert stitched.eval() is stitched and not stitched.training


def test_what_it_shows_of_itself(model: nn.Module) -> None:
    assert repr(piecework.compile(model, config=EAGER)) == "StitchedModule(Model, not compiled yet)"
    stitched = stitch(model)
    assert repr(stitched) == "StitchedModule(Model, 1 piece, eager)"
    assert repr(stitched.capture([2, 4], progress=False)).endswith("eager, captured for 2, 4)")
    stitched.sleep()
    assert "captured" not in repr(stitched)
    assert "captured" not in repr(stitched.capture([4], memory_budget=0, progress=False))
    page = stitched._repr_html_()
    assert "def execution_fn" in page and "<summary>Report</summary>" in page
    assert "&#x27;" in page or "<lambda>" not in page  # text, not markup


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_there_yet_can_be_asked_for(model: nn.Module, compiled: bool) -> None:
    stitched = stitch(model) if compiled else piecework.compile(model, config=EAGER)
    names = [name for name in dir(type(stitched)) if not name.startswith("_")]
    lacks = {name for name in names if not hasattr(stitched, name)}
    first = {"static_graphs"}
    later = {"entry", "entry_source", "pieces", "program", "source", "split_gm"}
    assert lacks == (first if compiled else first | later)
    for name in lacks:
        with pytest.raises(BindError, match=r"nothing is captured|there is no"):
            getattr(stitched, name)
    assert not hasattr(stitched, "no_such_thing") and stitched.layer is model.layer
