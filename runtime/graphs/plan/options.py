"""What is captured of a model, and how. In: a configuration, sizes and options. Out: a plan with nothing left open.

It captures nothing, and changes neither the configuration nor the model.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch

from piecework.errors import ConfigError, StaticGraphError, did_you_mean
from piecework.runtime.batch.descriptor import BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher
from piecework.runtime.batch.keys import LoraCases
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import (
    WORTH_CAPTURING,
    default_capture_sizes,
    require_positive_sizes,
)
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.graphs.memory.addresses import AddressPolicy
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.batch_shape import BatchShape, OtherSize, require_sizes
from piecework.runtime.graphs.plan.full_graphs import negotiated
from piecework.runtime.graphs.plan.phase import ContextFor, FailurePolicy
from piecework.runtime.graphs.stage.slots import Number
from piecework.runtime.splitting_op import GraphsOf

_SWITCHES = (
    "raise_interrupt",
    "clone_outputs",
    "strict",
    "poison",
    "put_back",
    "check_addresses",
    "mark_kernels",
)
_CALLS = ("kind_of", "join", "around", "context_for")


def _is_mapping(value: object, fits: Callable[[Any], bool] = lambda each: True) -> bool:
    return isinstance(value, Mapping) and all(map(fits, value.values()))


# What each option must be; those that are not here are checked where they are read, against the model.
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_SWITCHES, ("True or False", lambda value: type(value) is bool)),
    **dict.fromkeys(_CALLS, ("a function, or None", lambda v: v is None or callable(v))),
    "pad": ("True, False or None", lambda value: value is None or type(value) is bool),
    "runtime": (
        "a RuntimeConfig, or None",
        lambda value: value is None or isinstance(value, RuntimeConfig),
    ),
    "axes": (
        "a dict of lists of values",
        lambda v: _is_mapping(v, lambda e: isinstance(e, Sequence) and type(e) is not str),
    ),
    "other_sizes": ("a dict of lists of sizes", _is_mapping),
    "warmups": (
        "a number of runs, or None",
        lambda value: value is None or (type(value) is int and value >= 0),
    ),
    "max_padding_factor": (
        "a number of at least 1, or None",
        lambda v: v is None or (type(v) in (int, float) and 1 <= v < float("inf")),
    ),
    "memory_of": (
        "the static_graphs.graphs of a captured model, or None",
        lambda value: value is None or isinstance(value, StaticGraphs),
    ),
    "pads": ("a dict of numbers", lambda v: _is_mapping(v, lambda e: isinstance(e, Number))),
    "static": (
        "a dict of tensors",
        lambda v: _is_mapping(v, lambda e: isinstance(e, torch.Tensor)),
    ),
}


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How a stitched model is captured.

    Attributes:
        mode: what is captured: the pieces, the whole forward, or both; by default the configuration's ``cudagraph_mode``, and
            PIECEWISE where that is NONE.
        runtime: the program's limits: largest batch, most requests, query length of a decode batch, adapters. Sizes are
            resolved against it as by ``CompilationConfig.resolve``.
        lora_counts: numbers of active adapters to capture for; none means one graph for any number.
        axes: further axes of the descriptor, each with the values to capture.
        other_sizes: for each dynamic size beside the batch size (``x.1``: dimension 1 of argument ``x``; ``n``: an integer
            argument), the values to capture; or ``"batch"``, where it always equals the batch size and the trace did not see it.
        kind_of: tells from the call's tensor arguments, by name, what kind of batch it is; by default the forward context's
            ``batch`` tells.
        address_policy: what becomes of fresh tensors that enter a captured piece.
        warmups: uncaptured runs before each capture; by default the configuration's, and at least one on CUDA.
        on_failure: what a failed capture does.
        raise_interrupt: raise ``KeyboardInterrupt`` again after Ctrl-C; what was captured serves either way.
        max_padding_factor: a batch that would be padded to more than so many times its size runs uncaptured; None: it is padded to
            the next captured size, however large.
        clone_outputs: return copies; otherwise the next call overwrites what this one returned.
        strict: a batch that falls back to running uncaptured although its size was to be captured is an error; so is a mode that an
            operator can't be captured in, which is lowered otherwise.
        join: called before each capture and each call that is served from graphs: lets the current stream wait for work that the
            model queued on others.
        around: opened around all captures, and around those of the estimate: the capture context of a communicator, which registers
            the buffers that its graphs use when it is left.
        memory_of: the ``static_graphs.graphs`` of another captured model: both use one pool, and one of them runs at a time.
        pads: what fills the tail of each padded input, by its parameter's name; 0 by default.
        static: arguments without the batch size that calls pass in the same memory each time, such as a KV cache: by parameter name,
            the tensor itself. It is neither copied nor copied back; a call that passes another one is an error.
        poison: pad floating inputs with NaN, to find out what reads beyond the batch (debugging).
        pad: True says that rows of a batch are independent, so that it may be padded to the next captured size; where a try at the
            capture finds another result, that is an error. False pads nothing. None pads what shows no sign of mixing rows, and
            where the try holds. The try runs a small batch of random data alone and padded, eight uncaptured forwards.
        context_for: makes the forward context of runs on dummy inputs.
        put_back: copy what splitting ops write in runs on dummy inputs, and put it back after each; turn it off where the copies
            take too much memory and nothing is in those buffers yet.
        check_addresses: serve through pieces that check every address instead of through replay source (debugging).
        mark_kernels: let kernels inside CUDA graphs carry layer and emitted line in traces, where torch and CUDA can; costs time while
            capturing, and none in calls.
    """

    mode: CUDAGraphMode | str | None = None
    runtime: RuntimeConfig | None = None
    lora_counts: tuple[int, ...] = ()
    axes: Mapping[str, Sequence[Hashable]] = field(default_factory=dict)
    other_sizes: Mapping[str, Sequence[int] | Literal["batch"]] = field(default_factory=dict)
    kind_of: Callable[..., BatchKind] | None = None
    address_policy: AddressPolicy | str = AddressPolicy.COPY
    warmups: int | None = None
    on_failure: FailurePolicy | str = FailurePolicy.RAISE
    raise_interrupt: bool = True
    max_padding_factor: float | None = None
    clone_outputs: bool = True
    strict: bool = False
    join: Callable[[], object] | None = None
    around: Callable[[], AbstractContextManager[object]] | None = None
    memory_of: StaticGraphs | None = None
    pads: Mapping[str, Number] = field(default_factory=dict)
    static: Mapping[str, torch.Tensor] = field(default_factory=dict)
    poison: bool = False
    pad: bool | None = None
    context_for: ContextFor | None = None
    put_back: bool = True
    check_addresses: bool = False
    mark_kernels: bool = True

    @classmethod
    def given(cls, options: Mapping[str, object]) -> CaptureOptions:
        """The options that a caller gave by name.

        Raises:
            ConfigError: there is no such option.
        """
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"capture has no option {name!r}",
                    hint=did_you_mean(name, known) or f"use one of {', '.join(known)}",
                )
        return cls(**options)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name, (says, fits) in _KINDS.items():
            value = getattr(self, name)
            if not fits(value):
                got = reprlib.repr(value)  # a tensor would fill the screen
                raise ConfigError(f"{name} must be {says}; got {got}", where="capture")

    @property
    def same_as_batch(self) -> frozenset[str]:
        """Labels of the sizes that were declared to equal the batch size.

        Raises:
            ConfigError: a size is declared as another word.
        """
        words = {k: v for k, v in self.other_sizes.items() if isinstance(v, str)}
        wrong = sorted(label for label, word in words.items() if word != "batch")
        if wrong:
            raise ConfigError(
                f"{wrong[0]} is {words[wrong[0]]!r}",
                where="other_sizes",
                hint="give the values to capture, or 'batch'",
            )
        return frozenset(words)


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What is captured.

    Attributes:
        mode: what decode and mixed batches use.
        sizes: batch sizes, ascending.
        others: combinations of other sizes, by label; one empty one if there are none.
        dispatcher: which batch runs as what.
        lowered: why that is less than the mode that was asked for; "" if it isn't.
    """

    mode: CUDAGraphMode
    sizes: tuple[int, ...]
    others: tuple[Mapping[str, int], ...]
    dispatcher: CudagraphDispatcher
    lowered: str


def plan_capture(
    shape: BatchShape,
    config: CompilationConfig,
    sizes: Iterable[int] | None,
    options: CaptureOptions,
    said: Mapping[str, GraphsOf] = MappingProxyType({}),
) -> CapturePlan:
    """Settle what ``capture(sizes, …)`` means for one model.

    Args:
        said: which whole forwards may be captured with each operator between the pieces inside.

    Raises:
        ConfigError: a size can't be reached or served, or sizes and limits disagree.
        StaticGraphError: nothing is left to capture, or a dynamic size has no values to capture.
    """
    runtime = options.runtime
    lens = (1,) if runtime is None else tuple(runtime.query_lens)
    asked = _mode(config, options)
    mode, able, lowered = negotiated(asked, said, lens)
    if lowered and (options.strict or mode is CUDAGraphMode.NONE):
        raise StaticGraphError(
            f"mode {asked.name} can't be: {lowered}",
            where="capture",
            hint="capture in mode PIECEWISE, or say splitting_op(..., full_graphs=...)",
        )
    given = {label: v for label, v in options.other_sizes.items() if not isinstance(v, str)}
    values = _other_values(shape, given)
    others = tuple(
        dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())
    )
    chosen = _sizes(shape, config, mode, sizes, others, options.runtime)
    clash = sorted(set(values) & set(options.axes))
    if clash:
        raise ConfigError(
            f"axis {clash[0]!r} is a size of the model",
            where="axes",
            hint="name sizes of the model in other_sizes, and axes of your own otherwise",
        )
    adapters = (runtime is not None and runtime.enable_lora) or bool(options.lora_counts)
    parallel = runtime is not None and config.pass_config.enable_sp
    dispatcher = CudagraphDispatcher(
        mode,
        chosen,
        max_num_seqs=max(chosen) if runtime is None else runtime.max_num_seqs,
        uniform_decode_query_len=lens,
        decode_multiple_of=runtime.tensor_parallel_size if parallel else 1,
        lora=LoraCases(adapters, config.cudagraph_specialize_lora, tuple(options.lora_counts)),
        axes={**options.axes, **values},
        strict=options.strict,
        max_padding_factor=options.max_padding_factor,
    )
    for key in list(dispatcher.cudagraph_keys[CUDAGraphMode.FULL]):
        # A batch that doesn't say how wide its requests are has the widest, so those widths stay known to the dispatcher.
        if key.uniform and key.num_tokens // (key.num_reqs or 1) not in able:
            dispatcher.give_up(CUDAGraphMode.FULL, key)
            continue
        # Decode sizes that follow from the others; what was asked for by name is an error where it can't be.
        if key.num_tokens not in chosen and _refused(shape, key.num_tokens, others):
            dispatcher.give_up(CUDAGraphMode.FULL, key)
    return CapturePlan(mode, chosen, others, dispatcher, lowered)


def _refused(shape: BatchShape, size: int, others: Sequence[Mapping[str, int]]) -> bool:
    return any(shape.refusal(size, each) is not None for each in others)


def _mode(config: CompilationConfig, options: CaptureOptions) -> CUDAGraphMode:
    if options.mode is None:
        unset = config.cudagraph_mode is CUDAGraphMode.NONE
        return CUDAGraphMode.PIECEWISE if unset else config.cudagraph_mode
    mode = CUDAGraphMode.parse(options.mode)
    if mode is CUDAGraphMode.NONE:
        raise ConfigError("mode NONE captures nothing", where="mode", hint="don't call capture()")
    return mode


def _sizes(
    shape: BatchShape,
    config: CompilationConfig,
    mode: CUDAGraphMode,
    sizes: Iterable[int] | None,
    others: Sequence[Mapping[str, int]],
    runtime: RuntimeConfig | None,
) -> tuple[int, ...]:
    named = config.cudagraph_capture_sizes if sizes is None else require_positive_sizes(sizes)
    wanted = named
    if runtime is not None and named != ():
        largest = None if named is not None else config.max_cudagraph_capture_size
        asked = config.replace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=named,
            max_cudagraph_capture_size=largest,
            compile_sizes=(),  # they are compiled already, and serve what runs uncaptured
        )
        wanted = asked.resolve(runtime).cudagraph_capture_sizes
    elif named is None:
        wanted = default_capture_sizes(config.max_cudagraph_capture_size or WORTH_CAPTURING)
    found = tuple(wanted or ())
    if named is not None:
        require_sizes(shape, found, others)
    else:  # steps that nobody asked for one by one
        found = tuple(n for n in found if not _refused(shape, n, others))
    if not found:
        raise StaticGraphError("there is no size to capture", where="capture sizes")
    return found


def _marked(other: OtherSize) -> str:
    """How to fix a dimension; the batch then has to be marked as well, since only marked dimensions are dynamic."""
    argument, dot, dim = other.label.rpartition(".")
    if not dot:
        return ""
    return (
        f": torch._dynamo.mark_static({argument}, {dim}), and the batch dimension with "
        "torch._dynamo.mark_dynamic"
    )


def _other_values(
    shape: BatchShape, given: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """The values to capture of each other size, by its first label."""
    first = {label: each.label for each in shape.others for label in each.labels}
    unknown = sorted(set(given) - set(first))
    if unknown:
        raise ConfigError(
            f"no dynamic size {unknown[0]!r} beside the batch size",
            where="other_sizes",
            hint=f"there are: {', '.join(sorted(first)) or 'none'}",
        )
    found = {first[label]: tuple(dict.fromkeys(values)) for label, values in given.items()}
    for other in shape.others:
        if other.label not in found and other.example is not None:
            if other.example == shape.example and other.label.endswith(".0"):
                raise StaticGraphError(
                    "was as large as the batch in the example, and the trace does not say whether it always is",
                    where=f"input {other.label}",
                    hint=f"if it is, pass other_sizes={{{other.label!r}: 'batch'}}; if not, the values to capture, such as "
                    f"other_sizes={{{other.label!r}: [{other.example}]}}",
                )
            found[other.label] = (other.example,)
        if not found.get(other.label):
            raise StaticGraphError(
                "is dynamic beside the batch size, and a captured graph fixes it",
                where=f"input {other.label}",
                hint=f"pass the values to capture, such as other_sizes={{{other.label!r}: [16]}}, or 'batch' for a size that "
                f"always equals the batch size; or compile for one value of it{_marked(other)}",
            )
    return {each.label: found[each.label] for each in shape.others}
