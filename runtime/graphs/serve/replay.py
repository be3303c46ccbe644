"""Replay source of a captured model: emitted from what was captured, proved, and bound."""

from __future__ import annotations

import ast
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.plan.render import line_map
from piecework.codegen.replay.emit import REPLAY_NAME, generate_replay, whole_forward
from piecework.codegen.replay.plan import (
    Frozen,
    Held,
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
from piecework.codegen.replay.proof import ReplayProof
from piecework.codegen.stitch.bind import execute_source
from piecework.codegen.stitch.source import StitchedSource
from piecework.runtime.call.profile_names import layer_by_line, named_globals
from piecework.runtime.graphs.memory.addresses import Placement
from piecework.runtime.graphs.memory.captured_call import CapturedCall
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.captured_values import numbers_of
from piecework.runtime.pieces.program import Program

Stage = Callable[[Sequence[torch.Tensor]], object]
#: What staging is called in a profile.
STAGE = "stage inputs"


@dataclass(frozen=True, slots=True)
class Replay:
    """The replay of one captured descriptor: its source, its proof, and the function itself."""

    source: ReplaySource
    proof: ReplayProof
    call: Callable[[Sequence[torch.Tensor]], object]

    @contextmanager
    def named(self, labels: Sequence[str], *, by_layer: bool) -> Iterator[None]:
        """Show its parts by name in ``torch.profiler``; ``labels`` are the replays', in order."""
        names = {}
        for name, what in self.source.held.items():
            if isinstance(what, HeldReplay):
                names[name] = labels[what.piece]
            elif isinstance(what, HeldStage):
                names[name] = STAGE
        code, module = self.source.code, self.source.module
        operators = {alias.name: alias.name for alias in module.aliases}
        layer = layer_by_line(code, line_map(module, ast.parse(code))) if by_layer else None
        namespace = self.call.__globals__  # type: ignore[attr-defined]
        with named_globals(namespace, names), named_globals(namespace, operators, layer):
            yield


class ReplayMaker:
    """Makes the replays of one model, of its pieces or of its whole forward.

    Args:
        shape: its arguments.
        program: its stitching graph and source.
        weights: path → tensor.
        policy: the address policy, for the text.
    """

    def __init__(
        self,
        shape: BatchShape,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        policy: str,
    ) -> None:
        self._shape, self._weights, self._policy = shape, weights, policy
        self._banner = f"model: {program.name}"
        self._pieces = (program.split_gm, program.source)
        self._whole: tuple[torch.fx.GraphModule, StitchedSource] | None = None

    def make(
        self,
        calls: Sequence[CapturedCall],
        uncaptured: Sequence[Callable[..., object]],
        views: Sequence[torch.Tensor],
        stage: Stage,
        others: Mapping[str, int],
        sizes: Mapping[str, int],
        *,
        whole: bool,
    ) -> Replay:
        """The replay of captured pieces with the operators between, or of the whole forward.

        Args:
            calls: one per piece, or that of the whole forward.
            uncaptured: the pieces themselves, where the address policy left them uncaptured.
            views: the static inputs that the pieces read.
            stage: fills them.
            others: the sizes beside the batch size, by label.
            sizes: what each symbol of the trace is.

        Raises:
            EmitError: the text did not prove to do what the graph does on that memory.
        """
        if whole and self._whole is None:
            self._whole = whole_forward(*self._pieces)
        split_gm, source = self._whole if whole and self._whole is not None else self._pieces
        shape, request = self._shape, calls[0].request
        size = request.descriptor.num_tokens
        names = [parameter.name for parameter in source.module.entry.parameters]
        held = {row.name: self._weights[row.path] for row in source.module.bound}
        held |= {names[at]: self._weights[path] for at, path in shape.weights.items()}
        staged = tuple(names[each.position] for each in shape.staged)
        held |= dict(zip(staged, views, strict=True))
        numbers = {names[position]: others[label] for position, label in shape.numbers.items()}
        facts = ReplayFacts(
            title=f"{request.mode.name} {request.descriptor.describe()}",
            tokens=size,
            policy=self._policy,  # type: ignore[arg-type]
            staged=staged,
            sizes={**{names[position]: size for position in shape.sizes}, **numbers},
            places={name: Placement.of(tensor) for name, tensor in held.items()},
            pieces=tuple(map(_facts_of, calls)),
            numbers=numbers_of(split_gm, sizes),
            banner=(self._banner,),
        )
        emitted, proof = generate_replay(source, split_gm, facts)
        namespace = {n: _bound(e, calls, uncaptured, stage, held) for n, e in emitted.held.items()}
        namespace["__vllm_consts__"] = list(emitted.consts)
        return Replay(emitted, proof, execute_source(emitted.code, namespace, REPLAY_NAME))


def _facts_of(call: CapturedCall) -> PieceFacts:
    if call.graph is None:
        return PieceFacts(eager_reason=call.eager_reason or "it was not captured")
    writes_back = {copy.leaf: copy.writes_back for copy in call.copies}
    reads: list[Read] = []
    for leaf, slot in enumerate(call.slots):
        if leaf in writes_back:
            reads.append(Staged(writes_back[leaf]))
        elif slot.placement is not None and slot.origin is not None:
            reads.append(InPlace(slot.placement, slot.origin.value))
        else:
            reads.append(Frozen(slot.value))
    return PieceFacts(tuple(reads), _places_of(call.output))


def _places_of(output: object) -> Hashable:
    if isinstance(output, (tuple, list)):
        return tuple(map(_places_of, output))
    return Placement.of(output) if isinstance(output, torch.Tensor) else Frozen(output)


def _bound(
    what: Held,
    calls: Sequence[CapturedCall],
    uncaptured: Sequence[Callable[..., object]],
    stage: Stage,
    held: Mapping[str, torch.Tensor],
) -> object:
    """What a name of the emitted text is bound to."""
    match what:
        case HeldStage():
            return stage
        case HeldInput(name=known):
            return held[known]
        case HeldReplay(piece):
            return uncaptured[piece] if calls[piece].graph is None else calls[piece].replay
        case HeldOutput(piece, element):
            output = calls[piece].output
            return output if element is None else output[element]  # type: ignore[index]
        case HeldBuffer(piece, leaf):
            return next(each.static for each in calls[piece].copies if each.leaf == leaf)
        case _:
            raise AssertionError(f"nothing is bound to {what}")
