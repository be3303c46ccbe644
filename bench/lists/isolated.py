"""Rows run apart from each other. In: rows and options. Out: what became of each, as it is done.

Each row has a process of its own with a time limit: a crash, a hang or a state that one row leaves behind reaches no other.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from piecework.bench.lists.trial import Heard, Options, Outcome, Verdict

_MODULES = ["torch", "torch._dynamo", "torch._inductor", "piecework.bench.lists.catalogue"]


@dataclass(slots=True)
class RowResult:
    """What became of one row.

    Attributes:
        outcomes: one per sample that was tried.
        problem: why the row was not tried, or not to its end; "" if it was.
        seconds: how long it took.
    """

    source: str
    name: str
    kind: str
    outcomes: list[Outcome] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """One row to run: its list and name, how many of its samples (0: all), and how."""

    source: str
    name: str
    kind: str
    samples: int
    options: Options


def run_rows(tasks: Sequence[Task], *, jobs: int = 1, limit: float = 900.0) -> Iterator[RowResult]:
    """Run each task in a process of its own, ``jobs`` at a time, and yield results as they come.

    Args:
        limit: seconds after which a row is stopped; what it had found by then is kept.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    waiting = list(reversed(tasks))
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                each = _Running.start(context, waiting.pop())
                running[each.receiver] = each
            for receiver in wait(list(running), timeout=1.0):
                each = running[receiver]  # type: ignore[index]
                if each.receive():
                    del running[each.receiver]
                    yield each.finished()
            for each in [each for each in running.values() if each.age() > limit]:
                del running[each.receiver]
                yield each.stopped(f"stopped after {limit:.0f} s, while {each.doing} ran")
    finally:
        for each in running.values():
            each.kill()


class _Running:
    """A row in its process, and what it has told so far."""

    def __init__(self, task: Task, process: object, receiver: Connection) -> None:
        self.task = task
        self.receiver = receiver
        self.doing = "start"
        self._process = process
        self._started = time.monotonic()
        self._result = RowResult(task.source, task.name, task.kind)
        self._complete = False

    @classmethod
    def start(cls, context: object, task: Task) -> _Running:
        receiver, sender = context.Pipe(duplex=False)  # type: ignore[attr-defined]
        process = context.Process(target=_work, args=(task, sender), daemon=False)  # type: ignore[attr-defined]
        process.start()
        sender.close()
        return cls(task, process, receiver)

    def age(self) -> float:
        return time.monotonic() - self._started

    def receive(self) -> bool:
        """Take one message; True if it was the last."""
        try:
            message = self.receiver.recv()
        except EOFError:
            return True
        match message:
            case Outcome():
                self._result.outcomes.append(message)
            case ("doing", doing):
                self.doing = doing
            case ("problem", problem):
                self._result.problem = problem
            case "complete":
                self._complete = True
        return False

    def finished(self) -> RowResult:
        self._process.join()  # type: ignore[attr-defined]
        if not self._complete and not self._result.problem:
            code = self._process.exitcode  # type: ignore[attr-defined]
            return self._died(f"the process ended with code {code} while {self.doing} ran")
        self._result.seconds = self.age()
        return self._result

    def stopped(self, why: str) -> RowResult:
        self.kill()
        return self._died(why)

    def _died(self, why: str) -> RowResult:
        """A contender that crashes or hangs has failed; elsewhere the row wasn't tried to its end."""
        self._result.problem = why
        if self.doing in ("stock", "piecework", "split", "captured"):
            self._result.outcomes.append(Outcome("stopped", {self.doing: Verdict("failed", why)}))
        self._result.seconds = self.age()
        return self._result

    def kill(self) -> None:
        self._process.kill()  # type: ignore[attr-defined]
        self._process.join()  # type: ignore[attr-defined]
        self.receiver.close()


def run_together(tasks: Sequence[Task]) -> Iterator[RowResult]:
    """Run the tasks one after another in this process: quicker than `run_rows`, and stopped by what one of them does."""
    for task in tasks:
        start = time.monotonic()
        result = RowResult(task.source, task.name, task.kind)
        try:
            with quiet_libraries():
                result.outcomes = list(_outcomes(task, lambda _: None))
        except _NotBuilt as error:
            result.problem = str(error)
        result.seconds = time.monotonic() - start
        yield result


class _NotBuilt(Exception):
    """A row whose model or arguments can't be made."""


def _outcomes(task: Task, heard: Heard) -> Iterator[Outcome]:
    """Try the samples of one row, with a compile cache of its own."""
    from piecework.bench.lists.catalogue import find
    from piecework.bench.lists.trial import try_sample

    with own_cache():
        try:
            samples = find(task.source, task.name).samples(task.samples)
        except Exception as error:
            raise _NotBuilt(f"not built: {error}") from error
        for sample in samples:
            yield try_sample(sample, task.options, heard)


@contextmanager
def own_cache() -> Iterator[None]:
    """A fresh compile cache for the block, so that nothing is taken from an earlier run."""
    before = os.environ.get("PIECEWORK_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="piecework-models-") as folder:
        os.environ["PIECEWORK_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["PIECEWORK_CACHE_DIR"]
            else:
                os.environ["PIECEWORK_CACHE_DIR"] = before


def _work(task: Task, sender: Connection) -> None:
    """Run one row; tells the other side what it does, each outcome, and the end."""
    import torch

    torch.set_num_threads(1)
    try:
        with quiet_libraries():
            for outcome in _outcomes(task, lambda doing: sender.send(("doing", doing))):
                sender.send(outcome)
    except _NotBuilt as error:
        sender.send(("problem", str(error)))
        return
    sender.send("complete")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep warnings and logs of compilers and libraries out of the report, for the block."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
