"""Pieces that are wrapped by hand, as an engine captures its own model, with splitting ops between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.addresses import ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper, wrap_with_cudagraph_if_needed
from piecework.runtime.graphs.plan.phase import CaptureReport, capture_graphs
from piecework.runtime.graphs.stage.inputs import StaticInputs

FULL = CUDAGraphMode.FULL
Values = tuple[torch.Tensor, ...]
Run = Callable[..., Values]


class HandCaptured:
    """Serves batches of up to ``max(sizes)`` rows; ``fresh``: attention returns a tensor of its own.

    A piece is a layer, with a stand-in for attention between; subclasses have other pieces and splitting ops.
    """

    values: tuple[str, ...] = ("x",)  # that go in, from piece to piece, and out

    def __init__(
        self,
        mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE,
        sizes: tuple[int, ...] = (1, 2, 4, 8),
        *,
        policy: str = "copy",
        warmups: int = 0,
        hidden: int = 16,
        layers: int = 3,
        device: str = "cpu",
        fresh: bool = True,
    ) -> None:
        torch.manual_seed(0)
        self.largest, self.fresh = max(sizes), fresh
        self.graphs = StaticGraphs(device, address_policy=policy)
        self.dispatcher = CudagraphDispatcher(mode, sizes, max_num_seqs=self.largest)
        shape = (layers, hidden, hidden)
        self.weights = (torch.randn(shape, device=device) / hidden**0.5).unbind()
        self.graphs.addresses.register_weights({str(i): w for i, w in enumerate(self.weights)})
        self.like = torch.zeros(1, hidden, device=device)
        self.inputs = StaticInputs.allocate(
            dict.fromkeys(self.values, self.like), self.largest, poison=True
        )
        self.inputs.register(self.graphs.addresses)
        self.out = self.like.new_empty(self.largest, hidden)
        self.graphs.addresses.register_persistent("out", self.out, ValueOrigin.OUT_BUFFER)
        config = SimpleNamespace(cudagraph_mode=mode, cudagraph_num_of_warmups=warmups)
        self.runs: list[tuple[CUDAGraphMode, int]] = []
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                self.piece(i),
                config,
                i == 0,
                i == layers - 1,
                graphs=self.graphs,
                name=f"submod_{2 * i}",
                mutated_args=self.mutated(i),
            )
            for i in range(layers)
        ]
        self.full = CUDAGraphWrapper(self.stitched, config, FULL, graphs=self.graphs)
        self.kept: list[torch.Tensor] = []

    def piece(self, number: int) -> Run:
        return lambda x, w: (torch.tanh(x @ w) + x,)

    def mutated(self, number: int) -> frozenset[int]:
        """Which arguments of a piece it writes to."""
        return frozenset()

    def split(self, number: int, values: Values, out: torch.Tensor) -> Values:
        """What happens to the values after a piece; ``out`` is a buffer that may hold one."""
        if number == len(self.weights) - 1:
            return values
        mixed = values[0].flip(-1) * 0.5
        if not self.fresh:
            return (out[: len(mixed)].copy_(mixed),)
        self.kept = [*self.kept[-8:], mixed]  # each at a place of its own
        return (mixed,)

    def run(self, pieces: Sequence[Run], values: Values, out: torch.Tensor) -> Values:
        for number, (piece, weight) in enumerate(zip(pieces, self.weights, strict=True)):
            values = self.split(number, piece(*values, weight), out)
        return values

    def stitched(self, *values: torch.Tensor) -> Values:
        return self.run(self.pieces, values, self.out)

    def eager(self, *values: torch.Tensor) -> Values:
        pieces = [self.piece(number) for number in range(len(self.pieces))]
        own = tuple(each.clone() for each in values)
        return self.run(pieces, own, torch.empty_like(self.out))

    def dummy(self, descriptor):
        mode = get_forward_context().cudagraph_runtime_mode
        self.runs.append((mode, descriptor.num_tokens))
        return self.full(*self.inputs.views(descriptor.num_tokens))

    def capture(self, **options: object) -> CaptureReport:
        options.setdefault("dispatcher", self.dispatcher)
        descs = self.dispatcher.get_capture_descs()
        return capture_graphs(self.dummy, descs, self.graphs, **options)

    def serve(self, *values: torch.Tensor, uniform: bool = False) -> tuple[CUDAGraphMode, Values]:
        n = len(values[0])
        mode, descriptor = self.dispatcher.dispatch(n, uniform)
        if n > self.largest:
            return mode, self.stitched(*values)
        staged = self.inputs.stage(values, descriptor.num_tokens)
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            return mode, tuple(each[:n].clone() for each in self.full(*staged))

    def check(self, n: int, uniform: bool, **tolerance: float) -> CUDAGraphMode:
        """A batch of ``n`` rows equals the eager model's; the mode that it ran in."""
        shape, device = (n, self.like.shape[1]), self.like.device
        values = [torch.randn(shape, device=device) for _ in self.values]
        mode, found = self.serve(*values, uniform=uniform)
        torch.testing.assert_close(found, self.eager(*values), **tolerance)
        return mode

    def check_all(self, most: int, **tolerance: float) -> dict[tuple[int, bool], CUDAGraphMode]:
        """Every size up to ``most``, of both kinds."""
        batches = itertools.product(range(1, most + 1), (False, True))
        return {batch: self.check(*batch, **tolerance) for batch in batches}
