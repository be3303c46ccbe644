"""piecework.compile: what it returns, what it serves without a retrace, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from models import EAGER, Block, Layers, mix_pair
from torch import nn

import piecework
from piecework.errors import CaptureError, InputError


class Stack(Layers):
    def __init__(self, layers: int = 3, widths: dict[int, int] | None = None) -> None:
        inner = [(widths or {}).get(i, 8) for i in range(layers)]
        super().__init__(Block(mix_pair, f"layers.{i}", inner=w) for i, w in enumerate(inner))


def test_without_example_arguments_the_first_call_compiles() -> None:
    model, x = Stack(), torch.randn(5, 8)
    stitched = piecework.compile(model, config=EAGER)
    with pytest.raises(piecework.PieceworkError, match="compiled at its first call"):
        _ = stitched.source
    torch.testing.assert_close(stitched(x), model(x))
    assert "def execution_fn(" in stitched.source.code


def test_the_source_unpacks_results_and_keeps_weights() -> None:
    code = piecework.compile(Stack(), (torch.randn(4, 8),), config=EAGER).source.code
    assert "left, right, out = __vllm_submods__[0](" in code
    deleted = [line for line in code.splitlines() if line.strip().startswith("del ")]
    assert deleted and not any("weight" in line for line in deleted)
    assert code.count("mix = ") == 1 and "layers.2" in code


@pytest.mark.parametrize("layers", [4, 12])
def test_equal_layers_are_compiled_once_and_serve_any_batch_with_their_own_weights(
    layers: int,
) -> None:
    model = Stack(layers)
    with piecework.counters.expect(num_backend_compilations=3, num_eager_compiles=3):
        stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    report = stitched.report()
    assert (report.pieces, report.unique, report.splitting) == (layers + 1, 3, layers)
    assert f"{layers + 1} pieces, 3 unique" in str(report)
    middle = [piece for piece in stitched.pieces if piece.reused]
    assert len(middle) == layers - 2 and len({piece.key for piece in middle}) == 1
    with piecework.counters.expect(num_graphs_seen=0, num_backend_compilations=0):
        for batch in (2, 4, 9, 33):
            x = torch.randn(batch, 8)
            torch.testing.assert_close(stitched(x), model(x))


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, flag: bool = True) -> dict[str, object]:
        y = x * self.scale
        return {"y": [y, (x, None)], "n": 3, "again": y, "rows": x.shape[0], "scale": self.scale}


def test_any_structure_of_results() -> None:
    model = Returns()
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    x = torch.randn(6, 8)
    result, expected = stitched(x), model(x)
    torch.testing.assert_close(result["y"][0], expected["y"][0])
    assert result["y"][1][0] is x and result["y"][1][1] is None
    assert result["again"] is result["y"][0]
    assert (result["n"], result["rows"]) == (3, 6)
    assert result["scale"] is model.scale


# --- refusals --------------------------------------------------------------------------------------


def test_a_model_without_a_dynamic_dimension_is_compiled_as_it_is() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.bias

    x = torch.randn(4, 8)
    stitched = piecework.compile(Fixed(), (x,), config=EAGER)
    torch.testing.assert_close(stitched(x), x + 1)
    with pytest.raises(InputError, match="size 5 in dimension 0; the model was traced with 4"):
        stitched(torch.randn(5, 8))


class Counting(nn.Module):
    """A buffer, or a plain number, that the forward writes by ``+=``, or replaces."""

    def __init__(self, replaces: bool, plain: bool = False) -> None:
        super().__init__()
        self.replaces = replaces
        if plain:
            self.calls = 0
        else:
            self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.replaces:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        return x + self.calls


@pytest.mark.parametrize("plain", [True, False])
def test_a_forward_that_changes_its_own_state_is_refused_and_left_as_it_was(plain: bool) -> None:
    model = Counting(replaces=not plain, plain=plain)
    before = model.calls
    with pytest.raises(CaptureError, match=r"changes the model's own state.*calls"):
        piecework.compile(model, (torch.randn(3, 4),), config=EAGER)
    assert model.calls is before and not torch.as_tensor(before).any()


def test_a_buffer_written_in_place_stays_the_models() -> None:
    model, reference = Counting(replaces=False), Counting(replaces=False)
    buffer = model.calls
    stitched = piecework.compile(model, (torch.randn(3, 4),), config=EAGER)
    assert model.calls is buffer
    assert buffer.tolist() == [0.0] * 4
    for rows in (2, 5):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(stitched(x), reference(x))
    assert model.calls is buffer
    assert buffer.tolist() == [2.0] * 4


def test_a_model_that_computes_nothing_returns_what_it_returns() -> None:
    x = torch.randn(4)
    assert piecework.compile(lambda x: 3, (x,), config=EAGER)(x) == 3
    stitched = piecework.compile(lambda x, y: y if x.shape[0] > 4 else x, (x, x + 1), config=EAGER)
    longer = torch.randn(5)
    assert stitched(x, longer) is x
    assert stitched(longer, x) is x


@pytest.mark.inductor
def test_inductor_compiles_each_unique_piece_once() -> None:
    model, x = Stack(5), torch.randn(4, 8)
    with piecework.counters.expect(num_inductor_compiles=3):
        stitched = piecework.compile(model, (x,))
    for batch in (2, 7):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(stitched(x), model(x))
