"""What a benchmark found.

It measures nothing and rounds nothing away: the JSON holds every figure that the table was made from.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One contender in one setting."""

    setting: dict[str, object]  # what varies, such as ``{"layers": 32, "batch": 4}``
    contender: str  # its name
    seconds: float  # time of one call in the fastest round
    ratios: dict[str, float] = field(default_factory=dict)  # reference → how many times its time
    note: str = ""  # what to know about the figure


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of PERFORMANCE.md's kind, and what was measured."""

    name: str  # its identifier, such as ``B1``
    text: str  # what is compared
    bound: float  # the target
    measured: float  # the figure
    # True if ``measured`` must not exceed ``bound``, False if it must reach it
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


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

    def save(self, folder: Path, stem: str) -> list[Path]:
        """Write ``stem.json`` and, where matplotlib is installed, ``stem.png``."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / f"{stem}.json"]
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        data = {**asdict(self), "targets": targets}
        written[0].write_text(json.dumps(data, indent=2) + "\n")
        picture = folder / f"{stem}.png"
        if _plot(self, picture):
            written.append(picture)
        return written

    def finish(self, folder: Path | None, stem: str) -> int:
        """Print, `save` where there is a folder, and return a command's exit code."""
        self.print()
        for path in [] if folder is None else self.save(folder, stem):
            print(f"wrote {path}")
        return 0 if self.met else 1

    def print(self) -> None:
        console = Console(width=110)
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


# --- pictures ------------------------------------------------------------------------------------------

_COLUMNS = 3  # panels beside each other
_OURS, _OTHERS = "#d9480f", "#868e96"  # read on a light page and on a dark one
#: What the headline shows, in words that need no page to explain them.
_PLAIN = {
    "eager": "eager",
    "stock": "torch.compile",
    "piecework": "piecework",
    "limit": "the same kernels, called by hand",
}


def _plot(result: Result, path: Path) -> bool:
    """One panel for each setting, bars from zero."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[str, list[Row]] = {}
    for row in result.rows:
        title = ", ".join(f"{key} {value}" for key, value in row.setting.items())
        settings.setdefault(title, []).append(row)
    keys = {key for row in result.rows for key in row.setting}
    numbers = all(isinstance(value, int) for row in result.rows for value in row.setting.values())
    if len(settings) > 2 and len(keys) == 1 and numbers:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
        _lines(axes, result, *keys)
    else:
        columns = min(_COLUMNS, len(settings))
        lines = -(-len(settings) // columns)
        size = (5.0 * columns, (0.55 + 0.26 * max(map(len, settings.values()))) * lines + 0.5)
        figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False)
        for axes in grid.flat[len(settings) :]:
            axes.set_visible(False)
        for axes, (title, rows) in zip(grid.flat, settings.items(), strict=False):
            _bars(axes, {row.contender: row for row in rows}, result.unit)
            axes.set_title(title, fontsize=9, loc="left")
    figure.suptitle(f"{result.title} ({result.unit})", fontsize=10, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    chosen = {row.contender: row for row in result.rows if row.setting == result.headline}
    if chosen:
        figure, axes = pyplot.subplots(figsize=(7.2, 1.7))
        _bars(axes, {_PLAIN[each]: chosen[each] for each in _PLAIN if each in chosen}, result.unit)
        figure.tight_layout(pad=0.3)
        figure.savefig(path.with_stem(f"{path.stem}_headline"), dpi=160, transparent=True)
        pyplot.close(figure)
    return True


def _bars(axes: Any, rows: dict[str, Row], unit: str) -> None:
    """A bar for each name, with its figure behind it."""
    values = [row.seconds * _SCALE[unit] for row in rows.values()]
    ours = [row.contender.startswith("piecework") for row in rows.values()]
    bars = axes.barh([*rows], values, color=[_OURS if each else _OTHERS for each in ours])
    labels = [f"{each:,.0f}" if each >= 100 else f"{each:.3g}" for each in values]
    axes.bar_label(bars, labels, fontsize=8, padding=3, color=_OTHERS)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.15)
    axes.tick_params(labelsize=8, colors=_OTHERS, length=0)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def _lines(axes: Any, result: Result, key: str) -> None:
    """A line for each contender over the one number that varies."""
    for name in dict.fromkeys(row.contender for row in result.rows):
        rows = [row for row in result.rows if row.contender == name]
        values = [row.seconds * _SCALE[result.unit] for row in rows]
        colour = {"color": _OURS} if name == "piecework" else {}
        axes.plot([row.setting[key] for row in rows], values, marker="o", label=name, **colour)
    axes.set_xlabel(key)
    axes.set_ylabel(result.unit)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
