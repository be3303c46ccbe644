"""Replay source of a captured model: emitted from what was captured, proved, and bound."""

import ast
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.plan.render import line_map
from piecework.codegen.replay import plan
from piecework.codegen.replay.emit import REPLAY_NAME, generate_replay
from piecework.codegen.stitch.bind import execute_source
from piecework.codegen.stitch.source import StitchedSource
from piecework.runtime.call.profile_names import layer_by_line, named_globals
from piecework.runtime.graphs.memory.addresses import Placement
from piecework.runtime.graphs.memory.wrapper import CUDAGraphEntry

Stage = Callable[[Sequence[torch.Tensor]], object]
#: What staging is called in a profile.
STAGE = "stage inputs"


@dataclass(frozen=True, slots=True)
class Replay:
    """The replay of one captured descriptor: its source, and the function itself."""

    source: plan.ReplaySource
    call: Callable[[Sequence[torch.Tensor]], object]

    @contextmanager
    def named(self, labels: Sequence[str], *, by_layer: bool) -> Iterator[None]:
        """Show its parts by name in ``torch.profiler``; ``labels`` are the replays', in order."""
        names = {}
        for name, what in self.source.held.items():
            if what.kind == "replay":
                names[name] = labels[what.piece]
            elif what.kind == "stage":
                names[name] = STAGE
        code, module = self.source.code, self.source.module
        operators = {alias.name: alias.name for alias in module.aliases}
        layer = layer_by_line(code, line_map(module, ast.parse(code))) if by_layer else None
        namespace = self.call.__globals__  # type: ignore[attr-defined]
        with named_globals(namespace, names), named_globals(namespace, operators, layer):
            yield


def make_replay(
    split_gm: torch.fx.GraphModule,
    source: StitchedSource,
    facts: plan.ReplayFacts,
    calls: Sequence[CUDAGraphEntry],
    uncaptured: Sequence[Callable[..., object]],
    stage: Stage,
    held: Mapping[str, torch.Tensor],
) -> Replay:
    """Emit, prove and bind the replay of captured ``calls``, over the memory ``held`` by name."""
    emitted = generate_replay(source, split_gm, facts)

    def bound(what: plan.Held) -> object:
        match what:
            case plan.Held("stage"):
                return stage
            case plan.Held("input", name=known):
                return held[known]
            case plan.Held("replay", piece):
                return uncaptured[piece] if calls[piece].graph is None else calls[piece].replay
            case plan.Held("output", piece, element):
                output = calls[piece].output
                return output if element is None else output[element]  # type: ignore[index]
            case plan.Held("buffer", piece, int(leaf)):
                return calls[piece].slots[leaf].static
            case _:
                raise AssertionError(f"nothing is bound to {what}")

    namespace = {name: bound(what) for name, what in emitted.held.items()}
    namespace["__vllm_consts__"] = list(emitted.consts)
    return Replay(emitted, execute_source(emitted.code, namespace, REPLAY_NAME))


def facts_of(call: CUDAGraphEntry) -> plan.PieceFacts:
    """What the emitter is told of one piece's capture."""
    if call.graph is None:
        reason = call.record and call.record.eager_reason
        return plan.PieceFacts(eager_reason=reason or "it was not captured")
    reads: list[plan.Read] = []
    for slot in call.slots:
        if slot.static is not None:
            reads.append(plan.Staged(slot.writes_back))
        elif slot.placement is not None and slot.origin is not None:
            reads.append(plan.InPlace(slot.placement, slot.origin.value))
        else:
            reads.append(plan.Frozen(slot.value))
    return plan.PieceFacts(tuple(reads), _places_of(call.output))


def _places_of(output: object) -> Hashable:
    if isinstance(output, (tuple, list)):
        return tuple(map(_places_of, output))
    return Placement.of(output) if isinstance(output, torch.Tensor) else plan.Frozen(output)
