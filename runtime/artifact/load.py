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
from piecework.errors import ArtifactError, BindError, CaptureError, Unidentifiable
from piecework.runtime.artifact import surroundings
from piecework.runtime.artifact.facts import established
from piecework.runtime.artifact.folder import Folder, key_of, open_folder
from piecework.runtime.artifact.form import (
    CAREFUL,
    EDITED,
    ENTRY,
    GRAPHS,
    STATE,
    STITCHED,
    DirectConst,
    SavedTrace,
    SavedWeight,
    WeightInput,
    partition,
)
from piecework.runtime.artifact.pieces import PieceLoader
from piecework.runtime.artifact.program import LoadedAssumptions, graphs_reader
from piecework.runtime.artifact.store import Store
from piecework.runtime.artifact.values import from_bytes
from piecework.runtime.batch.ranges import RangeTable
from piecework.runtime.bind.direct_ops import DirectOps
from piecework.runtime.bind.places import traced
from piecework.runtime.bind.reachable import modules_of, own_tensors
from piecework.runtime.bind.weights import BoundWeights, Traced, Weight
from piecework.runtime.call.entry import Entry
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.identity.settings import settings_factors
from piecework.runtime.observe.dump import Dump
from piecework.runtime.pieces.manager import RangeEntry
from piecework.runtime.pieces.piecewise import PiecewiseBackend
from piecework.runtime.pieces.program import Kept, Program, called_forms, timed
from piecework.runtime.pieces.report import Piece
from piecework.runtime.trace.one_trace import Capture
from piecework.runtime.traces.traced_model import NewBackend, TracedModel

_HINT = "load it with the model that it was saved of, or compile the model again"


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
    def open(cls, store: Store, key_file: str | os.PathLike[str] | None) -> Artifact:
        """Verify an artifact and that it was made by, and for, what is here.

        Raises:
            ArtifactError: it is damaged, not to be trusted, or was made for something else; nothing of it was unpickled, loaded or executed.
        """
        start = time.perf_counter()
        folder = open_folder(store, key_of(key_file))
        surroundings.require_same_versions(_texts(folder, "versions"))
        surroundings.require_machine(_texts(folder, "machine"))
        surroundings.require_same_environment(_texts(folder, "environment"))
        if folder.facts.get("processes") != surroundings.processes():
            raise ArtifactError(
                f"the artifact was made by process {folder.facts.get('processes')}, and this is {surroundings.processes()}",
                hint="save an artifact on each rank, in a directory of its own",
            )
        try:
            settings = settings_factors(every=False)
        except Unidentifiable as error:
            raise ArtifactError(error.message, where=error.where, hint=error.hint) from error
        surroundings.require_same_settings(_texts(folder, "torch settings"), settings)
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
        surroundings.require_same_operators(_texts(folder, "operators"))
        tree = folder.facts.get("modules")
        surroundings.require_same_tree(
            tree if isinstance(tree, list) else [], surroundings.tree(modules_of(model))
        )
        surroundings.require_same_sources(_texts(folder, "sources"))
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


def _texts(folder: Folder, name: str) -> Mapping[str, str]:
    found = folder.facts.get(name)
    return found if isinstance(found, dict) else {}


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
        texts = {each: folder.text(f"{name}/{each}") for each in (STITCHED, ENTRY, CAREFUL)}
    with timed(phases, "check"):
        weights = _weights(saved, model)
    with timed(phases, "pieces"):
        program = _program(folder, name, saved, loader, config, texts, phases)
    plan, source = saved.made.plan, replace(saved.made.source, code=texts[ENTRY])
    captured = Capture(
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
    settings = dict(_texts(folder, "torch settings"))
    backend = new_backend()
    backend.adopt(program)
    return TracedModel(
        model, as_it_is, backend, program, entry, settings, saved.as_marked, saved.rows_in_one
    )


# --- the program -------------------------------------------------------------------------------------


def _program(
    folder: Folder,
    name: str,
    saved: SavedTrace,
    loader: PieceLoader,
    config: CompilationConfig,
    texts: Mapping[str, str],
    phases: dict[str, float],
) -> Program:
    direct = _direct_ops(saved)
    consts = (
        direct.implementations[each.op] if isinstance(each, DirectConst) else each
        for each in saved.source.consts
    )
    options = replace(saved.source.options, direct=direct.implementations)
    source = replace(saved.source, code=texts[STITCHED], consts=tuple(consts), options=options)
    table = None if saved.ranges is None else RangeTable.of(saved.ranges)
    backends = {
        each: _backend(each, number, saved, loader, config)
        for number, each in enumerate(saved.forms)
    }
    graphs = f"{name}/{GRAPHS}"
    data = partial(folder.read, graphs) if graphs in folder.files else None
    first = None if table is None else table.entries[0]
    pieces = (
        Piece(each, key, modules, seconds, backends[each].runnable_for(first), reused)
        for each, key, modules, seconds, reused in saved.rows
    )
    careful = replace(source, code=texts[CAREFUL], consts=saved.careful_consts)
    return Program(
        name=saved.name,
        config=config,
        graphs=graphs_reader(data, folder.name, backends),
        backends=backends,
        source=source,
        range_table=table,
        batch=saved.batch,
        direct_ops=direct,
        compiler=saved.compiler,
        phases=phases,
        passes=None,
        dump=Dump(None),
        submod_lists=called_forms(
            backends,
            source.submod_names,
            table,
            direct=config.stitching_config.direct_artifact_entry,
        ),
        kept=Kept(careful, tuple(pieces), saved.together, saved.report),
    )


def _direct_ops(saved: SavedTrace) -> DirectOps:
    """The operators that the source calls by their implementations, which must be registered here too."""
    direct = DirectOps.of(saved.direct.items())
    for op in saved.direct:
        if op not in direct.implementations:
            raise ArtifactError(
                f"operator {op} has no implementation of its own here",
                where=str(op),
                hint="import the module that registers it as it was registered when the model was saved",
            )
    return direct


def _backend(
    name: str, number: int, saved: SavedTrace, loader: PieceLoader, config: CompilationConfig
) -> PiecewiseBackend:
    compiled = {
        compile_range: loader.piece(form.file, form.inputs, form.strict, form.inductor)
        for compile_range, form in saved.forms[name].items()
    }
    backend = PiecewiseBackend(
        None,
        config,
        number,
        len(saved.forms),
        saved.sizes[name],
        None,
        compiled_runnables={each: piece.runnable for each, piece in compiled.items()},
        submod_name=name,
    )
    for each, piece in compiled.items():
        backend.entries[each] = RangeEntry(each, piece, 0.0, reused=False, cached=True)
    return backend


# --- weights -----------------------------------------------------------------------------------------


def _weights(saved: SavedTrace, model: Callable[..., object]) -> BoundWeights:
    roots = modules_of(model)
    held = {
        f"{prefix}{name}": tensor for prefix, root in roots for name, tensor in own_tensors(root)
    }
    found = [Weight(each.path, _tensor(each, held, model), each.source) for each in saved.weights]
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
    state = established(saved.state, model)
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
    if tensor is None:
        way = traced(saved.source, model)
        tensor = None if way is None else way.tensor()
    if not isinstance(tensor, torch.Tensor):
        raise ArtifactError(
            f"the model has no weight {saved.path}", where="the weights' signature", hint=_HINT
        )
    return tensor


def _inputs(saved: SavedTrace, weights: BoundWeights) -> Iterator[object]:
    for each in saved.inputs:
        if isinstance(each, WeightInput):
            held = saved.weights[each.index]
            yield Weight(held.path, weights.tensors[each.index], held.source)
        else:
            yield each
