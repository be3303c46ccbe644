"""Rows run apart from each other: what became of each.

Each row has a process of its own with a time limit: a crash, a hang or a state that one row leaves behind reaches no other.
"""

from __future__ import annotations

import io
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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

from pydantic import TypeAdapter

from piecework.bench.lists.trial import CONTENDERS, Heard, Options, Outcome, Verdict
from piecework.bench.measure.result import machine
from piecework.runtime.store.files import write_atomic

FILE = "models.json"


@dataclass(frozen=True, slots=True)
class Task:
    """One row to run: its list and name, and how."""

    source: str
    name: str
    kind: str
    options: Options


@dataclass(slots=True)
class RowResult:
    """What became of one row."""

    source: str
    name: str
    kind: str
    outcome: Outcome = field(default_factory=Outcome)
    problem: str = ""  # why the row was not tried, or not to its end; "" if it was
    seconds: float = 0.0  # how long it took


def run_rows(tasks: Sequence[Task], *, jobs: int = 1, limit: float = 900.0) -> Iterator[RowResult]:
    """Run each task in a process of its own, ``jobs`` at a time, and yield results as they come.

    Args:
        limit: seconds after which a row is stopped.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = [pool.submit(_run_apart, task, limit) for task in tasks]
            yield from (each.result() for each in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def _run_apart(task: Task, limit: float) -> RowResult:
    """One row; its process writes a line for all that it does, and one for what it found."""
    start = time.monotonic()
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
        last = dict(json.loads(line) for line in said if line.startswith("["))
    if "found" in last:
        result = TypeAdapter(RowResult).validate_python(last["found"])
    else:
        # A contender that crashes or hangs has failed; elsewhere the row wasn't tried to its end.
        doing = last.get("doing", "start")
        problem = f"{ended} while {doing} ran"
        result = RowResult(task.source, task.name, task.kind, problem=problem)
        if doing in CONTENDERS:
            result.outcome.verdicts[doing] = Verdict("failed", problem)
    result.seconds = time.monotonic() - start
    return result


def run_row(task: Task, heard: Heard = lambda _: None) -> RowResult:
    """Run one row in this process, with a compile cache of its own."""
    from piecework.bench.lists.catalogue import rows_of
    from piecework.bench.lists.generation import Family, try_family
    from piecework.bench.lists.trial import try_sample

    start = time.monotonic()
    result = RowResult(task.source, task.name, task.kind)
    with (
        quiet_libraries(),
        tempfile.TemporaryDirectory(prefix="piecework-models-") as cache,
        mock.patch.dict(os.environ, PIECEWORK_CACHE_DIR=cache),
    ):
        try:
            sample = {row.name: row for row in rows_of(task.source)}[task.name].sample()
        except Exception as error:  # noqa: BLE001 - a model or arguments that can't be made
            result.problem = f"not built: {error}"
        else:
            tried = try_family if isinstance(sample, Family) else try_sample
            result.outcome = tried(sample, task.options, heard)
    result.seconds = time.monotonic() - start
    return result


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
def quiet_libraries() -> Iterator[None]:
    """Keep what compilers and libraries print, log and warn of out of the report, for the block."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _work(task: Task) -> None:
    """Run one row in this process; says what it does, and what it found."""
    import torch

    torch.set_num_threads(1)

    def say(kind: str, what: object) -> None:
        print(json.dumps([kind, what]), file=sys.__stdout__, flush=True)

    say("found", asdict(run_row(task, lambda doing: say("doing", doing))))


if __name__ == "__main__":
    _work(TypeAdapter(Task).validate_json(sys.argv[1]))
