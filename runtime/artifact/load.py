"""Directories to stitched models. In: an artifact and a model of this process. Out: its traces, bound to the model's weights.

Nothing is traced, compiled or run. What is not as it was when the model was saved is refused, with the first difference.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from piecework.collector import collector_paused
from piecework.errors import ArtifactError, BindError, CaptureError
from piecework.runtime.artifact.fit import require_same_operators, require_same_tree, tree
from piecework.runtime.artifact.form import (
    EDITED,
    ENTRY,
    GRAPHS,
    STATE,
    SavedTrace,
    SavedWeight,
    WeightInput,
    partition,
)
from piecework.runtime.artifact.pieces import PieceLoader
from piecework.runtime.artifact.program import (
    LoadedAssumptions,
    loaded_program,
    require_fit,
    surroundings_of,
    texts_of,
)
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.call.entry import Entry
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.program import timed
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import Folder, Place, directory_of, open_folder
from piecework.runtime.store.surroundings import (
    processes,
    require_same_sources,
)
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.traces.traced_model import NewBackend, TracedModel
from piecework.runtime.watch.places import LookUps
from piecework.runtime.watch.reachable import modules_of, own_tensors
from piecework.runtime.watch.state import TracedState
from piecework.runtime.watch.values import Places, import_starts
from piecework.runtime.watch.weights import BoundWeights, Traced, Weight

_HINT = "load it with the model that it was saved of, or compile again: with artifact=path this happens by itself"


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact that fits this process.

    Attributes:
        folder: its verified directory.
        seconds: what opening it took.
    """

    folder: Folder
    seconds: float

    @classmethod
    def open(cls, place: Place, key_file: str | os.PathLike[str] | None) -> Artifact:
        """Verify an artifact and that it was made by, and for, what is here.

        Raises:
            ArtifactError: it is damaged, not to be trusted, or was made for something else; nothing of it was unpickled, loaded or executed.
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
            ArtifactError: the model is not the one that was saved, in its code, its structure, its settings or its weights' signature.
        """
        folder = self.folder
        require_same_operators(texts_of(folder, "operators"))
        saved = folder.facts.get("modules")
        require_same_tree(saved if isinstance(saved, list) else [], tree(modules_of(model)))
        require_same_sources(texts_of(folder, "sources"))
        rows = folder.facts.get("traces")
        loader = PieceLoader(folder.read)
        count = len(rows) if isinstance(rows, list) else 0
        with collector_paused():
            return tuple(
                _trace(
                    folder,
                    f"trace_{number}",
                    loader,
                    model,
                    config,
                    new_backend(),
                    as_it_is,
                    self.seconds,
                )
                for number in range(count)
            )


def _trace(
    folder: Folder,
    name: str,
    loader: PieceLoader,
    model: Callable[..., object],
    config: CompilationConfig,
    new_backend: NewBackend,
    as_it_is: Callable[..., object],
    opened: float,
) -> TracedModel:
    phases = {"read": opened}
    with timed(phases, "read"):
        saved = from_bytes(folder.read(f"{name}/{STATE}"), f"{name}/{STATE}")
        assert isinstance(saved, SavedTrace)
    with timed(phases, "check"):
        weights = _weights(saved, model)
    with timed(phases, "pieces"):
        graphs = f"{name}/{GRAPHS}"
        read = partial(folder.read, graphs) if graphs in folder.files else None
        program = loaded_program(saved.program, folder, f"{name}/", loader, config, phases, read)
    plan = saved.made.plan
    source = replace(saved.made.source, code=folder.text(f"{name}/{ENTRY}"))
    captured = ModelTrace(
        traced=lambda: program.graph,
        inputs=tuple(_inputs(saved, weights)),
        parameters=plan.parameters,
        assumptions=LoadedAssumptions(plan.symbols, plan.guards, saved.symbols),
        weights=weights,
        out_spec=pytree.tree_structure(None),
        result=(),
    )
    entry = Entry(captured, program, as_it_is, replace(saved.made, source=source))
    if saved.edited is not None:
        entry.edit(replace(saved.edited, code=folder.text(f"{name}/{EDITED}")))
    settings = dict(surroundings_of(folder).get("torch", {}))
    backend = new_backend()
    backend.adopt(program)
    return TracedModel(
        model, as_it_is, backend, program, entry, settings, saved.as_marked, saved.rows_in_one
    )


# --- weights -----------------------------------------------------------------------------------------


def _weights(saved: SavedTrace, model: Callable[..., object]) -> BoundWeights:
    roots = modules_of(model)
    held = {
        f"{prefix}{name}": tensor for prefix, root in roots for name, tensor in own_tensors(root)
    }
    found = [Weight(each.path, _tensor(each, held, model), each.way) for each in saved.weights]
    for each, weight in zip(saved.weights, found, strict=True):
        shape = torch.Size(each.shape)
        was = Traced(each.path, each.dtype, each.layout, each.device, shape, each.stride)
        difference = was.difference(weight.tensor)
        if difference:
            raise ArtifactError(
                f"weight {each.path} {difference}",
                where="the weights' signature",
                hint="load the weights as they were when the model was saved, or compile the model again",
            )
    try:
        import_starts(saved.state.values)
    except ImportError as error:
        raise ArtifactError(f"what the trace began at is not here: {error}", hint=_HINT) from error
    changed = saved.state.differences(model)
    if changed:
        why = f"the model is not the one that was saved: when it was traced, {changed[0]}"
        raise ArtifactError(why, hint=_HINT)
    state = TracedState.loaded(saved.state, model)
    try:
        weights = BoundWeights.of(model, roots, found, state)
    except (BindError, CaptureError) as error:
        raise ArtifactError(error.message, where=error.where, hint=error.hint) from error
    for each, names in zip(saved.weights, weights.names(), strict=True):
        if names != each.names:
            raise ArtifactError(
                f"weight {each.path} has the names {', '.join(sorted(names))}; when the model was saved it had "
                f"{', '.join(sorted(each.names))}",
                hint="tie the weights that were tied (most models have tie_weights()), and no others",
            )
    if saved.memory is not None and partition(weights.tensors) != saved.memory:
        raise ArtifactError(
            "the graph writes to weights, and others share memory now than when the model was saved",
            hint=_HINT,
        )
    return weights


def _tensor(
    saved: SavedWeight, held: Mapping[str, torch.Tensor], model: Callable[..., object]
) -> torch.Tensor:
    tensor: Any = held.get(saved.path)
    if tensor is None and saved.way:
        tensor = LookUps({"local": {"model": model}}).at(Places().of(saved.way))
    if not isinstance(tensor, torch.Tensor):
        raise ArtifactError(
            f"the model has no weight {saved.path}", where="the weights' signature", hint=_HINT
        )
    return tensor


def _inputs(saved: SavedTrace, weights: BoundWeights) -> Iterator[object]:
    for each in saved.inputs:
        if isinstance(each, WeightInput):
            held = saved.weights[each.index]
            yield Weight(held.path, weights.tensors[each.index], held.way)
        else:
            yield each
