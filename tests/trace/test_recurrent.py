"""Recurrent layers: in, models around LSTM, GRU and RNN; each runs as one call outside of the compiled pieces, equal to eager at several batch sizes."""

from __future__ import annotations

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import PieceworkError

LAYERS = {
    "lstm": lambda: nn.LSTM(8, 16, batch_first=True),
    "lstm, two layers, both ways": lambda: nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True),
    "lstm with projection": lambda: nn.LSTM(8, 16, batch_first=True, proj_size=4),
    "gru without bias": lambda: nn.GRU(8, 16, batch_first=True, bias=False),
    "rnn with relu": lambda: nn.RNN(8, 16, batch_first=True, nonlinearity="relu"),
}
X = torch.randn(4, 7, 8)


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(8, 8), layer, nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        output, hidden = self.layer(torch.relu(self.before(x)))
        return self.after(output), hidden


def tagger(layer: nn.Module) -> Tagger:
    torch.manual_seed(0)
    model = Tagger(layer).eval()
    model(X)
    return model


def check(stitched: piecework.StitchedModule, model: nn.Module, *batches: int) -> None:
    for batch in batches:
        x = torch.randn(batch, 7, 8)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", LAYERS)
def test_a_recurrent_layer_runs_outside(name: str) -> None:
    model = tagger(LAYERS[name]())
    stitched = piecework.compile(model, (X,), config=EAGER)
    check(stitched, model, 4, 2, 5, 1)
    assert [item.is_splitting_graph for item in stitched.program.items] == [False, True, False]


@pytest.mark.inductor
@pytest.mark.nightly
def test_a_recurrent_layer_between_compiled_pieces() -> None:
    model = tagger(LAYERS["lstm"]())
    stitched = piecework.compile(model, (X,))
    check(stitched, model, 4, 2, 5, 1)
    assert "torch.lstm(" in stitched.source.code


def test_a_captured_recurrent_layer_and_a_replaced_weight_of_one() -> None:
    model, example = tagger(nn.GRU(8, 16, batch_first=True)), X.clone()
    torch._dynamo.mark_dynamic(example, 0)
    stitched = piecework.compile(model, (example,), config=EAGER)
    stitched.capture([2, 4, 8], progress=False, estimate=False)
    check(stitched, model, 4, 2, 3, 5, 9)
    with torch.no_grad():
        model.layer.weight_ih_l0.mul_(3)
    check(stitched, model, 4)
    # torch's layer refers to its weights in several places, and a new one is not in all of them.
    model.layer.weight_ih_l0 = nn.Parameter(torch.randn(48, 8))
    with pytest.raises(PieceworkError):
        stitched(X)
