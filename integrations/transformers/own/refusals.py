"""What no stitched decoder serves. In: the arguments of a forward, and the decoder. Out: its tokens; or a typed error that says what to do instead.

It knows neither of the two ways to serve: what holds for both is said here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from piecework.errors import CaptureError, InputError
from piecework.integrations.transformers.own.settings import RECORDED, Settings

#: Without meaning inside the decoder: for the output, the head or the loss, or for generate(), which hands on what its way of decoding does not take.
INERT = (
    *("return_dict", "cache_position", "logits_to_keep", "num_items_in_batch"),
    *("tokenizer", "assistant_tokenizer", "assistant_model", "streamer"),
)


def refuse_model(decoder: nn.Module) -> None:
    """Refuse a model that can't be stitched in any way, as far as that can be told without running it.

    Raises:
        CaptureError: the model is not fit, and why.
    """
    where = type(decoder).__name__
    if decoder.training:
        raise CaptureError(
            "the model is in training mode", where=where, hint="call model.eval() first"
        )
    _refuse_looping_experts(decoder)


def _refuse_looping_experts(decoder: nn.Module) -> None:
    """The eager experts loop over those that were hit, which depends on the tokens; two other implementations don't."""
    experts = getattr(decoder.config, "_experts_implementation", None)
    selectable = getattr(decoder, "_can_set_experts_implementation", lambda: False)
    if experts == "eager" and selectable():
        raise CaptureError(
            "its experts are run by a loop whose length depends on the tokens",
            where="config._experts_implementation",
            hint="call model.set_experts_implementation('grouped_mm') or ('batched_mm') first",
        )


def refuse_call(
    decoder: nn.Module, given: Mapping[str, object], settings: Settings, strange: Sequence[str]
) -> None:
    """Refuse a forward that asks for more than hidden states and a cache.

    Args:
        given: the arguments of the decoder's forward, by name.
        strange: names of those that the way to serve does not carry.

    Raises:
        InputError: intermediate values are asked for, something is given that can't be carried, or the model is in training mode.
    """
    for name in RECORDED:
        asked = given.get(name)
        if asked or (asked is None and name in settings.recorded):
            raise InputError(
                f"{name} is asked for, and a stitched model keeps no intermediate values",
                where=type(decoder).__name__,
                hint="unstitch(model) for this call",
            )
    if strange:
        raise InputError(
            f"a stitched model does not take {', '.join(sorted(strange))}",
            where=type(decoder).__name__,
            hint="unstitch(model) for this call",
        )
    if decoder.training:
        raise InputError(
            "a stitched model is for inference, and this one is in training mode",
            where=type(decoder).__name__,
            hint="call model.eval()",
        )


def tokens_of(
    decoder: nn.Module, given: Mapping[str, object], dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.Tensor]:
    """The tokens of a forward, and the argument that they come as.

    Args:
        dtype, device: of the decoder's embeddings when it was stitched.

    Raises:
        InputError: there are none or two, they are empty or no ids, gradients or autocast are on, or the model was moved or cast.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise InputError(
            "give exactly one of input_ids and inputs_embeds",
            where="input_ids",
            hint="as in model(input_ids)",
        )
    weight = decoder.get_input_embeddings().weight
    if weight.dtype != dtype or weight.device != device:
        raise InputError(
            f"the model was stitched as {dtype} on {device} and is {weight.dtype} on {weight.device} now",
            where=type(decoder).__name__,
            hint="unstitch(model), then stitch it where it shall run",
        )
    entry, tokens = ("input_ids", ids) if embeds is None else ("inputs_embeds", embeds)
    ranks = 2 if embeds is None else 3
    if not isinstance(tokens, torch.Tensor):
        raise InputError(
            f"{entry} is a {type(tokens).__name__}, not a tensor",
            where=entry,
            hint="""tokenizer(text, return_tensors="pt") gives tensors""",
        )
    if tokens.ndim != ranks or 0 in tokens.shape:
        raise InputError(
            f"{entry} has shape {tuple(tokens.shape)}; expected {ranks} dimensions, none of them empty",
            where=entry,
            hint="the first dimension is the batch, the second the tokens: unsqueeze(0) for one sequence",
        )
    if embeds is None and (tokens.is_floating_point() or tokens.dtype is torch.bool):
        raise InputError(
            f"input_ids are {tokens.dtype}, and must be integers",
            where=entry,
            hint="pass what the tokenizer gave; embeddings are inputs_embeds",
        )
    if torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in decoder.parameters())
    ):
        raise InputError(
            "gradients are enabled, and a stitched model computes none",
            where=type(decoder).__name__,
            hint="call it under torch.no_grad(), or unstitch(model) to train",
        )
    if torch.is_autocast_enabled(tokens.device.type):
        raise InputError(
            "autocast is enabled, and a stitched model keeps the dtypes that it was captured with",
            where=type(decoder).__name__,
            hint="leave the autocast block, or load the model in the dtype you want before stitching",
        )
    return entry, tokens
