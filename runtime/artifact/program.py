"""A compiled program, without a model, for another process: what is kept of it, and one again.

`program_to_bytes` is for those who keep what was compiled themselves: without weights and graphs.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.schemas import every_node, overloads_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.codegen.graph.targets import function_path
from piecework.codegen.split.splitting import SplitItem
from piecework.errors import ArtifactError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.artifact.pieces import PieceForm, PieceLoader, piece_files
from piecework.runtime.artifact.values import from_bytes, operator_named, to_bytes
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.observe.dump import Dump
from piecework.runtime.pieces.layer_names import NAMESPACE
from piecework.runtime.pieces.manager import RangeEntry
from piecework.runtime.pieces.piecewise import PiecewiseBackend
from piecework.runtime.pieces.program import Graphs, Program
from piecework.runtime.store import surroundings
from piecework.runtime.store.digest import digest_of
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.package import KIND, Package, packed
from piecework.runtime.watch.direct_ops import DirectOps

STATE, GRAPHS = "state.pickle", "graphs.pickle"
_OPERATOR = "make the function an operator with torch.library.custom_op and register_fake"
#: What of a program means the same in every process.
_AS_SAVED = ("name", "batch", "batch_place", "pieces", "together", "compiled")
Saved = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DirectConst:
    """A constant that is the implementation of an operator, whichever it is in a process."""

    op: object


def saved_program(program: Program, files: dict[str, bytes]) -> Saved:
    """What is kept of ``program``, for `to_bytes`; its pieces are added to ``files``."""
    source = program.source
    direct = {id(f): op for op, f in program.direct_ops.implementations.items()}
    consts = tuple(DirectConst(direct[id(c)]) if id(c) in direct else c for c in source.consts)
    return {
        **{name: getattr(program, name) for name in _AS_SAVED},
        "ranges": None if program.range_table is None else program.range_table.entries,
        "source": replace(source, consts=consts, options=replace(source.options, direct={})),
        "direct": dict(program.direct_ops.calls),
        "forms": _forms(program, files),
    }


def _forms(program: Program, files: dict[str, bytes]) -> dict[str, tuple[object, ...]]:
    """Of each submodule the inputs that are sizes, and by range what makes its form again."""
    made: dict[int, PieceForm] = {}
    found: dict[str, tuple[object, ...]] = {}
    for name, backend in program.backends.items():
        forms: dict[Range | None, PieceForm] = {}
        for compile_range, entry in backend.entries.items():
            if id(entry.compiled) not in made:
                assert backend.graph is not None
                _require_portable(backend.graph, backend.structure, name)
                kept = piece_files(backend.graph, entry.compiled, name)
                files.update(kept.files)
                made[id(entry.compiled)] = kept.form
            forms[compile_range] = made[id(entry.compiled)]
        found[name] = backend.sym_shape_indices, forms
    return found


def _require_portable(graph: torch.fx.GraphModule, structure: Structure | None, name: str) -> None:
    """Raise `ArtifactError` for a piece that is another in another process, or holds a tensor."""
    reason = surroundings.operator_facts(graph)[1] or ("" if structure is None else structure.local)
    hint = _OPERATOR
    for node in graph.graph.find_nodes(op="get_attr"):
        if not isinstance(getattr(graph, str(node.target), None), torch.fx.GraphModule):
            reason = f"it holds the constant {node.target}, and an artifact holds no tensors"
            hint = "register it as a buffer of the model"
    if reason:
        raise ArtifactError(f"{name} can't be saved: {reason}", where=name, hint=hint)


def operators(graphs: Iterable[torch.fx.GraphModule]) -> dict[str, str]:
    """Operator that torch does not bring → what code depends on of it; `ArtifactError` for others."""
    found: dict[str, str] = {}
    nodes = (each for graph in graphs for each in every_node(graph) if each.op == "call_function")
    for target in dict.fromkeys(each.target for each in nodes):
        if isinstance(target, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
            ours = (op for op in overloads_of(target) if not torch_compat.is_torch_operator(op))
            found |= {str(op): _identity(op) for op in ours}
            continue
        path = function_path(target)
        if path is None or not (path.module in (None, "operator", "math") or path.root == "torch"):
            name = getattr(target, "__qualname__", target)
            why = f"the graph calls the Python function {name}, which may be another in another process"
            raise ArtifactError(why, hint=_OPERATOR)
    return found


def _identity(op: OpOverload) -> str:
    if op.namespace == NAMESPACE:
        why = f"{op} takes layer names as inputs, and is made anew in each process"
        hint = "use the eager compiler, or keep layer names out of operators' arguments"
        raise ArtifactError(why, hint=hint)
    try:
        return digest_of(op, str(op))
    except Unidentifiable as error:
        raise ArtifactError(error.message, where=str(op), hint=error.hint) from error


def require_same_operators(saved: Mapping[str, str]) -> None:
    """Raise `ArtifactError` for an operator that is missing, or has another schema or fake."""
    for name, digest in saved.items():
        op = operator_named(name)
        if not isinstance(op, OpOverload) or _identity(op) != digest:
            why = f"operator {name} has another schema or fake implementation than when the model was saved"
            raise ArtifactError(why, where=name, hint=surroundings.AGAIN)


def loaded_program(
    saved: Mapping[str, Any],
    package: Package,
    graphs: str,
    loader: PieceLoader,
    config: CompilationConfig,
    phases: dict[str, float],
) -> Program:
    """The program again; the file ``graphs`` is read when somebody asks for them."""
    direct = DirectOps.of(saved["direct"].items())
    for op in saved["direct"]:
        if op not in direct.implementations:
            hint = "import the module that registers it as it was when the model was saved"
            raise ArtifactError(f"operator {op} has no implementation of its own here", hint=hint)
    kept = saved["source"]
    consts = (
        direct.implementations[each.op] if isinstance(each, DirectConst) else each
        for each in kept.consts
    )
    options = replace(kept.options, direct=direct.implementations)
    source = replace(kept, consts=tuple(consts), options=options)
    table = None if saved["ranges"] is None else RangeTable(saved["ranges"])
    backends: dict[str, PiecewiseBackend] = {}
    for name, (sizes, forms) in saved["forms"].items():
        made = {each: loader.piece(form) for each, form in forms.items()}
        place = len(backends), len(saved["forms"])
        backends[name] = PiecewiseBackend(
            None, config, *place, sizes, None, compiled_runnables={}, submod_name=name
        )
        for each, piece in made.items():
            backends[name].entries[each] = RangeEntry(each, piece, 0.0, reused=False, cached=True)
    return Program(
        **{name: saved[name] for name in _AS_SAVED},
        config=config,
        graphs=_graphs_reader(package, graphs, backends),
        backends=backends,
        source=source,
        range_table=table,
        direct_ops=direct,
        phases=phases,
        dump=Dump(None),
    )


def _graphs_reader(
    package: Package, name: str, backends: Mapping[str, PiecewiseBackend]
) -> Callable[[], Graphs]:
    """What reads a program's graphs once; `ArtifactError` where it can't."""

    @cache
    def read() -> Graphs:
        hint = "compile the model without artifact= to capture, dump or edit it"
        if name not in package.files:
            raise ArtifactError("the artifact holds no graphs", where=package.name, hint=hint)
        try:
            graph, split_gm, rows = torch_compat.graphs_from_bytes(package.file(name))
        except Exception as error:
            why = f"the graphs can't be read: {error}"
            raise ArtifactError(why, where=package.name, hint=hint) from error
        for each, backend in backends.items():
            backend.graph = graph_of(split_gm, each)
            backend.structure = structure_of(backend.graph, describe_input=input_signature)
        items = (SplitItem(*row, split_gm.get_submodule(row[0])) for row in rows)
        return Graphs(graph, split_gm, tuple(items))

    return read


def program_to_bytes(program: Program) -> bytes:
    """``program`` with its kernels, signed where ``PIECEWORK_CACHE_KEY_FILE`` names a key."""
    files: dict[str, bytes] = {}
    files[STATE] = to_bytes(saved_program(program, files), "what was compiled")
    graphs = [program.graph, *(item.graph for item in program.items)]
    facts = {"machine": surroundings.machine(*graphs), "operators": operators(graphs)}
    return packed(files, facts, signing_key(), KIND)


def program_from_bytes(data: bytes, config: CompilationConfig) -> Program:
    """What `program_to_bytes` made, without its graphs."""
    start = time.perf_counter()
    found = Package.of(data, signing_key())
    surroundings.require_same_machine(found.table("machine"))  # type: ignore[arg-type]
    require_same_operators(found.table("operators"))
    saved: Any = from_bytes(found.file(STATE), STATE)
    phases = {"read": time.perf_counter() - start}
    return loaded_program(saved, found, GRAPHS, PieceLoader(found.file), config, phases)
