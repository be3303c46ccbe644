"""Recurrent layers: in, models around LSTM, GRU and RNN; each runs as one call outside of the compiled pieces, equal to eager at several batch sizes."""

from __future__ import annotations

import pytest
import torch

import piecework
from piecework.errors import PieceworkError
from piecework.runtime.config.compilation import CompilationConfig

LAYERS = {
    "lstm": lambda: torch.nn.LSTM(8, 16, batch_first=True),
    "lstm, two layers, both ways": lambda: torch.nn.LSTM(
        8, 16, 2, batch_first=True, bidirectional=True
    ),
    "lstm with projection": lambda: torch.nn.LSTM(8, 16, batch_first=True, proj_size=4),
    "gru": lambda: torch.nn.GRU(8, 16, batch_first=True),
    "gru without bias": lambda: torch.nn.GRU(8, 16, batch_first=True, bias=False),
    "rnn": lambda: torch.nn.RNN(8, 16, batch_first=True),
    "rnn with relu": lambda: torch.nn.RNN(8, 16, batch_first=True, nonlinearity="relu"),
}


class Tagger(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.before = torch.nn.Linear(8, 8)
        self.layer = layer
        self.after = torch.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        output, hidden = self.layer(torch.relu(self.before(x)))
        return self.after(output), hidden


def tagger(name: str) -> Tagger:
    torch.manual_seed(0)
    model = Tagger(LAYERS[name]()).eval()
    model(torch.randn(2, 7, 8))
    return model


def check(stitched: piecework.StitchedModule, model: torch.nn.Module, *batches: int) -> None:
    for batch in batches:
        x = torch.randn(batch, 7, 8)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layer_runs_outside(name: str) -> None:
    model = tagger(name)
    stitched = piecework.compile(
        model, (torch.randn(4, 7, 8),), config=CompilationConfig(backend="eager")
    )
    check(stitched, model, 4, 2, 5, 1)
    kinds = [item.is_splitting_graph for item in stitched.program.items]
    assert kinds == [False, True, False]


@pytest.mark.inductor
@pytest.mark.nightly
def test_recurrent_layer_between_compiled_pieces() -> None:
    model = tagger("lstm")
    stitched = piecework.compile(model, (torch.randn(4, 7, 8),))
    check(stitched, model, 4, 2, 5, 1)
    assert "torch.lstm(" in stitched.source.code


def test_recurrent_layer_captured() -> None:
    model, example = tagger("lstm"), torch.randn(4, 7, 8)
    torch._dynamo.mark_dynamic(example, 0)
    stitched = piecework.compile(model, (example,), config=CompilationConfig(backend="eager"))
    stitched.capture([2, 4, 8], progress=False, estimate=False)
    check(stitched, model, 4, 2, 3, 5, 9)


def test_replaced_weight_of_recurrent_layer_is_seen() -> None:
    model = tagger("gru")
    stitched = piecework.compile(
        model, (torch.randn(4, 7, 8),), config=CompilationConfig(backend="eager")
    )
    with torch.no_grad():
        model.layer.weight_ih_l0.mul_(3)
    check(stitched, model, 4)
    # torch's layer refers to its weights in several places, and a new one is not in all of them.
    model.layer.weight_ih_l0 = torch.nn.Parameter(torch.randn(48, 8))
    with pytest.raises(PieceworkError):
        stitched(torch.randn(4, 7, 8))
