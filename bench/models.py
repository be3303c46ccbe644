"""Models of lists that others made, run by piecework beside eager and ``torch.compile``.

Nothing is timed. The exit code is 1 if piecework refuses, or gets wrong, what stock serves.

Run it with ``piecework bench models --list NAME``, or ``python -m piecework.bench.models``.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from piecework.bench.lists.catalogue import LISTS, rows_of
from piecework.bench.lists.isolated import (
    RowResult,
    Task,
    keep_results,
    kept_results,
    run_row,
    run_rows,
)
from piecework.bench.lists.page import behind, cell, markdown
from piecework.bench.lists.trial import CONTENDERS, Options
from piecework.bench.measure.result import machine
from piecework.errors import UsageError
from piecework.runtime.store.files import write_atomic

CUT_EVERY = 3


def tasks_of(chosen: argparse.Namespace) -> list[Task]:
    """The rows that were asked for; every third, or every one of single models, is also cut."""
    found = []
    for source in chosen.list:
        kind = LISTS[source]
        stock = "always" if kind.everywhere else "if unequal"
        for index, row in enumerate(rows_of(source)):
            if re.search(chosen.only, row.name) and kind.admits(row.name):
                cut = kind.everywhere and (bool(chosen.only) or index % CUT_EVERY == 0)
                backend = chosen.backend or kind.backend
                options = Options(backend, cut and not chosen.no_cut, stock)  # type: ignore[arg-type]
                found.append(Task(source, row.name, row.kind, options))
    part = re.fullmatch(r"(\d+)/(\d+)", chosen.part)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        raise UsageError(f"{chosen.part!r} is no part", hint="write 2/4 for the second of four")
    return found[int(part[1]) - 1 :: int(part[2])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; returns 1 if something that stock serves is refused or wrong."""
    chosen = _parser().parse_args(arguments)
    console = Console(soft_wrap=True)
    tasks = tasks_of(chosen)
    kept = kept_results(chosen.out, tasks)
    results = list(kept.values())
    start = time.monotonic()
    left = [task for task in tasks if task not in kept]
    apart = run_rows(left, jobs=chosen.jobs, limit=chosen.limit)
    for result in map(run_row, left) if chosen.together else apart:
        results.append(result)
        console.print(f"{len(results)}/{len(tasks)} {_line(result)}", highlight=False, markup=False)
        keep_results(chosen.out, tasks, results)
    order = {(task.source, task.name): number for number, task in enumerate(tasks)}
    results.sort(key=lambda each: order[each.source, each.name])
    if chosen.page is not None:
        text = markdown(chosen.title, results, _settings(tasks))
        write_atomic(chosen.page, text.encode(), 0o644)
    missing = [line for result in results for line in behind(result)]
    for line in missing:
        console.print(line, highlight=False, markup=False)
    seconds = time.monotonic() - start
    console.print(f"{len(missing)} that stock serves and piecework does not, {seconds:.0f} s")
    return 1 if missing else 0


def _line(result: RowResult) -> str:
    cells = [f"{result.source}: {result.name}"]
    verdicts, skipped = result.outcome.verdicts, result.outcome.skipped
    cells += [f"{each} {verdicts[each].status}" for each in CONTENDERS if each in verdicts]
    cells += [f"no model: {cell(skipped)}"] if skipped else []
    cells += [result.problem] if result.problem else []
    return ", ".join([*cells, f"{result.seconds:.0f} s"])


def _settings(tasks: Sequence[Task]) -> list[str]:
    about = machine()
    backends = dict.fromkeys(task.options.backend for task in tasks)
    return [
        f"torch {about['torch']}, Python {about['python']}, {about['processor']}",
        f"pieces and stock compiled by {', '.join(f'`{each}`' for each in backends)}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="piecework bench models", description=__doc__)
    lists = "; ".join(f"{name}: {each.text}" for name, each in LISTS.items())
    parser.add_argument(
        "--list", action="append", choices=LISTS, required=True, help=f"may be repeated. {lists}"
    )
    parser.add_argument(
        "--only", default="", help="only models whose name this regular expression finds"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the JSON; a run that was stopped goes on from what is there, so empty it after a change of the code",
    )
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument("--title", default="Models", help="of the page")
    parser.add_argument("--backend", help="what compiles; each list has a default of its own")
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
