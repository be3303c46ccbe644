"""Stitched models to directories: one, or several that serve one model together, written whole or
not at all.

What can't be told again in another process is refused by name. No weight is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from piecework.errors import ArtifactError
from piecework.runtime import torch_compat
from piecework.runtime.artifact.fit import files_of, operators, partition, tree
from piecework.runtime.artifact.program import EDITED, ENTRY, GRAPHS, STATE, saved_program
from piecework.runtime.artifact.values import MAX_TENSOR, to_bytes
from piecework.runtime.compilers.inductor import InductorStandaloneAdaptor
from piecework.runtime.compilers.interface import EagerAdaptor
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import (
    PARTS,
    Place,
    directory_of,
    part_folder,
    write_folder,
)
from piecework.runtime.store.surroundings import is_foreign, processes, source_factors, surroundings
from piecework.runtime.trace.writes import mutations_in
from piecework.runtime.traces.traced_model import TracedModel
from piecework.runtime.watch.reachable import modules_of, tensors_of
from piecework.runtime.watch.state import SavedState
from piecework.runtime.watch.values import code_digest
from piecework.runtime.watch.weights import Weight


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
        ArtifactError: something can't be told again in another process, or the directory can't be
            written.
    """
    files: dict[str, bytes] = {}
    graphs: list[torch.fx.GraphModule] = []
    facts = _facts(part, files, "", graphs)
    _write(place, [part], files, facts, graphs, key_file)


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
    files = {name: to_bytes(value, name) for name, value in values.items()}
    graphs: list[torch.fx.GraphModule] = []
    rows = [_facts(each, files, part_folder(i), graphs) for i, each in enumerate(parts)]
    _write(place, parts, files, {**settings, PARTS: rows}, graphs, key_file)


def _write(
    place: Place,
    parts: Sequence[Part],
    files: Mapping[str, bytes],
    facts: Mapping[str, object],
    graphs: Sequence[torch.fx.GraphModule],
    key_file: str | os.PathLike[str] | None,
) -> None:
    settings, *others = [trace.settings for part in parts for trace in part.traces]
    if any(each != settings for each in others):
        raise ArtifactError(
            "torch was set otherwise for one trace of the model than for another",
            where="torch's settings",
            hint="compile the model again, and call it with every kind of size under the same settings",
        )
    assert settings is not None
    made_in = surroundings(*graphs, settings=settings)
    whole = {**facts, "surroundings": made_in, "processes": processes()}
    write_folder(directory_of(place), files, json.loads(json.dumps(whole)), signing_key(key_file))


def _facts(
    part: Part, files: dict[str, bytes], prefix: str, graphs: list[torch.fx.GraphModule]
) -> dict[str, object]:
    """What the manifest says of a module; its files and graphs are added to those given."""
    rows, own = [], []
    for number, trace in enumerate(part.traces):
        _require_savable(trace)
        _require_code_in_files(trace)
        program, entry, folder = trace.program, trace.entry, f"{prefix}trace_{number}"
        saved = _saved(trace, files, f"{folder}/")
        files[f"{folder}/{STATE}"] = to_bytes(saved, "what the trace took for given")
        files[f"{folder}/{ENTRY}"] = entry.source.code.encode()
        edited = None
        if entry.edited is not None:
            files[f"{folder}/{EDITED}"] = entry.edited.code.encode()
            why = entry.edited.difference
            edited = f"differs from the graph: {why}" if why else "proved to mean the graph"
        items = tuple((i.submod_name, i.graph_id, i.is_splitting_graph) for i in program.items)
        both = program.graph, program.split_gm
        pickled = torch_compat.graphs_to_bytes((*both, items), both)
        if pickled is not None:  # else captures must compile again
            files[f"{folder}/{GRAPHS}"] = pickled
        rows.append({"edited": edited, "graphs": pickled is not None})
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
    for wrong, what in (
        (
            type(compiler) not in (EagerAdaptor, InductorStandaloneAdaptor),
            f"compiler {trace.program.compiler!r}, which is neither inductor nor eager,",
        ),
        (config.use_inductor_graph_partition, "use_inductor_graph_partition"),
        (not trace.entry.made.plan.checks, "stitching_config.check_inputs=False"),
        (trace.settings is None, "settings of torch that have no stable form"),
        (
            inner is not None,
            f"weight {inner and inner.path}, which is a tensor of several,",
        ),
    ):
        if wrong:
            raise ArtifactError(
                f"a model that was compiled with {what} can't be saved",
                where=what,
                hint="leave it out, or compile the model in each process",
            )


# --- one trace ---------------------------------------------------------------------------------------


def _saved(trace: TracedModel, files: dict[str, bytes], folder: str) -> dict[str, object]:
    """A trace as values for `to_bytes`; its texts are added to ``files``."""
    program, entry, captured = trace.program, trace.entry, trace.entry.captured
    program.split_gm  # noqa: B018 - of a loaded program the graphs are read now
    saved = saved_program(program, files, folder)
    _require_no_weights((*saved["source"].consts, *saved["careful consts"]), trace)
    weights = entry.weights
    indices = {each.path: i for i, each in enumerate(weights.traced)}
    edited = entry.edited
    return {
        "program": saved,
        "made": replace(entry.made, source=replace(entry.source, code="")),
        "inputs": [indices[i.path] if isinstance(i, Weight) else i for i in captured.inputs],
        "weights": [*zip(weights.traced, weights.taken, weights.names(), strict=True)],
        "memory": _memory(trace),
        "state": _state(trace),
        "symbols": captured.assumptions.names(),
        "edited": None if edited is None else replace(edited, code=""),
    }


def _state(trace: TracedModel) -> SavedState:
    """What the trace read, where it still holds and another process can compare it."""
    weights, state = trace.entry.weights, trace.entry.weights.state
    hint = "put it back, or compile the model again, and save then"
    if changed := weights.change():
        why = f"the model is not as it is bound: {changed.message}"
        hint = changed.hint or "call rebind() first"
    elif moved := state.difference():
        why = f"the model is not as it was traced: {moved}"
    elif hooks := state.global_hooks():
        why = f"torch.nn.modules.module has {hooks}, which belong to this process"
    elif state.plain.untold:
        why = f"the trace relies on {state.plain.untold[0]}, which only this process can compare"
        hint = "keep what the model computes with in attributes that are numbers, texts, functions or tensors"
    else:
        return state.saved()
    raise ArtifactError(why, hint=hint)


def _require_no_weights(consts: Sequence[object], trace: TracedModel) -> None:
    held = {torch_compat.storage_id(t) for _, t in tensors_of(trace.model).values()}
    for each in consts:
        if isinstance(each, torch.Tensor) and (
            torch_compat.storage_id(each) in held or each.nbytes > MAX_TENSOR
        ):
            raise ArtifactError(
                "the stitching source holds a weight as a constant, and an artifact holds none",
                hint="register it as a parameter or a buffer of the model",
            )


def _memory(trace: TracedModel) -> tuple[int, ...] | None:
    """Which weights share memory, where that matters: the graph writes to one."""
    split_gm, inputs = trace.program.split_gm, trace.entry.captured.inputs
    nodes = split_gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, inputs, strict=True)
    held = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
    every = [item.submod_name for item in trace.program.items]
    written = mutations_in(split_gm, every, held)
    return partition(trace.entry.weights.tensors) if written else None


def _require_code_in_files(trace: TracedModel) -> None:
    """Raise if the trace went through code that is in no file and no method."""
    state = trace.entry.weights.state
    methods = state.classes.digests().values()
    told = {text.split()[-1] for each in methods for text in each.values()}
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
