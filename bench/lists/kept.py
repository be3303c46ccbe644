"""What a long run has found so far, as a file. In: tasks and results. Out: JSON, from which a later run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from piecework.bench.lists.isolated import RowResult, Task
from piecework.bench.measure.result import machine
from piecework.runtime.store.files import write_atomic


def keep_results(
    folder: Path | None, name: str, tasks: Sequence[Task], results: Sequence[RowResult]
) -> None:
    """Write what is known so far to the file ``name`` of ``folder``, each row with what was asked of it; nothing without a folder."""
    if folder is None:
        return
    asked = {(task.source, task.name): asdict(task) for task in tasks}
    rows = [{"asked": asked[each.source, each.name], **asdict(each)} for each in results]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    write_atomic(folder / name, text.encode() + b"\n")


def kept_results(
    folder: Path | None, name: str, tasks: Sequence[Task], *, ended: bool = True
) -> dict[Task, RowResult]:
    """What an earlier run with the same folder found of the same tasks.

    Args:
        ended: leave out rows that it could not end, so that they are tried again.
    """
    path = None if folder is None else folder / name
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["machine"] != machine():
        return {}
    asked, result = TypeAdapter(Task), TypeAdapter(RowResult)
    found = {}
    for row in data["rows"]:
        task = asked.validate_python(row.pop("asked"))
        if task in tasks and not (ended and row["problem"]):
            found[task] = result.validate_python(row)
    return found
