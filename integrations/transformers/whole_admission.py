"""Admission to the whole way: a model is tried as it is, rebuilt around tensors, and compiled."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from piecework.errors import CaptureError
from piecework.integrations.transformers import probe, whole_way
from piecework.integrations.transformers import settings as reading
from piecework.integrations.transformers.request.cache_state import layers_of, take_apart
from piecework.integrations.transformers.way import Subject
from piecework.runtime import torch_compat

# Prompts that are tried: sequences, and tokens of each. Each makes three tokens more.
_SIZES = ((2, 3), (3, 5), (2, 8))
_STEPS = 3
Given = dict[str, object]


def admit_whole(subject: Subject) -> whole_way.WholeWay:
    """Prove that a decoder and its encoder can be served whole, and compile what calls need."""
    way = _admitted(subject)
    if reading.is_encoder_decoder(subject.decoder):
        encoder = whole_way.encoder_of(subject)
        try:
            if encoder is None:
                way.encoder = "no encoder was found beside the decoder"
            else:
                reading.refuse_model(encoder.decoder)
                way.encoder = _admitted(encoder)
        except CaptureError as error:
            way.encoder = error.message
    return way


def _admitted(subject: Subject) -> whole_way.WholeWay:
    decoder = subject.decoder
    with torch.no_grad():
        with probe.as_refusal(decoder, "as it is"):
            calls = _generations(subject)
            way = whole_way.WholeWay(subject, _habits(subject, calls))
        with (
            probe.narrow_windows(decoder),
            probe.as_refusal(decoder, "around tensors of its cache"),
        ):
            for given in _generations(subject):
                kind, own = way.call_of(given).kind, way.own_result(given)
                cache_name, held = way.habits.cache_name, whole_way.held_names(own[1])
                run = whole_way.WholeForward(decoder, way.forward, kind, cache_name, held)
                way.require_same(run, given, own, compiled=False)
        if torch_compat.compiler_off() is None:
            with probe.as_refusal(decoder, "compiled whole"):
                _compile(way, calls)
    return way


def _compile(way: whole_way.WholeWay, calls: Sequence[Given]) -> None:
    """Compile for the first call of each kind, which must serve the others too."""
    seen: Counter[whole_way.CallKind] = Counter()
    for given in calls:
        kind = way.call_of(given).kind
        if way.is_left(kind):
            continue
        seen[kind] += 1
        stitched = way.kinds.get(kind)
        if stitched is None:
            stitched = way.compile(kind, given)
        else:
            way.require_same(stitched, given, way.own_result(given), compiled=True)
        # Another trace may be for full windows, or for the one token that a decoder beside an
        # encoder begins with: the third call tells.
        enough = len(_SIZES) if way.habits.counts or way.habits.is_pair else 2
        if seen[kind] == enough and len(stitched.traces) == enough:
            if not way.habits.makes_cache or (kind.cache is not None and kind.cache.is_filled):
                raise way.subject.refused(whole_way.UNROLLED, probe.HINT)
            way.leave(kind, whole_way.UNROLLED)


def _generations(subject: Subject) -> list[Given]:
    """What ``generate`` calls the decoder with, for several batches with padding on the left."""
    model, decoder, _ = subject
    if not isinstance(model, GenerationMixin) or model.main_input_name != "input_ids":
        what = f"from {model.main_input_name}" if isinstance(model, GenerationMixin) else "nothing"
        raise CaptureError(
            f"it generates {what}, and a decoder that is served whole is tried by prompts of tokens",
            where=type(model).__name__,
            hint="piecework.compile(model, args) compiles an encoder, whose result generate() takes "
            "as encoder_outputs; a decoder is stitched with its head",
        )
    calls: list[Given] = []
    forward = decoder.forward
    names = tuple(inspect.signature(forward).parameters)

    def noted(*args: object, **kwargs: object) -> object:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        calls.append(
            {name: copy.deepcopy(v) if isinstance(v, Cache) else v for name, v in given.items()}
        )
        return forward(*args, **kwargs)

    noted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    before = {name: value for name, value in vars(decoder).items() if name == "forward"}
    decoder.forward = noted
    try:
        for ids, mask in _prompts(model):
            how = {"max_new_tokens": _STEPS, "min_new_tokens": _STEPS, "pad_token_id": 0}
            model.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, **how)
    finally:
        del decoder.forward
        vars(decoder).update(before)
    return calls


def _habits(subject: Subject, calls: Sequence[Given]) -> whole_way.Habits:
    """What the calls, and the output of the first, show."""
    decoder = subject.decoder
    accepted = inspect.signature(decoder.forward).parameters
    first = copy.deepcopy(calls[0])
    output = decoder.forward(**{**first, "return_dict": True})
    if not isinstance(output, ModelOutput) or not isinstance(output[0], torch.Tensor):
        raise subject.refused(f"its forward returns a {type(output).__name__}", probe.HINT)
    tokens = first.get("attention_mask")
    seen = tokens.bool() if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else ...
    probe.require_finite(output[0][seen])
    made = {name for name, value in output.items() if isinstance(value, Cache)}
    if len(made) > 1 or not made <= set(accepted):
        why = f"its forward returns {', '.join(sorted(made))}, and takes no one cache of that name"
        raise subject.refused(why, probe.HINT)
    if not made:
        name = "past_key_values" if "past_key_values" in accepted else None
        return whole_way.Habits(name, False, frozenset(), type(output))
    (name,) = made
    take_apart(output[name], frozenset())  # refuses what it can't
    held = [_numbers(call.get(name)) for call in calls]
    # From the second call on: in the first there may be nothing yet.
    counts = {what for what, _ in set().union(*(each ^ held[1] for each in held[1:_STEPS]))}
    is_pair = isinstance(output[name], EncoderDecoderCache)
    return whole_way.Habits(name, True, frozenset(counts), type(output), is_pair)


def _numbers(cache: object) -> set[tuple[str, tuple[int, int]]]:
    """The integers that a cache's layers hold: name, layer and value."""
    return {
        (name, (index, value))
        for index, layer in enumerate(layers_of(cache))
        for name, value in vars(layer).items()
        if type(value) is int
    }


def _prompts(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and attention masks of `_SIZES`, the second row padded on the left."""
    embedding = reading.embedding_of(model)
    for batch, length in _SIZES:
        ids = torch.arange(3, 3 + batch * length, device=embedding.device) * 7
        mask = torch.ones(batch, length, dtype=torch.long, device=embedding.device)
        mask[1, : length // 2] = 0
        yield (ids % embedding.shape[0]).view(batch, length), mask
