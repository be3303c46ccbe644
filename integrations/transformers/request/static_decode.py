"""Decode steps of static caches in full graphs, in memory that keeps its address.

A cache is moved into that memory at its first step, and stays while anybody holds its tensors. No
graph holds a length: layers read it on the device.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from piecework.codegen.graph.origin import value_of
from piecework.errors import InputError, StaticGraphError
from piecework.integrations.transformers.request import state as states
from piecework.integrations.transformers.request import step as steps
from piecework.integrations.transformers.request.attention import attention
from piecework.integrations.transformers.request.state import dry_request
from piecework.runtime import torch_compat
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import (
    ForwardContext,
    get_forward_context,
    set_forward_context,
)
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import platform_for
from piecework.runtime.stitched import StitchedModule

#: What a layer stores of each sequence: heads, and the widths of keys and values.
LayerShape = tuple[int, int, int]


class StaticDecode:
    """The memory of full graphs for decode steps, and the cache that lies in it."""

    def __init__(
        self,
        layers: Mapping[str, states.AttentionLayer],
        shapes: Mapping[int, LayerShape],
        *,
        largest: int,
        length: int,
        like: torch.Tensor,
    ) -> None:
        self._layers, self._shapes = layers, [shapes[slot] for slot in sorted(shapes)]
        self._largest, self._length, self._like = largest, length, like
        self.outside: Counter[str] = Counter()  # steps that ran outside full graphs, by reason
        self.step: StaticStep | None = None  # the memory, from a capture on until it sleeps
        self._moving = threading.Lock()
        self._order = platform_for(like.device).call_order()

    def _wait(self) -> None:
        """Come after the step before, on the device too, which reads masks, caches and counts."""
        if self._order is not None:
            self._order()

    @contextmanager
    def context_for(
        self, mode: CUDAGraphMode, descriptor: BatchDescriptor
    ) -> Iterator[ForwardContext | None]:
        """The ``context_for`` of a capture: a decode step in this memory, or a `dry_request`."""
        if not descriptor.uniform:
            with dry_request(mode, descriptor) as context:
                yield context
            return
        self._wait()
        if self.step is None:
            # What inference mode makes can't be written to outside of it.
            with torch.inference_mode(False), torch.no_grad():
                kinds = {layer.layer_type for layer in self._layers.values()}
                size = (self._largest, self._length)
                self.step = StaticStep(self._shapes, kinds, *size, self._like)
        rows = descriptor.num_tokens
        state = states.RequestState(
            layers=self._layers,
            batch=rows,
            tokens=1,
            implementation=None,
            masks=None,
            cache=None,
            position_ids=torch.zeros(rows, 1, dtype=torch.long),
            paged={},
            step=self.step,
        )
        scope = set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
        with (
            self.step.counts_of_nothing(),
            scope as context,
            states.request_context(state, in_full_graphs=True),
        ):
            yield context

    def release(self) -> None:
        """Give the memory back, unless a cache lies in it."""
        with self._moving:
            if self.step is not None and not self.step.is_held():
                self.step = None

    def take(self, cache: Cache, batch: int, masks: steps.LayerMasks) -> StaticStep | None:
        """The step of a cache, moved here if need be; None, and counted, if it can't."""
        step = self.step
        if type(cache) is not StaticCache or step is None:
            return None
        self._wait()
        why = "" if step.holds(cache, batch) else self._moved_in(step, cache, batch)
        if why or not step.put_masks(masks, batch, cache.layers[0].max_cache_len):
            self.outside[why or "masks of another form"] += 1
            return None
        step.require_room(cache)
        return step

    def _moved_in(self, step: StaticStep, cache: StaticCache, batch: int) -> str:
        """Move a cache in; why not, if it can't be."""
        if "update" in vars(cache) or getattr(cache, "offloading", True):
            return "the cache is offloaded, or has an update of its own"
        for layer in cache.layers:
            if type(layer) is not StaticLayer or "update" in vars(layer):
                return f"a layer of the cache is a {type(layer).__name__}"
            if not layer.is_initialized:
                return "the cache is empty"
        if batch > self._largest:
            return f"{batch} sequences, and graphs for at most {self._largest}"
        length = cache.layers[0].max_cache_len
        if length > self._length:
            return f"the cache is longer than {self._length}"
        wanted = [
            ((batch, heads, length, width), self._like.dtype, self._like.device)
            for heads, *widths in self._shapes
            for width in widths
        ]
        held = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        if [(each.shape, each.dtype, each.device) for each in held] != wanted:
            return "the tensors of the cache have another shape, dtype or device"
        with self._moving:
            step.let_go(cache)
            if step.is_held():
                return "another cache lies in the memory of the graphs"
            with torch.inference_mode(False), torch.no_grad():
                step.move_in(cache, batch)
        return ""


class StaticStep:
    """Keys, values, lengths and masks of the decode steps of one cache."""

    def __init__(
        self,
        shapes: list[LayerShape],
        kinds: Set[str | None],
        largest: int,
        length: int,
        like: torch.Tensor,
    ) -> None:
        self._largest = largest
        self._keys = [like.new_zeros(largest, n, length, width) for n, width, _ in shapes]
        self._values = [like.new_zeros(largest, n, length, width) for n, _, width in shapes]
        self._counts = like.new_zeros(len(shapes), dtype=torch.long)
        self._masks = {kind: like.new_empty(largest, 1, 1, length) for kind in kinds}
        self._clear_masks()
        # The tensors that the layers of a cache were given, while the cache lives.
        self._given: WeakKeyDictionary[Cache, list[tuple[torch.Tensor, ...]]] = WeakKeyDictionary()
        self._own = self._users()
        self._most, self._version = 0, -1

    def attend(
        self,
        layer_idx: int,
        layer_type: str | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """As `DecodeStep.attend`, for as many sequences as there are rows."""
        rows = query.shape[2]
        if rows > self._largest:  # padding of captured pieces
            rows = self._largest
            query, key, value, out = steps.without_padding(rows, query, key, value, out)
        stored = self._keys[layer_idx][:rows], self._values[layer_idx][:rows]
        if not get_forward_context().dry:
            for held, new in zip(stored, (key, value), strict=True):
                held.transpose(0, 2).index_copy_(0, self._counts[layer_idx], new)
        heads, turned = key.shape[1], out.transpose(1, 2)
        query = query.as_strided(*steps.packed(query.shape, query.stride(), heads))
        mask = self._masks[layer_type][:rows]
        attended = scaled_dot_product_attention(query, *stored, mask, scale=scaling)
        out.as_strided(*steps.packed(turned.shape, turned.stride(), heads)).copy_(attended)

    def advance(self) -> None:
        """Each layer has one token more; after the step."""
        self._counts.add_(1)
        self._most, self._version = self._most + 1, self._counts._version

    @contextmanager
    def counts_of_nothing(self) -> Iterator[None]:
        """Let runs on dummy tokens store them at the first place: the cache may be full."""
        with torch.inference_mode(False), torch.no_grad():
            before = self._counts.clone()
            self._counts.zero_()
        try:
            yield
        finally:
            with torch.inference_mode(False), torch.no_grad():
                self._counts.copy_(before)

    def put_masks(self, masks: steps.LayerMasks, batch: int, room: int) -> bool:
        """Copy the masks of a request into place; False if they are of another form."""
        if masks.keys() != self._masks.keys() or any(
            mask is None or mask.shape[0] not in (1, batch) or mask.shape[3] != room
            for mask in masks.values()
        ):
            return False
        for kind, mask in masks.items():
            place = self._masks[kind]
            place[:batch, :, :, :room].copy_(steps.additive(mask, place.dtype))
        return True

    def require_room(self, cache: StaticCache) -> None:
        """Raise `InputError` for a step behind the end of the cache."""
        if self._counts._version != self._version:  # somebody else counted: a prompt, a reset
            self._most, self._version = int(self._counts.max()), self._counts._version
        room = cache.layers[0].max_cache_len
        if self._most >= room:
            why = f"the static cache is full: it has room for {room} tokens"
            hint = "make it with a larger max_cache_len"
            raise InputError(why, where="past_key_values", hint=hint)

    def holds(self, cache: StaticCache, batch: int) -> bool:
        """Whether a cache that was moved in still lies here, and has so many sequences."""
        given, layers = self._given.get(cache), cache.layers
        if given is None or len(given) != len(layers) or given[0][0].shape[0] != batch:
            return False
        return all(
            layer.keys is keys and layer.values is values and layer.cumulative_length is count
            for layer, (keys, values, count) in zip(layers, given, strict=True)
        )

    def let_go(self, cache: StaticCache) -> None:
        """Forget what a cache was given; its layers may hold it still."""
        self._given.pop(cache, None)

    def is_held(self) -> bool:
        """Whether anybody outside has a tensor of this memory."""
        return self._users() > self._own

    def _users(self) -> int:
        return sum(map(torch_compat.storage_users, (*self._keys, *self._values)))

    def move_in(self, cache: StaticCache, batch: int) -> None:
        """Copy a cache here, and let it lie here from now on."""
        self._clear_masks()
        given = []
        for slot, layer in enumerate(cache.layers):
            room = layer.max_cache_len
            keys, values = (each[slot][:batch, :, :room] for each in (self._keys, self._values))
            count = self._counts[slot]
            keys.copy_(layer.keys)
            values.copy_(layer.values)
            count.copy_(layer.cumulative_length)
            layer.keys, layer.values, layer.cumulative_length = keys, values, count
            given.append((keys, values, count))
        self._given[cache] = given
        self._version = -1

    def _clear_masks(self) -> None:
        """What nobody asks for attends to the first place, so that its result is a number."""
        for mask in self._masks.values():
            mask.fill_(-torch.inf)
            mask[..., 0] = 0


def static_decode(
    made: StitchedModule,
    layers: Mapping[str, states.AttentionLayer],
    config: PreTrainedConfig,
    *,
    largest: int,
    length: int,
) -> StaticDecode:
    """The memory for a stitched decoder; `StaticGraphError` where attention can't be in it."""
    implementation = config._attn_implementation
    if states.registered_attention(implementation) is not sdpa_attention_forward:
        raise _refused(f"attention by {implementation!r}; only 'sdpa' is captured")
    for each in StaticCache(config=config, max_cache_len=1).layers:
        if type(each) is not StaticLayer:
            raise _refused(f"its static cache has a {type(each).__name__}, which counts in Python")
    shapes: dict[int, LayerShape] = {}
    stored: list[torch.Tensor] = []
    for piece in made.split_gm.children():
        for node in piece.graph.find_nodes(op="call_function", target=attention.overload):  # type: ignore[union-attr, operator]
            layer = layers[node.kwargs["layer_name"]]
            query, key, value = map(value_of, node.args[:3])
            further = (*node.args[4:], node.kwargs.get("softcap"), node.kwargs.get("s_aux"))
            if layer.layer_idx in shapes or any(each is not None for each in further):
                raise _refused("it attends with soft-capping or sinks, or shares a slot of a cache")
            shapes[layer.layer_idx] = key.shape[1], key.shape[3], value.shape[3]
            stored += query, key, value
    if not shapes or sorted(shapes) != list(range(len(shapes))):
        raise _refused("its layers don't fill the slots of a cache")
    if len({each.dtype for each in stored}) > 1:
        raise _refused("its layers attend in different dtypes")
    like = torch.empty(0, dtype=stored[0].dtype, device=stored[0].device)
    return StaticDecode(layers, shapes, largest=largest, length=length, like=like)


def _refused(why: str) -> StaticGraphError:
    why = f"decode steps can't be in full graphs: {why}"
    hint = "leave max_cache_len out; the pieces around attention are captured"
    return StaticGraphError(why, where="max_cache_len", hint=hint)
