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
        families = [*self._families(), *_process_families(self.process)]
        return "".join(each.text() for each in families if each.samples)

    def _families(self) -> Iterator[_Family]:
        steps = _Family("piecework_steps_total", "counter", "Calls, by what they ran as and why.")
        padding = _Family(
            "piecework_padding_rows_total",
            "counter",
            "Rows that calls were padded by.",
        )
        held = _Family("piecework_graph_bytes", "gauge", "Memory that a static graph added.")
        traces = _Family("piecework_traces", "gauge", "Traces that serve the model.")
        phases = _Family(
            "piecework_compile_seconds_total", "counter", "Time that compiling took, by phase."
        )
        host = _Family(
            "piecework_stage_seconds", "gauge", "Host time of one profiled forward, by stage."
        )
        device = _Family(
            "piecework_stage_device_seconds",
            "gauge",
            "Device time of one profiled forward, by stage.",
        )
        for each in self.models:
            model = ("model", each.name)
            for row in each.calls:
                labels = (model, ("mode", row.mode), ("graph", row.graph), ("reason", row.reason))
                steps.add(labels, row.calls)
                padding.add(labels, row.padding)
            for (mode, graph), size in each.graph_bytes.items():
                held.add((model, ("mode", mode), ("graph", graph)), size)
            traces.add((model,), each.traces)
            for phase, seconds in each.phase_seconds.items():
                phases.add((model, ("phase", phase)), seconds)
            for stage in each.stages:
                here = (model, ("stage", stage.name))
                host.add(here, stage.microseconds / 1e6)
                device.add(here, stage.device_microseconds / 1e6)
        return iter((steps, padding, held, traces, phases, host, device))


class _Family:
    """One metric with all its samples, which the format wants in one place."""

    def __init__(self, name: str, kind: str, description: str) -> None:
        self._name, self._kind, self._description = name, kind, description
        self.samples: dict[_Labels, float] = {}

    def add(self, labels: _Labels, value: float) -> None:
        self.samples[labels] = self.samples.get(labels, 0) + value

    def text(self) -> str:
        lines = [
            f"# HELP {self._name} {self._description}",
            f"# TYPE {self._name} {self._kind}",
            *(f"{self._name}{_text_of(labels)} {value}" for labels, value in self.samples.items()),
        ]
        return "\n".join(lines) + "\n"


def _process_families(counts: Mapping[str, int]) -> Iterator[_Family]:
    for name, count in counts.items():
        family = _Family(
            f"piecework_{name.removeprefix('num_')}_total",
            "counter",
            f"piecework.counters.{name} of this process.",
        )
        family.add((), count)
        yield family


def _text_of(labels: _Labels) -> str:
    return "{" + ",".join(f'{k}="{_escaped(v)}"' for k, v in labels) + "}" if labels else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
