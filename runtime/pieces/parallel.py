"""Pieces compiled in forks: Inductor's state is per process, a new one lacks the user's ops."""

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.origin import graph_of
from piecework.codegen.graph.structure import Structure, input_signature, structure_of
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.observe.progress import CompileProgress
from piecework.runtime.pieces.manager import CompilerManager, Request, get_fake_args_from_graph


def different_pieces(
    split_gm: GraphModule,
    submod_names: Sequence[str],
    compile_ranges: Sequence[Range | None],
    batch_symbol: str | None,
    structures: dict[str, Structure],
) -> list[Request]:
    """Each different piece once per range, in order of first use; fills ``structures`` with all."""
    found: dict[tuple[str, Range | None], Request] = {}
    for name in submod_names:
        graph = graph_of(split_gm, name)
        if name not in structures:
            structures[name] = structure_of(graph, describe_input=input_signature)
        recorded = all(value is not None for value in get_fake_args_from_graph(graph))
        for each in compile_ranges if recorded else ():
            request = Request(name, graph, structures[name], each, batch_symbol)
            found.setdefault((structures[name].key, each), request)
    return list(found.values())


def compile_ahead(manager: CompilerManager, requests: Sequence[Request]) -> None:
    """Compile what is not in the cache yet in workers, as ``compile_workers`` allows."""
    if manager.config.compile_workers == 1:
        return
    missing = [each for each in requests if not manager.is_kept(each)]
    workers = min(manager.config.compile_workers, len(missing) - 1)
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if workers < 2 or not can_fork or torch.cuda.is_initialized():
        return
    # What Inductor prepares once per process (its patterns, precompiled headers) is there before
    # the workers are forked.
    first, *others = missing
    manager.compile(first)
    keys = {each.name: each.key for each in others}

    def compile_in_worker(request: Request) -> None:
        manager.progress = CompileProgress(patience=math.inf)  # the terminal is the parent's
        with torch_compat.without_compile_threads():
            manager.compile(request)

    jobs = {each.name: partial(compile_in_worker, each) for each in others}
    for name, seconds, succeeded in run_in_workers(jobs, workers):
        if succeeded:
            manager.elsewhere[keys[name]] = seconds
            manager.progress.compiled(name, seconds, "in a worker")


def run_in_workers(
    jobs: Mapping[str, Callable[[], object]], workers: int, hangs_after_s: float = 600.0
) -> Iterator[tuple[str, float, bool]]:
    """Each job in a fork of its own: name, seconds, success. All are killed on an interrupt."""
    fork = multiprocessing.get_context("fork")
    waiting = list(reversed(jobs.items()))
    running: dict[BaseProcess, float] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name, job = waiting.pop()
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()  # or the worker would write what waits here a second time
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
                    yield each.name, seconds, each.exitcode == 0
    finally:
        for each in running:
            each.kill()
            each.join()


def _work(job: Callable[[], object]) -> None:
    try:
        job()
    except Exception:  # noqa: BLE001 - the parent meets it again itself
        sys.exit(1)
