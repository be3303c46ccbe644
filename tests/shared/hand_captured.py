"""Pieces that are wrapped by hand, as an engine captures its own model: a layer each, with a stand-in for attention between."""

from __future__ import annotations

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


class HandCaptured:
    """Serves batches of up to ``max(sizes)`` rows; ``fresh``: attention returns a tensor of its own."""

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
        self.inputs = StaticInputs.allocate({"x": self.like}, self.largest, poison=True)
        self.inputs.register(self.graphs.addresses)
        self.out = self.like.new_empty(self.largest, hidden)
        self.graphs.addresses.register_persistent("out", self.out, ValueOrigin.OUT_BUFFER)
        config = SimpleNamespace(cudagraph_mode=mode, cudagraph_num_of_warmups=warmups)
        self.runs: list[tuple[CUDAGraphMode, int]] = []
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                self.piece,
                config,
                i == 0,
                i == layers - 1,
                graphs=self.graphs,
                name=f"submod_{2 * i}",
            )
            for i in range(layers)
        ]
        self.full = CUDAGraphWrapper(self.stitched, config, FULL, graphs=self.graphs)
        self.kept: list[torch.Tensor] = []

    @staticmethod
    def piece(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w) + x

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fresh:
            return self.out[: x.shape[0]].copy_(x.flip(-1) * 0.5)
        self.kept = [*self.kept[-8:], x.flip(-1) * 0.5]  # each at a place of its own
        return self.kept[-1]

    def stitched(self, x: torch.Tensor) -> torch.Tensor:
        for i, (piece, w) in enumerate(zip(self.pieces, self.weights, strict=True)):
            x = piece(self.attention(x) if i else x, w)
        return x

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        for i, w in enumerate(self.weights):
            x = self.piece(x.flip(-1) * 0.5 if i else x, w)
        return x

    def dummy(self, descriptor):
        mode = get_forward_context().cudagraph_runtime_mode
        self.runs.append((mode, descriptor.num_tokens))
        return self.full(*self.inputs.views(descriptor.num_tokens))

    def capture(self, **options: object) -> CaptureReport:
        options.setdefault("dispatcher", self.dispatcher)
        descs = self.dispatcher.get_capture_descs()
        return capture_graphs(self.dummy, descs, self.graphs, **options)

    def serve(self, rows: torch.Tensor, uniform: bool = False):
        n = rows.shape[0]
        mode, descriptor = self.dispatcher.dispatch(n, uniform)
        if n > self.largest:
            return mode, self.stitched(rows)
        staged = self.inputs.stage([rows], descriptor.num_tokens)
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            return mode, self.full(*staged)[:n].clone()

    def check(self, most: int, **tolerance: float) -> dict[tuple[int, bool], CUDAGraphMode]:
        """Every size up to ``most``, of both kinds, equals the eager model; the modes that were used."""
        modes = {}
        for n in range(1, most + 1):
            for uniform in (False, True):
                rows = torch.randn(n, self.like.shape[1], device=self.like.device)
                modes[n, uniform], out = self.serve(rows, uniform)
                torch.testing.assert_close(out, self.eager(rows), **tolerance)
        return modes
