"""Devices: a graph belongs to one, and a model on the CPU asks a GPU of the machine for nothing."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from torch._subclasses import FakeTensorMode

import piecework
from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper
from piecework.runtime.graphs.plan.captured_values import capture_device
from piecework.runtime.store import surroundings

CPU = torch.device("cpu")
FULL = CUDAGraphMode.FULL


def split(**devices: str) -> torch.fx.GraphModule:
    """A graph of pieces, each computing on devices of its own; what is known of values is as on a GPU."""
    outer, modules = torch.fx.Graph(), {}
    with FakeTensorMode():
        for name, on in devices.items():
            graph = torch.fx.Graph()
            nodes = []
            for number, device in enumerate(on.split()):
                node = graph.placeholder(f"x{number}")
                node.meta["example_value"] = torch.empty(3, device=device)
                nodes.append(node)
            graph.output(tuple(nodes))
            modules[name] = torch.fx.GraphModule({}, graph)
            outer.call_module(name)
    outer.output(())
    return torch.fx.GraphModule(modules, outer)


def test_the_device_is_that_of_what_is_captured_and_not_of_the_first_input():
    gm = split(submod_0="cuda:1 cuda:1", submod_1="cpu cuda:1", submod_2="cuda:1")
    assert capture_device(gm, ["submod_0", "submod_2"], CPU) == torch.device("cuda", 1)
    assert capture_device(gm, [], CPU) == CPU


@pytest.mark.parametrize("names", [["submod_1"], ["submod_0", "submod_2"]])
def test_several_devices_are_refused_with_a_value_on_each(names):
    gm = split(submod_0="cuda:1", submod_1="cpu cuda:1", submod_2="cuda:0")
    with pytest.raises(StaticGraphError, match="a static graph has one device") as caught:
        capture_device(gm, names, CPU)
    assert f"of {names[0]} is on" in str(caught.value) and "cuda:1" in str(caught.value)


def test_a_model_on_the_cpu_does_not_start_cuda(monkeypatch):
    def start(*args):
        raise AssertionError("this starts CUDA")

    model = torch.nn.Linear(4, 4)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "get_device_capability", start)
        assert surroundings.accelerators(torch.fx.symbolic_trace(model)) == {}
    stitched = captured(model, torch.randn(3, 4))
    assert stitched.static_graphs.graphs.platform.device == CPU


def test_the_key_of_compiled_pieces_has_the_gpus_of_the_model_and_no_others(monkeypatch):
    capabilities = {0: (9, 0), 1: (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capabilities[d.index])
    assert surroundings.accelerators(split(a="cuda:1").a)["cuda"].endswith("sm_86")
    assert surroundings.accelerators(split(a="cuda:1 cuda:0").a)["cuda"].endswith("sm_86 sm_90")
    assert surroundings.accelerators(split(a="cpu").a) == {}


def test_an_argument_on_another_device_is_refused_where_one_callable_is_captured():
    """What is done with it would be done at the capture and never again; a number of it would be frozen."""
    graphs = StaticGraphs("cpu", lazy=True)
    add = CUDAGraphWrapper(lambda x, y: x + 1, None, FULL, graphs=graphs, name="add")
    context = {"cudagraph_runtime_mode": FULL, "batch_descriptor": BatchDescriptor(4)}
    with (
        set_forward_context(**context),
        pytest.raises(StaticGraphError, match="argument 1 is on meta, and the graph on cpu"),
    ):
        add(torch.ones(4), torch.ones((), device="meta"))
    assert not graphs.records


@pytest.mark.parametrize("field", ["inductor_compile_config", "single_size_inductor_config"])
def test_graphs_of_inductors_own_inside_pieces_are_refused(field):
    config = piecework.CompilationConfig(**{field: {"triton.cudagraphs": True}})
    with pytest.raises(piecework.PieceworkError, match="decide about cuts and captures"):
        piecework.compile(torch.nn.ReLU(), (torch.randn(3, 4),), config=config)


def test_and_off_whatever_the_environment_says():
    from piecework.runtime.compilers import InductorStandaloneAdaptor

    options = InductorStandaloneAdaptor(piecework.CompilationConfig()).options_for(None)
    assert options["triton.cudagraphs"] is False
