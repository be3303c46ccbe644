"""Random stitched programs, captured and replayed in random order, equal themselves run plainly."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import (
    CUDAGraphOptions,
    CUDAGraphWrapper,
    wrap_with_cudagraph_if_needed,
)
from piecework.runtime.graphs.plan.phase import capture_graphs
from piecework.runtime.graphs.stage.inputs import StaticInputs

HIDDEN = 4


# Pieces take and return rows independently, so padding rows can never matter.
PIECES = {
    "mix": lambda x, y, w: (torch.tanh(x @ w + y), x + y),
    "swap": lambda x, y, w: (y, x * 2),
    "view": lambda x, y, w: ((x + 1).view(-1, 2, HIDDEN // 2).transpose(1, 2).reshape(x.shape), y),
    "parts": lambda x, y, w: tuple(torch.cat([x, y], -1).split(HIDDEN, dim=-1)),
    "strided": lambda x, y, w: (torch.stack([x, y], -1)[..., 1], x),
    "same": lambda x, y, w: ((z := x * w[0]), z),
    "in place": lambda x, y, w: (x.add_(1), y),
}
SPLITS = {
    "fresh": lambda x, y, out: (x.flip(-1), y.clone()),
    "in place": lambda x, y, out: (x.mul_(0.5), y),
    "out-buffer": lambda x, y, out: (out[: len(x)].copy_(x).neg_(), y),
    "strided": lambda x, y, out: (torch.stack([x, y])[0], torch.stack([x, y], -1)[..., 1]),
    "views of one": lambda x, y, out: tuple(torch.stack([x, y]).unbind()),
    "nothing": lambda x, y, out: (x, y),
}
PROGRAMS = st.lists(
    st.tuples(st.sampled_from(sorted(PIECES)), st.sampled_from(sorted(SPLITS))),
    min_size=1,
    max_size=4,
)


class Program:
    """A list of (piece, splitting op) steps over two values."""

    def __init__(self, steps, mode, policy, largest):
        self.steps = steps
        self.graphs = StaticGraphs("cpu", address_policy=policy)
        self.weights = [torch.randn(HIDDEN, HIDDEN) for _ in steps]
        self.graphs.addresses.register_weights({str(i): w for i, w in enumerate(self.weights)})
        self.out = torch.empty(largest, HIDDEN)
        self.graphs.addresses.register_persistent("out", self.out)
        config = SimpleNamespace(cudagraph_mode=mode, cudagraph_num_of_warmups=0)
        last = len(steps) - 1
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                PIECES[piece],
                config,
                False,  # no piece collects garbage: there is none, and it takes a while
                i == last,
                graphs=self.graphs,
                name=f"submod_{i}",
                mutated_args=frozenset({0} if piece == "in place" else ()),
            )
            for i, (piece, _) in enumerate(steps)
        ]
        options = CUDAGraphOptions(gc_disable=True)
        self.full = CUDAGraphWrapper(
            self.stitched, config, CUDAGraphMode.FULL, options, graphs=self.graphs
        )

    def stitched(self, x, y):
        for piece, (_, split), w in zip(self.pieces, self.steps, self.weights, strict=True):
            x, y = piece(x, y, w)
            x, y = SPLITS[split](x, y, self.out)
        return x, y

    def plain(self, x, y):
        out = torch.empty_like(self.out)
        for (piece, split), w in zip(self.steps, self.weights, strict=True):
            x, y = PIECES[piece](x, y, w)
            x, y = SPLITS[split](x, y, out)
        return x, y


@settings(deadline=None, max_examples=12)
@given(
    PROGRAMS,
    st.sampled_from(["PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]),
    st.sampled_from(["copy", "eager"]),
    st.sets(st.integers(1, 6), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8),
)
def test_captured_equals_plain(steps, mode, policy, sizes, batches):
    mode = CUDAGraphMode.parse(mode)
    largest = max(sizes)
    program = Program(steps, mode, policy, largest)
    example = torch.zeros(1, HIDDEN)
    inputs = StaticInputs.allocate({"x": example, "y": example}, largest, poison=True)
    inputs.register(program.graphs.addresses)
    dispatcher = CudagraphDispatcher(mode, sizes, max_num_seqs=largest)
    capture_graphs(
        lambda d: program.full(*inputs.views(d.num_tokens)),
        dispatcher.get_capture_descs(),
        program.graphs,
        dispatcher=dispatcher,
    )
    for n, uniform in batches:
        if n > largest:
            continue
        x, y = torch.randn(n, HIDDEN), torch.randn(n, HIDDEN)
        want = program.plain(x.clone(), y.clone())
        chosen, descriptor = dispatcher.dispatch(n, uniform)
        assert chosen is not CUDAGraphMode.NONE
        staged = inputs.stage([x, y], descriptor.num_tokens)
        with set_forward_context(cudagraph_runtime_mode=chosen, batch_descriptor=descriptor):
            got = program.full(*staged)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one[:n], other)
