"""Models that cannot be stitched: each is refused with its reason, and left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from piecework.errors import CaptureError, UsageError
from piecework.integrations.transformers import stitch, stitched_module, unstitch
from piecework.runtime.config.compilation import CompilationConfig

transformers = pytest.importorskip("transformers")

EAGER_PIECES = CompilationConfig(backend="eager")


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3)
    return model


def from_config(family: str, **fields: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[family](vocab_size=97, **fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def refused(model: nn.Module, reason: str, way: str | None = None) -> CaptureError:
    """Stitching ``model``, that way or any, must fail for ``reason`` and leave no trace."""
    before = {id(module): set(module.__dict__) for module in model.modules()}
    implementation = model.config._attn_implementation
    with pytest.raises(CaptureError, match=reason) as caught:
        stitch(model, config=EAGER_PIECES, way=way)
    assert {id(module): set(module.__dict__) for module in model.modules()} == before
    assert model.config._attn_implementation == implementation
    with pytest.raises(UsageError, match="not stitched"):
        unstitch(model)
    assert caught.value.hint
    return caught.value


class TokenShift(nn.Module):
    """Adds the previous token's state to each token, as RWKV and short convolutions do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states + torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1])


class Remembers(nn.Module):
    """Keeps state between forwards where no KV cache sees it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        earlier = getattr(self, "earlier", None)
        if states.shape[1] > 2:
            self.earlier = states[:, -1:]
            return self.inner(states)
        return self.inner(states) if earlier is None else self.inner(states - earlier)


class Branches(nn.Module):
    """Reads a number out of a tensor, which no graph can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) if float(states.sum()) < 1e9 else states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_mixed_outside_attention(dtype: torch.dtype) -> None:
    model = llama()
    model.model.layers[1].mlp = TokenShift(model.model.layers[1].mlp)
    refused(model.to(dtype), "mixes tokens outside attention", "flat")


def test_state_outside_the_cache() -> None:
    model = llama()
    model.model.layers[0].mlp = Remembers(model.model.layers[0].mlp)
    with pytest.raises(CaptureError, match="keeps state outside the KV cache"):
        stitch(model, config=EAGER_PIECES)


def test_graph_break() -> None:
    model = llama()
    model.model.layers[0].mlp = Branches(model.model.layers[0].mlp)
    refused(model, "one graph|graph break|data-dependent")


def test_shared_attention_module() -> None:
    model = llama()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    error = refused(model, "twice", "flat")
    assert error.where == "layers.0.self_attn"


def test_no_positions() -> None:
    model = from_config("bloom", hidden_size=32, n_layer=2, n_head=4)
    refused(model, "takes no position_ids", "flat")


def test_experts_in_a_loop() -> None:
    model = from_config(
        "mixtral",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model.set_experts_implementation("eager")
    assert "grouped_mm" in str(refused(model, "loop"))
    model.set_experts_implementation("batched_mm")
    stitch(model, config=EAGER_PIECES)


def test_attention_with_more_than_the_op_carries() -> None:
    model = llama()
    attention = model.model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, head_bias=torch.zeros(4), **kwargs)
    error = refused(model, "head_bias", "flat")
    assert error.where == "layers.0.self_attn"


def test_undefined_weights() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    refused(model, "infinite or undefined")


def test_training_mode() -> None:
    refused(llama().train(), "training mode")


def test_not_a_transformers_model() -> None:
    with pytest.raises(CaptureError, match="not a transformers model"):
        stitch(nn.Linear(2, 2))


def test_stitching_twice_and_unknown_entries() -> None:
    model = stitch(llama(), config=EAGER_PIECES)
    with pytest.raises(UsageError, match="already"):
        stitch(model)
    with pytest.raises(UsageError, match="no entry"):
        stitched_module(model, "pixel_values")
    unstitch(model)
    with pytest.raises(UsageError, match="not stitched"):
        stitched_module(model)
    stitch(model, config=EAGER_PIECES)
