"""The results of a run as a page: the same Markdown for the same results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from piecework.bench.lists.catalogue import LISTS
from piecework.bench.lists.isolated import RowResult
from piecework.bench.lists.trial import CONTENDERS, STATUSES, Verdict

_COUNTS = ("way", "pieces", "unique", "traces")


def behind(row: RowResult) -> list[str]:
    """What stock serves in this row and piecework doesn't, or a splitting op or a capture breaks.

    Where stock was not tried, what is refused by name counts as refused by it too. A capture may be refused by name; it may not be wrong.
    """
    found = []
    stock = row.outcome.verdicts.get("stock")
    for contender, verdict in row.outcome.verdicts.items():
        if contender == "stock" or verdict.status == "equal":
            continue
        if verdict.status == "refused" and (contender == "captured" or stock is None):
            continue
        if stock is None or stock.status == "equal" or contender != "piecework":
            found.append(f"{row.source}: {row.name}: {contender} {verdict.status}: {verdict.why}")
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
    tried = [row for row in rows if row.outcome.verdicts]
    lines = [
        "",
        f"## {source}",
        "",
        f"Of {len(rows)} models {len(tried)} run. Of those that were tried:",
    ]
    for contender in CONTENDERS:
        found = (row.outcome.verdicts.get(contender) for row in tried)
        counts = Counter(each.status for each in found if each)
        if counts:
            said = ", ".join(f"{counts[each]} {each}" for each in STATUSES if counts[each])
            lines.append(f"{contender} {said}; ")
    lines[-1] = lines[-1].removesuffix("; ") + "."
    columns = ["models", "kind", *CONTENDERS, *_COUNTS, "note"]
    cells = [_cells(row) for row in tried]
    shown = [n for n in range(len(columns)) if not cells or any(row[n] for row in cells)]
    lines += ["", *table([columns[n] for n in shown], ([row[n] for n in shown] for row in cells))]
    left = [row for row in rows if row not in tried]
    if left:
        lines += ["", f"No small model runs of {', '.join(row.name for row in left)}."]
    return lines


def _cells(row: RowResult) -> list[str]:
    made = row.outcome
    statuses = [made.verdicts[each].status if each in made.verdicts else "" for each in CONTENDERS]
    # The counts of many unlike models tell little.
    counted = made.pieces and not (row.source in LISTS and LISTS[row.source].everywhere)
    counts = [str(getattr(made, name) or "") if counted else "" for name in _COUNTS]
    return [row.name, row.kind, *statuses, *counts, cell(_note(made.verdicts))]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; rows that differ only in their first cell are one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        alike.setdefault(tuple(cells), []).append(name)
    found = ((", ".join(names), *cells) for cells, names in alike.items())
    lines = (header, ["---"] * len(header), *found)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _note(verdicts: Mapping[str, Verdict]) -> str:
    """The first reason: piecework's own, else a splitting op's or a capture's, else stock's."""
    for contender in ("piecework", "split", "captured", "stock"):
        if contender in verdicts and (why := verdicts[contender].why):
            return why if contender == "piecework" else f"{contender}: {why}"
    zero = verdicts["piecework"].zero if "piecework" in verdicts else ""
    return f"batch 0: {zero}" if zero not in ("", "equal") else ""


_FOLDERS = re.compile(r"(?<![\w.])(?:/[\w.-]+)+/(?=[\w.-]+)")  # of files that a message names


def cell(text: str) -> str:
    """``text`` for a cell of a table."""
    return (
        _FOLDERS.sub("", text.partition(" Hint:")[0])
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("\n", " ")[:240]
    )
