"""Models that cannot be stitched: each is refused with its reason, and left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import EAGER
from small_llms import build
from torch import nn

from piecework.errors import CaptureError, UsageError
from piecework.integrations.transformers import stitch, stitched_module, unstitch

transformers = pytest.importorskip("transformers")


def refused(model: nn.Module, reason: str, way: str | None = None) -> CaptureError:
    """Stitching ``model``, that way or any, must fail for ``reason`` and leave no trace."""
    before = {id(module): set(module.__dict__) for module in model.modules()}
    implementation = model.config._attn_implementation
    with pytest.raises(CaptureError, match=reason) as caught:
        stitch(model, config=EAGER, way=way)
    assert {id(module): set(module.__dict__) for module in model.modules()} == before
    assert model.config._attn_implementation == implementation
    with pytest.raises(UsageError, match="not stitched"):
        unstitch(model)
    assert caught.value.hint
    return caught.value


class Around(nn.Module):
    """Has ``states`` say what another module is given."""

    def __init__(self, inner: nn.Module, states: Callable[[Around, torch.Tensor], object]) -> None:
        super().__init__()
        self.inner, self.states = inner, states

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(self.states(self, states))


def shifted(_: Around, states: torch.Tensor) -> torch.Tensor:
    """Adds the previous token's state to each token, as RWKV and short convolutions do."""
    return states + nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]


def remembers(module: Around, states: torch.Tensor) -> torch.Tensor:
    """Keeps state between forwards where no KV cache sees it."""
    earlier = getattr(module, "earlier", None)
    if states.shape[1] > 2:
        module.earlier = states[:, -1:]
        return states
    return states if earlier is None else states - earlier


def branches(_: Around, states: torch.Tensor) -> torch.Tensor:
    """Reads a number out of a tensor, which no graph can."""
    return states if float(states.sum()) < 1e9 else states * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_mixed_outside_attention(dtype: torch.dtype) -> None:
    model = build()
    model.model.layers[1].mlp = Around(model.model.layers[1].mlp, shifted)
    refused(model.to(dtype), "mixes tokens outside attention", "flat")


def test_state_outside_the_cache() -> None:
    model = build()
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp, remembers)
    with pytest.raises(CaptureError, match="keeps state outside the KV cache"):
        stitch(model, config=EAGER)


def test_graph_break() -> None:
    model = build()
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp, branches)
    refused(model, "one graph|graph break|data-dependent")


def test_shared_attention_module() -> None:
    model = build()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert refused(model, "twice", "flat").where == "layers.0.self_attn"


def test_experts_in_a_loop() -> None:
    model = build("mixtral", num_hidden_layers=1, num_local_experts=2)
    model.set_experts_implementation("eager")
    assert "grouped_mm" in str(refused(model, "loop"))
    model.set_experts_implementation("batched_mm")
    stitch(model, config=EAGER)


def test_attention_with_more_than_the_op_carries() -> None:
    model = build()
    attention = model.model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, head_bias=torch.zeros(4), **kwargs)
    assert refused(model, "head_bias", "flat").where == "layers.0.self_attn"


def test_what_is_seen_at_sight_or_in_a_result() -> None:
    refused(build("bloom"), "takes no position_ids", "flat")
    refused(build().train(), "training mode")
    model = build()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    refused(model, "infinite or undefined")
    with pytest.raises(CaptureError, match="not a transformers model"):
        stitch(nn.Linear(2, 2))


def test_stitching_twice_and_unknown_entries() -> None:
    model = stitch(build(), config=EAGER)
    with pytest.raises(UsageError, match="already"):
        stitch(model)
    with pytest.raises(UsageError, match="no entry"):
        stitched_module(model, "pixel_values")
    unstitch(model)
    with pytest.raises(UsageError, match="not stitched"):
        stitched_module(model)
    stitch(model, config=EAGER)
