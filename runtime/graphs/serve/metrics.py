"""Metrics of models and of the process: plain values, and the same as Prometheus text.

Nothing is counted here, so calls pay nothing for it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

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
        calls: what its calls ran as, since the last `StitchedModule.capture` if there was one.
        graph_bytes: mode and graph → memory that the graph added.
        traces: how many traces serve it; one more: a call's sizes were compiled meanwhile.
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

    def __add__(self, other: Self) -> Self:
        latest = {name: max(n, other.process.get(name, n)) for name, n in self.process.items()}
        return Metrics((*self.models, *other.models), latest)

    def prometheus(self) -> str:
        """All of it in Prometheus' text exposition format; models of one name are added up."""
        families: defaultdict[str, Counter[_Labels]] = defaultdict(Counter)
        for name, labels, value in self._samples():
            families[name][labels] += value  # type: ignore[assignment]
        lines = []
        for name, samples in sorted(families.items(), key=lambda pair: pair[0] not in _FAMILIES):
            kind = "counter" if name.endswith("_total") else "gauge"
            told = _FAMILIES.get(name, "A counter of this process, as in piecework.counters.")
            lines += [f"# HELP piecework_{name} {told}", f"# TYPE piecework_{name} {kind}"]
            for labels, value in samples.items():
                inner = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels)
                lines.append(f"piecework_{name}{f'{{{inner}}}' if inner else ''} {value}")
        return "".join(line + "\n" for line in lines)

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


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
