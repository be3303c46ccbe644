"""The table as a page. In: what became of each row. Out: Markdown, the same for the same results.

Figures are counted here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from piecework.bench.lists.isolated import RowResult
from piecework.bench.lists.trial import STATUSES, Verdict

CONTENDERS = ("stock", "piecework", "split", "captured")


def summary(row: RowResult, contender: str) -> Verdict | None:
    """The worst of a row's samples for one contender; None if it tried none."""
    found = [each.verdicts[contender] for each in row.outcomes if contender in each.verdicts]
    return max(found, key=lambda each: STATUSES.index(each.status), default=None)


def behind(row: RowResult) -> list[str]:
    """What stock serves in this row and piecework doesn't, or a splitting op or a capture breaks: one line each.

    A capture may be refused by name; it may not be wrong.
    """
    found = []
    for outcome in row.outcomes:
        stock = outcome.verdicts.get("stock")
        served = stock is None or stock.status == "equal"
        for contender, verdict in outcome.verdicts.items():
            if contender == "stock" or verdict.status == "equal":
                continue
            if (contender, verdict.status) == ("captured", "refused"):
                continue
            if served or contender != "piecework":
                label = f" sample {outcome.label}" if outcome.label else ""
                found.append(
                    f"{row.source}: {row.name}{label}: {contender} {verdict.status}: {verdict.why}"
                )
    return found


def markdown(rows: Sequence[RowResult], settings: Iterable[str]) -> str:
    """The page: how it was made, a line per list, and a table per list with a reason for what isn't equal."""
    tried = [row for row in rows if row.outcomes]
    lines = [
        "# Ordinary models",
        "",
        "Written by `piecework bench models --page docs/models.md`; don't edit it. Each model is run eagerly, by "
        "`torch.compile(fullgraph=True)` (*stock*) and by `piecework.compile` with the default configuration, at the example's "
        "batch size, 1, 2, 5, and 0 where the model itself can. *Equal* means: every output and every argument written in place "
        "has eager's values (by torch's tolerance for the dtype, or as near as stock), dtype, shape and structure, and eager's "
        "strides where stock has them. *split* is the same cut at the operator in the middle of its graph, *captured* that with "
        "static graphs for 1, 2, 4 and 8; every third model is tried so.",
        "",
        *[f"- {line}" for line in settings],
        "",
        "| list | models | samples | stock equal | piecework equal | split equal | captured equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for source in dict.fromkeys(row.source for row in tried):
        lines.append(_totals(source, [row for row in tried if row.source == source]))
    missing = [line for row in tried for line in behind(row)]
    lines += ["", "## What stock serves and piecework does not", ""]
    lines += [f"- {cell(line)}" for line in missing] or ["Nothing."]
    for source in dict.fromkeys(row.source for row in tried):
        lines += _table(source, [row for row in tried if row.source == source])
    left = [row for row in rows if not row.outcomes]
    if left:
        lines += ["", "## Not tried", ""]
        lines += [f"- {row.source}: {row.name}: {cell(row.problem or 'no sample')}" for row in left]
    return "\n".join(lines) + "\n"


def _totals(source: str, rows: Sequence[RowResult]) -> str:
    cells = [source, str(len(rows)), str(sum(len(row.outcomes) for row in rows))]
    for contender in CONTENDERS:
        found = [summary(row, contender) for row in rows]
        tried = [each for each in found if each is not None]
        equal = sum(each.status == "equal" for each in tried)
        cells.append(f"{equal} of {len(tried)}" if tried else "")
    return f"| {' | '.join(cells)} |"


def _table(source: str, rows: Sequence[RowResult]) -> list[str]:
    found = []
    for row in rows:
        verdicts = {contender: summary(row, contender) for contender in CONTENDERS}
        statuses = [_status(row, contender, verdict) for contender, verdict in verdicts.items()]
        found.append([row.name, row.kind, *statuses, cell(_note(verdicts))])
    return ["", f"## {source}", "", *table(("models", "kind", *CONTENDERS, "note"), found)]


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
