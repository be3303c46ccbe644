"""What is read of a decoder's config and of a call, and what no way serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from piecework.errors import CaptureError, InputError

#: Without meaning inside the decoder: for the output, the head, the loss, or generate().
INERT = (
    *("return_dict", "cache_position", "logits_to_keep", "num_items_in_batch"),
    *("tokenizer", "assistant_tokenizer", "assistant_model", "streamer"),
)
RECORDED = ("output_attentions", "output_hidden_states", "output_router_logits")
# Without any of these, all layers attend to all that came before.
_NARROWER = ("layer_types", "sliding_window", "attention_chunk_size")
_UNSTITCH = "unstitch(model) for this call"


@dataclass(frozen=True, slots=True)
class Settings:
    """What serving needs of a config."""

    implementation: str  # the name of its attention function
    use_cache: bool  # as the call's default, and so the next
    return_dict: bool
    recorded: frozenset[str]  # intermediate values that it asks for
    sees_all: bool  # each token attends to all before it, in every layer

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Settings:
        return cls(
            implementation=config._attn_implementation,
            use_cache=getattr(config, "use_cache", False),
            return_dict=getattr(config, "return_dict", True),
            recorded=frozenset(name for name in RECORDED if getattr(config, name, False)),
            sees_all=config.get_text_config() is config
            and getattr(config, "is_causal", True) is True
            and all(field_of(config, name, differs=True) is None for name in _NARROWER),
        )

    def returned(self, output: object, given: Mapping[str, object]) -> object:
        """``output``, or a tuple of it where the call asks for that."""
        asked = given.get("return_dict")
        return output if (self.return_dict if asked is None else asked) else output.to_tuple()  # type: ignore[attr-defined]


class ConfigReader:
    """Reads the settings of one config, again only when it was written."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._read: tuple[dict[str, object], Settings] | None = None

    def now(self) -> Settings:
        held, read = vars(self._config), self._read
        if read is None or held != read[0]:
            before = dict(held)
            self._read = read = (before, Settings.of(self._config))
        return read[1]


def field_of(config: PreTrainedConfig, name: str, differs: object = None) -> object:
    """A field of ``config``; None without one, and ``differs`` where layers differ in it."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # raised for a field of the layers that is asked of the whole
        return differs


def embedding_of(decoder: nn.Module) -> torch.Tensor:
    """The weight of the token embedding; where it is, the decoder takes its inputs."""
    return decoder.get_input_embeddings().weight


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model, or the decoder in it, reads an encoder's states."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def refuse_model(decoder: nn.Module) -> None:
    """Raise `CaptureError` for a model that can be stitched in no way."""
    if decoder.training:
        why = "the model is in training mode"
        raise CaptureError(why, where=type(decoder).__name__, hint="call model.eval() first")
    # The eager experts loop over those that were hit; two other implementations don't.
    experts = getattr(decoder.config, "_experts_implementation", None)
    if experts == "eager" and getattr(decoder, "_can_set_experts_implementation", bool)():
        why = "its experts are run by a loop whose length depends on the tokens"
        hint = "call model.set_experts_implementation('grouped_mm') or ('batched_mm') first"
        raise CaptureError(why, where="config._experts_implementation", hint=hint)


def refuse_call(
    decoder: nn.Module, given: Mapping[str, object], settings: Settings, strange: Sequence[str]
) -> None:
    """Raise `InputError` where a forward asks for more than hidden states and a cache."""
    where = type(decoder).__name__
    for name in RECORDED:
        asked = given.get(name)
        if asked or (asked is None and name in settings.recorded):
            why = f"{name} is asked for, and a stitched model keeps no intermediate values"
            raise InputError(why, where=where, hint=_UNSTITCH)
    if strange:
        names = ", ".join(sorted(strange))
        raise InputError(f"a stitched model does not take {names}", where=where, hint=_UNSTITCH)
    if decoder.training:
        why = "a stitched model is for inference, and this one is in training mode"
        raise InputError(why, where=where, hint="call model.eval()")


def tokens_of(
    decoder: nn.Module, given: Mapping[str, object], dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.Tensor]:
    """The argument that tokens come as, and the tokens; `InputError` where they can't be served."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    entry, tokens, ranks = ("input_ids", ids, 2) if embeds is None else ("inputs_embeds", embeds, 3)
    if (ids is None) == (embeds is None):
        raise InputError("give exactly one of input_ids and inputs_embeds", where=entry)
    if (
        not isinstance(tokens, torch.Tensor)
        or tokens.ndim != ranks
        or 0 in tokens.shape
        or (embeds is None and (tokens.is_floating_point() or tokens.dtype is torch.bool))
    ):
        form = "[batch, tokens] of integers" if embeds is None else "[batch, tokens, hidden]"
        raise InputError(f"{entry} is no tensor {form}, or it is empty", where=entry)
    weight, where = embedding_of(decoder), type(decoder).__name__
    if weight.dtype != dtype or weight.device != device:
        raise InputError(
            f"the model was stitched as {dtype} on {device} and is {weight.dtype} on {weight.device} now",
            where=where,
            hint="unstitch(model), then stitch it where it shall run",
        )
    if torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in decoder.parameters())
    ):
        why = "gradients are enabled, and a stitched model computes none"
        hint = "call it under torch.no_grad(), or unstitch(model) to train"
        raise InputError(why, where=where, hint=hint)
    if torch.is_autocast_enabled(tokens.device.type):
        why = "autocast is enabled, and a stitched model keeps the dtypes that it was captured with"
        hint = "leave the autocast block, or load the model in the dtype you want before stitching"
        raise InputError(why, where=where, hint=hint)
    return entry, tokens
