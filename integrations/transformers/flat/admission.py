"""Admission of a model: in, a decoder; out, what serving it needs, or a typed error that says why it can't be stitched.

It never compiles anything: it runs the model on a few tokens, as it is and flattened, and compares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from piecework.errors import CaptureError
from piecework.integrations.transformers.flat.forward import FlatForward, FlatIdsForward, as_traced
from piecework.integrations.transformers.flat.rope import changing_ropes
from piecework.integrations.transformers.flat.serving import Serving, make_masks
from piecework.integrations.transformers.own.probe import (
    Forward,
    as_refusal,
    distance,
    embedding_of,
    field_of,
    is_encoder_decoder,
    narrow_windows,
    one_more,
    probe_tokens,
    require_finite,
    tolerance,
)
from piecework.integrations.transformers.own.refusals import refuse_model
from piecework.integrations.transformers.own.settings import ConfigReader
from piecework.integrations.transformers.request.attention import LAYER_NAME, Discovery
from piecework.integrations.transformers.request.state import (
    AttentionLayer,
    Masks,
    PositionRule,
    request_context,
)

# Which of the probe's six tokens is changed to see whether others follow: one with neighbours on both sides.
_CHANGED = 2

# How configs call the number of routed experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def admit(model: nn.Module, decoder: nn.Module, forward: Forward) -> Serving:
    """Find the decoder's attention layers and prove on a few tokens that it can be served flattened.

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
        with torch.no_grad():
            return _prove(model, decoder, forward, flat, {layer.name: layer for layer in layers})
    except BaseException:
        forget_layers(decoder)
        raise


def forget_layers(decoder: nn.Module) -> None:
    """Take the layer names off the modules of ``decoder``."""
    for module in decoder.modules():
        module.__dict__.pop(LAYER_NAME, None)


def refuse_at_sight(decoder: nn.Module, forward: Forward) -> None:
    """Refuse what can be told without running the model.

    Raises:
        CaptureError: the model is not fit, and why.
    """
    refuse_model(decoder)
    if is_encoder_decoder(decoder):
        raise CaptureError(
            "it attends to an encoder's states, which are no tokens of its own row",
            where=type(decoder).__name__,
            hint="stitch(model) may serve it whole",
        )
    accepted = inspect.signature(forward).parameters
    for name in ("input_ids", "position_ids", "past_key_values"):
        if name not in accepted:
            raise CaptureError(
                f"its forward takes no {name}, so a batch can't be flattened into one row of tokens",
                where=type(decoder).__name__,
                hint="stitch(model) may serve it whole",
            )


def _routes_experts(decoder: nn.Module) -> bool:
    config = decoder.config.get_text_config()
    return any((field_of(config, name) or 0) > 1 for name in _EXPERT_COUNTS)


def _discover(model: nn.Module, decoder: nn.Module, flat: FlatForward) -> Sequence[AttentionLayer]:
    """Run the flattened forward without attention: see who attends and how, and that nothing else joins tokens."""
    ids, _mask = probe_tokens(decoder)
    row = ids.reshape(1, -1)
    hidden, layers = _without_attention(decoder, flat, row)
    if not layers:
        raise CaptureError(
            "none of its modules attends through transformers' attention-function registry",
            where=type(decoder).__name__,
            hint="stitch(model) may serve it whole",
        )
    require_finite(hidden)
    other = row.clone()
    other[0, _CHANGED] = (other[0, _CHANGED] + 1) % embedding_of(decoder).shape[0]
    changed, _layers = _without_attention(decoder, flat, other)
    hidden[0, _CHANGED] = changed[0, _CHANGED]
    # Routed experts and quantised layers put rows together in other ways when one changes, which may cost the last bits.
    grouped = _routes_experts(decoder) or getattr(model, "hf_quantizer", None) is not None
    alike = distance(changed, hidden) <= tolerance(hidden) if grouped else changed.equal(hidden)
    if not alike:
        raise CaptureError(
            "with attention taken out, one token still changes the states of others: it mixes tokens outside attention",
            where=type(decoder).__name__,
            hint="stitch(model) may serve it whole",
        )
    return layers


def _without_attention(
    decoder: nn.Module, flat: FlatForward, row: torch.Tensor
) -> tuple[torch.Tensor, Sequence[AttentionLayer]]:
    """Hidden states of ``row`` where every attention gives zeros, and the layers that would have attended."""
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


def _prove(
    model: nn.Module,
    decoder: nn.Module,
    forward: Forward,
    flat: FlatForward,
    layers: Mapping[str, AttentionLayer],
) -> Serving:
    ids, mask = probe_tokens(decoder)
    ropes = changing_ropes(decoder)
    with narrow_windows(decoder):
        with as_refusal(decoder, "as it is"):
            seen, outputs, output_class = _reference(decoder, forward, layers, ids, mask)
        with as_refusal(decoder, "flattened"):
            create = _mask_maker(model, decoder, layers, seen, ids, mask)
            serving = Serving(
                decoder=decoder,
                dtype=embedding_of(decoder).dtype,
                device=embedding_of(decoder).device,
                layers=layers,
                ropes=ropes,
                position_rule=PositionRule.AFTER_PAST,
                create_masks=create,
                masks_see_positions=True,
                output_class=output_class,
                settings=ConfigReader(decoder.config),
            )
            serving = _with_position_rule(serving, flat, outputs, ids, mask)
            return _with_packing(serving, forward, flat, ids)


def _reference(
    decoder: nn.Module,
    forward: Forward,
    layers: Mapping[str, AttentionLayer],
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[dict[str, object], list[torch.Tensor], type]:
    """The model's own prefill and decode: the masks its layers saw, the hidden states, the output's class."""
    with _watching_masks(layers) as seen:
        prefill = forward(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True)
        masks = dict(seen)
    given = {name for name, value in prefill.items() if value is not None}
    cache = prefill.get("past_key_values")
    if given != {"last_hidden_state", "past_key_values"} or not hasattr(cache, "update"):
        raise CaptureError(
            f"its forward returns {', '.join(sorted(given))}; expected last_hidden_state and a KV cache",
            where=type(decoder).__name__,
            hint="stitch(model) may serve it whole",
        )
    decode = forward(
        input_ids=ids[:, :1],
        attention_mask=one_more(mask),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )
    return masks, [prefill.last_hidden_state, decode.last_hidden_state], type(prefill)


@contextmanager
def _watching_masks(layers: Mapping[str, AttentionLayer]) -> Iterator[dict[str, object]]:
    """Note the ``attention_mask`` that each attention module is called with."""
    seen: dict[str, object] = {}
    handles = []
    for layer in layers.values():
        signature = inspect.signature(layer.module.forward)

        def note(
            _module: nn.Module,
            args: tuple[object, ...],
            kwargs: dict[str, object],
            name: str = layer.name,
            signature: inspect.Signature = signature,
        ) -> None:
            arguments = signature.bind_partial(*args, **kwargs).arguments
            if "attention_mask" in arguments:
                seen[name] = arguments["attention_mask"]

        handles.append(layer.module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _mask_maker(
    model: nn.Module,
    decoder: nn.Module,
    layers: Mapping[str, AttentionLayer],
    seen: Mapping[str, object],
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> Callable[..., Masks]:
    """The function of transformers under which each layer gets the mask that the model's own forward gives it."""
    wrong = None
    for create in mask_makers(model).values():
        masks = make_masks(create, decoder, ids, mask, DynamicCache(config=decoder.config))
        wrong = _first_other_mask(layers, masks, seen)
        if wrong is None:
            return create
    raise CaptureError(
        "the model makes this layer's attention mask in a way of its own",
        where=wrong,
        hint="stitch(model) may serve it whole",
    )


def mask_makers(model: nn.Module) -> dict[str, Callable[..., Masks]]:
    """The functions that may make a model's masks, by name, in the order in which they are tried."""
    own = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return {"for generate": own, "causal": create_causal_mask}


def _first_other_mask(
    layers: Mapping[str, AttentionLayer], masks: Masks, seen: Mapping[str, object]
) -> str | None:
    """The first layer whose mask among ``masks`` is not the one that it was seen with."""
    for name, theirs in seen.items():
        if isinstance(masks, Mapping) and layers[name].layer_type not in masks:
            return name
        ours = layers[name].mask_of(masks)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            if ours.shape != theirs.shape or not torch.equal(ours, theirs):
                return name
        elif ours is not theirs:
            return name
    return None


def _with_position_rule(
    serving: Serving,
    flat: FlatForward,
    expected: Sequence[torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> Serving:
    """Find the rule by which the model numbers tokens: the first under which the flattened forward equals its own."""
    distances = []
    for rule in PositionRule:
        candidate = replace(serving, position_rule=rule)
        prefill = _serve(candidate, flat, input_ids=ids, attention_mask=mask, use_cache=True)
        decode = _serve(
            candidate,
            flat,
            input_ids=ids[:, :1],
            attention_mask=one_more(mask),
            past_key_values=prefill.past_key_values,
        )
        keep = mask.bool()
        apart = max(
            distance(prefill.last_hidden_state[keep], expected[0][keep]),
            distance(decode.last_hidden_state, expected[1]),
        )
        if apart <= tolerance(expected[0]):
            return candidate
        distances.append(apart)
    raise CaptureError(
        "the flattened forward differs from the model's own on a few tokens "
        f"(by {min(distances):.1e} of its norm): it keeps state outside the KV cache, or uses the batch's shape",
        where=type(serving.decoder).__name__,
        hint="stitch(model) may serve it whole",
    )


def _with_packing(
    serving: Serving, forward: Forward, flat: FlatForward, ids: torch.Tensor
) -> Serving:
    """Find whether position ids that start anew separate sequences in the model's masks."""
    positions = torch.tensor([[0, 1, 0]], device=ids.device).expand(ids.shape[0], 3)
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    expected = forward(**given, return_dict=True).last_hidden_state
    for sees in (True, False):
        candidate = replace(serving, masks_see_positions=sees)
        hidden = _serve(candidate, flat, **given).last_hidden_state
        if distance(hidden, expected) <= tolerance(expected):
            return candidate
    raise CaptureError(
        "the flattened forward differs from the model's own when position_ids are given",
        where=type(serving.decoder).__name__,
        hint="stitch(model) may serve it whole",
    )


def _serve(serving: Serving, flat: FlatForward, **given: object) -> object:
    def run(_entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with as_traced(flat.model):
            return flat(tokens, positions)

    return serving.serve({**given, "return_dict": True}, run)
