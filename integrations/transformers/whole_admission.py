"""Admission to the whole way. In: a decoder that the flat way refused. Out: the way to serve it whole, with what generation needs compiled, or a typed error that says why not.

It runs the model on a few tokens, as it is, rebuilt around tensors, and compiled, and compares all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

from piecework.errors import CaptureError
from piecework.integrations.transformers.admission import Forward
from piecework.integrations.transformers.probe import (
    as_refusal,
    embedding_of,
    narrow_windows,
    one_more,
    probe_tokens,
    require_finite,
)
from piecework.integrations.transformers.whole import WholeForward
from piecework.integrations.transformers.whole_way import Habits, WholeWay
from piecework.runtime import torch_compat
from piecework.runtime.config.compilation import CompilationConfig

_HINT = "leave this model unstitched"
Given = dict[str, object]


def admit_whole(
    model: nn.Module, decoder: nn.Module, forward: Forward, config: CompilationConfig | None
) -> WholeWay:
    """Prove on a few tokens that the decoder can be served whole, and compile prefill and decode.

    While torch's compiler is switched off nothing is compiled; kinds of calls are when they first come after that.

    Raises:
        CaptureError: the model is not fit, and why.
        PieceCompileError: as ``piecework.compile``.
    """
    accepted = inspect.signature(forward).parameters
    if "input_ids" not in accepted:
        raise CaptureError(
            "its forward takes no input_ids", where=type(decoder).__name__, hint=_HINT
        )
    own = inspect.signature(model.forward).parameters  # type: ignore[arg-type]
    positions = "position_ids" in own and "position_ids" in accepted
    with torch.no_grad():
        with as_refusal(decoder, "as it is"):
            habits = _habits(decoder, forward, positions)
        way = WholeWay(decoder, forward, habits, config)
        with narrow_windows(decoder), as_refusal(decoder, "around tensors of its cache"):
            for given in _requests(decoder, forward, habits, positions):
                _require_same_uncompiled(way, given)
        if torch_compat.compiler_off() is None:
            with as_refusal(decoder, "compiled whole"):
                _compile(way, _requests(decoder, forward, habits, positions))
    return way


def _require_same_uncompiled(way: WholeWay, given: Given) -> None:
    kind = way.kind_of(given)
    run = WholeForward(way.decoder, way.forward, kind, way.habits.cache_name)
    way.require_same(run, given, compiled=False)


def _compile(way: WholeWay, requests: Iterator[Given]) -> None:
    """Compile for the first request of each kind; the others must be served by what was compiled."""
    for given in requests:
        kind = way.kind_of(given)
        stitched = way.serving(kind)
        if stitched is None:
            stitched = way.compile(kind, given)
        else:
            way.require_same(stitched, given, compiled=True)
        if len(stitched.traces) > 1:
            raise CaptureError(
                "its graph holds for one batch and length alone, and each other one would be compiled anew",
                where=type(way.decoder).__name__,
                hint=_HINT,
            )


def _habits(decoder: nn.Module, forward: Forward, positions: bool) -> Habits:
    """Run a prefill and two steps, and see what comes back."""
    accepted = inspect.signature(forward).parameters
    ids, mask = probe_tokens(decoder)
    output = forward(**_given(ids, mask, positions), use_cache=True, return_dict=True)
    if not isinstance(output, ModelOutput) or not isinstance(output[0], torch.Tensor):
        raise CaptureError(
            f"its forward returns a {type(output).__name__}",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    require_finite(output[0][mask.bool()])
    caches = [name for name, value in output.items() if isinstance(value, Cache)]
    others = [name for name in output if name in accepted and name not in caches]
    if len(caches) > 1 or others or not set(caches) <= set(accepted):
        raise CaptureError(
            f"its forward takes back {', '.join(others or caches)}, which is no KV cache that could be taken apart",
            where=type(decoder).__name__,
            hint=_HINT,
        )
    if not caches:
        name = "past_key_values" if "past_key_values" in accepted else None
        return Habits(name, False, frozenset(), type(output))
    cache = output[caches[0]]
    counted = [_numbers(cache)]
    for _ in range(2):
        mask = one_more(mask)
        forward(
            **_given(ids[:, :1], mask, positions),
            **{caches[0]: cache},
            use_cache=True,
            return_dict=True,
        )
        counted.append(_numbers(cache))
    counts = {name for first in counted for name, _ in first ^ counted[-1]}
    return Habits(caches[0], True, frozenset(counts), type(output))


def _numbers(cache: Cache) -> set[tuple[str, tuple[int, int]]]:
    """The integers that layers hold: name, layer and value."""
    return {
        (name, (index, value))
        for index, layer in enumerate(getattr(cache, "layers", ()))
        for name, value in vars(layer).items()
        if type(value) is int
    }


def _requests(
    decoder: nn.Module, forward: Forward, habits: Habits, positions: bool
) -> Iterator[Given]:
    """Two generations of a few tokens, of other batches and lengths, left padding among them: what `generate` calls the decoder with."""
    for ids, mask in (probe_tokens(decoder), _more_tokens(decoder)):
        cache = DynamicCache(config=decoder.config) if habits.makes_cache else None
        for _ in range(3 if habits.makes_cache else 1):
            given = _given(ids, mask, positions)
            if cache is not None and habits.cache_name is not None:
                given |= {habits.cache_name: cache, "use_cache": True}
            yield given
            forward(**given, return_dict=True)
            ids, mask = ids[:, -1:], one_more(mask)


def _more_tokens(decoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows of five tokens, the second padded on the left."""
    embedding = embedding_of(decoder)
    ids = (torch.arange(3, 18, device=embedding.device) * 7) % embedding.shape[0]
    mask = torch.ones(3, 5, dtype=torch.long, device=embedding.device)
    mask[1, :2] = 0
    return ids.view(3, 5), mask


def _given(ids: torch.Tensor, mask: torch.Tensor, positions: bool) -> Given:
    given: Given = {"input_ids": ids, "attention_mask": mask}
    if positions:
        counted = (mask.cumsum(dim=1) - 1).clamp_min(0)
        given["position_ids"] = counted[:, -ids.shape[1] :]
    return given
