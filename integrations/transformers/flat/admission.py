"""Admission to the flat way: a model is run on a few tokens, as it is and flattened, and compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from piecework.errors import CaptureError, InputError
from piecework.integrations.transformers.flat.forward import FlatForward, FlatIdsForward, as_traced
from piecework.integrations.transformers.flat.rope import changing_ropes
from piecework.integrations.transformers.flat.serving import Serving
from piecework.integrations.transformers.own.probe import (
    MODEL_ERRORS,
    Forward,
    as_refusal,
    distance,
    embedding_of,
    field_of,
    is_encoder_decoder,
    limit_of,
    narrow_windows,
    probe_tokens,
    require_finite,
)
from piecework.integrations.transformers.own.refusals import ConfigReader, refuse_model
from piecework.integrations.transformers.request.attention import LAYER_NAME, Discovery
from piecework.integrations.transformers.request.state import (
    AttentionLayer,
    Masks,
    PositionRule,
    request_context,
)

_HINT = "stitch(model) may serve it whole"

# Which of the probe's six tokens is changed: one with neighbours on both sides.
_CHANGED = 2

# How configs call the number of routed experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def admit(model: nn.Module, decoder: nn.Module, forward: Forward) -> Serving:
    """Find the attention layers, and prove on a few tokens that a decoder can be served flattened.

    On success each attention module carries its layer name; ``forget_layers`` takes it away.

    Args:
        model: what the user stitches.
        decoder: the module whose forward will be replaced.
        forward: that forward, bound.

    Raises:
        CaptureError: the model is not fit, and why.
    """
    refuse_at_sight(decoder, forward)
    flat = FlatIdsForward(decoder, forward)
    layers = _discover(model, decoder, flat)
    for layer in layers:
        setattr(layer.module, LAYER_NAME, layer.name)
    try:
        with torch.no_grad(), narrow_windows(decoder):
            return _found_equal(model, decoder, forward, flat, layers)
    except BaseException:
        forget_layers(decoder)
        raise


def forget_layers(decoder: nn.Module) -> None:
    """Take the layer names off the modules of ``decoder``."""
    for module in decoder.modules():
        module.__dict__.pop(LAYER_NAME, None)


def refuse_at_sight(decoder: nn.Module, forward: Forward) -> None:
    """Raise `CaptureError` where a model need not be run to see that it is not fit."""
    refuse_model(decoder)
    if is_encoder_decoder(decoder):
        raise CaptureError(
            "it attends to an encoder's states, which are no tokens of its own row",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    accepted = inspect.signature(forward).parameters
    for name in ("input_ids", "position_ids", "past_key_values"):
        if name not in accepted:
            raise CaptureError(
                f"its forward takes no {name}, so a batch can't be flattened into one row of tokens",
                where=type(decoder).__name__,
                hint=_HINT,
            )


def _routes_experts(decoder: nn.Module) -> bool:
    config = decoder.config.get_text_config()
    return any((field_of(config, name) or 0) > 1 for name in _EXPERT_COUNTS)


def _discover(model: nn.Module, decoder: nn.Module, flat: FlatForward) -> Sequence[AttentionLayer]:
    """Run the flattened forward without attention: who attends, and that nothing else joins tokens."""
    ids, _mask = probe_tokens(decoder)
    row = ids.reshape(1, -1)
    hidden, layers = _without_attention(decoder, flat, row)
    if not layers:
        raise CaptureError(
            "none of its modules attends through transformers' attention-function registry",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    require_finite(hidden)
    other = row.clone()
    other[0, _CHANGED] = (other[0, _CHANGED] + 1) % embedding_of(decoder).shape[0]
    changed, _layers = _without_attention(decoder, flat, other)
    hidden[0, _CHANGED] = changed[0, _CHANGED]
    # Routed experts and quantised layers group rows in other ways when one changes.
    grouped = _routes_experts(decoder) or getattr(model, "hf_quantizer", None) is not None
    # Else both are runs of the same kernels on the same shapes, and rows that stay have their bits.
    limit = limit_of(hidden.dtype) if grouped else 0.0
    if distance(changed, hidden) > limit:
        raise CaptureError(
            "with attention taken out, one token still changes the states of others: it mixes tokens outside attention",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    return layers


def _without_attention(
    decoder: nn.Module, flat: FlatForward, row: torch.Tensor
) -> tuple[torch.Tensor, Sequence[AttentionLayer]]:
    """Hidden states where every attention gives zeros, and the layers that would have attended."""
    names = {module: name for name, module in decoder.named_modules()}
    layer_types = field_of(decoder.config.get_text_config(), "layer_types")
    discovery = Discovery(names, layer_types, [])
    positions = torch.arange(row.numel(), device=row.device).unsqueeze(0)
    with (
        torch.no_grad(),
        as_traced(decoder),
        request_context(discovery),
        as_refusal(decoder, "flattened, without a mask outside attention,"),
    ):
        return flat(row, positions).clone(), discovery.found


def mask_makers(model: nn.Module) -> dict[str, Callable[..., Masks]]:
    """The functions that may make a model's masks, in the order in which they are tried."""
    own = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return {"for generate": own, "causal": create_causal_mask}


def _found_equal(
    model: nn.Module,
    decoder: nn.Module,
    forward: Forward,
    flat: FlatForward,
    layers: Sequence[AttentionLayer],
) -> Serving:
    """The first masks, numbering and packing under which the flattened forward equals the model's
    own.
    """
    ids, mask = probe_tokens(decoder)
    packed = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 0]], device=ids.device).expand(2, 3),
        "use_cache": False,
    }

    def results(run: Forward) -> list[torch.Tensor]:
        """Of a prompt with padding, of one more token, and of positions that start anew."""
        prompt = run(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True)
        given = {name for name, value in prompt.items() if value is not None}  # type: ignore[attr-defined]
        cache = prompt.get("past_key_values")  # type: ignore[attr-defined]
        if given != {"last_hidden_state", "past_key_values"} or not hasattr(cache, "update"):
            raise CaptureError(
                f"its forward returns {', '.join(sorted(given))}; expected last_hidden_state and a KV cache",
                where=type(decoder).__name__,
                hint=_HINT,
            )
        further = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        step = run(
            input_ids=ids[:, :1],
            attention_mask=further,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        found = (prompt, step, run(**packed, return_dict=True))
        hidden: list[torch.Tensor] = [each.last_hidden_state for each in found]  # type: ignore[attr-defined]
        return [hidden[0][mask.bool()], *hidden[1:]]

    with as_refusal(decoder, "as it is"):
        expected = results(forward)
        output_class = type(forward(**packed, return_dict=True))
    for each in expected:
        require_finite(each)
    distances, failure = [], None
    for create, rule, sees in product(mask_makers(model).values(), PositionRule, (True, False)):
        serving = Serving(
            decoder=decoder,
            dtype=embedding_of(decoder).dtype,
            device=embedding_of(decoder).device,
            layers={layer.name: layer for layer in layers},
            ropes=changing_ropes(decoder),
            position_rule=rule,
            create_masks=create,
            masks_see_positions=sees,
            output_class=output_class,
            settings=ConfigReader(decoder.config),
        )
        try:
            got = results(lambda **given: _served(serving, flat, given))  # noqa: B023
        except (InputError, *MODEL_ERRORS) as error:
            failure = error
            continue
        apart = max(map(distance, got, expected))
        if apart <= limit_of(expected[0].dtype):
            return serving
        distances.append(apart)
    if not distances and failure is not None:
        with as_refusal(decoder, "flattened"):
            raise failure
    raise CaptureError(
        f"the flattened forward differs from the model's own on a few tokens (by {min(distances):.1e} of its norm): "
        "it makes masks or numbers tokens in a way of its own, keeps state outside the KV cache, or uses the batch's shape",
        where=type(decoder).__name__,
        hint=_HINT,
    )


def _served(serving: Serving, flat: FlatForward, given: Mapping[str, object]) -> object:
    def run(_entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with as_traced(flat.model):
            return flat(tokens, positions)

    return serving.serve(given, run)
