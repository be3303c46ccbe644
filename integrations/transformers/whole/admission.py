"""Admission to the whole way. In: a decoder that the flat way refused. Out: the way to serve it whole, with what generation needs compiled, or a typed error that says why not.

It runs the model on a few tokens, as it is, rebuilt around tensors, and compiled, and compares all of it.
"""

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
from piecework.integrations.transformers.own.cache_state import layers_of, take_apart
from piecework.integrations.transformers.own.probe import (
    Forward,
    as_refusal,
    embedding_of,
    narrow_windows,
    require_finite,
)
from piecework.integrations.transformers.own.sameness import require_same_output
from piecework.integrations.transformers.whole.forward import CallKind, Habits, WholeForward
from piecework.integrations.transformers.whole.way import UNROLLED, WholeWay
from piecework.runtime import torch_compat
from piecework.runtime.config.compilation import CompilationConfig

_HINT = "leave this model unstitched"
# Prompts that are tried: sequences and tokens of each. Each makes three tokens more, which is the prompt's forward and two steps.
_SIZES = ((2, 3), (3, 5), (2, 8))
_STEPS = 3
Given = dict[str, object]


def admit_whole(
    model: nn.Module, decoder: nn.Module, forward: Forward, config: CompilationConfig | None
) -> WholeWay:
    """Prove on a few tokens that the decoder can be served whole, and compile what generation needs.

    While torch's compiler is switched off nothing is compiled; kinds of calls are when they first come after that.

    Raises:
        CaptureError: the model is not fit, and why.
        PieceCompileError: as ``piecework.compile``.
    """
    with torch.no_grad():
        with as_refusal(decoder, "as it is"):
            calls = _generations(model, decoder, forward)
            habits = _habits(decoder, forward, calls)
        way = WholeWay(model, decoder, forward, habits, config)
        with as_refusal(decoder, "as it is"):
            _require_stateless(way, calls)
        with narrow_windows(decoder), as_refusal(decoder, "around tensors of its cache"):
            for given in _generations(model, decoder, forward):
                _require_same_uncompiled(way, given)
        if torch_compat.compiler_off() is None:
            with as_refusal(decoder, "compiled whole"):
                _compile(way, calls)
    return way


def _require_stateless(way: WholeWay, calls: Sequence[Given]) -> None:
    """Refuse a forward whose results depend on earlier calls otherwise than through its cache."""
    for given in calls:
        first, again = way.own_result(given), way.own_result(given)
        try:
            require_same_output(again.output, first.output, compiled=False)  # type: ignore[arg-type]
        except CaptureError as error:
            raise CaptureError(
                "called again with the same arguments its forward gives another result: it keeps state in its modules, outside its cache",
                where=type(way.decoder).__name__,
                hint=_HINT,
            ) from error


def _require_same_uncompiled(way: WholeWay, given: Given) -> None:
    kind = way.kind_of(given)
    own = way.own_result(given)
    run = WholeForward(way.decoder, way.forward, kind, way.habits.cache_name, own.held)
    way.require_same(run, given, own, compiled=False)


def _compile(way: WholeWay, calls: Sequence[Given]) -> None:
    """Compile for the first call of each kind. What it made must serve the others: where each of them takes another trace, the kind is left to the model's own forward."""
    seen: Counter[CallKind] = Counter()
    for given in calls:
        kind = way.kind_of(given)
        if way.is_left(kind):
            continue
        seen[kind] += 1
        stitched = way.serving(kind)
        if stitched is None:
            stitched = way.compile(kind, given)
        else:
            way.require_same(stitched, given, way.own_result(given), compiled=True)
        # Another trace may be for windows that are full, where layers count tokens, or for the single token that a decoder
        # beside an encoder begins with: the third call tells.
        enough = len(_SIZES) if way.habits.counts or way.habits.is_pair else 2
        if seen[kind] == enough and len(stitched.traces) == enough:
            if not way.habits.makes_cache or (kind.cache is not None and kind.cache.is_filled):
                raise CaptureError(UNROLLED, where=type(way.decoder).__name__, hint=_HINT)
            way.leave_tokens(kind)


def _generations(model: nn.Module, decoder: nn.Module, forward: Forward) -> list[Given]:
    """What ``generate`` calls the decoder with for a few tokens, of several batches and lengths, all with padding on the left."""
    if not isinstance(model, GenerationMixin):
        raise CaptureError(
            "it has no generate(), by which a decoder that is served whole is tried",
            where=type(model).__name__,
            hint="stitch is for models that generate: compile an encoder by "
            "piecework.compile(model, args), and stitch a decoder with its head",
        )
    if model.main_input_name != "input_ids":
        raise CaptureError(
            f"it generates from {model.main_input_name}, and a decoder that is served whole is tried by prompts of tokens",
            where=type(model).__name__,
            hint="piecework.compile(model.get_encoder(), args) stitches the encoder; give generate() its result as encoder_outputs",
        )
    calls: list[Given] = []
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
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=_STEPS,
                min_new_tokens=_STEPS,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
            )
    finally:
        del decoder.forward
        vars(decoder).update(before)
    return calls


def _habits(decoder: nn.Module, forward: Forward, calls: Sequence[Given]) -> Habits:
    """What the calls, and the output of the first, show."""
    accepted = inspect.signature(forward).parameters
    first = copy.deepcopy(calls[0])
    output = forward(**{**first, "return_dict": True})
    if not isinstance(output, ModelOutput) or not isinstance(output[0], torch.Tensor):
        raise CaptureError(
            f"its forward returns a {type(output).__name__}",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    tokens = first.get("attention_mask")
    seen = tokens.bool() if isinstance(tokens, torch.Tensor) and tokens.ndim == 2 else ...
    require_finite(output[0][seen])
    made = {name for name, value in output.items() if isinstance(value, Cache)}
    if len(made) > 1 or not made <= set(accepted):
        raise CaptureError(
            f"its forward returns {', '.join(sorted(made))}, and takes no one cache of that name",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    if not made:
        name = "past_key_values" if "past_key_values" in accepted else None
        return Habits(name, False, frozenset(), type(output))
    (name,) = made
    take_apart(output[name], frozenset())  # refuses what it can't
    held = [_numbers(call.get(name)) for call in calls]
    # From the second call on: in the first there may be nothing yet.
    counts = {what for what, _ in set().union(*(each ^ held[1] for each in held[1:_STEPS]))}
    return Habits(
        name, True, frozenset(counts), type(output), isinstance(output[name], EncoderDecoderCache)
    )


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
    embedding = embedding_of(model)
    for batch, length in _SIZES:
        ids = torch.arange(3, 3 + batch * length, device=embedding.device) * 7
        mask = torch.ones(batch, length, dtype=torch.long, device=embedding.device)
        mask[1, : length // 2] = 0
        yield (ids % embedding.shape[0]).view(batch, length), mask
