"""Different pieces compiled at the same time, in forked workers, so that the cache has them when
they are reached.

Nothing that a worker made is used directly: the caller compiles every piece again afterwards and
finds it in the cache. A worker that fails, hangs or is killed costs time and nothing else.

Why processes, and why forked: Inductor keeps its graph, options and counters in the process, so
threads can't share it, and a fresh process would not know the user's operators. CUDA does not
survive a fork, so nothing is forked once CUDA is in use.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.pieces.manager import CompilerManager, key_of
from piecework.runtime.pieces.piecewise import inputs_for

_HANGS_AFTER_SECONDS = 600.0


class Request(NamedTuple):
    """One compilation that lies ahead: a piece that differs from those before it, for one range."""

    submod_name: str
    graph: GraphModule
    inputs: tuple[object, ...]
    compile_range: Range | None
    structure: Structure

    @property
    def name(self) -> str:
        return self.submod_name + ("" if self.compile_range is None else f" {self.compile_range}")

    def compile(self, manager: CompilerManager) -> None:
        inputs, where = self.inputs, self.compile_range
        structure, name = self.structure, self.submod_name
        manager.compile(self.graph, inputs, where, structure=structure, submod_name=name)


def different_pieces(
    split_gm: GraphModule,
    submod_names: Sequence[str],
    compile_ranges: Sequence[Range | None],
    batch_symbol: str | None,
    structures: dict[str, Structure],
) -> list[Request]:
    """What must be compiled: each different piece once per range, in order of first use.

    A piece whose inputs were not recorded by tracing is left out; it is compiled when it is
    reached. ``structures`` holds those of the pieces that are known, and of all of them afterwards.
    """
    found: dict[tuple[str, Range | None], Request] = {}
    for name in submod_names:
        graph = graph_of(split_gm, name)
        if name not in structures:
            structures[name] = structure_of(graph, describe_input=input_signature)
        structure = structures[name]
        for compile_range in compile_ranges:
            if (structure.key, compile_range) in found:
                continue
            inputs = tuple(inputs_for(graph, compile_range, batch_symbol))
            if all(each is not None for each in inputs):
                request = Request(name, graph, inputs, compile_range, structure)
                found[structure.key, compile_range] = request
    return list(found.values())


def compile_ahead(manager: CompilerManager, requests: Sequence[Request]) -> None:
    """Compile what is not in the cache yet in workers, as ``compile_workers`` allows.

    The first one is compiled here: what Inductor prepares once per process (its patterns, the
    compiler's precompiled headers) is then there before the workers are forked.
    """
    if manager.config.compile_workers == 1:
        return
    missing = [r for r in requests if not manager.is_kept(r.graph, r.structure, r.compile_range)]
    workers = min(manager.config.compile_workers, len(missing) - 1)
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if workers < 2 or not can_fork or torch.cuda.is_initialized():
        return
    keys = {r.name: key_of(r.graph, r.structure, r.compile_range) for r in missing}
    missing[0].compile(manager)
    manager.ahead.add(keys[missing[0].name])

    def compile_in_worker(request: Request) -> None:
        manager.progress = None  # the terminal is the parent's
        with torch_compat.without_compile_threads():
            request.compile(manager)

    def finished(name: str, seconds: float, succeeded: bool) -> None:
        if succeeded:
            manager.elsewhere[keys[name]] = seconds
            if manager.progress is not None:
                manager.progress.compiled(name, seconds, "in a worker")

    jobs = {each.name: partial(compile_in_worker, each) for each in missing[1:]}
    run_in_workers(jobs, workers, finished)


def run_in_workers(
    jobs: Mapping[str, Callable[[], object]],
    workers: int,
    finished: Callable[[str, float, bool], None],
    *,
    hangs_after_s: float = _HANGS_AFTER_SECONDS,
) -> None:
    """Run each job in a forked process of its own, at most ``workers`` at a time, in order; one that
    takes ``hangs_after_s`` is killed, and all are if this call is interrupted. ``finished`` is told
    the name of each that ended, its seconds and whether it succeeded."""
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(jobs.items()))
    running: dict[BaseProcess, float] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, job = waiting.pop()
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()  # else the worker would write what waits here a second time
                process = fork.Process(target=_work, args=(job,), name=name)
                running[process] = time.perf_counter()
                process.start()
            wait([each.sentinel for each in running], timeout=1.0)
            for each, start in list(running.items()):
                seconds = time.perf_counter() - start
                if seconds > hangs_after_s:
                    each.kill()
                    each.join()
                if not each.is_alive():
                    del running[each]
                    finished(each.name, seconds, each.exitcode == 0)
    finally:
        for each in running:
            each.kill()
            each.join()


def _work(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception:  # noqa: BLE001 - the parent meets it again itself
        sys.exit(1)
