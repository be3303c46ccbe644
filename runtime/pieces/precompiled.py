"""The different pieces of a model, compiled before they are asked for. In: a stitching graph. Out: a compiler manager that finds them done.

It decides what runs at the same time; how a piece is compiled is the manager's business, and leaving this out changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.fx

from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.pieces import parallel
from piecework.runtime.pieces.manager import CompilerManager, RangeEntry
from piecework.runtime.pieces.piecewise import inputs_for


@dataclass(frozen=True, slots=True)
class Request:
    """One compilation that lies ahead: a piece that differs from all before it, for one batch range."""

    submod_name: str
    graph: torch.fx.GraphModule
    inputs: tuple[object, ...]
    compile_range: Range | None
    structure: Structure

    @property
    def name(self) -> str:
        return self.submod_name + ("" if self.compile_range is None else f" {self.compile_range}")


def different_pieces(
    split_gm: torch.fx.GraphModule,
    submod_names: Sequence[str],
    compile_ranges: Sequence[Range | None],
    batch_symbol: str | None,
) -> list[Request]:
    """What must be compiled: each different piece once per range, in order of first use.

    A piece whose inputs were not recorded by tracing is left out; it is compiled when it is reached.
    """
    found: dict[tuple[str, Range | None], Request] = {}
    for name in submod_names:
        graph = graph_of(split_gm, name)
        structure = structure_of(graph, describe_input=input_signature)
        for compile_range in compile_ranges:
            inputs = tuple(inputs_for(graph, compile_range, batch_symbol))
            if all(each is not None for each in inputs):
                request = Request(name, graph, inputs, compile_range, structure)
                found.setdefault((structure.key, compile_range), request)
    return list(found.values())


def compile_ahead(manager: CompilerManager, requests: Sequence[Request]) -> None:
    """Compile what is not in the cache yet in workers, as ``compile_workers`` allows.

    The first one is compiled here: what Inductor prepares once per process (its patterns, the compiler's precompiled
    headers) is then there before the workers are forked, instead of being made in each of them.
    """
    missing = [
        each
        for each in requests
        if not manager.is_kept(each.graph, each.structure, each.compile_range)
    ]
    workers = min(manager.config.compile_workers, len(missing) - 1)
    if parallel.why_not(workers):
        return
    first, *rest = missing
    manager.compiled_ahead(first.structure, _compile(manager, first))
    by_name = {each.name: each for each in rest}

    def finished(result: parallel.JobResult) -> None:
        request = by_name[result.name]
        manager.compiled_elsewhere(request.structure, request.compile_range, result)

    def job(request: Request) -> parallel.Job:
        def run() -> None:
            manager.progress = None  # in the worker; the terminal is the parent's
            with torch_compat.without_compile_threads():
                _compile(manager, request)

        return parallel.Job(request.name, run)

    parallel.run_in_workers([job(each) for each in rest], workers, finished)


def _compile(manager: CompilerManager, request: Request) -> RangeEntry:
    return manager.compile(
        request.graph,
        request.inputs,
        request.compile_range,
        structure=request.structure,
        submod_name=request.submod_name,
    )
