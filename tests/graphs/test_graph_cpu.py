"""What only the CPU static graph does: poison, blocks that come back, and errors where CUDA would be undefined."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import StaticGraphError
from piecework.runtime.graphs.device.cpu import CpuGraphPool, CpuStaticGraph
from piecework.runtime.graphs.memory.owner import platform_for


def test_outputs_are_poison_until_the_first_replay():
    pool = CpuGraphPool()
    x = torch.ones(3)
    graph = CpuStaticGraph(pool)
    floats, halves, ints = graph.capture(lambda x: (x + 1, x.half(), x.long()), (x,), {})
    assert floats.isnan().all()
    assert halves.isnan().all()
    assert (ints == -1).all()
    graph.replay()
    assert floats.tolist() == [2.0, 2.0, 2.0]


def test_shapes_that_depend_on_values_are_an_error_on_replay():
    x = torch.tensor([1.0, 0.0])
    graph = CpuStaticGraph(CpuGraphPool())
    graph.capture(lambda x: x[x > 0], (x,), {})
    x.fill_(1)
    with pytest.raises(StaticGraphError, match="output 0 came out with another layout"):
        graph.replay()


def test_a_sparse_output_is_an_error():
    graph = CpuStaticGraph(CpuGraphPool())
    with pytest.raises(StaticGraphError, match=r"output 0 is a .*sparse_coo Tensor"):
        graph.capture(lambda x: x.to_sparse(), (torch.eye(2),), {})


def test_a_device_without_static_graphs_is_an_error():
    with pytest.raises(StaticGraphError, match="no static graphs on 'meta' devices"):
        platform_for("meta")


def test_memory_of_an_earlier_output_goes_to_later_captures_though_a_graph_reads_it():
    """As in CUDA's private pools: what a graph reads of the pool it does not keep."""
    pool = (platform := platform_for("cpu")).new_pool()
    first, second, later = (platform.new_graph(pool) for _ in range(3))
    x = torch.ones(4, 16)
    output = first.capture(lambda x: x + 1, (x,), {})
    second.capture(lambda y: y * 2, (output,), {}, weak_output=True)
    taken = pool.nbytes
    address = output.data_ptr()
    del output
    again = later.capture(lambda x: (x - 1, x - 2), (x,), {})
    assert pool.nbytes == taken
    assert address in {each.data_ptr() for each in again}
    first.replay()
    second.replay()
    later.replay()
    assert [each[0, 0].item() for each in again] == [0.0, -1.0]
