"""The lazy per-size policy: general graph first, listed sizes compiled and captured as they come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.fx

from piecework.errors import InputError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.serve.lazy import CUDAPiecewiseBackend


class Compiler:
    """Stands for a backend and its manager: returns callables that tell themselves apart, and logs what it was asked."""

    batch_symbol, compile_ranges = None, ()

    def __init__(self, log):
        self.log = log
        self.compiler_manager = self

    def compile(self, request):
        assert request.submod_name.startswith("piece ") and request.structure.key
        assert request.inputs and request.compile_range.is_single_size()
        size = request.compile_range.start
        self.log.append(f"compile {size}")
        return SimpleNamespace(runnable=logged(self.log, f"size {size}"))


def logged(log, name):
    def run(x, n):
        log.append(name)
        return x + 1

    return run


def settings(compile_sizes=(), capture_sizes=(), warmups=0, mode=CUDAGraphMode.PIECEWISE):
    return SimpleNamespace(
        compile_sizes=compile_sizes,
        cudagraph_capture_sizes=capture_sizes,
        cudagraph_num_of_warmups=warmups,
        cudagraph_mode=mode,
    )


@pytest.fixture
def make():
    x = torch.zeros(16)

    def make(lazy=True, check=False, index=0, total=1, **options):
        graphs = StaticGraphs("cpu", lazy=lazy, check_addresses=check)
        graphs.addresses.register_persistent("x", x)
        log = []
        compiler = Compiler(log)
        graph = torch.fx.symbolic_trace(lambda x, n: x + 1)
        piece = CUDAPiecewiseBackend(
            graph, settings(**options), graphs, index, total, [1], logged(log, "general"), compiler
        )
        return SimpleNamespace(
            piece=piece,
            log=log,
            compiler=compiler,
            graphs=graphs,
            x=x,
            run=lambda n: piece(x[:n], n),
        )

    return make


def test_a_compile_size_is_compiled_on_its_first_hit(make):
    case = make(compile_sizes=[4, 2])
    case.run(1)
    case.run(4)
    case.run(4)
    assert case.log == ["general", "compile 4", "size 4", "size 4"]
    case.run(2)
    assert case.log[4:] == ["compile 2", "size 2"]
    assert case.piece.concrete_size_entries[2].compiled
    assert case.graphs.records == []


@pytest.mark.parametrize("warmups", [0, 1, 3])
def test_a_capture_size_warms_up_is_captured_and_replayed(make, warmups):
    case = make(capture_sizes=[4], warmups=warmups)
    case.run(4)
    for done in range(warmups):
        assert case.piece.concrete_size_entries[4].num_finished_warmup == done
        case.run(4)
    assert case.graphs.records == []
    assert case.run(4).tolist() == [1.0] * 4
    entry = case.piece.concrete_size_entries[4]
    assert [record.descriptor for record in case.graphs.records] == [BatchDescriptor(4)]
    assert entry.cudagraph is not None
    assert entry.input_addresses == (case.x.data_ptr(),)
    case.x.fill_(5)
    out = case.run(4)
    assert out.tolist() == [6.0] * 4
    assert out.data_ptr() == entry.output.data_ptr()
    assert len(case.graphs.records) == 1


def test_a_size_that_is_both_is_compiled_then_captured(make):
    case = make(compile_sizes=[4], capture_sizes=[4], warmups=1)
    case.run(1)
    for _ in range(3):
        case.run(4)
    assert case.log[:3] == ["general", "compile 4", "size 4"]
    assert "general" not in case.log[1:]
    assert len(case.graphs.records) == 1


def test_clearing_starts_the_captures_over(make):
    case = make(capture_sizes=[4, 2])
    case.run(1)
    for n in (4, 2):
        case.run(n)
    case.graphs.discard(CUDAGraphMode.PIECEWISE, BatchDescriptor(4, has_lora=True))
    case.graphs.discard(CUDAGraphMode.FULL, BatchDescriptor(4))
    assert case.piece.concrete_size_entries[4].cudagraph is not None
    case.graphs.clear_all_graphs()
    assert all(entry.cudagraph is None for entry in case.piece.concrete_size_entries.values())
    assert case.run(4).tolist() == case.run(4).tolist()
    assert len(case.graphs.records) == 1


def test_a_size_that_is_no_number_is_an_error(make):
    case = make(capture_sizes=[4])
    case.run(4)
    with pytest.raises(InputError, match="argument 1 should be the batch size and is a Tensor"):
        case.piece(case.x, case.x)
