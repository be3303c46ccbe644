"""A piecewise model for the GPU benchmarks. In: layers, width, sizes, a device. Out: the same forward run plainly, by wrappers, bare or as one graph.

It compiles nothing: what is measured is how captured pieces are put together, not how fast they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from piecework.runtime.dispatch import CudagraphDispatcher
from piecework.runtime.forward_context import set_forward_context
from piecework.runtime.graphs.address import ValueOrigin
from piecework.runtime.graphs.capture import CaptureReport, capture_graphs
from piecework.runtime.graphs.descriptor import BatchDescriptor
from piecework.runtime.graphs.memory import MemoryEstimate, estimate_memory
from piecework.runtime.graphs.mode import CUDAGraphMode
from piecework.runtime.graphs.owner import StaticGraphs
from piecework.runtime.graphs.wrapper import CUDAGraphWrapper, wrap_with_cudagraph_if_needed
from piecework.runtime.inputs import StaticInputs

MODE = CUDAGraphMode.FULL_AND_PIECEWISE


class PiecewiseForward:
    """``layers`` attention stand-ins between ``layers + 1`` pieces, each capturable.

    The stand-in writes into a persistent out-buffer and is never captured by itself, as attention in serving.
    """

    def __init__(self, layers: int, width: int, sizes: Sequence[int], device: str) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        self.graphs = StaticGraphs(device, address_policy="refuse")
        self.largest = max(sizes)
        self.weights = [
            torch.randn(width, width, device=device, generator=generator) / width
            for _ in range(layers + 1)
        ]
        names = {f"w{i}": weight for i, weight in enumerate(self.weights)}
        self.graphs.addresses.register_weights(names)
        example = {"x": torch.zeros(1, width, device=device)}
        self.inputs = StaticInputs.allocate(example, self.largest)
        self.inputs.register(self.graphs.addresses)
        self.attended = torch.zeros(self.largest, width, device=device)
        self.graphs.addresses.register_persistent("attended", self.attended, ValueOrigin.OUT_BUFFER)
        config = SimpleNamespace(cudagraph_mode=MODE, cudagraph_num_of_warmups=1)
        self.pieces = [
            wrap_with_cudagraph_if_needed(
                _piece, config, i == 0, i == layers, graphs=self.graphs, name=f"submod_{2 * i}"
            )
            for i in range(layers + 1)
        ]
        self.whole = CUDAGraphWrapper(
            self._stitched, config, CUDAGraphMode.FULL, graphs=self.graphs
        )
        self.dispatcher = CudagraphDispatcher(MODE, sizes, max_num_seqs=self.largest)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 0.5, out=self.attended[: x.shape[0]])

    def _stitched(self, x: torch.Tensor) -> torch.Tensor:
        for index, (piece, weight) in enumerate(zip(self.pieces, self.weights, strict=True)):
            x = piece(x, weight)
            if index + 1 < len(self.pieces):
                x = self._attend(x)
        return x

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The forward without any graph."""
        for index, weight in enumerate(self.weights):
            x = _piece(x, weight)
            if index + 1 < len(self.weights):
                x = x * 0.5
        return x

    def _dummy(self, descriptor: BatchDescriptor) -> object:
        return self.whole(*self.inputs.views(descriptor.num_tokens))

    def estimate(self) -> MemoryEstimate:
        descs = self.dispatcher.get_capture_descs()
        return estimate_memory(self._dummy, descs, self.graphs, warmups=1)

    def capture(self) -> CaptureReport:
        descs = self.dispatcher.get_capture_descs()
        return capture_graphs(
            self._dummy, descs, self.graphs, warmups=1, dispatcher=self.dispatcher
        )

    def by_wrappers(self, batch: int, *, whole: bool) -> Callable[[], torch.Tensor]:
        """A step as a runtime without replay source does it: dispatch, context, and a look-up per piece."""

        def step() -> torch.Tensor:
            mode, descriptor = self.dispatcher.dispatch(batch, whole)
            scope = set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor)
            with scope:
                return self.whole(*self.inputs.views(descriptor.num_tokens))

        return step

    def bare(self, batch: int) -> Callable[[], torch.Tensor]:
        """The limit: nothing but replays and the stand-in, everything else bound beforehand."""
        _, descriptor = self.dispatcher.dispatch(batch)
        calls = [piece.concrete_cudagraph_entries[descriptor].call for piece in self.pieces]
        replays = [call.replay for call in calls]
        sources = [call.output for call in calls[:-1]]
        target = self.attended[: descriptor.num_tokens]
        last, result, multiply = replays.pop(), calls[-1].output, torch.mul
        pairs = list(zip(replays, sources, strict=True))

        def step() -> torch.Tensor:
            for replay, source in pairs:
                replay()
                multiply(source, 0.5, out=target)
            last()
            return result

        return step


def _piece(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ weight) + x
