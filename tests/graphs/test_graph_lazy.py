"""The lazy per-size policy: general graph first, listed sizes compiled and captured as they come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.fx

from piecework.errors import InputError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.serve.lazy import CUDAPiecewiseBackend


class Compiler:
    """Stands for a backend and its manager: returns callables that tell themselves apart, and logs what it was asked."""

    batch_symbol, compile_ranges = None, ()

    def __init__(self, log):
        self.log = log
        self.compiler_manager = self

    def compile(self, graph, example_inputs, compile_range, *, structure, submod_name):
        assert isinstance(graph, torch.fx.GraphModule) and submod_name.startswith("piece ")
        assert compile_range.is_single_size() and structure.key
        self.log.append(f"compile {compile_range.start}")
        return SimpleNamespace(runnable=logged(self.log, f"size {compile_range.start}"))


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


def test_the_first_call_runs_the_general_graph(make):
    case = make(compile_sizes=[4], capture_sizes=[4])
    case.run(4)
    assert case.log == ["general"]
    assert case.graphs.records == []


def test_unknown_sizes_run_the_general_graph(make):
    case = make(compile_sizes=[4], capture_sizes=[8])
    case.run(4)
    for n in (1, 5, 16):
        assert case.run(n).tolist() == [1.0] * n
    assert case.log == ["general"] * 4


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
    assert entry.cudagraph.captured
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


def test_skipping_graphs_in_the_context(make):
    case = make(compile_sizes=[4], capture_sizes=[4])
    case.run(1)
    with set_forward_context(skip_cuda_graphs=True):
        case.run(4)
        assert case.log == ["general", "compile 4", "size 4"]
        assert case.graphs.records == []
    static = case.run(4)
    with set_forward_context(skip_cuda_graphs=True):
        assert case.run(4).data_ptr() != static.data_ptr()


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_modes_without_pieces_capture_none(make, mode):
    case = make(capture_sizes=[4], mode=mode)
    for _ in range(3):
        case.run(4)
    assert case.log == ["general"] * 3


def test_moved_inputs_are_caught_in_debug(make):
    case = make(capture_sizes=[4], check=True)
    case.run(1)
    case.run(4)
    case.run(4)
    other = torch.zeros(4)
    case.graphs.addresses.register_persistent("other", other)
    with pytest.raises(StaticGraphError, match="is at another address"):
        case.piece(other, 4)


def test_a_closed_phase_is_an_error(make):
    case = make(lazy=False, capture_sizes=[4])
    case.run(4)
    with pytest.raises(
        StaticGraphError, match=r"outside the capture phase \(piece 0, PIECEWISE tokens=4\)"
    ):
        case.run(4)


@pytest.mark.parametrize(("index", "weak"), [(0, False), (1, True)])
def test_the_last_piece_lets_go_of_its_output(make, index, weak):
    case = make(capture_sizes=[4], index=index, total=2)
    case.run(4)
    output = case.run(4)
    free = case.graphs.pool._free
    assert (len(free) == 1) is weak
    assert output.tolist() == [1.0] * 4


def test_clearing_starts_the_captures_over(make):
    case = make(capture_sizes=[4, 2])
    case.run(1)
    for n in (4, 2):
        case.run(n)
    case.graphs.discard(CUDAGraphMode.PIECEWISE, BatchDescriptor(4, has_lora=True))
    case.graphs.discard(CUDAGraphMode.FULL, BatchDescriptor(4))
    assert case.piece.concrete_size_entries[4].call is not None
    case.graphs.clear_all_graphs()
    assert all(entry.call is None for entry in case.piece.concrete_size_entries.values())
    assert case.run(4).tolist() == case.run(4).tolist()
    assert len(case.graphs.records) == 1


def test_a_piece_without_a_size_runs_its_general_graph():
    graphs, log = StaticGraphs("cpu", lazy=True), []
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    piece = CUDAPiecewiseBackend(
        graph, settings([4], [4]), graphs, 0, 1, [], lambda x: log.append("general"), Compiler(log)
    )
    for _ in range(3):
        piece(torch.zeros(3))
    assert log == ["general"] * 3 and graphs.records == []


def test_a_size_that_is_no_number_is_an_error(make):
    case = make(capture_sizes=[4])
    case.run(4)
    with pytest.raises(InputError, match="argument 1 should be the batch size and is a Tensor"):
        case.piece(case.x, case.x)
