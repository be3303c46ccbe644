"""Replay source of a captured model. In: what was captured for one descriptor. Out: the emitted function, proved and bound, ready to call.

It captures nothing, and what it emits is not used until its proof is done.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.plan.render import line_map
from piecework.codegen.replay.emit import REPLAY_NAME, generate_replay
from piecework.codegen.replay.plan import HeldReplay, HeldStage, ReplaySource
from piecework.codegen.replay.proof import ReplayProof
from piecework.codegen.replay.whole import whole_forward
from piecework.codegen.stitch.bind import execute_source
from piecework.codegen.stitch.source import StitchedSource
from piecework.runtime.call.profile_names import layer_by_line, named_globals
from piecework.runtime.graphs.memory.captured_call import CapturedCall
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.numbers import numbers_of
from piecework.runtime.graphs.serve.replay_facts import bind_replay, replay_facts
from piecework.runtime.pieces.program import Program

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
        """Show staging, replays and operators by name in ``torch.profiler`` for the block; ``labels`` are the replays', in order."""
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
        stage: Callable[[Sequence[torch.Tensor]], object],
        others: Mapping[str, int],
        sizes: Mapping[str, int],
        *,
        whole: bool,
    ) -> Replay:
        """The replay of captured pieces, with the splitting ops between them; or of the whole forward, captured as one graph.

        Args:
            calls: one per piece, or that of the whole forward.
            uncaptured: the pieces themselves, for those that the address policy left uncaptured.
            views: the static inputs that the pieces read.
            stage: fills them.
            others: the sizes beside the batch size.
            sizes: what each symbol of the trace is.

        Raises:
            EmitError: the text did not prove to do what the graph does on the memory that was captured.
        """
        if whole and self._whole is None:
            self._whole = whole_forward(*self._pieces)
        split_gm, source = self._whole if whole and self._whole is not None else self._pieces
        known, weights = numbers_of(split_gm, sizes), self._weights_in(source)
        facts = replay_facts(
            source, self._shape, views, calls, weights, others, known, self._policy, self._banner
        )
        emitted, proof = generate_replay(source, split_gm, facts)
        held = {**dict(zip(facts.staged, views, strict=True)), **weights}
        namespace = bind_replay(emitted, calls, uncaptured, stage, held)
        return Replay(emitted, proof, execute_source(emitted.code, namespace, REPLAY_NAME))

    def _weights_in(self, source: StitchedSource) -> dict[str, torch.Tensor]:
        """Tensors of the names that ``source`` holds or is passed."""
        names = [parameter.name for parameter in source.module.entry.parameters]
        found = {row.name: self._weights[row.path] for row in source.module.bound}
        passed = {names[at]: self._weights[path] for at, path in self._shape.weights.items()}
        return found | passed
