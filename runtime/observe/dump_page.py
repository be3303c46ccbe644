"""The page of a dump: one HTML file with the stages, the times, a map of the pieces and the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from piecework.codegen import StitchedSource
from piecework.codegen.plan.render import environment

_SAYS = {
    "00_config.json": "the configuration",
    "01_captured.py": "the captured graph",
    "02_split.py": "the stitching graph and its submodules",
    "03_plan.txt": "the plan of the source, statement by statement",
    "04_stitched.py": "the emitted source, as it runs",
    "times.json": "seconds per phase and piece",
}


@dataclass(slots=True)
class RangeCell:
    """A piece's compiled form for one batch range.

    ``origin`` is ``compiled``, ``cache``, or the piece that it is shared with; ``code`` the file of
    what Inductor wrote, "" if there is none.
    """

    batches: str
    seconds: float
    origin: str
    code: str = ""


@dataclass(slots=True)
class Step:
    """One submodule of the stitching graph, in order.

    Attributes:
        name: the submodule.
        modules: the model's modules that it holds.
        operators: what runs here outside the pieces; "" for a piece.
        node: what the emitted statement says it stands for; "" for a piece.
        graph: the file of a piece's graph.
        key: equal for equal programs; "" until the piece is compiled.
        same_as: the equal piece before this one.
        ranges: the compiled forms.
    """

    name: str
    modules: str
    operators: str = ""
    node: str = ""
    graph: str = ""
    key: str = ""
    same_as: str = ""
    ranges: list[RangeCell] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Page:
    """What the page shows."""

    model: str
    place: str
    versions: str
    failure: str
    stages: Sequence[str]
    phases: Mapping[str, float]
    steps: Sequence[Step]
    source: StitchedSource | None


def render_page(page: Page) -> str:
    """``page`` as HTML that needs no other file to be read."""
    # It brings a lexer, which a process that dumps nothing needs not load.
    from piecework.runtime.observe.highlight import line_html, token_styles

    pieces = [step for step in page.steps if step.graph]
    keys = list(dict.fromkeys(piece.key for piece in pieces if piece.key))
    numbers = {key: number for number, key in enumerate(keys, 1)}
    code = "" if page.source is None else page.source.code
    return (
        environment()
        .get_template("dump.html.jinja")
        .render(
            model=page.model,
            place=page.place,
            versions=page.versions,
            failure=page.failure,
            headline=_headline(page, pieces, len(keys)),
            stages=[{"file": name, "says": _SAYS.get(name, "")} for name in page.stages],
            phases={name: _seconds(value) for name, value in page.phases.items()},
            boxes=_boxes(page, numbers),
            rows=[_row(piece, numbers) for piece in pieces],
            lines=[
                line_html(*each) for each in zip(code.splitlines(), token_styles(code), strict=True)
            ],
        )
    )


def _headline(page: Page, pieces: Sequence[Step], unique: int) -> str:
    if not page.steps:
        return "not split yet"
    compiled = sum(bool(piece.key) for piece in pieces)
    done = f"{unique} different" if compiled == len(pieces) else f"{compiled} of them compiled"
    counts = (len(pieces), "piece"), (len(page.steps) - len(pieces), "splitting submodule")
    total, cuts = (f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    return f"{total}, {done}, between {cuts}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _tint(number: int | None) -> str:
    """The style of a program; its number tells programs apart where styles repeat."""
    return f"tint{number % 4}" if number else "pending"


def _row(piece: Step, numbers: Mapping[str, int]) -> dict[str, object]:
    number = numbers.get(piece.key)
    shown = [
        asdict(cell)
        | {"seconds": _seconds(cell.seconds) if cell.origin in ("compiled", "cache") else ""}
        for cell in piece.ranges
    ]
    return {
        "name": piece.name,
        "number": number,
        "tint": _tint(number),
        "key": piece.key[:12],
        "modules": piece.modules,
        "graph": piece.graph,
        "same_as": piece.same_as,
        "ranges": shown,
    }


def _boxes(page: Page, numbers: Mapping[str, int]) -> list[dict[str, object]]:
    """The map: one box per step, from top to bottom; a piece is square, the rest round."""
    lines = _source_lines(page)
    boxes: list[dict[str, object]] = []
    for place, step in enumerate(page.steps):
        number, line = numbers.get(step.key), lines.get(step.name)
        outside = f"L{line}" if line else "stages"
        boxes.append(
            {
                "kind": _tint(number) if step.graph else "outside",
                "top": 34 * place,
                "text_top": 34 * place + 17,
                "radius": 3 if step.graph else 13,
                "label": f"{number or ''} {step.name}" if step.graph else step.operators,
                "detail": _detail(step) if step.graph else "",
                "modules": step.modules,
                "target": f"piece-{step.name}" if step.graph else outside,
            }
        )
    return boxes


def _detail(piece: Step) -> str:
    if piece.same_as:
        return f"= {piece.same_as}"
    if not piece.ranges:
        return "not compiled"
    return _seconds(sum(cell.seconds for cell in piece.ranges))


def _source_lines(page: Page) -> dict[str, int]:
    """Step outside the pieces → the first line of its statement; both are in the same order."""
    statements = iter(sorted(page.source.lines.items())) if page.source is not None else iter(())
    found: dict[str, int] = {}
    for step in filter(lambda each: each.node, page.steps):
        line = next((n for n, origin in statements if origin.node == step.node), None)
        if line is None:
            break
        found[step.name] = line
    return found
