"""Between captures and replay source. In: the captured calls of one descriptor. Out: the facts that the source is made from, and the names that it runs with.

It copies nothing and replays nothing; places are read from the captures themselves, not from what was planned.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import assert_never

import torch

from piecework.codegen.replay.plan import (
    Buffer,
    Frozen,
    HeldBack,
    HeldBuffer,
    HeldInput,
    HeldOutput,
    HeldReplay,
    HeldStage,
    InPlace,
    PieceFacts,
    Read,
    ReplayFacts,
    ReplaySource,
    Staged,
)
from piecework.codegen.stitch.source import StitchedSource
from piecework.errors import StaticGraphError
from piecework.runtime.graphs.memory.addresses import Placement, ValueOrigin
from piecework.runtime.graphs.memory.captured_call import CapturedCall
from piecework.runtime.graphs.memory.copies import StagedCopy
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.numbers import Numbers


def replay_facts(
    source: StitchedSource,
    shape: BatchShape,
    views: Sequence[torch.Tensor],
    calls: Sequence[CapturedCall],
    weights: Mapping[str, torch.Tensor],
    others: Mapping[str, int],
    known: Numbers,
    policy: str,
    banner: str,
) -> ReplayFacts:
    """What was captured for one descriptor.

    Args:
        source: the stitching source, of the pieces or of the whole forward; its parameters are those of ``shape``, in order.
        views: the static inputs, in the order of ``shape.staged``.
        calls: one per piece.
        weights: by their names in ``source``.
        others: the sizes beside the batch size, by label.
        known: numbers of the graph at these sizes, by node.
    """
    if not calls or len(calls) != len(source.submod_names):
        raise StaticGraphError(f"{len(calls)} of {len(source.submod_names)} pieces were captured")
    request = calls[0].request
    size = request.descriptor.num_tokens
    names = [parameter.name for parameter in source.module.entry.parameters]
    staged = tuple(names[each.position] for each in shape.staged)
    places: dict[str, Hashable] = {name: Placement.of(w) for name, w in weights.items()}
    places |= {name: Placement.of(view) for name, view in zip(staged, views, strict=True)}
    numbers = {names[position]: others[label] for position, label in shape.numbers.items()}
    return ReplayFacts(
        title=f"{request.mode.name} {request.descriptor.describe()}",
        tokens=size,
        policy=policy,
        staged=staged,
        sizes={**{names[position]: size for position in shape.sizes}, **numbers},
        places=places,
        pieces=tuple(map(_piece, calls)),
        numbers=known,
        banner=(banner,),
    )


def _piece(call: CapturedCall) -> PieceFacts:
    if call.graph is None:
        return PieceFacts(eager_reason=call.eager_reason or "it was not captured")
    buffer_of = {
        member.leaf: number for number, copy in enumerate(call.copies) for member in copy.members
    }
    reads: list[Read] = []
    for leaf, slot in enumerate(call.slots):
        if leaf in buffer_of:
            reads.append(Staged(buffer_of[leaf]))
        elif slot.placement is not None and slot.origin is not None:
            weight = slot.origin is ValueOrigin.WEIGHT
            reads.append(InPlace(slot.placement, "weight" if weight else slot.origin.value))
        else:
            reads.append(Frozen(slot.value))
    buffers = tuple(
        Buffer(tuple(m.leaf for m in copy.members), copy.window is None, copy.writes_back)
        for copy in call.copies
    )
    return PieceFacts(tuple(reads), buffers, _places_of(call.output))


def _places_of(output: object) -> Hashable:
    if isinstance(output, (tuple, list)):
        return tuple(map(_places_of, output))
    return Placement.of(output) if isinstance(output, torch.Tensor) else Frozen(output)


def bind_replay(
    replay: ReplaySource,
    calls: Sequence[CapturedCall | None],
    uncaptured: Sequence[Callable[..., object]],
    stage: Callable[[Sequence[torch.Tensor]], object],
    held: Mapping[str, torch.Tensor],
) -> dict[str, object]:
    """The namespace that replay source is executed in.

    Args:
        calls: the captured call of each piece.
        uncaptured: the pieces themselves, for those that run uncaptured.
        stage: fills the input buffers.
        held: static inputs and weights, by name.
    """
    namespace: dict[str, object] = {"__vllm_consts__": list(replay.consts)}
    for name, what in replay.held.items():
        match what:
            case HeldStage():
                namespace[name] = stage
            case HeldInput(name=known):
                namespace[name] = held[known]
            case HeldReplay(piece):
                call = _call(calls, piece)
                namespace[name] = uncaptured[piece] if call.graph is None else call.replay
            case HeldOutput(piece, element):
                output = _call(calls, piece).output
                namespace[name] = output if element is None else output[element]  # type: ignore[index]
            case HeldBuffer(piece, buffer):
                copy = _call(calls, piece).copies[buffer]
                namespace[name] = copy.members[0].static if copy.window is None else _fill(copy)
            case HeldBack(piece, buffer):
                namespace[name] = _bring_back(_call(calls, piece).copies[buffer])
            case _:
                assert_never(what)
    return namespace


def _call(calls: Sequence[CapturedCall | None], piece: int) -> CapturedCall:
    call = calls[piece]
    if call is None:
        raise StaticGraphError("was not captured", where=f"piece {piece}")
    return call


def _fill(copy: StagedCopy) -> Callable[..., None]:
    leaves = [member.leaf for member in copy.members]
    return lambda *values: copy.stage(_at(leaves, values))


def _bring_back(copy: StagedCopy) -> Callable[..., None]:
    leaves = [member.leaf for member in copy.members]
    return lambda *values: copy.bring_back(_at(leaves, values))


def _at(leaves: Sequence[int], values: Sequence[object]) -> list[object]:
    """Argument leaves with ``values`` at their places; the others are not looked at."""
    found: list[object] = [None] * (max(leaves) + 1)
    for leaf, value in zip(leaves, values, strict=True):
        found[leaf] = value
    return found
