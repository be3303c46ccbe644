"""transformers' encoders, vision and audio models, compiled. In: transformers' registries. Out: for each family whether a small model runs, is taken, and answers as eager does; as a page of the documentation.

Nothing is timed. Each family has a process of its own. The exit code is 1 if one answers otherwise, or fails with an error that nobody
meant.

Run it with ``piecework bench encoders``, or ``python -m piecework.bench.encoders``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from piecework.bench.lists.catalogue import rows_of
from piecework.bench.lists.families import is_encoder_family
from piecework.bench.lists.isolated import RowResult, Task, run_rows, run_together
from piecework.bench.lists.kept import keep_results, kept_results
from piecework.bench.lists.page import cell, table
from piecework.bench.lists.trial import Options
from piecework.bench.measure.result import machine
from piecework.runtime.store.files import write_atomic

FILE = "encoders.json"
LIMIT = 240.0  # seconds for one family
KINDS = ("text", "vision", "audio", "multi-modal")


def status(row: RowResult) -> tuple[str, str]:
    """What became of a family, and why.

    Returns:
        "equal", "refused" by name, "wrong", "failed" with an error that nobody meant, or "no model": no small one runs.
    """
    for outcome in row.outcomes:
        if outcome.skipped:
            return "no model", outcome.skipped
        verdict = outcome.verdicts.get("piecework")
        if verdict is not None:
            return verdict.status, verdict.why
    if row.outcomes:  # stock did not come to its end
        return "failed", row.problem
    return "no model", row.problem


def tasks_of(only: str, backend: str) -> list[Task]:
    """A task for each family that a config alone says is an encoder."""
    chosen = [row for row in rows_of("encoders") if re.search(only, row.name)]
    return [
        Task(row.source, row.name, row.kind, 1, Options(backend, stock="if unequal"))
        for row in sorted(chosen, key=lambda row: (KINDS.index(row.kind), row.name))
        if is_encoder_family(row.name)
    ]


def markdown(rows: Sequence[RowResult], backend: str, families: int) -> str:
    """The page of the documentation.

    Args:
        families: how many there are, tried or not.
    """
    counts = Counter(status(row)[0] for row in rows)
    tried = len(rows) - counts["no model"]
    stock_too = sum(status(row)[0] == "refused" and _stock(row) != "equal" for row in rows)
    import transformers

    lines = [
        "# Encoders of transformers",
        "",
        "Each family of transformers' registries of text encoders, vision and audio models, as a small model with seeded weights; of an encoder-decoder",
        "that generates, its encoder. It is compiled from one call and asked with others: 1, 2, 3, 4 and 5 rows, tokens of three lengths with padding on the right, on the",
        "left and none, sound of two lengths; calls that the model itself refuses are left out. `piecework bench encoders --page docs/encoders.md` writes this page.",
        "",
        *(
            [f"This run tried {len(rows)} of {families} families.", ""]
            if len(rows) < families
            else []
        ),
        f"transformers {transformers.__version__}, torch {machine()['torch']}, pieces compiled by `{backend}`. Of {len(rows)} families {tried} have a small model",
        f"that runs; **{counts['equal']} of these are equal**, {counts['refused']} are refused by name ({stock_too} of them by `torch.compile(fullgraph=True)` too,",
        f"*stock*, which is asked where piecework is not equal), {counts['wrong']} are wrong, {counts['failed']} fail otherwise. *Traces* are all that the calls needed.",
        "",
        *table(_HEADER, map(_cells, rows)),
    ]
    return "\n".join(lines) + "\n"


_HEADER = ("families", "kind", "", "stock", "pieces", "different", "traces", "note")


def _cells(row: RowResult) -> list[str]:
    what, why = status(row)
    made = next((each for each in row.outcomes if each.pieces), None)
    counted = map(str, (made.pieces, made.unique, made.traces)) if made else ("", "", "")
    why = "" if what == "no model" else why  # it is in the JSON
    return [row.name, row.kind, what, _stock(row), *counted, cell(why)]


def _stock(row: RowResult) -> str:
    found = [each.verdicts["stock"].status for each in row.outcomes if "stock" in each.verdicts]
    return found[0] if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the families; returns 1 if one is wrong or fails."""
    parser = argparse.ArgumentParser(prog="piecework bench encoders", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON; a later run goes on from it")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument(
        "--only", default="", help="only families whose name this regular expression finds"
    )
    parser.add_argument("--backend", default="eager", help="what compiles the pieces")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one family")
    parser.add_argument("--together", action="store_true", help="all in this process")
    parser.add_argument(
        "--as-found", action="store_true", help="try nothing: the page of what --out has"
    )
    chosen = parser.parse_args(arguments)
    tasks = tasks_of(chosen.only, chosen.backend)
    kept = kept_results(chosen.out, FILE, tasks, ended=not chosen.as_found)
    found = list(kept.values())
    left = [] if chosen.as_found else [each for each in tasks if each not in kept]
    results = (
        run_together(left)
        if chosen.together
        else run_rows(left, jobs=chosen.jobs, limit=chosen.limit)
    )
    for each in results:
        found.append(each)
        what, why = status(each)
        print(
            f"{len(found)}/{len(tasks)} {each.name}: {what} {why} {each.seconds:.0f} s", flush=True
        )
        keep_results(chosen.out, FILE, tasks, found)
    order = {task.name: number for number, task in enumerate(tasks)}
    found.sort(key=lambda each: order[each.name])
    if chosen.page is not None:
        text = markdown(found, chosen.backend, len(tasks_of("", chosen.backend)))
        write_atomic(chosen.page, text.encode(), 0o644)
    return 1 if any(status(each)[0] in ("wrong", "failed") for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())
