"""Ordinary models, run by piecework and by ``torch.compile``. In: lists of models that others made. Out: a table, a JSON file, and the page of the documentation.

Nothing is timed. The exit code is 1 if piecework refuses, or gets wrong, what stock serves.

Run it with ``piecework bench models``, or ``python -m piecework.bench.models``.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from piecework.bench.lists.catalogue import LISTS, OTHERS, rows_of
from piecework.bench.lists.isolated import (
    RowResult,
    Task,
    run_rows,
    run_together,
)
from piecework.bench.lists.kept import keep_results, kept_results
from piecework.bench.lists.page import CONTENDERS, behind, markdown, summary
from piecework.bench.lists.trial import Options
from piecework.bench.measure.result import machine
from piecework.errors import UsageError

FILE = "models.json"
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
        return run_together(tasks)
    return run_rows(tasks, jobs=chosen.jobs, limit=chosen.limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; returns 1 if something that stock serves is refused or wrong."""
    chosen = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    tasks = tasks_of(chosen)
    kept = kept_results(chosen.out, FILE, tasks)
    results = list(kept.values())
    start = time.monotonic()
    for result in _results([each for each in tasks if each not in kept], chosen):
        results.append(result)
        console.print(f"{len(results)}/{len(tasks)} {_line(result)}", highlight=False, markup=False)
        keep_results(chosen.out, FILE, tasks, results)
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
        "--list", action="append", choices=[*LISTS, *OTHERS], help="only this list; may be repeated"
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
