"""What is captured of a model, and how: the options, and the plan that they make of sizes."""

import math
import numbers
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, get_args

import torch
import torch.fx
from pydantic import Field, InstanceOf

from piecework.codegen.graph.origin import nodes_of
from piecework.errors import ConfigError, StaticGraphError
from piecework.runtime.batch.dispatcher import CudagraphDispatcher, lora_cases
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import (
    WORTH_CAPTURING,
    default_capture_sizes,
    require_positive_sizes,
)
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.groups import CUDAGraphModeField, parsed_by
from piecework.runtime.config.model import FrozenModel
from piecework.runtime.graphs.memory.addresses import AddressPolicy
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.phase import ContextFor, FailurePolicy
from piecework.runtime.splitting_op import GraphsOf, registry

_ORDER: tuple[GraphsOf, ...] = get_args(GraphsOf)
_Switch = Annotated[bool, Field(strict=True)]
_Count = Annotated[int, Field(strict=True, ge=0)]
_Policy = Annotated[AddressPolicy, parsed_by(AddressPolicy.parse)]
_OnFailure = Annotated[FailurePolicy, parsed_by(FailurePolicy.parse)]


class CaptureOptions(FrozenModel):
    explained_by: ClassVar[str] = "help(piecework.runtime.CaptureOptions) says what each option is"

    # the pieces, the whole forward, or both; by default the configuration's ``cudagraph_mode``, and
    # PIECEWISE where that is NONE
    mode: CUDAGraphModeField | None = None
    runtime: RuntimeConfig | None = None  # the program's limits, against which sizes are resolved
    # numbers of active adapters to capture for; none: one graph for any number
    lora_counts: tuple[int, ...] = ()
    # further axes of the descriptor, each with the values to capture
    axes: Mapping[str, tuple[Hashable, ...]] = {}
    # the value to capture of a dynamic size beside the batch size (``x.1``: dimension 1 of argument
    # ``x``; ``n``: an integer argument), by default the example's; or ``"batch"``, where it always
    # equals the batch size and the trace did not see it
    other_sizes: Mapping[str, Annotated[int, Field(strict=True)] | Literal["batch"]] = {}
    # what becomes of fresh tensors that enter a captured piece
    address_policy: _Policy = AddressPolicy.COPY
    # uncaptured runs before each capture; the configuration's, one on CUDA at least
    warmups: _Count | None = None
    on_failure: _OnFailure = FailurePolicy.RAISE  # what a failed capture does
    # run a batch uncaptured that would be padded to more than so many times its size; None: pad it
    # to the next captured size, however large
    max_padding_factor: Annotated[float, Field(strict=True, ge=1, lt=math.inf)] | None = None
    # return copies; otherwise the next call overwrites what this one returned
    clone_outputs: _Switch = True
    # a batch that falls back to running uncaptured, and a mode that has to be lowered, are errors
    strict: _Switch = False
    # called before each capture and each served call: lets the current stream wait for work that
    # the model queued on others
    join: Callable[[], object] | None = None
    # opened around all captures: the capture context of a communicator
    around: Callable[[], AbstractContextManager[object]] | None = None
    # the ``static_graphs.graphs`` of another captured model: both use one pool, and one of them
    # runs at a time
    memory_of: StaticGraphs | None = None
    # what fills the tail of each padded input, by its parameter's name; 0 by default
    pads: Mapping[str, InstanceOf[numbers.Number]] = {}
    # pad floating inputs with NaN, to find out what reads beyond the batch (debugging)
    poison: _Switch = False
    # True says that rows are independent, so that a batch may be padded; where a try finds another
    # result, that is an error. False pads nothing. None pads what shows no sign of mixing rows,
    # where the try holds. The try makes eight small uncaptured forwards.
    pad: _Switch | None = None
    context_for: ContextFor | None = None  # makes the forward context of runs on dummy inputs
    # copy what splitting ops write in runs on dummy inputs, and put it back
    put_back: _Switch = True
    check_addresses: _Switch = False  # serve through pieces that check every address (debugging)
    # let kernels inside CUDA graphs carry layer and emitted line in traces
    mark_kernels: _Switch = True


def plan_capture(
    shape: BatchShape,
    config: CompilationConfig,
    sizes: Iterable[int] | None,
    options: CaptureOptions,
    declared: Mapping[str, GraphsOf] = MappingProxyType({}),
) -> tuple[CudagraphDispatcher, str]:
    runtime = options.runtime
    lens = (1,) if runtime is None else tuple(runtime.query_lens)
    wanted = config.cudagraph_mode if options.mode is None else options.mode
    if wanted is CUDAGraphMode.NONE:
        if options.mode is not None:
            hint = "don't call capture()"
            raise ConfigError("mode NONE captures nothing", where="mode", hint=hint)
        wanted = CUDAGraphMode.PIECEWISE
    mode, able, lowered = negotiated(wanted, declared, lens)
    if lowered and (options.strict or mode is CUDAGraphMode.NONE):
        why = f"mode {wanted.name} can't be: {lowered}"
        hint = "capture in mode PIECEWISE, or say splitting_op(..., full_graphs=...)"
        raise StaticGraphError(why, where="capture", hint=hint)
    chosen = _sizes(shape, config, mode, sizes, runtime)
    adapters = (runtime is not None and runtime.enable_lora) or bool(options.lora_counts)
    parallel = runtime is not None and config.pass_config.enable_sp
    dispatcher = CudagraphDispatcher(
        mode,
        chosen,
        max_num_seqs=max(chosen) if runtime is None else runtime.max_num_seqs,
        uniform_decode_query_len=lens,
        decode_multiple_of=runtime.tensor_parallel_size if parallel else 1,
        lora=lora_cases(adapters, config.cudagraph_specialize_lora, options.lora_counts),
        axes=options.axes,
        strict=options.strict,
        max_padding_factor=options.max_padding_factor,
    )
    for key in list(dispatcher.cudagraph_keys[CUDAGraphMode.FULL]):
        # A batch that doesn't say how wide its requests are has the widest, so those widths stay
        # known to the dispatcher. Decode sizes that follow from the others may be out of reach.
        too_wide = key.uniform and key.num_tokens // (key.num_reqs or 1) not in able
        if too_wide or shape.refusal(key.num_tokens) is not None:
            dispatcher.give_up(CUDAGraphMode.FULL, key)
    return dispatcher, lowered


def full_graphs_of(split_gm: torch.fx.GraphModule, between: Iterable[str]) -> dict[str, GraphsOf]:
    """Which whole forwards the operators in the submodules ``between`` say they can be in."""
    operators = (node.target for _, node in nodes_of(split_gm, between))
    found = [each for each in operators if isinstance(each, torch._ops.OpOverload)]
    return {each._schema.name: registry.graphs_of(each) for each in found}


def negotiated(
    mode: CUDAGraphMode, declared: Mapping[str, GraphsOf], query_lens: Sequence[int]
) -> tuple[CUDAGraphMode, tuple[int, ...], str]:
    """The most of ``mode`` that every operator can be captured in."""
    lens = tuple(query_lens)
    weakest = min(declared, key=lambda name: _ORDER.index(declared[name]), default="")
    kind = declared.get(weakest, "always")
    if not mode.has_mode(CUDAGraphMode.FULL) or kind == "always":
        return mode, lens, ""
    why = f"{weakest} can be captured whole for {kind} only"
    if kind == "never":
        why = f"{weakest} can't be captured in a whole forward"
    able = {"never": (), "single_token_decode": tuple(n for n in lens if n == 1)}.get(kind, lens)
    mixed = mode.mixed_mode()
    if not able:
        return (CUDAGraphMode.PIECEWISE if mixed is CUDAGraphMode.FULL else mixed), lens, why
    if mixed is CUDAGraphMode.FULL:
        return CUDAGraphMode.FULL_AND_PIECEWISE, able, why
    return mode, able, "" if able == lens else why


def _sizes(
    shape: BatchShape,
    config: CompilationConfig,
    mode: CUDAGraphMode,
    sizes: Iterable[int] | None,
    runtime: RuntimeConfig | None,
) -> tuple[int, ...]:
    named = config.cudagraph_capture_sizes if sizes is None else require_positive_sizes(sizes)
    wanted = named
    if runtime is not None and named != ():
        largest = None if named is not None else config.max_cudagraph_capture_size
        limited = config.replace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=named,
            max_cudagraph_capture_size=largest,
            compile_sizes=(),  # they are compiled already, and serve what runs uncaptured
        )
        wanted = limited.resolve(runtime).cudagraph_capture_sizes
    elif named is None:
        wanted = default_capture_sizes(config.max_cudagraph_capture_size or WORTH_CAPTURING)
    refusals = {size: shape.refusal(size) for size in wanted or ()}
    for size, why in refusals.items() if named is not None else ():
        if why is not None:  # else a step that nobody named
            one = (
                "for size 1 too, mark the batch dimension with "
                "torch._dynamo.decorators.mark_unbacked and compile again"
            )
            why = f"size {size} can't be captured: {why}"
            hint = one if size == 1 else "capture sizes that the trace allows"
            raise ConfigError(why, where="capture sizes", hint=hint)
    found = tuple(size for size, why in refusals.items() if why is None)
    if not found:
        raise StaticGraphError("there is no size to capture", where="capture sizes")
    return found
