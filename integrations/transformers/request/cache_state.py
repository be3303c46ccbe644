"""A KV cache taken apart into its form and its tensors, rebuilt around others, and put back.

It knows no kind of layer: what a layer holds is a tensor, a count, or part of the form, or refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from piecework.errors import InputError

#: Caches that do nothing but hold layers, or two of these.
_KINDS = (DynamicCache, StaticCache, EncoderDecoderCache)
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)
_LEAF, _COUNT, _TABLE, _VALUE, _CACHE = "leaf", "count", "table", "value", "cache"
# What of a pair of caches a forward sets: by layer, whether it holds the encoder's states.
_FILLED = "is_updated"

#: What an attribute is: a leaf or a count by its number, a table, a cache by its form, or a value.
Part = tuple[str, object]
Attributes = tuple[tuple[str, Part], ...]


@dataclass(frozen=True, slots=True)
class CacheForm:
    """What of a cache is fixed while it is traced."""

    kind: type
    own: Attributes  # beside the layers; of a pair, its two caches too
    layers: tuple[tuple[type, Attributes], ...]  # of each its class and attributes
    is_filled: bool  # whether any layer holds states of tokens


@dataclass(slots=True)
class TakenApart:
    """A cache's form, and its leaves: tensors, and one as long as each count."""

    form: CacheForm
    leaves: list[torch.Tensor]
    lent: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # by the copy's identity, what is held


def take_apart(cache: Cache, counts: Set[str]) -> TakenApart:
    """The form and leaves of ``cache``; raises `InputError` for what is neither."""
    leaves: list[torch.Tensor] = []
    taken = TakenApart(_form(cache, leaves, counts), leaves)
    leaves[:] = [_plain(leaf, taken.lent) for leaf in leaves]
    return taken


def _form(cache: Cache, leaves: list[torch.Tensor], counts: Set[str]) -> CacheForm:
    if type(cache) not in _KINDS:
        raise _refused(f"past_key_values is a {type(cache).__name__}")
    held = [] if isinstance(cache, EncoderDecoderCache) else cache.layers
    first = len(leaves)
    layers = tuple((type(each), _attributes(vars(each), leaves, counts)) for each in held)
    own = {name: value for name, value in vars(cache).items() if name != "layers"}
    attributes = _attributes(own, leaves, counts)
    filled = any(leaf.ndim > 1 and leaf.numel() for leaf in leaves[first:])
    return CacheForm(type(cache), attributes, layers, filled)


def _attributes(
    held: Mapping[str, object], leaves: list[torch.Tensor], counts: Set[str]
) -> Attributes:
    return tuple((name, _part(name, held[name], leaves, counts)) for name in sorted(held))


def _part(name: str, value: object, leaves: list[torch.Tensor], counts: Set[str]) -> Part:
    kind = type(value)
    if isinstance(value, Cache):
        return _CACHE, _form(value, leaves, counts)
    if kind is torch.Tensor:
        leaves.append(value)
        return _LEAF, len(leaves) - 1
    if kind is int and name in counts:
        # As the size of a tensor: of an integer a trace may take the number for granted.
        leaves.append(torch.empty(value, 0))  # type: ignore[call-overload]
        return _COUNT, len(leaves) - 1
    if kind is dict:
        inner = ((key, _part(name, each, leaves, counts)) for key, each in value.items())  # type: ignore[attr-defined]
        return _TABLE, tuple(inner)
    if kind in _CONSTANTS or isinstance(value, type):
        return _VALUE, (value, kind)  # with its class: True and 1 are equal
    raise _refused(f"{name} of past_key_values is a {kind.__name__}")


def _refused(why: str) -> InputError:
    why = f"{why}, which a decoder that is compiled whole does not take"
    hint = "pass a plain DynamicCache, or unstitch(model) for this call"
    return InputError(why, where="past_key_values", hint=hint)


def _plain(tensor: torch.Tensor, lent: dict[int, torch.Tensor]) -> torch.Tensor:
    """``tensor`` as graphs take it: contiguous, and without marks that bind a trace to it."""
    if not tensor.is_contiguous():
        plain = tensor.contiguous()
    elif vars(tensor):
        plain = tensor.detach()
    else:
        return tensor
    lent[id(plain)] = tensor
    return plain


def rebuilt(form: CacheForm, leaves: Sequence[torch.Tensor]) -> Cache:
    """A cache of ``form`` around ``leaves``; traced by Dynamo."""
    cache = _with_attributes(form.kind, form.own, leaves)
    if form.kind is not EncoderDecoderCache:
        cache.layers = [_with_attributes(kind, parts, leaves) for kind, parts in form.layers]
    return cache


def _with_attributes(kind, attributes, leaves):  # type: ignore[no-untyped-def]
    made = object.__new__(kind)
    for name, part in attributes:
        setattr(made, name, _value(part, leaves))
    return made


def _value(part, leaves):  # type: ignore[no-untyped-def]
    kind, what = part
    if kind == _LEAF:
        return leaves[what]
    if kind == _COUNT:
        return leaves[what].shape[0]
    if kind == _TABLE:
        return {key: _value(inner, leaves) for key, inner in what}
    if kind == _CACHE:
        return rebuilt(what, leaves)
    return what[0]


def held_by(cache: Cache, names: Sequence[str]) -> list[dict[str, object]]:
    """What each layer holds, and what a pair sets; torch 2.11 can't list ``names`` in a trace."""
    held = [
        {name: getattr(layer, name) for name in names if hasattr(layer, name)}
        for layer in layers_of(cache)
    ]
    if isinstance(cache, EncoderDecoderCache):
        held.append({_FILLED: dict(cache.is_updated)})
    return held


def layers_of(cache: object) -> list[object]:
    """The layers of a cache; of a pair the decoder's, then the encoder's."""
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return list(getattr(cache, "layers", ()))


def put_back(cache: Cache, taken: TakenApart, held: Sequence[Mapping[str, object]]) -> None:
    """Let a cache hold what a forward on the `rebuilt` one, which ``held`` is of, made of it."""
    parts = [cache]
    if isinstance(cache, EncoderDecoderCache):
        *held, own = held
        cache.is_updated.update(own[_FILLED])  # type: ignore[arg-type]
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    for part in parts:  # a layer of a decoder has one in both caches of a pair
        while len(part.layers) < len(held) // len(parts):
            part.layers.append(part.layer_class_to_replicate())
    copied: set[int] = set()
    for layer, values in zip(layers_of(cache), held, strict=True):
        for name, value in values.items():
            if type(value) is dict:
                now = {key: _own(each, taken, copied) for key, each in value.items()}
                getattr(layer, name).update(now)
            else:
                own = _own(value, taken, copied)
                if getattr(layer, name, layer) is not own:
                    setattr(layer, name, own)


def _own(value: object, taken: TakenApart, copied: set[int]) -> object:
    """``value``, or the cache's own tensor that it stands for, with what was written into it."""
    own = taken.lent.get(id(value))
    if own is None:
        return value
    if own.data_ptr() != value.data_ptr() and id(value) not in copied:  # type: ignore[attr-defined]
        copied.add(id(value))
        own.copy_(value)  # type: ignore[arg-type]
    return own
