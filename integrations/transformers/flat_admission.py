"""Admission to the flat way: a model is run on a few tokens, as it is and flattened, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from piecework.errors import InputError
from piecework.integrations.transformers import flat_way, probe
from piecework.integrations.transformers.flat_forward import FlatIdsForward, as_traced
from piecework.integrations.transformers.request import state as states
from piecework.integrations.transformers.request.attention import Discovery
from piecework.integrations.transformers.settings import embedding_of, field_of
from piecework.integrations.transformers.way import Subject
from piecework.runtime import torch_compat

# Which of the probe's six tokens is changed: one with neighbours on both sides.
_CHANGED = 2
# How configs call the number of routed experts.
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def admit_flat(subject: Subject) -> flat_way.FlatWay:
    """Prove on a few tokens that a decoder can be served flattened, and compile it."""
    flat_way.refuse_at_sight(subject)
    decoder = subject.decoder
    flat = FlatIdsForward(decoder, decoder.forward)
    layers = _discover(subject, flat)
    try:
        flat_way.name_layers(layers)
        with torch.no_grad(), probe.narrow_windows(decoder):
            way = _found_equal(subject, flat, layers)
        if torch_compat.compiler_off() is None:
            way.entry("input_ids")
        return way
    except BaseException:
        flat_way.forget_layers(decoder)
        raise


def _discover(subject: Subject, flat: FlatIdsForward) -> Sequence[states.AttentionLayer]:
    """Find who attends, and that nothing else joins tokens, by a run without attention."""
    decoder = subject.decoder
    ids, _mask = probe.probe_tokens(decoder)
    row = ids.reshape(1, -1)
    hidden, layers = _without_attention(decoder, flat, row)
    if not layers:
        why = "none of its modules attends through transformers' attention-function registry"
        raise subject.refused(why, flat_way.FLAT_HINT)
    probe.require_finite(hidden)
    other = row.clone()
    other[0, _CHANGED] = (other[0, _CHANGED] + 1) % embedding_of(decoder).shape[0]
    changed, _layers = _without_attention(decoder, flat, other)
    hidden[0, _CHANGED] = changed[0, _CHANGED]
    # Routed experts and quantised layers group rows in other ways when one changes. Else both are
    # runs of the same kernels on the same shapes, and rows that stay have their bits.
    config = decoder.config.get_text_config()
    routed = any((field_of(config, name) or 0) > 1 for name in _EXPERT_COUNTS)  # type: ignore[operator]
    grouped = routed or getattr(subject.model, "hf_quantizer", None) is not None
    if probe.distance(changed, hidden) > (probe.limit_of(hidden.dtype) if grouped else 0.0):
        why = "one token changes the states of others without attention: it mixes tokens outside attention"
        raise subject.refused(why, flat_way.FLAT_HINT)
    return layers


def _without_attention(
    decoder: nn.Module, flat: FlatIdsForward, row: torch.Tensor
) -> tuple[torch.Tensor, Sequence[states.AttentionLayer]]:
    """Hidden states where every attention gives zeros, and the layers that would have attended."""
    names = {module: name for name, module in decoder.named_modules()}
    layer_types = field_of(decoder.config.get_text_config(), "layer_types")
    discovery = Discovery(names, layer_types, [])  # type: ignore[arg-type]
    positions = torch.arange(row.numel(), device=row.device).unsqueeze(0)
    with (
        torch.no_grad(),
        as_traced(decoder),
        states.request_context(discovery),
        probe.as_refusal(decoder, "flattened, without a mask outside attention,"),
    ):
        return flat(row, positions).clone(), discovery.found


def _found_equal(
    subject: Subject, flat: FlatIdsForward, layers: Sequence[states.AttentionLayer]
) -> flat_way.FlatWay:
    """The first masks, numbering and packing under which the flattened forward equals its own."""
    decoder = subject.decoder
    with probe.as_refusal(decoder, "as it is"):
        expected, output_class = _results(subject, decoder.forward)
    for each in expected:
        probe.require_finite(each)

    def run(_entry: str, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with as_traced(decoder):
            return flat(tokens, positions)

    distances, failure = [], None
    for masks, rule, sees in product(
        flat_way.mask_makers(subject.model), states.PositionRule, (True, False)
    ):
        habits = flat_way.Habits(rule, masks, sees, output_class)
        way = flat_way.FlatWay(subject, layers, habits)
        try:
            got, _ = _results(subject, lambda **given: way.serve(given, run))  # noqa: B023
        except (InputError, *probe.MODEL_ERRORS) as error:
            failure = error
            continue
        apart = max(map(probe.distance, got, expected))
        if apart <= probe.limit_of(expected[0].dtype):
            return way
        distances.append(apart)
    if not distances and failure is not None:
        with probe.as_refusal(decoder, "flattened"):
            raise failure
    raise subject.refused(
        f"the flattened forward differs from the model's own on a few tokens (by {min(distances):.1e} of its norm): "
        "it makes masks or numbers tokens in a way of its own, keeps state outside the KV cache, or uses the batch's shape",
        flat_way.FLAT_HINT,
    )


def _results(subject: Subject, run: probe.Forward) -> tuple[list[torch.Tensor], type]:
    """States of a padded prompt, one more token and packed rows; the output's class."""
    ids, mask = probe.probe_tokens(subject.decoder)
    prompt: Any = run(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True)
    given = {name for name, value in prompt.items() if value is not None}
    cache = prompt.get("past_key_values")
    if given != {"last_hidden_state", "past_key_values"} or not hasattr(cache, "update"):
        why = f"its forward returns {', '.join(sorted(given))}; expected last_hidden_state and a KV cache"
        raise subject.refused(why, flat_way.FLAT_HINT)
    longer = {"attention_mask": torch.cat([mask, mask.new_ones(2, 1)], dim=1)}
    step = run(
        input_ids=ids[:, :1], past_key_values=cache, use_cache=True, return_dict=True, **longer
    )
    positions = torch.tensor([[0, 1, 0]], device=ids.device).expand(2, 3)
    packed = run(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True)
    hidden = [each.last_hidden_state for each in (prompt, step, packed)]  # type: ignore[attr-defined]
    return [hidden[0][mask.bool()], *hidden[1:]], type(packed)
