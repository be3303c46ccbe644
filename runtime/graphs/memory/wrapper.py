"""A callable that is captured per batch shape: the forward context's mode and descriptor decide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import ForwardContext, current_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs.memory.captured_call import CapturedCall, CUDAGraphOptions
from piecework.runtime.graphs.memory.owner import CaptureRecord, StaticGraphs
from piecework.runtime.torch_compat import flatten_tree

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class CUDAGraphEntry:
    """What a wrapper knows about one descriptor."""

    batch_descriptor: BatchDescriptor
    num_finished_warmup: int = 0
    call: CapturedCall | None = None

    @property
    def output(self) -> object:
        """The static output, weakly referenced; None before the capture."""
        return None if self.call is None else self.call.output


@dataclass(eq=False)
class CUDAGraphWrapper:
    """Runs ``runnable`` as a static graph whenever the context's mode is this wrapper's mode.

    Without a context, on another mode, when the context skips graphs, or while somebody else
    captures, it runs ``runnable``. Wrappers nest: a FULL one around pieces with PIECEWISE ones.

    Args:
        runnable: any callable over tensors; its output may be any pytree.
        config: gives ``cudagraph_num_of_warmups``; None means no warm-up.
        runtime_mode: PIECEWISE or FULL.
        cudagraph_options: how to capture.
        graphs: the owner of pool and capture phase; by default a private, lazy one on the device of
            the first tensor argument.
        name: what errors and reports call it.

    Example:
        >>> from piecework.runtime.batch.forward_context import set_forward_context
        >>> graphs = StaticGraphs("cpu")
        >>> x = torch.zeros(2)
        >>> graphs.addresses.register_persistent("x", x)
        >>> double = CUDAGraphWrapper(lambda x: x * 2, None, CUDAGraphMode.FULL, graphs=graphs)
        >>> mode = dict(cudagraph_runtime_mode=CUDAGraphMode.FULL, batch_descriptor=BatchDescriptor(2))
        >>> with graphs.capturing(), set_forward_context(**mode):
        ...     _ = double(x)
        >>> with set_forward_context(**mode):
        ...     double(x.fill_(3)).tolist()
        [6.0, 6.0]
    """

    runnable: Callable[..., object]
    config: CompilationConfig | None
    runtime_mode: CUDAGraphMode
    cudagraph_options: CUDAGraphOptions = field(default_factory=CUDAGraphOptions)
    graphs: StaticGraphs | None = None
    name: str = "model"
    concrete_cudagraph_entries: dict[BatchDescriptor, CUDAGraphEntry] = field(
        default_factory=dict, init=False
    )

    def __post_init__(self) -> None:
        if self.runtime_mode not in (CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
            raise ConfigError(
                f"a wrapper captures in mode PIECEWISE or FULL, not {self.runtime_mode}",
                where=self.name,
                hint="don't wrap what is never captured",
            )
        if self.graphs is not None:
            self.graphs.register(self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        context = current_forward_context()
        if (
            context is None
            or context.cudagraph_runtime_mode is not self.runtime_mode
            or context.skip_cuda_graphs
        ):
            if context is not None and context.batch_descriptor is not None:
                self._count_warmup(context.batch_descriptor)
            return self.runnable(*args, **kwargs)
        entry = self.concrete_cudagraph_entries.get(context.batch_descriptor)
        call = None if entry is None else entry.call
        if self.graphs is not None and self.graphs.others_capture():
            return self.runnable(*args, **kwargs)
        if call is None:
            return self._warm_up_or_capture(context, args, kwargs)
        if call.trusted:
            call.replay()
            return call.output
        return call(self.runnable, args, kwargs)

    def unwrap(self) -> Callable[..., object]:
        """What is wrapped."""
        return self.runnable

    def _count_warmup(self, descriptor: BatchDescriptor) -> None:
        """An uncaptured run of a shape, while the capture phase is open, is a warm-up of it."""
        if self.graphs is not None and self.graphs.is_open:
            self._entry(descriptor).num_finished_warmup += 1

    def _entry(self, descriptor: BatchDescriptor) -> CUDAGraphEntry:
        return self.concrete_cudagraph_entries.setdefault(descriptor, CUDAGraphEntry(descriptor))

    def _warm_up_or_capture(
        self, context: ForwardContext, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        descriptor = context.batch_descriptor
        if descriptor is None:
            raise StaticGraphError(
                f"the forward context asks for mode {self.runtime_mode.name} without a batch descriptor",
                where=self.name,
                hint="pass batch_descriptor to set_forward_context, as the dispatcher returned it",
            )
        if self.graphs is None:
            leaves, _ = flatten_tree((args, kwargs))
            devices = (leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.graphs = StaticGraphs(next(devices, torch.device("cpu")), lazy=True)
            self.graphs.register(self)
        graphs, options = self.graphs, self.cudagraph_options
        warmups = 0 if self.config is None else self.config.cudagraph_num_of_warmups
        entry = self._entry(descriptor)
        if graphs.is_open and entry.num_finished_warmup < warmups:
            entry.num_finished_warmup += 1
            return self.runnable(*args, **kwargs)
        record = CaptureRecord(self.name, self.runtime_mode, descriptor)
        entry.call, output = CapturedCall.make(self.runnable, args, kwargs, record, options, graphs)
        if options.debug_log_enable and not graphs.in_phase:
            _log.debug("captured %s", record.where)
        return output

    def discard(self, mode: CUDAGraphMode, descriptor: BatchDescriptor) -> None:
        if mode is self.runtime_mode:
            entry = self.concrete_cudagraph_entries.pop(descriptor, None)
            if entry is not None and entry.call is not None:
                entry.call.reset()

    def clear_graphs(self) -> None:
        with ExitStack() as every:
            for descriptor in list(self.concrete_cudagraph_entries):
                every.callback(self.discard, self.runtime_mode, descriptor)


def wrap_with_cudagraph_if_needed(
    piecewise_backend: Callable[..., object],
    config: CompilationConfig,
    is_first_graph: bool,
    is_last_graph: bool,
    *,
    graphs: StaticGraphs,
    name: str = "piece",
    mutated_args: frozenset[int] = frozenset(),
) -> Callable[..., object]:
    """The piece itself, or a PIECEWISE wrapper around it where the mode captures pieces."""
    if not config.cudagraph_mode.requires_piecewise_compilation():
        return piecewise_backend
    options = CUDAGraphOptions(is_first_graph, not is_first_graph, is_last_graph, mutated_args)
    mode = CUDAGraphMode.PIECEWISE
    return CUDAGraphWrapper(piecewise_backend, config, mode, options, graphs, name)
