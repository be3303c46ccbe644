"""Rows run apart from each other: what became of each.

Each row has a process of its own with a time limit: a crash, a hang or a state that one row leaves behind reaches no other.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from piecework.bench.lists.trial import Heard, Options, Outcome, Verdict
from piecework.bench.measure.result import machine
from piecework.runtime.store.files import write_atomic

FILE = "models.json"


@dataclass(slots=True)
class RowResult:
    """What became of one row."""

    source: str
    name: str
    kind: str
    outcomes: list[Outcome] = field(default_factory=list)  # one per sample that was tried
    problem: str = ""  # why the row was not tried, or not to its end; "" if it was
    seconds: float = 0.0  # how long it took


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
    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = [pool.submit(_run_apart, task, limit) for task in tasks]
            yield from (each.result() for each in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def _run_apart(task: Task, limit: float) -> RowResult:
    """One row; its process writes a line for all that it does and finds."""
    start = time.monotonic()
    result = RowResult(task.source, task.name, task.kind)
    command = [sys.executable, "-m", "piecework.bench.lists.isolated", json.dumps(asdict(task))]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL)
        try:
            ended = f"the process ended with code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = f"stopped after {limit:.0f} s,"
        said.seek(0)
        lines = [json.loads(line) for line in said if line.startswith("[")]
    doing = "start"
    for kind, what in lines:
        if kind == "outcome":
            result.outcomes.append(TypeAdapter(Outcome).validate_python(what))
        elif kind == "problem":
            result.problem = what
        doing = what if kind == "doing" else doing
    if ["complete", ""] not in lines and not result.problem:
        # A contender that crashes or hangs has failed; elsewhere the row wasn't tried to its end.
        result.problem = f"{ended} while {doing} ran"
        if doing in ("stock", "piecework", "split", "captured"):
            verdict = Verdict("failed", result.problem)
            result.outcomes.append(Outcome("stopped", {doing: verdict}))
    result.seconds = time.monotonic() - start
    return result


def run_together(tasks: Sequence[Task]) -> Iterator[RowResult]:
    """Run the tasks one after another in this process."""
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
    from piecework.bench.lists.generation import Family, try_family
    from piecework.bench.lists.trial import try_sample

    with own_cache():
        try:
            samples = find(task.source, task.name).samples(task.samples)
        except Exception as error:
            raise _NotBuilt(f"not built: {error}") from error
        for sample in samples:
            tried = try_family if isinstance(sample, Family) else try_sample
            yield tried(sample, task.options, heard)


def keep_results(folder: Path | None, tasks: Sequence[Task], results: Sequence[RowResult]) -> None:
    """Write what is known so far to ``folder``, each row with what was asked of it."""
    if folder is None:
        return
    asked = {(task.source, task.name): asdict(task) for task in tasks}
    rows = [{"asked": asked[each.source, each.name], **asdict(each)} for each in results]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    write_atomic(folder / FILE, text.encode() + b"\n")


def kept_results(folder: Path | None, tasks: Sequence[Task]) -> dict[Task, RowResult]:
    """What an earlier run with the same folder found of the same tasks."""
    if folder is None or not (folder / FILE).exists():
        return {}
    data = json.loads((folder / FILE).read_text())
    if data["machine"] != machine():
        return {}
    asked, result = TypeAdapter(Task), TypeAdapter(RowResult)
    found = {}
    for row in data["rows"]:
        task = asked.validate_python(row.pop("asked"))
        if task in tasks and not row["problem"]:
            found[task] = result.validate_python(row)
    return found


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


def _work(task: Task) -> None:
    """Run one row in this process; says what it does, each outcome, and the end."""
    import torch

    torch.set_num_threads(1)

    def say(kind: str, what: object) -> None:
        print(json.dumps([kind, what]), flush=True)

    try:
        with quiet_libraries():
            for outcome in _outcomes(task, lambda doing: say("doing", doing)):
                say("outcome", asdict(outcome))
    except _NotBuilt as error:
        say("problem", str(error))
    else:
        say("complete", "")


if __name__ == "__main__":
    _work(TypeAdapter(Task).validate_json(sys.argv[1]))
