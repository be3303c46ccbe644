"""Models that cannot be stitched: each is refused with its reason, and left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import EAGER
from small_llms import Around, build
from torch import nn

from piecework.errors import CaptureError, UsageError
from piecework.integrations.transformers import (
    how_served,
    sleep,
    stitch,
    stitched_module,
    unstitch,
    wake_up,
)

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


def doubled_compiled(_: Around, states: torch.Tensor) -> torch.Tensor:
    return states * 2 if torch.compiler.is_compiling() else states


def given(states: Callable[[Around, torch.Tensor], object], family: str = "llama") -> nn.Module:
    """A model whose second block's layer is given other states."""
    model = build(family)
    block = (model.transformer.h if family == "bloom" else model.model.layers)[1]
    block.mlp = Around(block.mlp, states)
    return model


def test_tokens_mixed_outside_attention() -> None:
    for model in (given(shifted), given(shifted).to(torch.bfloat16)):
        refused(model, "mixes tokens outside attention", "flat")


def test_state_outside_the_cache() -> None:
    with pytest.raises(CaptureError, match="keeps state outside the KV cache"):
        stitch(given(remembers), config=EAGER)
    model = build("bloom")
    layer = model.transformer.h[0].mlp
    own = layer.forward

    def counts(*args: object) -> torch.Tensor:
        layer.calls = getattr(layer, "calls", 0) + 1
        return own(*args) * layer.calls

    layer.forward = counts
    with pytest.raises(CaptureError, match="differs from the model's own"):
        stitch(model, config=EAGER, way="whole")


def test_what_no_graph_holds_or_a_graph_would_do_otherwise() -> None:
    refused(given(branches), "one graph|graph break|data-dependent")
    refused(given(doubled_compiled, "bloom"), r"flattened: .* nor whole: .*")


def test_experts_in_a_loop() -> None:
    model = build("mixtral", num_hidden_layers=1, num_local_experts=2)
    model.set_experts_implementation("eager")
    assert "grouped_mm" in str(refused(model, "loop"))
    model.set_experts_implementation("batched_mm")
    stitch(model, config=EAGER)


def test_attention_that_is_shared_or_takes_more() -> None:
    model = build()
    attention = model.model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, head_bias=torch.zeros(4), **kwargs)
    assert refused(model, "head_bias", "flat").where == "layers.0.self_attn"
    model = build()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    assert refused(model, "twice", "flat").where == "layers.0.self_attn"


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
    for ask in (stitched_module, how_served, sleep, wake_up, unstitch):
        with pytest.raises(UsageError, match="not stitched"):
            ask(model)
    stitch(model, config=EAGER)
