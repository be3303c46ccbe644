"""Stitched models to directories. In: the traces of a stitched model, or of several that serve one model together. Out: an artifact, written whole or not at all.

What can't be told again in another process is refused by name. No weight is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from piecework.errors import ArtifactError
from piecework.runtime import torch_compat
from piecework.runtime.analysis.writes import mutations_in
from piecework.runtime.artifact.fit import files_of, operators, tree
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
from piecework.runtime.artifact.program import saved_program
from piecework.runtime.artifact.values import MAX_TENSOR, to_bytes
from piecework.runtime.call.edited import EditedSource
from piecework.runtime.compilers.eager import EagerAdaptor
from piecework.runtime.compilers.inductor import InductorStandaloneAdaptor
from piecework.runtime.pieces.program import Program
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import (
    PARTS,
    Place,
    directory_of,
    part_folder,
    write_folder,
)
from piecework.runtime.store.surroundings import is_foreign, processes, source_factors, surroundings
from piecework.runtime.trace.inputs import Argument, Layout, Size
from piecework.runtime.traces.traced_model import TracedModel
from piecework.runtime.watch.reachable import modules_of, tensors_of
from piecework.runtime.watch.state import SavedState
from piecework.runtime.watch.values import code_digest
from piecework.runtime.watch.weights import Weight

Graph = torch.fx.GraphModule


@dataclass(frozen=True, slots=True)
class Part:
    """A stitched module that is saved, alone or with others.

    Attributes:
        model: what it was made of.
        traces: its traces.
        settings: what the manifest says of how they were made, as JSON data.
    """

    model: Any
    traces: Sequence[TracedModel]
    settings: Mapping[str, object]


def save(place: Place, part: Part, *, key_file: str | os.PathLike[str] | None = None) -> None:
    """Write a stitched module to a directory, in place of an artifact that is there.

    Args:
        key_file: the secret that signs the manifest; `piecework.runtime.store.files.signing_key`.

    Raises:
        ArtifactError: something can't be told again in another process, or the directory can't be written.
    """
    path, key = directory_of(place), signing_key(key_file)
    files: dict[str, bytes] = {}
    graphs: list[Graph] = []
    facts = _facts(part, files, "", graphs)
    write_folder(path, files, _as_json({**facts, **_surroundings(part.traces, graphs)}), key)


def save_together(
    place: Place,
    parts: Sequence[Part],
    settings: Mapping[str, object],
    values: Mapping[str, object],
    *,
    key_file: str | os.PathLike[str] | None = None,
) -> None:
    """The same of several modules that serve one model: their pieces are written once.

    Args:
        settings: what the manifest says of all of them.
        values: further values by the names of their files, as `to_bytes` takes them.
    """
    path, key = directory_of(place), signing_key(key_file)
    files = {name: to_bytes(value, name) for name, value in values.items()}
    graphs: list[Graph] = []
    rows = [_facts(each, files, part_folder(i), graphs) for i, each in enumerate(parts)]
    traces = [trace for part in parts for trace in part.traces]
    facts = {**settings, **_surroundings(traces, graphs), PARTS: rows}
    write_folder(path, files, _as_json(facts), key)


def _as_json(facts: Mapping[str, object]) -> dict[str, object]:
    data: dict[str, object] = json.loads(json.dumps(facts))
    return data


def _surroundings(traces: Sequence[TracedModel], graphs: Sequence[Graph]) -> dict[str, object]:
    """What the manifest says of the process."""
    if any(each.settings != traces[0].settings for each in traces):
        raise ArtifactError(
            "torch was set otherwise for one trace of the model than for another",
            where="torch's settings",
            hint="compile the model again, and call it with every kind of size under the same settings",
        )
    settings = traces[0].settings
    assert settings is not None
    return {"surroundings": surroundings(*graphs, settings=settings), "processes": processes()}


def _facts(
    part: Part, files: dict[str, bytes], prefix: str, graphs: list[Graph]
) -> dict[str, object]:
    """What the manifest says of a module, whose files are added to ``files``, and its graphs to ``graphs``."""
    rows, own = [], []
    for number, trace in enumerate(part.traces):
        _require_savable(trace)
        _code_with_places(trace)
        folder = f"{prefix}trace_{number}"
        saved = _saved(trace, files, folder)
        program = trace.program
        files[f"{folder}/{STATE}"] = to_bytes(saved, "what the trace took for given")
        files[f"{folder}/{ENTRY}"] = trace.entry.source.code.encode()
        if trace.entry.edited is not None:
            files[f"{folder}/{EDITED}"] = trace.entry.edited.code.encode()
        pickled = _graphs(program)
        if pickled is not None:
            files[f"{folder}/{GRAPHS}"] = pickled
        rows.append({"edited": _edited_text(trace.entry.edited), "graphs": pickled is not None})
        own.append(program.graph)
        own += [backend.graph for backend in program.backends.values() if backend.graph]
        own += [item.graph for item in program.items]
    graphs += own
    states = [trace.entry.weights.state for trace in part.traces]
    traced = {each.co_filename for state in states for each in state.code}
    classes = {type(each) for _, root in modules_of(part.model) for each in root.modules()}
    classes.update(each for state in states for each in state.classes.classes)
    return {
        **part.settings,
        "modules": tree(modules_of(part.model)),
        "sources": source_factors(filter(os.path.isfile, {*traced, *files_of(classes)})),
        "operators": operators(own),
        "traces": rows,
    }


def _require_savable(trace: TracedModel) -> None:
    config, compiler = trace.program.config, trace.backend.compiler_manager.compiler
    inner = next((each for each in trace.entry.weights.traced if each.inner), None)
    for wrong, where, hint in (
        (
            type(compiler) not in (EagerAdaptor, InductorStandaloneAdaptor),
            f"compiler {trace.program.compiler!r}",
            "use inductor or eager",
        ),
        (config.use_inductor_graph_partition, "use_inductor_graph_partition", "leave it out"),
        (
            not trace.entry.made.plan.checks,
            "stitching_config.check_inputs=False",
            "leave it on",
        ),
        (
            trace.settings is None,
            "settings of torch that have no stable form",
            "see the warning of the compile cache",
        ),
        (
            inner is not None,
            f"weight {inner and inner.path}, which is a tensor of several,",
            "no other process can tell whether it has the same: compile the model in each, or hold quantised weights as plain tensors",
        ),
    ):
        if wrong:
            why = f"a model that was compiled with {where} can't be saved"
            raise ArtifactError(why, where=where, hint=hint)


# --- one trace ---------------------------------------------------------------------------------------


def _saved(trace: TracedModel, files: dict[str, bytes], folder: str) -> SavedTrace:
    program, entry, captured = trace.program, trace.entry, trace.entry.captured
    program.split_gm  # noqa: B018 - of a loaded program the graphs are read now
    saved = saved_program(program, files, f"{folder}/")
    _require_no_weights((*saved.source.consts, *saved.careful_consts), trace)
    indices = {each.path: i for i, each in enumerate(entry.weights.traced)}
    edited = entry.edited
    return SavedTrace(
        program=saved,
        made=replace(entry.made, source=replace(entry.source, code="")),
        inputs=tuple(_inputs(captured.inputs, indices)),
        weights=_weights(trace),
        memory=_memory(trace),
        state=_state(trace),
        symbols=captured.assumptions.names(),
        as_marked=trace.as_marked,
        rows_in_one=trace.rows_in_one,
        edited=None if edited is None else replace(edited, code=""),
    )


def _state(trace: TracedModel) -> SavedState:
    """What the trace read, where it still holds and another process can compare it."""
    weights, state = trace.entry.weights, trace.entry.weights.state
    changed = weights.change()
    hooks = state.global_hooks()
    if changed is not None:
        why = f"the model is not as it is bound: {changed.message}"
        hint = changed.hint or "call rebind() first"
    elif moved := state.difference():
        why = f"the model is not as it was traced: {moved}"
        hint = "put it back, or compile the model again, and save then"
    elif hooks:
        why = f"torch.nn.modules.module has {hooks}, which belong to this process"
        hint = "remove the hooks, compile the model again, and save then"
    elif state.plain.untold:
        why = f"the trace relies on {state.plain.untold[0]}, which only this process can compare"
        hint = "keep what the model computes with in attributes that are numbers, texts, functions or tensors"
    else:
        return state.saved()
    raise ArtifactError(why, hint=hint)


def _inputs(
    inputs: Sequence[object], indices: Mapping[str, int]
) -> Iterator[WeightInput | Argument | Size | Layout]:
    for each in inputs:
        if isinstance(each, Weight):
            yield WeightInput(indices[each.path])
        else:
            assert isinstance(each, (Argument, Size, Layout))
            yield each


def _require_no_weights(consts: Sequence[object], trace: TracedModel) -> None:
    tensors = (each for each in consts if isinstance(each, torch.Tensor))
    held = {torch_compat.storage_id(t) for _, t in tensors_of(trace.model).values()}
    for each in tensors:
        if torch_compat.storage_id(each) in held or each.nbytes > MAX_TENSOR:
            raise ArtifactError(
                "the stitching source holds a weight as a constant, and an artifact holds none",
                hint="register it as a parameter or a buffer of the model",
            )


# --- weights -----------------------------------------------------------------------------------------


def _weights(trace: TracedModel) -> tuple[SavedWeight, ...]:
    weights = trace.entry.weights
    rows = zip(weights.traced, weights.taken, weights.names(), strict=True)
    return tuple(
        SavedWeight(w.path, w.dtype, w.layout, w.device, tuple(w.shape), w.stride, way, names)
        for w, way, names in rows
    )


def _memory(trace: TracedModel) -> tuple[int, ...] | None:
    """Which weights share memory, where that matters: the graph writes to one."""
    split_gm, inputs = trace.program.split_gm, trace.entry.captured.inputs
    nodes = split_gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, inputs, strict=True)
    held = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
    every = [item.submod_name for item in trace.program.items]
    if not mutations_in(split_gm, every, held):
        return None
    return partition(trace.entry.weights.tensors)


# --- code --------------------------------------------------------------------------------------------


def _code_with_places(trace: TracedModel) -> None:
    """Raise if the trace went through code that is in no file and no method, which nobody could compare."""
    state = trace.entry.weights.state
    told = {text.split()[-1] for text in state.classes.digests().values()}
    told.update(each.text.split()[-1] for each in state.plain.values if each.text)
    for each in state.code:
        in_file = os.path.isfile(each.co_filename) or not is_foreign(each.co_filename)
        of_python = "__create_fn__" in each.co_qualname or "_tuple_new" in each.co_names
        if not (in_file or of_python or code_digest(each) in told):
            raise ArtifactError(
                f"the trace went through {each.co_qualname}, whose source is in no file",
                where=each.co_filename,
                hint="put it into a module",
            )


# --- graphs and the manifest -------------------------------------------------------------------------


def _graphs(program: Program) -> bytes | None:
    """The graphs with their fake values; None where torch can't write them, and captures must then compile again."""
    items = tuple((i.submod_name, i.graph_id, i.is_splitting_graph) for i in program.items)
    graphs = program.graph, program.split_gm
    return torch_compat.graphs_to_bytes((*graphs, items), graphs)


def _edited_text(edited: EditedSource | None) -> str | None:
    if edited is None:
        return None
    if edited.difference is not None:
        return f"differs from the graph: {edited.difference}"
    return "proved to mean the graph"
