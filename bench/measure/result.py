"""What a benchmark found. In: rows of figures and the targets they are held to. Out: a table, a JSON file and a plot.

It measures nothing and rounds nothing away: the JSON holds every figure that the table was made from.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one setting.

    Attributes:
        setting: what varies, such as ``{"layers": 32, "batch": 4}``.
        contender: its name.
        seconds: time of one call in the fastest round.
        ratios: reference → how many times its time.
        note: what to know about the figure.
    """

    setting: dict[str, object]
    contender: str
    seconds: float
    ratios: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of PERFORMANCE.md's kind, and what was measured.

    Attributes:
        name: its identifier, such as ``B1``.
        text: what is compared.
        bound: the target.
        measured: the figure.
        at_most: True if ``measured`` must not exceed ``bound``, False if it must reach it.
    """

    name: str
    text: str
    bound: float
    measured: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


Setting = tuple[tuple[str, object], ...]
_SCALE = {"µs a call": 1e6, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Result:
    """All figures of one benchmark run."""

    title: str
    rows: tuple[Row, ...]
    targets: tuple[Target, ...]
    machine: dict[str, object]
    notes: tuple[str, ...] = ()
    unit: str = "µs a call"
    headline: dict[str, object] | None = None  # the setting that gets a picture of its own

    @property
    def met(self) -> bool:
        """Whether every target is met."""
        return all(target.met for target in self.targets)

    def to_json(self) -> str:
        data = asdict(self)
        for target, entry in zip(self.targets, data["targets"], strict=True):
            entry["met"] = target.met
        return json.dumps(data, indent=2) + "\n"

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write ``stem.json`` and, where matplotlib is installed, ``stem.png``; returns what was written."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{stem}.json"]
        written[0].write_text(self.to_json())
        picture = folder / f"{stem}.png"
        if _plot(self, picture):
            written.append(picture)
        return written

    def finish(self, folder: Path | None, stem: str, console: Console | None = None) -> int:
        """Print, `save` where there is a folder, and return a command's exit code: 1 if a target is missed."""
        self.print(console)
        for path in [] if folder is None else self.save(folder, stem):
            print(f"wrote {path}")
        return 0 if self.met else 1

    def print(self, console: Console | None = None) -> None:
        console = console or Console()
        console.print(self._table())
        if self.targets:
            console.print(self._target_table())
        for note in self.notes:
            console.print(note, style="dim", highlight=False)

    def _table(self) -> Table:
        settings = list(self.rows[0].setting) if self.rows else []
        references = list(dict.fromkeys(name for row in self.rows for name in row.ratios))
        table = Table(title=self.title)
        for name in settings:
            table.add_column(name, justify="right")
        table.add_column("contender", no_wrap=True)
        table.add_column(self.unit, justify="right")
        for name in references:
            table.add_column(f"× {name}", justify="right")
        with_notes = any(row.note for row in self.rows)
        if with_notes:
            table.add_column("note", style="dim")
        before: dict[str, object] | None = None
        for row in self.rows:
            if before is not None and row.setting != before:
                table.add_section()
            before = row.setting
            table.add_row(
                *(str(row.setting[name]) for name in settings),
                row.contender,
                f"{row.seconds * _SCALE[self.unit]:.1f}",
                *(_ratio_text(row.ratios.get(name)) for name in references),
                *((row.note,) if with_notes else ()),
            )
        return table

    def _target_table(self) -> Table:
        table = Table(title="targets")
        for name in ("target", "what", "bound", "measured", ""):
            table.add_column(name)
        for target in self.targets:
            sign = "≤" if target.at_most else "≥"
            table.add_row(
                target.name,
                target.text,
                f"{sign} {target.bound:g}",
                f"{target.measured:.3f}",
                "[green]met[/]" if target.met else "[red]missed[/]",
            )
        return table


def _ratio_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def machine() -> dict[str, object]:
    """What the figures depend on besides the code."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or "unknown"


_COLUMNS = 3  # panels beside each other
_OURS, _LIMIT, _OTHERS = "#d9480f", "#495057", "#adb5bd"
_LINES = ("#1971c2", "#2f9e44", "#9c36b5", "#868e96", "#0b7285")


def _plot(result: Result, path: Path) -> bool:
    """One panel for each setting, bars from zero; over three depths or more that are all that varies, a line for each contender."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = _in_order(dict.fromkeys(tuple(row.setting.items()) for row in result.rows))
    if len(settings) > 2 and all(
        len(each) == 1 and isinstance(each[0][1], int) for each in settings
    ):
        figure = _lines(result, pyplot)
    else:
        figure = _panels(result, settings, pyplot)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    if result.headline is not None:
        figure = _headline(result, pyplot)
        figure.savefig(path.with_stem(f"{path.stem}_headline"), dpi=160, transparent=True)
        pyplot.close(figure)
    return True


#: What the headline shows, in words that need no page to explain them.
_PLAIN = {
    "eager": "eager",
    "stock": "torch.compile",
    "piecework": "piecework",
    "limit": "the same kernels, called by hand",
}
_ON_BOTH = "#868e96"  # reads on a light page and on a dark one


def _headline(result: Result, pyplot: Any) -> Any:
    """Four bars of one setting, without a background."""
    rows = {row.contender: row for row in result.rows if row.setting == result.headline}
    names = [name for name in _PLAIN if name in rows]
    values = [rows[name].seconds * _SCALE[result.unit] for name in names]
    figure, axes = pyplot.subplots(figsize=(7.2, 1.7))
    colours = [_OURS if name == "piecework" else _ON_BOTH for name in names]
    bars = axes.barh([_PLAIN[name] for name in names], values, color=colours, height=0.66)
    labels = [f"{value:,.0f} {result.unit.split()[0]}" for value in values]
    axes.bar_label(bars, labels, fontsize=9, padding=4, color=_ON_BOTH)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.tick_params(labelsize=9, colors=_ON_BOTH, length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3)
    return figure


def _in_order(settings: Iterable[Setting]) -> list[Setting]:
    """``settings`` with ascending numbers, those with more words behind the others; words stay in the order in which it was measured."""
    given = list(settings)
    values = dict.fromkeys(value for each in given for _, value in each)
    first = {value: n for n, value in enumerate(values)}

    def rank(setting: Setting) -> list[float]:
        words = sum(not isinstance(value, (int, float)) for _, value in setting)
        return [words, *(n if isinstance(n, (int, float)) else first[n] for _, n in setting)]

    return sorted(given, key=rank)


def _panels(result: Result, settings: list[Setting], pyplot: Any) -> Any:
    columns = min(_COLUMNS, len(settings))
    count = -(-len(settings) // columns)
    most = max(sum(tuple(r.setting.items()) == each for r in result.rows) for each in settings)
    size = (5.0 * columns + 0.6, (0.55 + 0.26 * most) * count + 0.5)
    figure, grid = pyplot.subplots(count, columns, figsize=size, squeeze=False)
    for axes, setting in zip(grid.flat, settings, strict=False):
        rows = [row for row in result.rows if tuple(row.setting.items()) == setting]
        values = [row.seconds * _SCALE[result.unit] for row in rows]
        names = [row.contender for row in rows]
        bars = axes.barh(names, values, color=list(map(_colour, names)), height=0.72)
        axes.bar_label(
            bars, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], fontsize=7, padding=2
        )
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.15)
        axes.set_title(
            ", ".join(f"{key} {value}" for key, value in setting), fontsize=9, loc="left"
        )
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(settings) :]:
        axes.set_visible(False)
    figure.suptitle(f"{result.title} ({result.unit})", fontsize=10, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / size[1]))
    return figure


def _lines(result: Result, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    (key,) = result.rows[0].setting
    contenders = list(dict.fromkeys(row.contender for row in result.rows))
    others = iter(_LINES * len(contenders))
    for name in contenders:
        rows = [row for row in result.rows if row.contender == name]
        colour = _OURS if name.startswith("piecework") else next(others)
        style = "--" if name.startswith("piecework,") else "-"  # a variant of ours
        axes.plot(
            [row.setting[key] for row in rows],
            [row.seconds * _SCALE[result.unit] for row in rows],
            style,
            color=colour,
            marker="o",
            markersize=4,
            label=name,
        )
    axes.set_xlabel(key)
    axes.set_ylabel(result.unit)
    axes.set_ylim(bottom=0)
    axes.set_title(result.title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def _colour(contender: str) -> str:
    if contender.startswith("limit"):
        return _LIMIT
    return _OURS if contender.startswith("piecework") else _OTHERS
