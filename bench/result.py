"""What a benchmark found. In: rows of figures and the targets they are held to. Out: a table, a JSON file and a plot.

It measures nothing and rounds nothing away: the JSON holds every figure that the table was made from.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

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


_PER_LINE = 6  # settings beside each other


def _plot(result: Result, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys(tuple(row.setting.items()) for row in result.rows))
    contenders = list(dict.fromkeys(row.contender for row in result.rows))
    colours = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(contenders)}
    lines = [settings[i : i + _PER_LINE] for i in range(0, len(settings), _PER_LINE)]
    figure, grid = pyplot.subplots(
        len(lines), figsize=(10.0, 1.5 + 3.0 * len(lines)), sharey=True, squeeze=False
    )
    times = [row.seconds for row in result.rows]
    for axes, line in zip(grid[:, 0], lines, strict=True):
        for place, setting in enumerate(line):
            found = [row for row in result.rows if tuple(row.setting.items()) == setting]
            width = 0.8 / len(found)
            for number, row in enumerate(found):
                axes.bar(
                    place + (number - (len(found) - 1) / 2) * width,
                    row.seconds * _SCALE[result.unit],
                    width,
                    color=colours[row.contender],
                )
        labels = ["\n".join(f"{key} {value}" for key, value in setting) for setting in line]
        axes.set_xticks(range(len(line)), labels, fontsize=7)
        axes.set_xlim(-0.6, len(lines[0]) - 0.4)
        axes.set_ylabel(result.unit)
        if max(times) > 20 * min(
            times
        ):  # bars from zero are fairer, as long as all of them are seen
            axes.set_yscale("log")
    grid[0, 0].set_title(result.title)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), fontsize=7, loc="lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.25 / len(lines) if len(contenders) > 5 else 0.06, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
