"""The page of a dump. In: the pieces of one compilation, their times and the emitted source. Out: one HTML file that needs no other to be read.

It reads no files and decides nothing about the compilation; geometry is here, looks are in the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from piecework.codegen import StitchedSource
from piecework.codegen.plan.render import environment
from piecework.runtime.observe.highlight import line_html, token_styles

TEMPLATE = "dump.html.jinja"


@dataclass(frozen=True, slots=True)
class Step:
    """One submodule of the stitching graph, in order.

    ``operators`` is "" for a piece; so is ``node``, which else is what the emitted statement says it stands for.
    """

    name: str
    operators: str
    modules: str
    node: str


@dataclass(frozen=True, slots=True)
class RangeCell:
    """A piece's compiled form for one batch range.

    Attributes:
        batches: the range.
        seconds: in the compiler.
        origin: ``compiled``, ``cache``, or the piece that it is shared with.
        code: the file of what Inductor wrote; "" if there is none.
    """

    batches: str
    seconds: float
    origin: str
    code: str


@dataclass(frozen=True, slots=True)
class PieceRow:
    """One piece. ``key`` is "" and ``ranges`` empty until it is compiled; ``same_as`` names the equal piece before it."""

    name: str
    key: str
    modules: str
    graph: str
    ranges: tuple[RangeCell, ...] = ()
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows."""

    model: str
    place: str
    versions: str
    failure: str
    stages: tuple[str, ...]
    phases: Mapping[str, float]
    steps: tuple[Step, ...]
    rows: tuple[PieceRow, ...]
    source: StitchedSource | None


def render_page(page: Page) -> str:
    """``page`` as HTML."""
    letters = _letters(page.rows)
    compiled = [row for row in page.rows if row.key]
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            model=page.model,
            place=page.place,
            versions=page.versions,
            failure=page.failure,
            headline=_headline(page, len(compiled), len({row.key for row in compiled})),
            stages=[{"file": name, "says": _SAYS.get(name, "")} for name in page.stages],
            phases=_bars(page.phases),
            map=_Map(page, letters).layout(),
            rows=[_row(row, letters) for row in page.rows],
            lines=[] if page.source is None else _coloured(page.source.code),
        )
    )


_SAYS = {
    "00_config.json": "the configuration",
    "01_captured.py": "the captured graph",
    "02_split.py": "the stitching graph and its submodules",
    "03_plan.txt": "the plan of the source, statement by statement",
    "04_stitched.py": "the emitted source, as it runs",
    "times.json": "seconds per phase and piece",
}


def _headline(page: Page, compiled: int, unique: int) -> str:
    outside = sum(bool(step.operators) for step in page.steps)
    if not page.steps:
        return "not split yet"
    total = len(page.rows)
    done = f"{unique} different" if compiled == total else f"{compiled} of them compiled"
    pieces, cuts = (
        f"{n} {noun}{'' if n == 1 else 's'}"
        for n, noun in ((total, "piece"), (outside, "splitting submodule"))
    )
    return f"{pieces}, {done}, between {cuts}"


def _coloured(code: str) -> list[Markup]:
    lines = code.splitlines()
    return [line_html(*each) for each in zip(lines, token_styles(code), strict=True)]


def _letters(rows: Sequence[PieceRow]) -> dict[str, str]:
    """A short name for each different program, in order: A to Z, then AA and so on."""
    keys = dict.fromkeys(row.key for row in rows if row.key)
    return {key: _letter(index) for index, key in enumerate(keys)}


def _letter(index: int) -> str:
    text = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        text = chr(ord("A") + rest) + text
    return text


def _tint(letter: str) -> str:
    """The style of a program; the letter tells programs apart where styles repeat."""
    return f"tint{(sum(map(ord, letter)) - ord('A')) % 4}" if letter else "pending"


def _bars(phases: Mapping[str, float]) -> list[dict[str, object]]:
    longest = max(phases.values(), default=0.0) or 1.0
    return [
        {"name": name, "seconds": _seconds(value), "share": round(100 * value / longest, 1)}
        for name, value in phases.items()
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _row(row: PieceRow, letters: Mapping[str, str]) -> dict[str, object]:
    letter = letters.get(row.key, "")
    return {
        "name": row.name,
        "letter": letter,
        "tint": _tint(letter),
        "key": row.key,
        "short_key": row.key[:12],
        "modules": row.modules,
        "graph": row.graph,
        "same_as": row.same_as,
        "span": 1 if row.same_as else max(1, len(row.ranges)),
        "batches": ", ".join(cell.batches for cell in row.ranges),
        "ranges": [
            {
                "batches": cell.batches,
                "seconds": _seconds(cell.seconds) if cell.origin in ("compiled", "cache") else "",
                "origin": cell.origin,
                "code": cell.code,
            }
            for cell in row.ranges
        ],
    }


# --- the piece map -----------------------------------------------------------------------------------

_STEP = 34
_BOX = 26
_LEFT = 8
_WIDTH = 300
_TOP = 10
_ROUND_INSET = 30
_TEXT = _LEFT + _WIDTH + 16
_TOTAL = 820
_MAX_LABEL = 26
_MAX_MODULES = 62
_LONGEST_PERIOD = 8
_FOLD_FROM = 5  # repetitions; two are shown before the fold and one after it


class _Map:
    """Places one box per step from top to bottom; repeated layers are folded."""

    def __init__(self, page: Page, letters: Mapping[str, str]) -> None:
        self.steps = page.steps
        self.rows = {row.name: row for row in page.rows}
        self.letters = letters
        self.lines = _source_lines(page)

    def layout(self) -> dict[str, object]:
        boxes: list[dict[str, object]] = []
        folds: list[dict[str, object]] = []
        y = _TOP
        for item in self._folded():
            if isinstance(item, Step):
                boxes.append(self._box(item, y))
            else:
                folds.append({"y": y + _BOX // 2 + 4, "text": item})
            y += _STEP
        return {
            "boxes": boxes,
            "folds": folds,
            "width": _TOTAL,
            "height": y + 2,
            "center": _LEFT + _WIDTH // 2,
            "top": _TOP,
            "bottom": max(_TOP, y - _STEP + _BOX),
            "description": f"{len(self.steps)} steps from top to bottom, {len(self.rows)} of them compiled pieces",
        }

    def _folded(self) -> list[Step | str]:
        marks = [self._mark(step) for step in self.steps]
        found: list[Step | str] = []
        at = 0
        while at < len(marks):
            period, count = _repetition(marks, at)
            if count < _FOLD_FROM:
                found.append(self.steps[at])
                at += 1
                continue
            found += self.steps[at : at + 2 * period]
            what = ", ".join(marks[at : at + period])
            found.append(f"{count - 3} more times: {what}")
            found += self.steps[at + (count - 1) * period : at + count * period]
            at += count * period
        return found

    def _mark(self, step: Step) -> str:
        row = self.rows.get(step.name)
        if row is None:
            return step.operators
        return self.letters.get(row.key, step.name)

    def _box(self, step: Step, y: int) -> dict[str, object]:
        row = self.rows.get(step.name)
        inset = 0 if row else _ROUND_INSET
        letter = self.letters.get(row.key, "") if row else ""
        line = self.lines.get(step.name)
        label = step.name if row else step.operators
        return {
            "tint": _tint(letter) if row else "outside",
            "x": _LEFT + inset,
            "y": y,
            "width": _WIDTH - 2 * inset,
            "height": _BOX,
            "radius": 3 if row else _BOX // 2,
            "baseline": y + _BOX // 2 + 4,
            "label": _shortened(label, _MAX_LABEL),
            "label_x": _LEFT + inset + (36 if row else 14),
            "letter": letter,
            "letter_x": _LEFT + 12,
            "detail": self._detail(row) if row else "",
            "detail_x": _LEFT + _WIDTH - 10,
            "modules": _shortened(step.modules, _MAX_MODULES),
            "modules_x": _TEXT,
            "title": f"{step.name}: {step.operators or 'a piece'}"
            + (f" ({step.modules})" if step.modules else ""),
            "target": f"piece-{step.name}" if row else (f"L{line}" if line else "stages"),
        }

    @staticmethod
    def _detail(row: PieceRow) -> str:
        if row.same_as:
            return f"= {row.same_as}"
        if not row.ranges:
            return "not compiled"
        text = _seconds(sum(cell.seconds for cell in row.ranges))
        return f"cache, {text}" if all(cell.origin == "cache" for cell in row.ranges) else text


def _repetition(marks: Sequence[str], at: int) -> tuple[int, int]:
    """The period and count, of those that begin at ``at``, that cover most; (0, 0) if nothing repeats."""
    best = (0, 0)
    for period in range(1, min(_LONGEST_PERIOD, len(marks) - at) + 1):
        block = marks[at : at + period]
        count = 1
        while marks[at + count * period : at + (count + 1) * period] == block:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]}…{text[1 - length // 2:]}"


def _source_lines(page: Page) -> dict[str, int]:
    """Step outside the pieces → the first line of its statement; both are in the same order."""
    if page.source is None:
        return {}
    statements = iter(sorted(page.source.lines.items()))
    found: dict[str, int] = {}
    for step in filter(lambda each: each.node, page.steps):
        line = next((n for n, origin in statements if origin.node == step.node), None)
        if line is None:
            break
        found[step.name] = line
    return found
