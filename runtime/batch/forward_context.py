"""What one forward runs as, for whoever runs inside it; never beyond its ``with`` block."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType

from piecework.errors import InputError
from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.batch.mode import CUDAGraphMode

_NO_STATE: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """What the wrappers and the splitting ops of one forward need to know."""

    # NONE, PIECEWISE or FULL; never a composite mode
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE
    # the (padded) batch shape, or None when nothing is captured for it
    batch_descriptor: BatchDescriptor | None = None
    # run everything uncaptured, whatever the mode (profiling, warm-up)
    skip_cuda_graphs: bool = False
    # whatever the attention implementation reads; piecework never looks inside
    attn_metadata: object = None
    # named objects of an integration, such as the request's KV cache
    state: Mapping[str, object] = field(default_factory=lambda: _NO_STATE)
    # what kind of batch it is, for a model that dispatches by itself; None is a plain one
    batch: BatchKind | None = None
    # it runs on dummy inputs: an op leaves state alone that torch does not see. False inside a full
    # graph's capture, whose replays do what is captured.
    dry: bool = False

    def __post_init__(self) -> None:
        if self.cudagraph_runtime_mode.separate_routine():
            raise InputError(
                f"{self.cudagraph_runtime_mode.name} is a pair of modes; one forward runs in a single one",
                where="cudagraph_runtime_mode",
                hint="let the dispatcher choose it: mode, descriptor = dispatcher.dispatch(num_tokens)",
            )


# A ContextVar is a constant key; the value belongs to the running thread or task.
_CURRENT: ContextVar[ForwardContext | None] = ContextVar("piecework_forward_context", default=None)


class ForwardScope:
    """The block in which a context (or none at all) is current."""

    __slots__ = ("_token", "context")

    def __init__(self, context: ForwardContext | None) -> None:
        self.context = context

    def __enter__(self) -> ForwardContext | None:
        self._token = _CURRENT.set(self.context)
        return self.context

    def __exit__(self, *exception: object) -> None:
        _CURRENT.reset(self._token)


#: Makes an existing context (or none at all) current for a ``with`` block.
override_forward_context = ForwardScope


def set_forward_context(
    attn_metadata: object = None,
    *,
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
    batch_descriptor: BatchDescriptor | None = None,
    skip_cuda_graphs: bool = False,
    state: Mapping[str, object] | None = None,
    batch: BatchKind | None = None,
) -> ForwardScope:
    """Make a context current for a ``with`` block; the outer one is back afterwards.

    The arguments are the fields of `ForwardContext`.

    Example:
        >>> with set_forward_context({"seq_lens": [3]}):
        ...     get_forward_context().attn_metadata
        {'seq_lens': [3]}
    """
    captured = (cudagraph_runtime_mode, batch_descriptor, skip_cuda_graphs)
    state = _NO_STATE if state is None else state
    return ForwardScope(ForwardContext(*captured, attn_metadata, state, batch))


def get_forward_context() -> ForwardContext:
    """The current context; an `InputError` outside of a forward."""
    context = _CURRENT.get()
    if context is None:
        why = "no forward context is set"
        hint = "call the model inside `with set_forward_context(...)`"
        raise InputError(why, where="get_forward_context", hint=hint)
    return context


def current_forward_context() -> ForwardContext | None:
    """The current context, or None; one look-up, for the paths that run once per piece."""
    return _CURRENT.get()
