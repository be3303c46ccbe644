"""Metrics. In: what models counted of their calls, what their graphs hold, and the process's counters. Out: plain values, and the same as Prometheus text.

It counts nothing itself and is asked for, so calls pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from piecework.runtime.graphs.serve.report import CallRow
from piecework.runtime.observe.profile import StageRow

#: What an HTTP answer with the text says of itself.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_Labels = tuple[tuple[str, str], ...]
_FAMILIES = {
    "steps_total": "Calls, by what they ran as and why.",
    "padding_rows_total": "Rows that calls were padded by.",
    "graph_bytes": "Memory that a static graph added.",
    "traces": "Traces that serve the model.",
    "compile_seconds_total": "Time that compiling took, by phase.",
    "stage_seconds": "Host time of one profiled forward, by stage.",
    "stage_device_seconds": "Device time of one profiled forward, by stage.",
}


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """One model.

    Attributes:
        name: what tells it from others.
        calls: what its calls ran as, how many, and by how many rows they were padded; since the last `StitchedModule.capture`, if there was one.
        graph_bytes: mode and graph → memory that the graph added.
        traces: how many traces serve it; one more means that a call's sizes were traced and compiled meanwhile.
        phase_seconds: phase of compilation → seconds, over all traces.
        stages: where a forward spends its time; empty unless a profile was given.
    """

    name: str
    calls: tuple[CallRow, ...]
    graph_bytes: Mapping[tuple[str, str], int]
    traces: int
    phase_seconds: Mapping[str, float]
    stages: tuple[StageRow, ...] = ()


@dataclass(frozen=True, slots=True)
class Metrics:
    """What one or more models did; ``a + b`` are those of both.

    Attributes:
        models: one for each model.
        process: `piecework.counters`, which all models of the process share.

    Example:
        >>> text = (target.metrics(name="target") + draft.metrics(name="draft")).prometheus()
    """

    models: tuple[ModelMetrics, ...]
    process: Mapping[str, int]

    def __add__(self, other: Metrics) -> Metrics:
        latest = {name: max(n, other.process.get(name, n)) for name, n in self.process.items()}
        return Metrics((*self.models, *other.models), latest)

    def prometheus(self) -> str:
        """All of it in Prometheus' text exposition format; times are in seconds.

        Models of one name are one: their values are added up.
        """
        samples: dict[str, dict[_Labels, float]] = {}
        for name, labels, value in self._samples():
            family = samples.setdefault(name, {})
            family[labels] = family.get(labels, 0) + value
        order = [*_FAMILIES, *(name for name in samples if name not in _FAMILIES)]
        return "".join(_text_of_family(name, samples[name]) for name in order if name in samples)

    def _samples(self) -> Iterator[tuple[str, _Labels, float]]:
        for each in self.models:
            model = ("model", each.name)
            for row in each.calls:
                labels = (model, ("mode", row.mode), ("graph", row.graph), ("reason", row.reason))
                yield "steps_total", labels, row.calls
                yield "padding_rows_total", labels, row.padding
            for (mode, graph), size in each.graph_bytes.items():
                yield "graph_bytes", (model, ("mode", mode), ("graph", graph)), size
            yield "traces", (model,), each.traces
            for phase, seconds in each.phase_seconds.items():
                yield "compile_seconds_total", (model, ("phase", phase)), seconds
            for stage in each.stages:
                here = (model, ("stage", stage.name))
                yield "stage_seconds", here, stage.microseconds / 1e6
                yield "stage_device_seconds", here, stage.device_microseconds / 1e6
        for name, count in self.process.items():
            yield f"{name.removeprefix('num_')}_total", (), count


def _text_of_family(name: str, samples: Mapping[_Labels, float]) -> str:
    """One metric with all its samples, which the format wants in one place."""
    kind = "counter" if name.endswith("_total") else "gauge"
    counter = "A counter of this process, as in piecework.counters."
    lines = [
        f"# HELP piecework_{name} {_FAMILIES.get(name, counter)}",
        f"# TYPE piecework_{name} {kind}",
        *(f"piecework_{name}{_text_of(labels)} {value}" for labels, value in samples.items()),
    ]
    return "\n".join(lines) + "\n"


def _text_of(labels: _Labels) -> str:
    return "{" + ",".join(f'{k}="{_escaped(v)}"' for k, v in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
