"""Stitched models as files, and bound to the weights of a model of another process.

What another process can't tell is refused when a model is saved; what is not as it was then, when
it is loaded. No weight is written, and loading traces, compiles and runs nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, Self

import torch
import torch.fx

from piecework.codegen.split.splitting import SplittingOp, SplittingOps
from piecework.collector import collector_paused
from piecework.errors import ArtifactError, BindError, CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.artifact import program as programs
from piecework.runtime.artifact.pieces import PieceLoader
from piecework.runtime.artifact.values import MAX_TENSOR, from_bytes, to_bytes
from piecework.runtime.call.entry import Entry
from piecework.runtime.compilers.inductor import InductorStandaloneAdaptor
from piecework.runtime.compilers.interface import EagerAdaptor
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.pieces.program import timed
from piecework.runtime.store import surroundings
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.package import PARTS, Package, Place, part_folder, write_package
from piecework.runtime.trace.sizes import SizePolicy
from piecework.runtime.trace.writes import mutations_in
from piecework.runtime.traces.traced_model import NewBackend, TracedModel
from piecework.runtime.watch.places import LookUps
from piecework.runtime.watch.reachable import modules_of, own_tensors, tensors_of
from piecework.runtime.watch.state import SavedState, TracedState
from piecework.runtime.watch.values import code_digest, import_starts
from piecework.runtime.watch.weights import BoundWeights, Weight

_HINT = "load it with the model that it was saved of, or compile again: with artifact=path this happens by itself"
#: What of a configuration says where and how fast to compile.
_NO_EFFECT = frozenset({"cache_dir", "debug_dump_path", "compile_workers"})


def made_with(
    config: CompilationConfig,
    runtime_config: RuntimeConfig | None,
    splitting_ops: Sequence[SplittingOp] | None,
    sizes: SizePolicy | None,
    kept: Mapping[str, object] | None,
) -> dict[str, object]:
    """How a module was made, as JSON data: one that is made by the same data does the same."""
    try:
        data: dict[str, object] = json.loads(config.model_dump_json())
        problem = "" if CompilationConfig(**data) == config else "it reads back as another one"
    except Exception as error:  # noqa: BLE001 - pydantic and codecs raise anything
        problem = str(error)
    if problem:
        hint = "leave passes and other objects out of it, or name them as text"
        raise ArtifactError(f"the configuration can't be written down: {problem}", hint=hint)
    ops = None if splitting_ops is None else list(SplittingOps(splitting_ops).declared)
    return {
        "config": data,
        "runtime config": runtime_config and json.loads(runtime_config.model_dump_json()),
        "splitting ops": ops,
        "sizes": None if sizes is None else type(sizes).__name__,
        "kept": None if kept is None else dict(kept),
    }


def require_made_so(saved: Mapping[str, Any], wanted: Mapping[str, Any], among: str = "") -> None:
    """Raise `ArtifactError` where an artifact was made with other settings than are wanted."""
    for name in sorted(wanted.keys() | (saved.keys() if among else set())):
        before, now, full = saved.get(name), wanted.get(name), f"{among} {name}".strip()
        if isinstance(before, dict) and isinstance(now, dict):
            require_made_so(before, now, full)
        elif before != now and name not in _NO_EFFECT:
            why = f"the artifact was made with {full} {before!r}, and {now!r} is wanted"
            raise ArtifactError(why, hint="give it a file of its own, or leave it as it was")


def _processes() -> dict[str, int]:
    """This process among those that run one model together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return {"rank": 0, "world": 1}
    return {"rank": distributed.get_rank(), "world": distributed.get_world_size()}


def files_of(classes: Iterable[type]) -> set[str]:
    """The files of the modules that define classes."""
    modules = (sys.modules.get(each.__module__) for each in classes)
    files = (getattr(each, "__file__", None) for each in modules)
    return {file for file in files if isinstance(file, str)}


def _partition(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number per tensor, equal for those in one memory."""
    stores = [torch_compat.storage_id(each) for each in tensors]
    return tuple(map(stores.index, stores))


class Part(NamedTuple):
    """A stitched module that is saved, alone or with others."""

    model: Any
    traces: Sequence[TracedModel]
    settings: Mapping[str, object]  # how they were made, as JSON data


def write_models(
    place: Place,
    parts: Sequence[Part],
    settings: Mapping[str, object] | None = None,
    values: Mapping[str, object] | None = None,
    *,
    key_file: str | os.PathLike[str] | None = None,
) -> None:
    """Write a stitched module, or several that serve one model; equal pieces are written once."""
    files = {name: to_bytes(value, name) for name, value in (values or {}).items()}
    graphs: list[torch.fx.GraphModule] = []
    if settings is None:
        facts = _facts(parts[0], files, "", graphs)
    else:
        rows = [_facts(each, files, part_folder(i), graphs) for i, each in enumerate(parts)]
        facts = {**settings, PARTS: rows}
    whole = {**facts, "machine": surroundings.machine(*graphs), "processes": _processes()}
    write_package(place, files, json.loads(json.dumps(whole)), signing_key(key_file))


def _facts(
    part: Part, files: dict[str, bytes], prefix: str, graphs: list[torch.fx.GraphModule]
) -> dict[str, object]:
    """What the manifest says of a module; its files and graphs are added to those given."""
    edits, own = [], []
    traced: set[str] = set()
    classes = {type(each) for _, root in modules_of(part.model) for each in root.modules()}
    for number, trace in enumerate(part.traces):
        _require_savable(trace)
        program, edited, folder = trace.program, trace.entry.now.edited, f"{prefix}trace_{number}/"
        why = edited and edited.difference
        mark = f"differs from the graph: {why}" if why else "proved to mean the graph"
        edits.append(mark if edited else "")
        state = to_bytes(_saved(trace, files), "what the trace took for given")
        files[f"{folder}{programs.STATE}"] = state
        items = tuple((i.submod_name, i.graph_id, i.is_splitting_graph) for i in program.items)
        pickled = torch_compat.graphs_to_bytes(program.graph, program.split_gm, items)
        if pickled is not None:  # else captures must compile again
            files[f"{folder}{programs.GRAPHS}"] = pickled
        own += [program.graph, *(item.graph for item in program.items)]
        own += [backend.graph for backend in program.backends.values() if backend.graph]
        traced |= {each.co_filename for each in trace.entry.now.weights.state.code}
        classes |= set(trace.entry.now.weights.state.classes)
    graphs += own
    return {
        **part.settings,
        "sources": surroundings.source_factors(filter(os.path.isfile, traced | files_of(classes))),
        "operators": programs.operators(own),
        "edits": edits,
    }


def _require_savable(trace: TracedModel) -> None:
    compiler, what = trace.backend.compiler_manager.compiler, ""
    weights = trace.entry.now.weights
    if type(compiler) not in (EagerAdaptor, InductorStandaloneAdaptor):
        what = f"compiler {compiler.name!r}, which is neither inductor nor eager,"
    elif trace.program.config.use_inductor_graph_partition:
        what = "use_inductor_graph_partition"
    elif not trace.entry.plan().checks:
        what = "stitching_config.check_inputs=False"
    elif inner := [each.path for each in weights.traced if each.inner]:
        what = f"weight {inner[0]}, which is a tensor of several,"
    if what:
        why = f"a model that was compiled with {what} can't be saved"
        raise ArtifactError(why, hint="leave it out, or compile the model in each process")
    state = weights.state
    compared = {each.text.split()[-1] for each in state.saved().values if each.text}
    for each in state.code:
        in_file = os.path.isfile(each.co_filename) or not surroundings.is_foreign(each.co_filename)
        of_python = "__create_fn__" in each.co_qualname or "_tuple_new" in each.co_names
        if not (in_file or of_python or code_digest(each) in compared):
            why = f"the trace went through {each.co_qualname}, whose source is in no file"
            raise ArtifactError(why, where=each.co_filename, hint="put it into a module")


def _saved(trace: TracedModel, files: dict[str, bytes]) -> dict[str, object]:
    """A trace as values for `to_bytes`; its pieces are added to ``files``."""
    program, entry = trace.program, trace.entry
    program.split_gm  # noqa: B018 - of a loaded program the graphs are read now
    saved = programs.saved_program(program, files)
    held = {torch_compat.storage_id(t) for _, t in tensors_of(trace.model).values()}
    tensors = (each for each in saved["source"].consts if isinstance(each, torch.Tensor))
    if any(torch_compat.storage_id(t) in held or t.nbytes > MAX_TENSOR for t in tensors):
        why = "the stitching source holds a weight as a constant, and an artifact holds none"
        raise ArtifactError(why, hint="register it as a parameter or a buffer of the model")
    weights = entry.now.weights
    indices = {each.path: i for i, each in enumerate(weights.traced)}
    return {
        "program": saved,
        "made": entry.made,
        "plan": to_bytes(entry.plan(), "what the entry says"),
        "inputs": [indices[i.path] if isinstance(i, Weight) else i for i in entry.inputs],
        "weights": [*zip(weights.traced, weights.taken, weights.names(), strict=True)],
        "memory": _memory(trace),
        "state": _state(trace),
        "edited": entry.now.edited,
    }


def _state(trace: TracedModel) -> SavedState:
    """What the trace read, where it still holds and another process can compare it."""
    weights, state = trace.entry.now.weights, trace.entry.now.weights.state
    if changed := weights.change():  # of the weights or of what was traced
        why = f"the model is not as it is bound: {changed.message}"
        hint = changed.hint or "call rebind() first"
    elif untold := state.untold():
        why = f"the trace relies on {untold}, which only this process can compare"
        hint = "keep what the model computes with in attributes that are numbers, texts, functions or tensors"
    else:
        return state.saved()
    raise ArtifactError(why, hint=hint)


def _memory(trace: TracedModel) -> tuple[int, ...] | None:
    """Which weights share memory, where that matters: the graph writes to one."""
    split_gm, inputs = trace.program.split_gm, trace.entry.inputs
    nodes = split_gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, inputs, strict=True)
    held = {node.name: each.path for node, each in pairs if isinstance(each, Weight)}
    every = [item.submod_name for item in trace.program.items]
    return (
        _partition(trace.entry.now.weights.tensors) if mutations_in(split_gm, every, held) else None
    )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file's content that fits this process, and the seconds that opening it took."""

    package: Package
    seconds: float

    @classmethod
    def open(cls, place: Place, key_file: str | os.PathLike[str] | None) -> Self:
        """Verify an artifact and that it was made by, and for, what is here."""
        start = time.perf_counter()
        package = Package.read(place, signing_key(key_file))
        made_by = package.facts.get("processes")
        if made_by != _processes():
            why = f"the artifact was made by process {made_by}, and this is {_processes()}"
            raise ArtifactError(why, hint="save an artifact on each rank, in a file of its own")
        surroundings.require_same_machine(package.table("machine"))  # type: ignore[arg-type]
        return cls(package, time.perf_counter() - start)

    def parts(self) -> tuple[Self, ...]:
        """One for each module, of an artifact of several that were saved together."""
        found = self.package.parts()
        return tuple(Artifact(each, self.seconds / len(found)) for each in found)

    def traces(
        self,
        model: Callable[..., object],
        config: CompilationConfig,
        new_backend: Callable[[], NewBackend],
        as_it_is: Callable[..., object],
    ) -> tuple[TracedModel, ...]:
        """The traces, bound to ``model``; `ArtifactError` unless it is the model that was saved."""
        programs.require_same_operators(self.package.table("operators"))
        surroundings.require_same_sources(self.package.table("sources"))
        package, loader = self.package, PieceLoader(self.package.file)
        found: list[TracedModel] = []
        with collector_paused():
            for number, _ in enumerate(package.facts["edits"]):  # type: ignore[arg-type]
                state, graphs = (f"trace_{number}/{n}" for n in (programs.STATE, programs.GRAPHS))
                phases = {"read": self.seconds}
                with timed(phases, "read"):
                    saved: Any = from_bytes(package.file(state), state)
                with timed(phases, "check"):
                    weights = _found(saved, model)
                    bound = _bound(saved, model, weights)
                with timed(phases, "pieces"):
                    program = programs.loaded_program(
                        saved["program"], package, graphs, loader, config, phases
                    )
                inputs = tuple(weights[i] if isinstance(i, int) else i for i in saved["inputs"])
                plan = cache(partial(from_bytes, saved["plan"], state))
                entry = Entry(inputs, bound, program, as_it_is, saved["made"], plan)
                if saved["edited"] is not None:
                    entry.edit(saved["edited"])
                backend = new_backend()()
                backend.adopt(program)
                found.append(TracedModel(model, as_it_is, backend, program, entry))
        return tuple(found)


def _found(saved: Mapping[str, Any], model: Callable[..., object]) -> list[Weight]:
    """The model's weights, where they have the signatures that they had."""
    roots, now = modules_of(model), LookUps.of(model)
    held = {
        f"{prefix}{name}": tensor for prefix, root in roots for name, tensor in own_tensors(root)
    }
    found = []
    for was, way, _ in saved["weights"]:
        tensor: Any = held.get(was.path)
        if tensor is None and way:
            tensor = now.at(way)
        here = isinstance(tensor, torch.Tensor)
        if difference := was.difference(tensor) if here else "is not in the model":
            hint = "load the weights as they were when the model was saved, or compile it again"
            raise ArtifactError(f"weight {was.path} {difference}", hint=hint)
        found.append(Weight(was.path, tensor, way))
    return found


def _bound(
    saved: Mapping[str, Any], model: Callable[..., object], found: Sequence[Weight]
) -> BoundWeights:
    """Weights, where they are tied as they were, and what the trace read of Python is as it was."""
    state, hint = saved["state"], _HINT
    try:
        import_starts(state.values)
        traced = TracedState.loaded(state, model)
        why = traced.difference()
        if not why:
            weights = BoundWeights.of(modules_of(model), found, traced)
    except (ImportError, BindError, CaptureError) as error:
        why, hint = getattr(error, "message", str(error)), getattr(error, "hint", _HINT)
    if why:
        raise ArtifactError(f"the model is not the one that was saved: {why}", hint=hint)
    for (was, _, before), names in zip(saved["weights"], weights.names(), strict=True):
        if names != before:
            now, then = (", ".join(sorted(each)) for each in (names, before))
            why = f"weight {was.path} has the names {now}; when the model was saved it had {then}"
            hint = "tie the weights that were tied (most models have tie_weights()), and no others"
            raise ArtifactError(why, hint=hint)
    if saved["memory"] is not None and _partition(weights.tensors) != saved["memory"]:
        why = "the graph writes to weights, and other ones share memory than when it was saved"
        raise ArtifactError(why, hint=_HINT)
    return weights
