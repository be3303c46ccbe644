"""Kernels inside graphs carry layer and emitted line: through `fake_cuda`'s recorder, and on torch 2.15 through its own, over a fake of the CUDA runtime."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda
from models import EAGER, Layers
from torch import nn
from torchs_graph import RealGraphs, newer

import piecework
from piecework.runtime.observe.profile import write_trace

DEVICE = torch.device("cuda", 0)


def recorded() -> dict[int, list[dict]]:
    """Node of a graph → what torch's recorder knows of it."""
    return dict(importlib.import_module("torch.cuda._graph_annotations").get_kernel_annotations())


@piecework.splitting_op("kernel_marks::mix", rows="independent")
def mix(x: torch.Tensor, layer: str) -> torch.Tensor:
    return x * 2


@mix.register_fake
def _(x: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enter, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.kernel_marks.mix(self.enter(x), self.name)
        return x + self.leave(torch.ops.kernel_marks.mix(y, self.name))


class Stitched:
    """A model that the CUDA platform captures, under the fake; compiled before, since Dynamo would ask a real device."""

    def __init__(self) -> None:
        self.model = Layers(Layer(f"layers.{number}") for number in range(2))
        self.stitched = piecework.compile(self.model, (torch.randn(8, 4),), config=EAGER)

    def under(self, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Stitched:
        fake.install(monkeypatch)
        self.fake = fake
        return self

    def capture(self, sizes, **options):
        self.stitched.capture(sizes, progress=False, estimate=False, **options)
        return self.stitched.static_graphs

    def graphs(self) -> dict[tuple[str, int], object]:
        """The graphs that are replayed, by piece and size."""
        captures = self.stitched.static_graphs
        return {
            (wrapper.name, descriptor.num_tokens): entry.graph.require_captured()
            for wrapper in (*captures._wrapped[0], captures._whole[0])
            for descriptor, entry in wrapper.concrete_cudagraph_entries.items()
            if entry.graph is not None
        }

    def marks(self, graph) -> list[dict]:
        """What each node of ``graph`` carries where it is replayed, in order."""
        told = recorded()
        return [told[graph.exec_id << 32 | node][0] for node in range(len(graph.work))]

    def statement(self, line: int) -> str:
        return self.stitched.source.code.splitlines()[line - 1]


@pytest.fixture(scope="module")
def compiled() -> Stitched:
    return Stitched()


@pytest.fixture(params=["fake", pytest.param("torch", marks=newer)])
def on(compiled, monkeypatch, request) -> Iterator[Stitched]:
    """The model under a fake of CUDA, with a fake of torch's recorder or with its own."""
    fake = FakeCuda("2.15") if request.param == "fake" else RealGraphs()
    yield compiled.under(fake, monkeypatch)
    compiled.stitched.sleep()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"])
def test_every_kernel_of_a_graph_carries_layer_and_line(on, mode):
    static = on.capture([2, 4], mode=mode)
    assert static.report.unmarked == ""
    graphs = on.graphs()
    whole = {size: graph for (name, size), graph in graphs.items() if "whole" in name}
    pieces = {key: graph for key, graph in graphs.items() if "whole" not in key[0]}
    assert sorted(whole) == ([2, 4] if "FULL" in mode else [])
    assert len(pieces) == (0 if mode == "FULL" else 2 * len(on.stitched.source.submod_names))
    for (name, size), graph in pieces.items():
        marks = on.marks(graph)
        assert {each["graph"] for each in marks} == {f"PIECEWISE tokens={size}"}
        [line] = {each["line"] for each in marks}
        index = on.stitched.source.submod_names.index(name)
        assert f"__vllm_submods__[{index}](" in on.statement(line)
        [(said, layer)] = {(each["name"], each["layer"]) for each in marks}
        assert said == f"{name} {layer}" and "layers." in layer
    for size, graph in whole.items():
        marks = on.marks(graph)
        [told] = {each["graph"] for each in marks}
        assert told.startswith(f"FULL tokens={size} ")
        assert all("layers." in each["layer"] for each in marks)
        mixes = [each for each in marks if "mix" in each["name"]]
        assert all("mix(" in on.statement(each["line"]) for each in mixes)
        assert [each["layer"] for each in mixes] == [f"layers.{n // 2}" for n in range(4)]
    x = torch.randn(3, 4)
    torch.testing.assert_close(on.stitched(x), on.model(x))


def test_nothing_is_recorded_after_the_capture_and_what_is_given_up_leaves_no_marks(on):
    static = on.capture([2, 4], mode="FULL_AND_PIECEWISE")
    before = recorded()
    recorder = importlib.import_module("torch.cuda._graph_annotations")
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)), torch.no_grad():
        outer.capture_begin(pool=torch.cuda.graph_pool_handle())
        with recorder.mark_kernels("theirs"):
            on.stitched(torch.randn(3, 4))
        recorder.resolve_pending_annotations()
        outer.capture_end()
    assert before and recorded() == before
    static.release()
    assert not recorded()


@pytest.mark.parametrize("lacks", ["torch", "driver", "bindings", "asked"])
@torch.no_grad()
def test_where_it_can_not_be_the_report_says_why(compiled, monkeypatch, lacks):
    fake = FakeCuda("2.13" if lacks == "torch" else "2.15")
    fake.recorder.unable = lacks == "driver"
    if lacks == "bindings":
        fake.recorder.unable = ImportError("no package metadata of cuda-bindings")
    on = compiled.under(fake, monkeypatch)
    static = on.capture([2, 4], **({"mark_kernels": False} if lacks == "asked" else {}))
    says = {"torch": "2.15 can", "driver": "driver of CUDA 13.1", "asked": "mark_kernels is off"}
    says["bindings"] = "no package metadata"
    assert says[lacks] in static.report.unmarked
    assert says[lacks] in str(static.report)
    assert not fake.recorder.kept
    x = torch.randn(3, 4)
    torch.testing.assert_close(on.stitched(x), on.model(x))
    on.stitched.sleep()


def test_a_trace_is_told_of_the_marks(on, monkeypatch, tmp_path):
    on.capture([2])
    given = {}

    def export(self, path, **options):
        given.update(options)
        Path(path).write_text("{}")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_trace(tmp_path / "trace.json", lambda: None, [])
    marks = recorded()
    assert marks and dict(given["cuda_graph_annotations"]) == marks
