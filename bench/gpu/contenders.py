"""The ways to run captured pieces that are compared.

All replay graphs of the same kernels; nothing here is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace

import torch
import torch.fx

import piecework
from piecework.bench.contenders import Piece, conventional, dynamic, op_operands
from piecework.bench.decoder import OPERATOR, attention_body
from piecework.errors import PieceworkError
from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphEntry, wrap_with_cudagraph_if_needed
from piecework.runtime.graphs.plan.phase import capture_graphs
from piecework.runtime.stitched import StitchedModule

Step = Callable[[], torch.Tensor]
_PIECEWISE, _FULL = CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL


def stitch(model: torch.nn.Module, ids: torch.Tensor, backend: str) -> StitchedModule:
    """The model, compiled so that one trace serves every batch."""
    example = dynamic(ids.clone(), unbacked=True)
    config = CompilationConfig(backend=backend)
    return piecework.compile(model, (example,), splitting_ops=[OPERATOR], config=config)


@dataclass(eq=False)
class Contenders:
    """One model, captured piece by piece and whole, and once more the conventional way.

    Args:
        model: takes token ids.
        ids: token ids of the largest batch.
        sizes: batch sizes to capture.
        backend: compiles the pieces.
    """

    model: torch.nn.Module
    ids: torch.Tensor
    sizes: Sequence[int]
    backend: str

    @cached_property
    def stitched(self) -> StitchedModule:
        stitched = stitch(self.model, self.ids[: max(2, len(self.ids))], self.backend)
        return stitched.capture(
            self.sizes,
            mode=CUDAGraphMode.FULL_AND_PIECEWISE,
            clone_outputs=False,
            progress=False,
            estimate=False,
        )

    @cached_property
    def conventional(self) -> Conventional:
        return Conventional(self.model, self.ids, self.sizes, self.backend)

    def makers(self, batch: int) -> dict[str, Callable[[], Step]]:
        """What makes each contender at one captured batch size."""
        ids = self.ids[:batch].clone()
        decode = set_forward_context(batch=BatchKind(uniform_decode=True))

        def one_graph() -> Step:
            descriptor = BatchDescriptor(batch, batch, True)
            whole = self.stitched.static_graphs.replays[_FULL, descriptor].call
            return lambda: whole([ids])[0]  # type: ignore[index]

        def full() -> Step:
            stitched = self.stitched

            def step() -> torch.Tensor:
                with decode:
                    return stitched(ids)  # type: ignore[return-value]

            return step

        return {
            "bare loop": lambda: bare_loop(self.stitched, batch, ids),
            "bare list": lambda: bare_list(self.stitched, batch, ids),
            "conventional": lambda: partial(self.conventional, ids),
            "piecework": lambda: partial(self.stitched, ids),  # type: ignore[arg-type]
            "one graph": one_graph,
            "piecework, full": full,
        }


def bare_loop(stitched: StitchedModule, batch: int, ids: torch.Tensor) -> Step:
    """Contender 6: replays and attention launches with everything bound beforehand."""
    work, result = _bound(stitched, batch, ids)
    pairs = list(zip(work[::2], work[1::2], strict=False))
    last = work[-1]

    def step() -> torch.Tensor:
        for replay, operands in pairs:
            replay()
            attention_body(*operands)
        last()
        return result

    return step


def bare_list(stitched: StitchedModule, batch: int, ids: torch.Tensor) -> Step:
    """Contender 7: a list of segments, called in turn, as the newest breakable runners do."""
    work, result = _bound(stitched, batch, ids)
    segments = [each if callable(each) else partial(attention_body, *each) for each in work]

    def step() -> torch.Tensor:
        for segment in segments:
            segment()
        return result

    return step


def _bound(stitched: StitchedModule, batch: int, ids: torch.Tensor) -> tuple[list, torch.Tensor]:  # type: ignore[type-arg]
    """Replays and operands of attention in turn, and the result; the input buffers are filled."""
    static = stitched.static_graphs
    descriptor = BatchDescriptor(batch)
    with set_forward_context(cudagraph_runtime_mode=_PIECEWISE, batch_descriptor=descriptor):
        static.replays[_PIECEWISE, descriptor].call([ids])
    *work, result = _work(stitched, [_call(w, descriptor) for w in static.pieces_for(batch)])
    return work, result


def _work(stitched: StitchedModule, calls: Sequence[CUDAGraphEntry]) -> Iterator:  # type: ignore[type-arg]
    """Replays with the operands of the attention between them, and at the end the result."""
    names = stitched.source.submod_names
    values: dict[torch.fx.Node, object] = {}
    for node in stitched.split_gm.graph.nodes:
        if node.op == "call_module" and node.target in names:
            call = calls[names.index(str(node.target))]
            yield call.replay
            for user in node.users:
                values[user] = call.output[user.args[1]]  # type: ignore[index]
        elif node.op == "call_module":
            operands = op_operands(stitched.split_gm, node, OPERATOR)
            yield [values[each] if isinstance(each, torch.fx.Node) else each for each in operands]
        elif node.op == "output":
            yield values[node.args[0][0]]


def _call(wrapper: object, descriptor: BatchDescriptor) -> CUDAGraphEntry:
    call = wrapper.concrete_cudagraph_entries[descriptor]  # type: ignore[attr-defined]
    if call.graph is None:
        raise PieceworkError(f"a piece was not captured for {descriptor.describe()}")
    return call  # type: ignore[no-any-return]


class Conventional:
    """Contender 5: Dynamo's guards, a look-up and a wrapper per piece, the dispatcher."""

    def __init__(
        self, model: torch.nn.Module, ids: torch.Tensor, sizes: Sequence[int], backend: str
    ) -> None:
        self.graphs = StaticGraphs(ids.device)
        self.buffer = torch.zeros_like(ids)
        self.graphs.addresses.register_persistent("ids", self.buffer)
        self.graphs.addresses.register_weights(dict(model.named_parameters()))
        self.dispatcher = CudagraphDispatcher(_PIECEWISE, sizes, max_num_seqs=max(sizes))
        config = CompilationConfig(backend=backend)
        how = {"unbacked": True, "config": config, "wrapped": self._captured}
        self.compiled = conventional(model, ids, OPERATOR, **how)  # type: ignore[arg-type]
        descs = self.dispatcher.get_capture_descs()
        capture_graphs(self._dummy, descs, self.graphs, warmups=1, dispatcher=self.dispatcher)

    def _captured(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        settings = SimpleNamespace(cudagraph_mode=_PIECEWISE, cudagraph_num_of_warmups=0)
        first, last = next(iter(pieces)), next(reversed(pieces))
        return {
            name: wrap_with_cudagraph_if_needed(
                piece, settings, name == first, name == last, graphs=self.graphs, name=name
            )
            for name, piece in pieces.items()
        }

    def _dummy(self, descriptor: BatchDescriptor) -> object:
        return self.compiled(self.buffer[: descriptor.num_tokens])

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        count = ids.shape[0]
        mode, descriptor = self.dispatcher.dispatch(count)
        self.buffer[:count].copy_(ids, non_blocking=True)
        with set_forward_context(cudagraph_runtime_mode=mode, batch_descriptor=descriptor):
            return self.compiled(self.buffer[: descriptor.num_tokens])[:count]
