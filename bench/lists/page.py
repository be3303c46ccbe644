"""The results of a run as a page: the same Markdown for the same results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from piecework.bench.lists.catalogue import LISTS
from piecework.bench.lists.isolated import RowResult
from piecework.bench.lists.trial import STATUSES, Verdict

CONTENDERS = ("stock", "piecework", "split", "captured")
_COUNTS = ("way", "pieces", "unique", "traces")


def summary(row: RowResult, contender: str) -> Verdict | None:
    """The worst of a row's samples for one contender; None if it tried none."""
    found = [each.verdicts[contender] for each in row.outcomes if contender in each.verdicts]
    return max(found, key=lambda each: STATUSES.index(each.status), default=None)


def behind(row: RowResult) -> list[str]:
    """What stock serves in this row and piecework doesn't, or a splitting op or a capture breaks.

    Where stock was not tried, what is refused by name counts as refused by it too. A capture may be refused by name; it may not be wrong.
    """
    found = []
    for outcome in row.outcomes:
        stock = outcome.verdicts.get("stock")
        for contender, verdict in outcome.verdicts.items():
            if contender == "stock" or verdict.status == "equal":
                continue
            if verdict.status == "refused" and (contender == "captured" or stock is None):
                continue
            if stock is None or stock.status == "equal" or contender != "piecework":
                label = f" sample {outcome.label}" if outcome.label else ""
                found.append(
                    f"{row.source}: {row.name}{label}: {contender} {verdict.status}: {verdict.why}"
                )
    return found


def markdown(title: str, rows: Sequence[RowResult], settings: Iterable[str]) -> str:
    """The page: how it was made, what was found, and a table for each list."""
    sources = dict.fromkeys(row.source for row in rows)
    lines = [
        f"# {title}",
        "",
        "`piecework bench models` writes this page. Each model, small and with seeded weights, is run eagerly, by `piecework.compile` with the default configuration, "
        "and by `torch.compile(fullgraph=True)` (*stock*), at several batch sizes. *Equal* means: every output and every argument written in place "
        "has eager's values (by torch's tolerance for the dtype, or as near as stock), dtype, shape and structure, and eager's "
        "strides where stock has them. *split* is the same cut at the operator in the middle of its graph, *captured* that with "
        "static graphs for 1, 2, 4 and 8.",
        "",
        *[f"- {line}" for line in settings],
        *[f"- {source}: {LISTS[source].text if source in LISTS else ''}" for source in sources],
    ]
    missing = [line for row in rows for line in behind(row)]
    lines += ["", "## What stock serves and piecework does not", ""]
    lines += [f"- {cell(line)}" for line in missing] or ["Nothing."]
    for source in sources:
        lines += _section(source, [row for row in rows if row.source == source])
    return "\n".join(lines) + "\n"


def _section(source: str, rows: Sequence[RowResult]) -> list[str]:
    tried = [row for row in rows if any(outcome.verdicts for outcome in row.outcomes)]
    lines = [
        "",
        f"## {source}",
        "",
        f"Of {len(rows)} models {len(tried)} run. Of those that were tried:",
    ]
    for contender in CONTENDERS:
        counts = Counter(each.status for row in tried if (each := summary(row, contender)))
        if counts:
            said = ", ".join(f"{counts[each]} {each}" for each in STATUSES if counts[each])
            lines.append(f"{contender} {said}; ")
    lines[-1] = lines[-1].removesuffix("; ") + "."
    columns = ["models", "kind", *CONTENDERS, *_COUNTS, "note"]
    cells = [_cells(row) for row in tried]
    shown = [n for n in range(len(columns)) if not cells or any(row[n] for row in cells)]
    found = [[row[n] for n in shown] for row in cells]
    lines += ["", *table([columns[n] for n in shown], found)]
    left = [row for row in rows if row not in tried]
    if left:
        lines += ["", f"No small model runs of {', '.join(row.name for row in left)}."]
    return lines


def _cells(row: RowResult) -> list[str]:
    verdicts = {contender: summary(row, contender) for contender in CONTENDERS}
    statuses = [_status(row, contender, verdict) for contender, verdict in verdicts.items()]
    made = next((each for each in row.outcomes if each.pieces), None)
    if row.source in LISTS and LISTS[row.source].everywhere:
        made = None  # the counts of so many unlike models tell little
    counts = [str(getattr(made, name) or "") if made else "" for name in _COUNTS]
    return [row.name, row.kind, *statuses, *counts, cell(_note(verdicts))]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; rows that differ only in their first cell are one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        alike.setdefault(tuple(cells), []).append(name)
    found = ((", ".join(names), *cells) for cells, names in alike.items())
    lines = (header, ["---"] * len(header), *found)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _status(row: RowResult, contender: str, verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    found = [each.verdicts[contender] for each in row.outcomes if contender in each.verdicts]
    same = sum(each.status == verdict.status for each in found)
    return verdict.status if same == len(found) else f"{verdict.status} ({same} of {len(found)})"


def _note(verdicts: dict[str, Verdict | None]) -> str:
    """The first reason: piecework's own, else a splitting op's or a capture's, else stock's."""
    for contender in ("piecework", "split", "captured", "stock"):
        verdict = verdicts[contender]
        if verdict is not None and verdict.why:
            return verdict.why if contender == "piecework" else f"{contender}: {verdict.why}"
    ours = verdicts["piecework"]
    return f"batch 0: {ours.zero}" if ours is not None and ours.zero not in ("", "equal") else ""


_FOLDERS = re.compile(r"(?<![\w.])(?:/[\w.-]+)+/(?=[\w.-]+)")  # of files that a message names


def cell(text: str) -> str:
    """``text`` for a cell of a table."""
    return (
        _FOLDERS.sub("", text.partition(" Hint:")[0])
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("\n", " ")[:240]
    )
