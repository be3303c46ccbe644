"""What a configuration means in one program: its conflicts, and a copy with nothing left open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from piecework.errors import ConfigError, ConfigProblem
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import derive_ranges
from piecework.runtime.batch.sizes import (
    adjust_sizes_for_spec_decode,
    padded_sizes,
    resolve_capture_sizes,
)
from piecework.runtime.config.groups import CompilationMode, RuntimeConfig
from piecework.runtime.config.model import Conflict, report
from piecework.runtime.config.values import CAPTURE_SIZES, has_op

if TYPE_CHECKING:
    from piecework.runtime.config.compilation import CompilationConfig

_log = logging.getLogger(__name__)
_WHOLE = (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE)

WITHOUT_EFFECT: Mapping[str, tuple[object, str]] = {
    "compile_cache_save_format": (
        "unpacked",
        "the cache keeps an artifact as one file with a checksum; set debug_dump_path to look into "
        "what was compiled",
    ),
    "compile_mm_encoder": (
        True,
        "an encoder is a model of its own here; compile it by itself, under "
        "set_model_tag(name, is_encoder=True)",
    ),
}
"""Values that the field knows and nothing here would go by: the value, and what to do instead."""


def conflicts_of(config: CompilationConfig) -> Iterator[Conflict]:
    """Fields of one configuration that are valid alone and contradict each other."""
    for name, (value, reason) in WITHOUT_EFFECT.items():
        if getattr(config, name) == value:
            yield Conflict((name,), f"{value!r} would have no effect: {reason}")
    mode, captures = config.mode, config.cudagraph_mode
    partition = config.use_inductor_graph_partition
    if partition and config.backend != "inductor":
        yield Conflict(
            ("use_inductor_graph_partition", "backend"),
            f"only Inductor partitions a graph, and the backend is {config.backend!r}",
        )
    if partition and mode is CompilationMode.NONE:
        yield Conflict(
            ("use_inductor_graph_partition", "mode"),
            "mode NONE compiles nothing, so Inductor has nothing to partition",
        )
    if mode is CompilationMode.NONE and captures is not CUDAGraphMode.NONE:
        yield Conflict(
            ("cudagraph_mode", "mode"),
            f"mode NONE traces nothing, so there is nothing that {captures} could capture; use "
            "PIECEWORK_COMPILE, with backend 'eager' to compile nothing",
        )
    if captures.requires_piecewise_compilation() and mode in _WHOLE:
        yield Conflict(
            ("cudagraph_mode", "mode"),
            f"{captures} captures pieces, and mode {mode} makes none; use PIECEWORK_COMPILE, "
            f"or cudagraph_mode {captures.without_piecewise()}",
        )
    if captures.requires_piecewise_compilation() and config.splitting_ops == ():
        yield Conflict(
            ("cudagraph_mode", "splitting_ops"),
            f"{captures} captures the pieces between splitting ops, and splitting_ops is "
            "empty; use FULL to capture the whole graph",
        )
    yield from _size_conflicts(config)


def _size_conflicts(config: CompilationConfig) -> Iterator[Conflict]:
    captures, sizes = config.cudagraph_mode, config.cudagraph_capture_sizes
    largest = config.max_cudagraph_capture_size
    if sizes is not None and largest is not None and largest != max(sizes, default=0):
        yield Conflict(
            ("cudagraph_capture_sizes", "max_cudagraph_capture_size"),
            f"the largest listed size is {max(sizes, default=0)} and the maximum {largest}; "
            "give only one of the two",
        )
    if captures is CUDAGraphMode.NONE:
        return
    if sizes == ():
        yield Conflict(
            ("cudagraph_mode", "cudagraph_capture_sizes"),
            f"{captures} captures, and no size is listed; use mode NONE, or leave the list out",
        )
    if largest == 0:
        yield Conflict(
            ("cudagraph_mode", "max_cudagraph_capture_size"),
            f"{captures} captures, and the largest size is 0; use mode NONE",
        )
    # A batch that may run uncaptured keeps its own size, so that any size is reached.
    if sizes and captures.mixed_mode() is not CUDAGraphMode.NONE:
        padded = padded_sizes(sizes)
        idle = [
            f"{size} (padded to {padded[size]})"
            for size in config.compile_sizes
            if isinstance(size, int) and size < len(padded) and padded[size] != size
        ]
        if idle:
            yield Conflict(
                ("compile_sizes", "cudagraph_capture_sizes"),
                f"no batch runs in {', '.join(idle)}; compile captured sizes, or sizes above "
                f"{max(sizes)}",
            )


# --- splitting ops -------------------------------------------------------------------------------


def with_splitting_ops(
    config: CompilationConfig, registered: Iterable[str], attention_ops: Iterable[str]
) -> CompilationConfig:
    """``config`` with explicit splitting ops: the registered ones where nothing was chosen."""
    if config.mode in _WHOLE:
        # These modes hand the whole graph to one compiler; a list given by hand is kept as it is.
        return config if config.splitting_ops is not None else config.replace(splitting_ops=())
    if config.pass_config.fuse_attn_quant and not config.use_inductor_graph_partition:
        return with_attention_inside(config, registered, attention_ops)
    if config.splitting_ops is not None:
        return config
    return _split_at(config, registered, "no splitting op is registered")


def with_attention_inside(
    config: CompilationConfig, registered: Iterable[str], attention_ops: Iterable[str]
) -> CompilationConfig:
    """``config`` cut nowhere at attention, so that a pass can fuse it."""
    where = "pass_config.fuse_attn_quant"
    if not config.pass_config.fuse_attn_quant:
        raise ConfigError(
            "attention stays in the graph only for a pass that fuses it",
            where=where,
            hint="set pass_config.fuse_attn_quant, or leave the splitting ops as they are",
        )
    attention = sorted(set(attention_ops))
    if config.splitting_ops is not None:
        cut = [op for op in attention if has_op(config.splitting_ops, op)]
        if cut:
            raise ConfigError(
                "fuse_attn_quant needs attention inside the pieces, and the graph is cut at "
                + ", ".join(cut),
                where="splitting_ops",
                hint="remove it from splitting_ops, or use use_inductor_graph_partition",
            )
        return config
    if not attention:
        raise ConfigError(
            "fuse_attn_quant needs to know which splitting ops are attention",
            where=where,
            hint="pass attention_ops, or list the other ops in splitting_ops",
        )
    remaining = (op for op in registered if not has_op(attention, op))
    return _split_at(config, remaining, "fuse_attn_quant keeps attention in the graph")


def _split_at(config: CompilationConfig, ops: Iterable[str], why_none: str) -> CompilationConfig:
    """``config`` cut at ``ops``; with none of them no pieces are captured, which is logged."""
    chosen, captures = tuple(sorted(set(ops))), config.cudagraph_mode
    if not chosen and captures.requires_piecewise_compilation():
        fallback = captures.without_piecewise()
        _log.warning(
            "%s, so there are no pieces to capture: cudagraph_mode %s becomes %s",
            why_none,
            captures,
            fallback,
        )
        captures = fallback
    return config.replace(splitting_ops=chosen, cudagraph_mode=captures)


# --- sizes ---------------------------------------------------------------------------------------


def with_capture_sizes(config: CompilationConfig, runtime: RuntimeConfig) -> CompilationConfig:
    """``config`` with explicit capture sizes: none if nothing is captured."""
    captured: tuple[int, ...] = ()
    if config.cudagraph_mode is not CUDAGraphMode.NONE:
        captured = resolve_capture_sizes(
            config.cudagraph_capture_sizes,
            config.max_cudagraph_capture_size,
            max_num_seqs=runtime.max_num_seqs,
            max_num_batched_tokens=runtime.max_num_batched_tokens,
            decode_query_lens=runtime.query_lens,
        )
        captured = _whole_shares(captured, _ranks_that_cut(config, runtime))
    elif config.cudagraph_capture_sizes:
        _log.warning("cudagraph_mode NONE captures nothing: cudagraph_capture_sizes are dropped")
    return config.replace(
        cudagraph_capture_sizes=captured, max_cudagraph_capture_size=max(captured, default=0)
    )


def _ranks_that_cut(config: CompilationConfig, runtime: RuntimeConfig) -> int:
    """Over how many ranks the tokens of a batch are cut."""
    return runtime.tensor_parallel_size if config.pass_config.enable_sp else 1


def _whole_shares(sizes: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The sizes of which every rank gets the same share; others are left out, which is logged."""
    kept = tuple(size for size in sizes if size % ranks == 0)
    if sizes and not kept:
        raise ConfigError(
            f"no capture size is a multiple of {ranks}, over which the sequence is cut",
            where="cudagraph_capture_sizes",
            hint="list multiples, or switch pass_config.enable_sp off",
        )
    if len(kept) < len(sizes):
        dropped = ", ".join(str(size) for size in sizes if size not in kept)
        _log.warning("capture sizes %s are dropped: the sequence is cut over %s", dropped, ranks)
    return kept


def with_compile_sizes(config: CompilationConfig) -> CompilationConfig:
    """``config`` with the capture sizes in place of a reference to them in ``compile_sizes``."""
    if CAPTURE_SIZES not in config.compile_sizes:
        return config
    if config.cudagraph_capture_sizes is None:
        raise ConfigError(
            "compile_sizes refers to the capture sizes, which are not chosen yet",
            where="compile_sizes",
            hint="call resolve() first",
        )
    named = [size for size in config.compile_sizes if isinstance(size, int)]
    return config.replace(compile_sizes=(*named, *config.cudagraph_capture_sizes))


def with_spec_decode_sizes(
    config: CompilationConfig, query_len: int, tensor_parallel_size: int
) -> CompilationConfig:
    """``config`` whose capture sizes are multiples of the query length of a decode batch."""
    sizes, largest = config.cudagraph_capture_sizes, config.max_cudagraph_capture_size
    if sizes is None or largest is None:
        raise ConfigError(
            "the capture sizes are not chosen yet",
            where="cudagraph_capture_sizes",
            hint="call resolve() or post_init_cudagraph_sizes() first",
        )
    adjusted = adjust_sizes_for_spec_decode(
        sizes,
        query_len,
        max_size=largest,
        tensor_parallel_size=tensor_parallel_size if config.pass_config.enable_sp else 1,
    )
    return config.replace(
        cudagraph_capture_sizes=adjusted, max_cudagraph_capture_size=max(adjusted, default=0)
    )


def _require_decode_sizes(config: CompilationConfig, runtime: RuntimeConfig) -> CompilationConfig:
    """``config`` itself, if decode batches of every query length have a size to be captured in."""
    captures, sizes = config.cudagraph_mode, config.cudagraph_capture_sizes
    if sizes and captures.separate_routine() and captures.decode_mode() is CUDAGraphMode.FULL:
        ranks = _ranks_that_cut(config, runtime)
        for query_len in runtime.query_lens:
            adjust_sizes_for_spec_decode(
                sizes, query_len, max_size=max(sizes), tensor_parallel_size=ranks
            )
    return config


def _require_reachable(config: CompilationConfig, runtime: RuntimeConfig) -> CompilationConfig:
    """``config`` itself, if a batch can be as large as each compile size."""
    largest = runtime.max_num_batched_tokens
    beyond = [size for size in config.compile_sizes if isinstance(size, int) and size > largest]
    if beyond:
        raise ConfigError(
            f"no batch reaches {', '.join(map(str, beyond))}; the largest batch is {largest}",
            where="compile_sizes",
            hint="remove these sizes, or raise max_num_batched_tokens",
        )
    return config


def _with_ranges(config: CompilationConfig, runtime: RuntimeConfig) -> CompilationConfig:
    """``config`` with the endpoints that cut something: the largest batch itself does not."""
    ranges = derive_ranges(config.compile_ranges_endpoints, runtime.max_num_batched_tokens)
    return config.replace(compile_ranges_endpoints=tuple(each.end for each in ranges[:-1]))


def resolve(
    config: CompilationConfig,
    runtime: RuntimeConfig,
    registered: Iterable[str] | None,
    attention_ops: Iterable[str],
) -> CompilationConfig:
    """A copy of ``config`` with nothing left open; the problems of all steps are one error."""
    problems: list[ConfigProblem] = []
    steps: list[Callable[[CompilationConfig], CompilationConfig]] = [
        lambda each: (
            each if registered is None else with_splitting_ops(each, registered, attention_ops)
        ),
        lambda each: with_capture_sizes(each, runtime),
        lambda each: _require_decode_sizes(each, runtime),
        # Where the sizes could not be chosen, that is the problem.
        lambda each: each if each.cudagraph_capture_sizes is None else with_compile_sizes(each),
        lambda each: _require_reachable(each, runtime),
        lambda each: _with_ranges(each, runtime),
    ]
    done = config
    for step in steps:
        try:
            done = step(done)
        except ConfigError as error:
            text = error.message if error.hint is None else f"{error.message} ({error.hint})"
            problems.extend(error.problems or (ConfigProblem(error.where or "", text),))
    if problems:
        raise report(type(config).__name__, problems)
    if {"all", "none"}.isdisjoint(done.custom_ops):
        done = done.replace(custom_ops=(done.custom_op_base(), *done.custom_ops))
    return done
