"""Directories to stitched models: an artifact's traces, bound to the weights of a model of this
process.

Nothing is traced, compiled or run. What is not as it was when the model was saved is refused, with
the first difference.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.codegen.entry.plan import Symbol
from piecework.collector import collector_paused
from piecework.errors import ArtifactError, BindError, CaptureError
from piecework.runtime.artifact.fit import (
    partition,
    require_same_operators,
    require_same_tree,
    tree,
)
from piecework.runtime.artifact.pieces import PieceLoader
from piecework.runtime.artifact.program import (
    EDITED,
    ENTRY,
    GRAPHS,
    STATE,
    loaded_program,
    require_fit,
)
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.call.entry import Entry
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.program import timed
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import Folder, Place, directory_of, open_folder
from piecework.runtime.store.surroundings import processes, require_same_sources
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.traces.traced_model import NewBackend, TracedModel
from piecework.runtime.watch.places import LookUps
from piecework.runtime.watch.reachable import modules_of, own_tensors
from piecework.runtime.watch.state import TracedState
from piecework.runtime.watch.values import Places, import_starts
from piecework.runtime.watch.weights import BoundWeights, Weight

_HINT = "load it with the model that it was saved of, or compile again: with artifact=path this happens by itself"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact that fits this process, and the seconds that opening it took."""

    folder: Folder
    seconds: float

    @classmethod
    def open(cls, place: Place, key_file: str | os.PathLike[str] | None) -> Artifact:
        """Verify an artifact and that it was made by, and for, what is here.

        Raises:
            ArtifactError: it is damaged, not to be trusted, or was made for something else; nothing
                of it was unpickled, loaded or executed.
        """
        start = time.perf_counter()
        folder = open_folder(directory_of(place), signing_key(key_file))
        if folder.facts.get("processes") != processes():
            raise ArtifactError(
                f"the artifact was made by process {folder.facts.get('processes')}, and this is {processes()}",
                hint="save an artifact on each rank, in a directory of its own",
            )
        require_fit(folder)
        return cls(folder, time.perf_counter() - start)

    def parts(self) -> tuple[Artifact, ...]:
        """One for each module, of an artifact of several that were saved together."""
        found = self.folder.parts()
        return tuple(Artifact(each, self.seconds / len(found)) for each in found)

    def traces(
        self,
        model: Callable[..., object],
        config: CompilationConfig,
        new_backend: Callable[[], NewBackend],
        as_it_is: Callable[..., object],
    ) -> tuple[TracedModel, ...]:
        """The traces, bound to ``model``.

        Raises:
            ArtifactError: the model is not the one that was saved, in its code, its structure, its
                settings or its weights' signature.
        """
        folder = self.folder
        require_same_operators(folder.table("operators"))
        modules, rows = folder.facts.get("modules"), folder.facts.get("traces")
        require_same_tree(modules if isinstance(modules, list) else [], tree(modules_of(model)))
        require_same_sources(folder.table("sources"))
        loader = PieceLoader(folder.read)
        count = len(rows) if isinstance(rows, list) else 0
        with collector_paused():
            return tuple(
                self._trace(f"trace_{n}/", loader, model, config, new_backend(), as_it_is)
                for n in range(count)
            )

    def _trace(
        self,
        place: str,
        loader: PieceLoader,
        model: Callable[..., object],
        config: CompilationConfig,
        new_backend: NewBackend,
        as_it_is: Callable[..., object],
    ) -> TracedModel:
        folder, phases = self.folder, {"read": self.seconds}
        with timed(phases, "read"):
            saved: Any = from_bytes(folder.read(f"{place}{STATE}"), f"{place}{STATE}")
        with timed(phases, "check"):
            weights = _weights(saved, model)
        with timed(phases, "pieces"):
            graphs = f"{place}{GRAPHS}"
            program = loaded_program(
                saved["program"], folder, place, loader, config, phases, graphs
            )
        made, held = saved["made"], weights.tensors
        source = replace(made.source, code=folder.text(f"{place}{ENTRY}"))
        captured = ModelTrace(
            traced=lambda: program.graph,
            inputs=tuple(
                (
                    Weight(saved["weights"][each][0].path, held[each], saved["weights"][each][1])
                    if isinstance(each, int)
                    else each
                )
                for each in saved["inputs"]
            ),
            parameters=made.plan.parameters,
            assumptions=_Assumptions(made.plan.symbols, made.plan.guards, saved["symbols"]),
            weights=weights,
            out_spec=pytree.tree_structure(None),
            result=(),
        )
        entry = Entry(captured, program, as_it_is, replace(made, source=source))
        if saved["edited"] is not None:
            entry.edit(replace(saved["edited"], code=folder.text(f"{place}{EDITED}")))
        settings: Any = folder.table("surroundings").get("torch", {})
        backend = new_backend()
        backend.adopt(program)
        return TracedModel(model, as_it_is, backend, program, entry, dict(settings))


class _Assumptions(Assumptions):
    """What the trace assumed, as far as captures ask: the rest is in the entry's plan."""

    def __init__(
        self, symbols: tuple[Symbol, ...], guards: tuple[str, ...], names: Mapping[str, str]
    ) -> None:
        self._found, self._texts, self._names = symbols, guards, dict(names)

    def symbols(self) -> tuple[Symbol, ...]:
        return self._found

    def guards(self) -> tuple[str, ...]:
        return self._texts


# --- weights -----------------------------------------------------------------------------------------


def _weights(saved: Mapping[str, Any], model: Callable[..., object]) -> BoundWeights:
    roots = modules_of(model)
    held = {
        f"{prefix}{name}": tensor for prefix, root in roots for name, tensor in own_tensors(root)
    }
    found = []
    for was, way, _ in saved["weights"]:
        tensor: Any = held.get(was.path)
        if tensor is None and way:
            tensor = LookUps({"local": {"model": model}}).at(Places().of(way))
        here = isinstance(tensor, torch.Tensor)
        difference = was.difference(tensor) if here else "is not in the model"
        if difference:
            raise ArtifactError(
                f"weight {was.path} {difference}",
                where="the weights' signature",
                hint="load the weights as they were when the model was saved, or compile the model again",
            )
        found.append(Weight(was.path, tensor, way))
    state = saved["state"]
    try:
        import_starts(state.values)
    except ImportError as error:
        raise ArtifactError(f"what the trace began at is not here: {error}", hint=_HINT) from error
    traced = TracedState.loaded(state, model)
    if changed := state.differences(model, traced.classes):
        why = f"the model is not the one that was saved: when it was traced, {changed[0]}"
        raise ArtifactError(why, hint=_HINT)
    try:
        weights = BoundWeights.of(model, roots, found, traced)
    except (BindError, CaptureError) as error:
        raise ArtifactError(error.message, where=error.where, hint=error.hint) from error
    for (was, _, before), names in zip(saved["weights"], weights.names(), strict=True):
        if names != before:
            raise ArtifactError(
                f"weight {was.path} has the names {', '.join(sorted(names))}; when the model was saved it had "
                f"{', '.join(sorted(before))}",
                hint="tie the weights that were tied (most models have tie_weights()), and no others",
            )
    if saved["memory"] is not None and partition(weights.tensors) != saved["memory"]:
        raise ArtifactError(
            "the graph writes to weights, and others share memory now than when the model was saved",
            hint=_HINT,
        )
    return weights
