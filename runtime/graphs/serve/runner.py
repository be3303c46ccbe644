"""One forward served at any batch size: in, tensors; out, the model's outputs, from a captured graph where there is one.

It never compiles and never captures while serving: what isn't captured runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from piecework.errors import InputError
from piecework.runtime.batch.coverage import CoverageRow, coverage
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.estimate import MemoryEstimate, estimate_memory, fit_budget
from piecework.runtime.graphs.plan.phase import (
    CaptureReport,
    CaptureWatcher,
    ContextFor,
    FailurePolicy,
    Key,
    capture_graphs,
)
from piecework.runtime.graphs.stage.inputs import StaticInputs
from piecework.runtime.torch_compat import flatten_tree, unflatten_tree


@dataclass(eq=False)
class GraphRunner:
    """Dispatches, stages, runs and trims; the loop that every engine would write around captured graphs.

    Args:
        forward: the model over its dynamic inputs, in the order of ``inputs``; pieces or the whole are wrapped.
        inputs: the persistent buffers.
        dispatcher: which batch runs as what.
        graphs: the owner of what is captured.
        output_dims: the batch dimension of each output leaf, None for one without; dimension 0 of every tensor
            by default.
        context_for: makes the context of dummy runs; by default one without attention metadata.
        clone_outputs: return copies. Otherwise the next batch overwrites what this one returned.

    Example:
        >>> from piecework.runtime.graphs.memory.wrapper import CUDAGraphWrapper
        >>> graphs = StaticGraphs("cpu")
        >>> model = CUDAGraphWrapper(lambda x: x * 2, None, CUDAGraphMode.FULL, graphs=graphs)
        >>> runner = GraphRunner(
        ...     model,
        ...     StaticInputs.allocate({"x": torch.zeros(1)}, maximum=4),
        ...     CudagraphDispatcher(CUDAGraphMode.FULL, [2, 4], max_num_seqs=4),
        ...     graphs,
        ... )
        >>> report = runner.capture()
        >>> runner(torch.tensor([1.0, 2.0, 3.0])).tolist()
        [2.0, 4.0, 6.0]
    """

    forward: Callable[..., object]
    inputs: StaticInputs
    dispatcher: CudagraphDispatcher
    graphs: StaticGraphs
    output_dims: Sequence[int | None] | None = None
    context_for: ContextFor | None = None
    clone_outputs: bool = False
    dropped: tuple[Key, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.inputs.register(self.graphs.addresses)

    def estimate(self, *, warmups: int = 0) -> MemoryEstimate:
        """What capturing everything would take, from a few sizes; see ``estimate_memory``."""
        return estimate_memory(
            self._dummy,
            self.dispatcher.get_capture_descs(),
            self.graphs,
            warmups=warmups,
            context_for=self.context_for,
        )

    def capture(
        self,
        *,
        warmups: int = 0,
        budget_bytes: int | None = None,
        on_failure: FailurePolicy = FailurePolicy.RAISE,
        raise_interrupt: bool = True,
        watcher: CaptureWatcher | None = None,
    ) -> CaptureReport:
        """Capture what the dispatcher lists, or as much of it as fits the budget.

        Args:
            warmups: uncaptured runs before each capture.
            budget_bytes: estimate first, and give up the sizes beyond it (see ``dropped``).
            on_failure, raise_interrupt, watcher: as for ``capture_graphs``.
        """
        if budget_bytes is not None:
            self.dropped = fit_budget(self.estimate(warmups=warmups), self.dispatcher, budget_bytes)
        return capture_graphs(
            self._dummy,
            self.dispatcher.get_capture_descs(),
            self.graphs,
            warmups=warmups,
            context_for=self.context_for,
            dispatcher=self.dispatcher,
            on_failure=on_failure,
            raise_interrupt=raise_interrupt,
            watcher=watcher,
        )

    def coverage(self, max_num_batched_tokens: int) -> list[CoverageRow]:
        """How each batch size runs now."""
        return coverage(self.dispatcher, max_num_batched_tokens)

    def __call__(
        self,
        *tensors: torch.Tensor,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        axes: Mapping[str, Hashable] | None = None,
        attn_metadata: object = None,
        state: Mapping[str, object] | None = None,
    ) -> object:
        """Run one batch.

        Args:
            tensors: the dynamic inputs, of one batch size.
            uniform_decode, has_lora, num_active_loras, axes: what kind of batch it is, for the dispatcher.
            attn_metadata, state: put into the forward context.

        Raises:
            InputError: an input does not fit its buffer, or an output has another batch size than declared.
        """
        count = self.inputs.batch_size(tensors)
        mode, descriptor = self.dispatcher.dispatch(
            count, uniform_decode, has_lora, num_active_loras, axes=axes
        )
        scope = set_forward_context(
            attn_metadata, cudagraph_runtime_mode=mode, batch_descriptor=descriptor, state=state
        )
        if mode is CUDAGraphMode.NONE:
            with scope:
                return self.forward(*tensors)
        padded = descriptor.num_tokens
        staged = self.inputs.stage(tensors, padded)
        with scope:
            output = self.forward(*staged)
        return self._trimmed(output, count, padded)

    def _dummy(self, descriptor: BatchDescriptor) -> object:
        return self.forward(*self.inputs.views(descriptor.num_tokens))

    def _trimmed(self, output: object, count: int, padded: int) -> object:
        if count == padded and not self.clone_outputs:
            return output
        leaves, spec = flatten_tree(output)
        dims = (0,) * len(leaves) if self.output_dims is None else self.output_dims
        if len(dims) != len(leaves):
            raise InputError(
                f"{len(leaves)} outputs, and batch dimensions declared for {len(dims)}",
                where="output_dims",
            )
        pairs = enumerate(zip(leaves, dims, strict=True))
        trimmed = [self._trim(index, *pair, count, padded) for index, pair in pairs]
        return unflatten_tree(trimmed, spec)

    def _trim(self, index: int, leaf: object, dim: int | None, count: int, padded: int) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if dim is not None:
            if not -leaf.dim() <= dim < leaf.dim() or leaf.shape[dim] != padded:
                raise InputError(
                    f"output {index} has shape {list(leaf.shape)}, not {padded} in dimension {dim}",
                    where="output_dims",
                    hint="declare the batch dimension of each output leaf, None where there is none",
                )
            leaf = leaf.narrow(dim, 0, count)
        return leaf.clone() if self.clone_outputs else leaf
