"""Captured: a Llama of transformers, one tiny layer; attention, with its mask and cache, stays outside of the pieces."""

from contextlib import AbstractContextManager

import piecework
import torch
from piecework.integrations.transformers import stitch
from piecework.integrations.transformers.request.state import current_request, request_context
from piecework.integrations.transformers.stitcher import stitched_module
from transformers import LlamaConfig, LlamaForCausalLM

TEXT_MADE_WITH = {"torch": "2.13", "transformers": "5.23"}


def stitched() -> piecework.StitchedModule:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    return stitched_module(stitch(model, config=piecework.CompilationConfig(backend="eager")))


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(1)
    return [
        (torch.randint(32, (1, tokens)), torch.arange(tokens).unsqueeze(0)) for tokens in (1, 5)
    ]


def around(
    module: piecework.StitchedModule, call: tuple[object, ...]
) -> AbstractContextManager[None]:
    """The request that attention reads while the graph runs, made as the stitched model makes it."""
    tokens, positions = call
    requests = []

    def note_request(entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        requests.append(current_request())
        return torch.zeros(*tokens.shape, 16)

    given = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    module.model.model.forward.way.serve(given, note_request)
    return request_context(requests[0])
