"""Compiling different pieces at the same time. In: jobs, and what compiles one. Out: their results in the caches on disk, and how long each took.

Nothing that a worker made is trusted or used directly: the caller compiles every piece again afterwards and finds it in the cache.
A worker that fails, hangs or is killed costs time and nothing else.

Why processes, and why forked. Inductor keeps its graph, its options and its counters in the process, so threads can't share it.
A fresh process would have to import the user's modules to know its operators, and fake tensors and symbols can't be sent to it. A
forked one has all of it. CUDA does not survive a fork, so nothing is forked once CUDA is in use; Inductor's own workers compile the
kernels of a piece in parallel there.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_HANGS_AFTER_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Job:
    """One compilation: what progress calls it, and what to run, in a worker, to get it into the cache."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job went. ``error`` is "" for success; ``seconds`` are the worker's, by the clock."""

    name: str
    seconds: float
    error: str = ""


def why_not(workers: int) -> str:
    """Why pieces are compiled one after another; "" if they can be compiled at the same time."""
    if workers < 2:
        return "one worker"
    if not hasattr(os, "fork") or sys.platform == "win32":
        return "this system can't fork"
    if torch.cuda.is_initialized():
        return "CUDA is in use, and it does not survive a fork"
    return ""


def run_in_workers(
    jobs: Sequence[Job],
    workers: int,
    finished: Callable[[JobResult], None] | None = None,
    *,
    hangs_after_s: float = _HANGS_AFTER_SECONDS,
) -> list[JobResult]:
    """Run each job in a forked process of its own, at most ``workers`` at a time, in order.

    Args:
        jobs: what to run.
        workers: how many at a time.
        finished: called in this process as each one ends.
        hangs_after_s: a worker that takes longer is killed.

    Returns:
        The results, in the order in which they came. If this is interrupted, no worker is left behind.
    """
    waiting = list(reversed(jobs))
    running: dict[int, _Worker] = {}
    results: list[JobResult] = []
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    worker = _Worker.start(waiting.pop(), inherited=running)
                    running[worker.pipe] = worker
                    selector.register(worker.pipe, selectors.EVENT_READ)
                for key, _ in selector.select(timeout=1.0):
                    worker = running[key.fd]
                    if worker.read():
                        continue
                    selector.unregister(worker.pipe)
                    del running[worker.pipe]
                    results.append(worker.finish())
                    if finished is not None:
                        finished(results[-1])
                for worker in running.values():
                    worker.kill_after(hangs_after_s)
        finally:
            for worker in running.values():
                worker.kill_after(0.0)
                worker.finish()
    return results


class _Worker:
    """A forked process and the pipe that it writes its result to."""

    def __init__(self, job: Job, pid: int, pipe: int, start: float) -> None:
        self.job = job
        self.pid = pid
        self.pipe = pipe
        self._start = start
        self._data = b""
        self._killed = False

    @classmethod
    def start(cls, job: Job, inherited: dict[int, _Worker]) -> _Worker:
        read_end, write_end = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # else the worker would write what is waiting here a second time
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            _work(job, write_end, [read_end, *inherited])
        os.close(write_end)
        return cls(job, pid, read_end, start)

    def read(self) -> bool:
        """Take what the worker has written; false at its end."""
        part = os.read(self.pipe, 1 << 16)
        self._data += part
        return bool(part)

    def kill_after(self, seconds: float) -> None:
        if not self._killed and time.perf_counter() - self._start >= seconds:
            os.kill(self.pid, signal.SIGKILL)
            self._killed = True

    def finish(self) -> JobResult:
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.perf_counter() - self._start
        try:
            error = json.loads(self._data)["error"]
        except (ValueError, KeyError, TypeError):
            code = os.waitstatus_to_exitcode(status)
            error = f"the worker ended early ({'signal' if code < 0 else 'exit code'} {abs(code)})"
        return JobResult(self.job.name, seconds, error)


def _work(job: Job, pipe: int, inherited: Sequence[int]) -> None:
    """The life of a worker; it never returns, and runs none of the parent's exit handlers."""
    code = 1
    try:
        for other in inherited:
            os.close(other)
        error = ""
        try:
            job.run()
        except Exception as problem:  # noqa: BLE001 - the parent meets it again itself
            error = f"{type(problem).__name__}: {problem}"
        os.write(pipe, json.dumps({"error": error[:4000]}).encode("ascii"))
        code = 0
    finally:
        os._exit(code)
