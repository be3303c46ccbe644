"""A compiled program, without a model, in another process. In: a `Program`. Out: what is kept of it; and a `Program` again, whose graphs are read when somebody asks for them.

`program_to_bytes` is for those who keep what was compiled themselves: no weight and no graph is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch.fx

from piecework.codegen import SplitItem
from piecework.codegen.entry.plan import Symbol
from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.codegen.stitch.source import generate_source
from piecework.errors import ArtifactError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.artifact.fit import operators, require_portable, require_same_operators
from piecework.runtime.artifact.form import (
    CAREFUL,
    STATE,
    STITCHED,
    DirectConst,
    SavedForm,
    SavedProgram,
)
from piecework.runtime.artifact.pieces import PieceLoader, piece_files
from piecework.runtime.artifact.values import from_bytes, to_bytes
from piecework.runtime.batch.ranges import RangeTable
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.observe.dump import Dump
from piecework.runtime.pieces.manager import RangeEntry
from piecework.runtime.pieces.piecewise import PiecewiseBackend
from piecework.runtime.pieces.program import Graphs, Kept, Program, called_forms
from piecework.runtime.pieces.report import Piece
from piecework.runtime.store.files import signing_key
from piecework.runtime.store.folder import Folder, packed, unpacked
from piecework.runtime.store.surroundings import (
    Factors,
    require_same_surroundings,
    settings_factors,
    surroundings,
)
from piecework.runtime.trace.assumptions import Assumptions
from piecework.runtime.watch.direct_ops import DirectOps

# --- saving ------------------------------------------------------------------------------------------


def saved_program(program: Program, files: dict[str, bytes], folder: str) -> SavedProgram:
    """What is kept of ``program``; its texts and pieces are added to ``files``, texts below ``folder``.

    Raises:
        ArtifactError: something in it can't be told again in another process.
    """
    source = careful = program.source
    if source.options.direct:
        careful = generate_source(program.split_gm, replace(source.options, direct={}))
    direct = {id(f): op for op, f in program.direct_ops.implementations.items()}
    files[f"{folder}{STITCHED}"] = source.code.encode()
    files[f"{folder}{CAREFUL}"] = careful.code.encode()
    consts = (DirectConst(direct[id(c)]) if id(c) in direct else c for c in source.consts)
    return SavedProgram(
        name=program.name,
        compiler=program.compiler,
        report=program.report(),
        rows=tuple((p.name, p.key, p.modules, p.seconds, p.reused) for p in program.pieces()),
        ranges=None if program.range_table is None else program.range_table.entries,
        batch=program.batch,
        source=replace(
            source, code="", consts=tuple(consts), options=replace(source.options, direct={})
        ),
        direct=dict(program.direct_ops.calls),
        careful_consts=tuple(careful.consts),
        forms=dict(_forms(program, files)),
        sizes={name: each.sym_shape_indices for name, each in program.backends.items()},
        together=program.together(),
    )


def _forms(program: Program, files: dict[str, bytes]) -> Iterator[tuple[str, dict[Any, SavedForm]]]:
    made: dict[int, SavedForm] = {}
    for name, backend in program.backends.items():
        forms: dict[Any, SavedForm] = {}
        for compile_range, entry in backend.entries.items():
            if id(entry.compiled) not in made:
                assert backend.graph is not None
                require_portable(backend.graph, backend.structure, name)
                _require_no_attributes(backend.graph, name)
                found = piece_files(backend.graph, entry.compiled, name)
                files.update(found.files)
                count = len(backend.graph.graph.find_nodes(op="placeholder"))
                form = SavedForm(found.name, count, found.strict, found.inductor)
                made[id(entry.compiled)] = form
            forms[compile_range] = made[id(entry.compiled)]
        yield name, forms


def _require_no_attributes(graph: torch.fx.GraphModule, name: str) -> None:
    for node in graph.graph.find_nodes(op="get_attr"):
        if not isinstance(getattr(graph, str(node.target), None), torch.fx.GraphModule):
            raise ArtifactError(
                f"{name} can't be saved: it holds the constant {node.target}, and an artifact holds no tensors",
                where=name,
                hint="register it as a buffer of the model",
            )


# --- loading -----------------------------------------------------------------------------------------


def loaded_program(
    saved: SavedProgram,
    files: Folder,
    folder: str,
    loader: PieceLoader,
    config: CompilationConfig,
    phases: dict[str, float],
    graphs: Callable[[], bytes] | None = None,
) -> Program:
    """The program again.

    Args:
        files: the verified files; the program's own texts lie below ``folder``.
        graphs: reads its graphs; None where there are none.

    Raises:
        ArtifactError: a piece or an operator is not here.
    """
    direct = DirectOps.of(saved.direct.items())
    for op in saved.direct:
        if op not in direct.implementations:
            raise ArtifactError(
                f"operator {op} has no implementation of its own here",
                where=str(op),
                hint="import the module that registers it as it was registered when the model was saved",
            )
    consts = (
        direct.implementations[each.op] if isinstance(each, DirectConst) else each
        for each in saved.source.consts
    )
    source = replace(
        saved.source,
        code=files.text(f"{folder}{STITCHED}"),
        consts=tuple(consts),
        options=replace(saved.source.options, direct=direct.implementations),
    )
    careful = replace(source, code=files.text(f"{folder}{CAREFUL}"), consts=saved.careful_consts)
    table = None if saved.ranges is None else RangeTable.of(saved.ranges)
    first = None if table is None else table.entries[0]
    backends = {
        name: _backend(name, number, saved, loader, config)
        for number, name in enumerate(saved.forms)
    }
    pieces = (
        Piece(name, key, modules, seconds, backends[name].runnable_for(first), reused)
        for name, key, modules, seconds, reused in saved.rows
    )
    return Program(
        name=saved.name,
        config=config,
        graphs=_graphs_reader(graphs, files.name, backends),
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


def _backend(
    name: str, number: int, saved: SavedProgram, loader: PieceLoader, config: CompilationConfig
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


class LoadedAssumptions(Assumptions):
    """What the trace assumed, as far as captures ask: the rest is in the entry's plan."""

    def __init__(
        self, symbols: tuple[Symbol, ...], guards: tuple[str, ...], names: Mapping[str, str]
    ) -> None:
        self._found, self._texts, self._names = symbols, guards, dict(names)

    def symbols(self) -> tuple[Symbol, ...]:
        return self._found

    def guards(self) -> tuple[str, ...]:
        return self._texts


def _graphs_reader(
    data: Callable[[], bytes] | None, where: str, backends: Mapping[str, PiecewiseBackend]
) -> Callable[[], Graphs]:
    """What reads the graphs of a program, once, and gives its pieces theirs; it raises `ArtifactError` where it can't."""

    @cache
    def read() -> Graphs:
        hint = "compile the model without artifact= to capture, dump or edit it"
        if data is None:
            raise ArtifactError("the artifact holds no graphs", where=where, hint=hint)
        try:
            (graph, split_gm, rows), _ = torch_compat.graphs_from_bytes(data())  # type: ignore[misc]
        except ArtifactError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"the graphs can't be read: {error}", where=where, hint=hint
            ) from error
        for name, backend in backends.items():
            backend.graph = graph_of(split_gm, name)
            backend.structure = structure_of(backend.graph, describe_input=input_signature)
        items = (SplitItem(*row, split_gm.get_submodule(row[0])) for row in rows)
        return Graphs(graph, split_gm, tuple(items))

    return read


# --- alone, as bytes ---------------------------------------------------------------------------------


def program_to_bytes(program: Program) -> bytes:
    """``program`` with its pieces' kernels, for a process like this one; signed where ``PIECEWORK_CACHE_KEY_FILE`` names a key.

    Raises:
        ArtifactError: something in it can't be told again in another process.
    """
    files: dict[str, bytes] = {}
    files[STATE] = to_bytes(saved_program(program, files, ""), "what was compiled")
    graphs = [program.graph, *(item.graph for item in program.items)]
    facts = {
        "surroundings": surroundings(*graphs, settings=settings_factors(every=False)),
        "operators": operators(graphs),
    }
    return packed(files, facts, signing_key())


def program_from_bytes(data: bytes, config: CompilationConfig) -> Program:
    """What `program_to_bytes` made, without its graphs.

    Raises:
        ArtifactError: it is damaged, not signed with the key, or was made by or for something else than what is here. Nothing of it was unpickled,
            executed or loaded then.
    """
    start = time.perf_counter()
    found = unpacked(data, signing_key())
    require_fit(found)
    require_same_operators(texts_of(found, "operators"))
    saved = from_bytes(found.read(STATE), STATE)
    assert isinstance(saved, SavedProgram)
    phases = {"read": time.perf_counter() - start}
    return loaded_program(saved, found, "", PieceLoader(found.read), config, phases)


def require_fit(folder: Folder) -> None:
    """Raise `ArtifactError` unless what was saved was compiled in such a process as this is."""
    try:
        require_same_surroundings(surroundings_of(folder))
    except Unidentifiable as error:
        raise ArtifactError(error.message, where=error.where, hint=error.hint) from error


def surroundings_of(folder: Folder) -> Factors:
    """What an artifact was made in."""
    found = folder.facts.get("surroundings")
    return found if isinstance(found, dict) else {}


def texts_of(folder: Folder, name: str) -> Mapping[str, str]:
    """What the manifest says of ``name``, as texts by name."""
    found = folder.facts.get(name)
    return found if isinstance(found, dict) else {}
