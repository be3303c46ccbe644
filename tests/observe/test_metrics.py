"""Metrics of a model: what is counted anyway, as values and as Prometheus text."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import EAGER, Block, Layers, mix_pair

import piecework
from piecework.errors import BindError, InputError
from piecework.runtime.graphs.serve.metrics import Metrics, ModelMetrics
from piecework.runtime.graphs.serve.report import CallRow
from piecework.runtime.stitched import StitchedModule

SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)+\})? (\S+)'
)
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"')


def parsed(text: str) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """Metric → labels → value, by the rules of the text format: HELP and TYPE first."""
    assert text.endswith("\n")
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    kinds: dict[str, str] = {}
    helped: list[str] = []
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name, _, description = line.removeprefix("# HELP ").partition(" ")
            assert description and name not in helped
            helped.append(name)
        elif line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            kinds[name] = kind
            assert name == helped[-1] and kind in ("counter", "gauge")
        else:
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            name, labels, value = match.groups()
            assert name == helped[-1] and (kinds[name] == "counter") == name.endswith("_total")
            # What is escaped in a label is escaped so in JSON.
            key = frozenset((k, json.loads(f'"{v}"')) for k, v in LABEL.findall(labels or ""))
            assert key not in found.setdefault(name, {}), f"{line} is there twice"
            found[name][key] = float(value)
    return found


@pytest.fixture(scope="module")
def compiled() -> StitchedModule:
    model = Layers(Block(mix_pair) for _ in range(2))
    return piecework.compile(model.eval(), (torch.randn(4, 8),), config=EAGER)


@pytest.fixture
def captured(compiled: StitchedModule) -> StitchedModule:
    return compiled.capture([2, 4], progress=False, estimate=False)


def by_label(samples: dict[frozenset[tuple[str, str]], float], label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in samples.items():
        found[dict(key)[label]] = found.get(dict(key)[label], 0) + value
    return found


def test_steps_and_padding_by_mode(captured: StitchedModule) -> None:
    for size in (1, 2, 3, 4, 3, 9):
        captured(torch.randn(size, 8))
    [model] = captured.metrics().models
    assert sum(row.calls for row in model.calls) == sum(r.calls for r in captured.call_report())
    found = parsed(captured.metrics().prometheus())
    steps, padding = found["piecework_steps_total"], found["piecework_padding_rows_total"]
    assert by_label(steps, "graph") == {"tokens=2": 2, "tokens=4": 3, "": 1}
    assert by_label(steps, "mode") == {"PIECEWISE": 5, "NONE": 1}
    assert by_label(padding, "graph") == {"tokens=2": 1, "tokens=4": 2, "": 0}
    assert by_label(steps, "model") == {"Layers": 6}
    assert {dict(key)["reason"] for key in steps} == {row.reason for row in captured.call_report()}
    held = by_label(found["piecework_graph_bytes"], "graph")
    assert sum(held.values()) == captured.memory_report().total
    assert set(held) == {"tokens=2", "tokens=4"}


def test_the_process_and_the_compilation_are_counted(compiled: StitchedModule) -> None:
    found = parsed(compiled.metrics().prometheus())
    for name, count in piecework.counters.snapshot().items():
        assert found[f"piecework_{name.removeprefix('num_')}_total"] == {frozenset(): count}
    assert by_label(found["piecework_traces"], "model") == {"Layers": len(compiled.traces)}
    phases = by_label(found["piecework_compile_seconds_total"], "phase")
    assert {"capture", "split", "compile", "emit"} <= set(phases)
    assert phases["split"] == sum(each.program.phases["split"] for each in compiled.traces)


def counted(stitched: StitchedModule) -> dict[tuple[str, str, str], int]:
    [of_model] = stitched.metrics().models
    return {(row.mode, row.graph, row.reason): row.calls for row in of_model.calls}


def linear() -> StitchedModule:
    return piecework.compile(torch.nn.Linear(8, 8).eval(), (torch.randn(4, 8),), config=EAGER)


def test_calls_of_a_model_that_nothing_is_captured_of_are_counted() -> None:
    stitched, nothing = linear(), ("NONE", "", "nothing is captured")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda size: stitched(torch.randn(2 + size % 3, 8)), range(40)))
    with pytest.raises(InputError):
        stitched(torch.randn(2, 9))  # nothing ran
    assert counted(stitched) == {nothing: 40}
    stitched.rebind()
    stitched(torch.randn(2, 8))
    assert counted(stitched) == {nothing: 41}
    stitched.capture([2], progress=False)(torch.randn(2, 8))
    assert counted(stitched) == {("PIECEWISE", "tokens=2", "its size is captured"): 1}
    stitched.sleep()
    stitched(torch.randn(2, 8))
    assert counted(stitched) == {nothing: 1}


def test_times_of_pieces_are_there_when_asked_for(captured: StitchedModule) -> None:
    profile = captured.profile(torch.randn(4, 8), profiled_calls=2)
    found = parsed(captured.metrics(profile=profile).prometheus())
    host = by_label(found["piecework_stage_seconds"], "stage")
    assert host == {row.name: row.microseconds / 1e6 for row in profile.rows}
    pieces = [each for each in host if each.startswith("replay submod_")]
    assert any("layers.0" in each for each in pieces) and any("layers.1" in e for e in pieces)
    assert "mix" in host and "stage inputs" in host and all(t > 0 for t in host.values())
    assert "piecework_stage_seconds" not in captured.metrics().prometheus()


def test_several_models_make_one_text(captured: StitchedModule) -> None:
    other = linear()
    captured(torch.randn(2, 8))
    both = captured.metrics(name="target") + other.metrics(name="draft")
    found = parsed(both.prometheus())
    assert set(by_label(found["piecework_traces"], "model")) == {"target", "draft"}
    counts = piecework.counters.snapshot()
    assert found["piecework_models_seen_total"] == {frozenset(): counts["num_models_seen"]}
    # Of one name, they are one: a sample may be there once only.
    one = captured.metrics(name="x")
    once, twice = (parsed(m.prometheus())["piecework_steps_total"] for m in (one, one + one))
    assert twice == {key: 2 * n for key, n in once.items()}


def test_labels_are_escaped() -> None:
    name = 'a "quoted" \\ path\nand a line, {of=1}'
    row = CallRow("NONE", "", "b\\n", 3)
    text = Metrics((ModelMetrics(name, (row,), {}, 1, {}),), {}).prometheus()
    [[labels, steps]] = parsed(text)["piecework_steps_total"].items()
    assert dict(labels) == {"model": name, "mode": "NONE", "graph": "", "reason": "b\\n"}
    assert steps == 3


def test_a_model_that_was_never_called_has_no_calls() -> None:
    with pytest.raises(BindError, match="nothing is captured"):
        piecework.compile(torch.nn.Linear(8, 8)).call_report()
