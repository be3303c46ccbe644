"""Ordinary models, run by piecework and by ``torch.compile``. In: lists of models that others made. Out: a table, a JSON file, and the page of the documentation.

Nothing is timed. The exit code is 1 if piecework refuses, or gets wrong, what stock serves.

Run it with ``piecework bench models``, or ``python -m piecework.bench.models``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console

from piecework.bench.lists.catalogue import LISTS, rows_of
from piecework.bench.lists.isolated import (
    RowResult,
    Task,
    quiet_libraries,
    run_rows,
    run_together,
)
from piecework.bench.lists.page import CONTENDERS, behind, markdown, summary
from piecework.bench.lists.trial import Options
from piecework.bench.result import machine
from piecework.errors import UsageError
from piecework.runtime.cache.atomic import write_atomic

SAMPLES = 6
CUT_EVERY = 3


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    """The rows that were asked for; every third is also cut and captured."""
    found = []
    for source in arguments.list or LISTS:
        for index, row in enumerate(rows_of(source)):
            if re.search(arguments.only, row.name):
                options = Options(arguments.backend, arguments.shapes, _is_cut(arguments, index))
                found.append(Task(source, row.name, row.kind, arguments.samples, options))
    part, of = _part(arguments.part)
    return found[part - 1 :: of]


def _is_cut(arguments: argparse.Namespace, index: int) -> bool:
    """Every third model of a list; every one where single models are asked for."""
    return not arguments.no_cut and (bool(arguments.only) or index % CUT_EVERY == 0)


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"{text!r} is no part", hint="write 2/4 for the second of four")
    return int(found[1]), int(found[2])


def _results(tasks: Sequence[Task], chosen: argparse.Namespace) -> Iterator[RowResult]:
    if chosen.together:
        quiet_libraries()
        return run_together(tasks)
    return run_rows(tasks, jobs=chosen.jobs, limit=chosen.limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; returns 1 if something that stock serves is refused or wrong."""
    chosen = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    tasks = tasks_of(chosen)
    kept = _kept(chosen.out, tasks)
    results = list(kept.values())
    start = time.monotonic()
    for result in _results([each for each in tasks if each not in kept], chosen):
        results.append(result)
        console.print(f"{len(results)}/{len(tasks)} {_line(result)}", highlight=False, markup=False)
        _keep(chosen.out, tasks, results)
    order = {(task.source, task.name): number for number, task in enumerate(tasks)}
    results.sort(key=lambda each: order[each.source, each.name])
    console.print(f"{time.monotonic() - start:.0f} s")
    if chosen.page is not None:
        chosen.page.write_text(markdown(results, _settings(chosen)))
    missing = [line for result in results for line in behind(result)]
    for line in missing:
        console.print(line, highlight=False, markup=False)
    console.print(f"{len(missing)} that stock serves and piecework does not")
    return 1 if missing else 0


def _keep(folder: Path | None, tasks: Sequence[Task], results: Sequence[RowResult]) -> None:
    """Write what is known so far, each row with what was asked of it."""
    if folder is None:
        return
    asked = {(task.source, task.name): asdict(task) for task in tasks}
    rows = [{"asked": asked[each.source, each.name], **asdict(each)} for each in results]
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), "rows": rows}, indent=1)
    write_atomic(folder / "models.json", text.encode() + b"\n")


def _kept(folder: Path | None, tasks: Sequence[Task]) -> dict[Task, RowResult]:
    """What an earlier run with the same folder found of the same tasks; rows that it could not end are tried again."""
    path = None if folder is None else folder / "models.json"
    if path is None or not path.exists():
        return {}
    data = json.loads(path.read_text())
    if data["machine"] != machine():
        return {}
    asked, result = TypeAdapter(Task), TypeAdapter(RowResult)
    found = {}
    for row in data["rows"]:
        task = asked.validate_python(row.pop("asked"))
        if task in tasks and not row["problem"]:
            found[task] = result.validate_python(row)
    return found


def _line(result: RowResult) -> str:
    cells = [f"{result.source}: {result.name}"]
    for contender in CONTENDERS:
        verdict = summary(result, contender)
        if verdict is not None:
            cells.append(f"{contender} {verdict.status}")
    return ", ".join([*cells, result.problem, f"{result.seconds:.0f} s"]).replace(", ,", ",")


def _settings(chosen: argparse.Namespace) -> list[str]:
    about = machine()
    samples = (
        "all samples" if chosen.samples == 0 else f"at most {chosen.samples} samples, evenly spread"
    )
    return [
        f"torch {about['torch']}, Python {about['python']}, {about['processor']}",
        f"pieces and stock compiled by `{chosen.backend}`; {samples} of each model",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="piecework bench models", description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the JSON; a run that was stopped goes on from what is there, so empty it after a change of the code",
    )
    parser.add_argument("--page", type=Path, default=None, help="Markdown file to write")
    parser.add_argument(
        "--list", action="append", choices=list(LISTS), help="only this list; may be repeated"
    )
    parser.add_argument(
        "--only", default="", help="only models whose name this regular expression finds"
    )
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="of each model at most; 0 for all"
    )
    parser.add_argument("--backend", default="inductor", help="what compiles; eager is quick")
    parser.add_argument(
        "--shapes", default="", help="type of dynamic shapes in place of the default's"
    )
    parser.add_argument("--no-cut", action="store_true", help="don't cut or capture any")
    parser.add_argument("--part", default="1/1", help="every so-manieth model only, such as 2/4")
    parser.add_argument(
        "--together", action="store_true", help="all in this process, without a time limit"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
