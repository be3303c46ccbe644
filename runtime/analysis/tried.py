"""The pieces of a trace for every size, tried. In: a split graph, and what its pieces were compiled to. Out: nothing, or why another trace has to serve sizes 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.errors import CaptureError
from piecework.runtime.analysis.unbacked import Compiled, EverySize


class NotAdmitted(CaptureError):
    """A trace may not serve every size; the caller makes one for larger sizes."""


@dataclass
class TriedPieces:
    """Tries each different piece once.

    Args:
        every_size: the try.
        weights: the model's own tensors, by the graph's placeholder.
    """

    every_size: EverySize
    weights: Mapping[str, torch.Tensor]

    def before(self, split_gm: torch.fx.GraphModule, names: Sequence[str]) -> dict[str, Structure]:
        """What each piece is, once all are known to run with every size.

        Raises:
            NotAdmitted: one does not.
        """
        found: dict[str, Structure] = {}
        seen: set[str] = set()
        calls = {str(n.target): n for n in split_gm.graph.find_nodes(op="call_module")}
        for name in names:
            piece = graph_of(split_gm, name)
            found[name] = structure_of(piece, describe_input=input_signature)
            if found[name].key in seen:
                continue
            seen.add(found[name].key)
            reason = self.every_size.refusal(name, piece, self._weights_of(calls[name], piece))
            if reason is not None:
                raise NotAdmitted(f"{name}: {reason}")
        return found

    def after(self, compiled: Mapping[str, Compiled]) -> None:
        """Compare what the pieces were compiled to with their graphs.

        Raises:
            NotAdmitted: one does something else.
        """
        reason = self.every_size.difference(compiled)
        if reason is not None:
            raise NotAdmitted(reason)

    def _weights_of(
        self, call: torch.fx.Node, piece: torch.fx.GraphModule
    ) -> dict[str, torch.Tensor]:
        placeholders = piece.graph.find_nodes(op="placeholder")
        pairs = zip(placeholders, call.args, strict=True)
        return {
            own.name: self.weights[given.name]
            for own, given in pairs
            if isinstance(given, torch.fx.Node) and given.name in self.weights
        }
