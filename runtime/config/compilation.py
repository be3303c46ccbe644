"""Everything that decides how a model is compiled, as one frozen, validated configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, Field

from piecework.errors import ConfigError, ConfigProblem, short_methods
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable, derive_ranges
from piecework.runtime.batch.sizes import (
    adjust_sizes_for_spec_decode,
    padded_sizes,
    resolve_capture_sizes,
)
from piecework.runtime.config.groups import (
    BackendName,
    CompilationMode,
    CompileSizes,
    CUDAGraphModeField,
    CustomOps,
    DynamicShapesConfig,
    DynamicShapesType,
    Endpoints,
    ModeField,
    OpNames,
    Options,
    PassConfig,
    Passes,
    RuntimeConfig,
    Sizes,
    StitchingConfig,
)
from piecework.runtime.config.model import KEY, FrozenModel, digest, factors_of, ignored, report
from piecework.runtime.config.qualified_name import import_qualified

__all__ = [
    "CUDAGraphMode",
    "CompilationConfig",
    "CompilationMode",
    "DynamicShapesConfig",
    "DynamicShapesType",
    "PassConfig",
    "RuntimeConfig",
    "StitchingConfig",
]

_WHOLE = (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE)
_log = logging.getLogger(__name__)
_A_PATH = "a path does not change what is compiled"
_A_BATCH_RANGE = "each compiled form is kept under its own batch range"
_A_CAPTURE_SIZE = "captured graphs are not cached, and the code is the same for every size"


@short_methods
class CompilationConfig(FrozenModel):
    """Everything that decides how a model is captured, split, compiled, stitched and replayed.

    The names are the field's. A fresh object holds what the user chose, with None (or a missing base
    in ``custom_ops``) for what is still open; ``resolve()`` returns one with nothing left open.

    Raises:
        ConfigError: fields are unknown, wrong or in conflict. All problems are listed together.

    Example:
        >>> config = CompilationConfig(mode="PIECEWORK_COMPILE", compile_ranges_endpoints=[16])
        >>> [str(each) for each in config.get_compile_ranges(64)]
        ['[1, 16]', '[17, 64]']
    """

    if TYPE_CHECKING:  # fields take more than what they hold: a list, a name

        def __init__(self, **fields: Any) -> None: ...

    mode: Annotated[ModeField, KEY] = Field(
        CompilationMode.PIECEWORK_COMPILE,
        description="`NONE` (0): run as written; `STOCK_TORCH_COMPILE` (1): torch.compile; "
        "`DYNAMO_TRACE_ONCE` (2): one trace, no recompilation; `PIECEWORK_COMPILE` (3): split, "
        "compile the pieces, stitch. By number or name; `VLLM_COMPILE` means 3.",
    )
    backend: Annotated[BackendName, KEY] = Field(
        "inductor",
        description="What compiles a piece: `inductor`, `eager` (compiles nothing) or a qualified "
        "name. In modes 1 and 2, the torch.compile backend.",
    )
    debug_dump_path: Annotated[Path | None, ignored(_A_PATH)] = Field(
        None, description="A folder that receives the stages of each compilation."
    )
    cache_dir: Annotated[Path | None, ignored(_A_PATH)] = Field(
        None, description="The compile cache's folder; None is one in the user's cache folder."
    )
    compile_cache_save_format: Annotated[Literal["binary"], ignored("there is one format")] = Field(
        "binary",
        description="One checked file an artifact. The field's `unpacked` is refused: "
        "`debug_dump_path` writes what can be looked into.",
    )
    custom_ops: Annotated[CustomOps, KEY] = Field(
        (),
        description="Which custom ops run as such: `all` or `none`, then `+op` and `-op`. Without a "
        "base, `none` where Inductor compiles and `all` elsewhere. A model asks with "
        "`config.is_custom_op_enabled(op)`; its graph is held to the rules: calling an op that a rule "
        "switches off is an error, `+ns::op` of an op that it does not call a warning.",
    )
    splitting_ops: Annotated[OpNames | None, KEY] = Field(
        None,
        description="Where the graph is cut: `ns::op` (every overload) or `ns::op.overload`. None "
        "is every op registered with `piecework.splitting_op`; an empty list cuts nowhere.",
    )
    repeated_layers: Annotated[
        tuple[str, ...],
        ignored("layers that share a trace have the graph that a trace of each has"),
    ] = Field(
        (),
        description="Which layers share one trace where torch finds them alike: dotted names of the modules whose children "
        "they are. By default each layer is traced.",
    )
    repeated_blocks: Annotated[Literal["found", "off"] | tuple[str, ...], KEY] = Field(
        "found",
        description="Where a graph that calls no splitting op is cut: between the calls of modules that are alike. `found` (at least 4 "
        "of one class that one module calls, of 8 operators each, none a convolution), the dotted names of the modules that hold "
        "them (2 are enough there), or `off`. An empty `splitting_ops` cuts nowhere.",
    )
    compile_mm_encoder: Annotated[
        Literal[False], ignored("it decides whether an encoder is compiled, not how")
    ] = Field(
        False,
        description="Refused if true: an encoder is a model of its own here, compiled by itself under "
        "`set_model_tag(name, is_encoder=True)`.",
    )
    strict: Annotated[bool, ignored("it decides what is refused, not what is compiled")] = Field(
        False,
        description="Refuse instead of warning: a splitting op that is named and not in the graph, a model in training mode that goes by "
        "it, a `cudagraph_mode` under which nothing is captured when the first call comes.",
    )
    compile_sizes: Annotated[CompileSizes, ignored(_A_BATCH_RANGE)] = Field(
        (),
        description="Batch sizes that get code for exactly that size, which wins over a range. "
        '`"cudagraph_capture_sizes"` stands for those.',
    )
    compile_ranges_endpoints: Annotated[Endpoints, ignored(_A_BATCH_RANGE)] = Field(
        (),
        validation_alias=AliasChoices("compile_ranges_endpoints", "compile_ranges_split_points"),
        description="Last sizes of the compiled ranges: `[1, e0] [e0+1, e1] …` up to the largest "
        "batch. Also accepted as `compile_ranges_split_points`.",
    )
    inductor_compile_config: Annotated[Options, KEY] = Field(
        {}, description="Options for Inductor, by its own names (`max_autotune`, …)."
    )
    single_size_inductor_config: Annotated[Options, KEY] = Field(
        {},
        description="Options for Inductor on top of those where code is made for one batch size, "
        "such as `max_autotune` and `coordinate_descent_tuning`.",
    )
    compile_workers: Annotated[int, ignored("it decides who compiles, not what")] = Field(
        1,
        ge=1,
        strict=True,
        description="Processes that compile different pieces at the same time; 1 compiles one after "
        "another. They are forked, so there is only one where CUDA is in use.",
    )
    inductor_passes: Annotated[Passes, KEY] = Field(
        {},
        description="Inductor pass slots and what runs there: a qualified name, or (in Python) a "
        "callable.",
    )
    cudagraph_mode: Annotated[CUDAGraphModeField, KEY] = Field(
        CUDAGraphMode.NONE,
        description="What is captured: `NONE`, `PIECEWISE` (the pieces), `FULL` (the whole "
        "forward), `FULL_DECODE_ONLY` (FULL for decode batches, else NONE) or `FULL_AND_PIECEWISE`.",
    )
    cudagraph_num_of_warmups: Annotated[
        int, ignored("warm-ups run before capture and leave no code behind")
    ] = Field(0, ge=0, strict=True, description="Runs of a batch shape before it is captured.")
    cudagraph_capture_sizes: Annotated[Sizes | None, ignored(_A_CAPTURE_SIZE)] = Field(
        None,
        description="Batch sizes to capture. None is 1, 2, 4, then by 8 to 256, then by 16 to the "
        "maximum, and the same steps in requests up to max_num_seqs; an empty list goes with mode "
        "`NONE` only.",
    )
    max_cudagraph_capture_size: Annotated[int | None, ignored(_A_CAPTURE_SIZE)] = Field(
        None,
        ge=0,
        strict=True,
        description="The largest size to capture. None is min(2 · max_num_seqs · query length, 512, "
        "max_num_batched_tokens), or the largest of `cudagraph_capture_sizes`.",
    )
    cudagraph_copy_inputs: Annotated[
        bool, ignored("inputs are staged around the compiled code, never in it")
    ] = Field(
        True,
        description="Copy inputs into persistent buffers before a replay. Off, the caller writes into "
        "these buffers (`static_graphs.static_inputs(size)`) and passes views of them; a batch that lies "
        "elsewhere is an error.",
    )
    cudagraph_specialize_lora: Annotated[bool, ignored("it only adds captured descriptors")] = (
        Field(True, description="Capture once with and once without active adapters.")
    )
    use_inductor_graph_partition: Annotated[bool, KEY] = Field(
        False,
        description="Let Inductor cut the compiled code at the splitting ops instead of cutting the "
        "graph before it.",
    )
    pass_config: Annotated[PassConfig, KEY] = Field(
        PassConfig(), description="Which graph passes run."
    )
    dynamic_shapes_config: Annotated[DynamicShapesConfig, KEY] = Field(
        DynamicShapesConfig(), description="How dynamic dimensions are traced."
    )
    stitching_config: Annotated[StitchingConfig, KEY] = Field(
        StitchingConfig(), description="The levers of the stitched function and its entry."
    )

    def conflicts(self) -> Iterator[ConfigProblem]:
        mode, captures = self.mode, self.cudagraph_mode
        sizes, largest = self.cudagraph_capture_sizes, self.max_cudagraph_capture_size
        pieces = captures.requires_piecewise_compilation()
        capturing, partitions = (
            captures is not CUDAGraphMode.NONE,
            self.use_inductor_graph_partition,
        )
        found = max(sizes or (), default=0)
        if partitions and self.backend != "inductor":
            why = f"only Inductor partitions a graph, and the backend is {self.backend!r}"
            yield ConfigProblem("use_inductor_graph_partition, backend", why)
        if partitions and mode is CompilationMode.NONE:
            why = "mode NONE compiles nothing, so Inductor has nothing to partition"
            yield ConfigProblem("use_inductor_graph_partition, mode", why)
        if capturing and mode is CompilationMode.NONE:
            why = f"mode NONE traces nothing, so there is nothing that {captures} could capture"
            hint = "use PIECEWORK_COMPILE, with backend 'eager' to compile nothing"
            yield ConfigProblem("cudagraph_mode, mode", f"{why}; {hint}")
        if pieces and mode in _WHOLE:
            why = f"{captures} captures pieces, and mode {mode} makes none"
            hint = f"use PIECEWORK_COMPILE, or cudagraph_mode {captures.without_piecewise()}"
            yield ConfigProblem("cudagraph_mode, mode", f"{why}; {hint}")
        if pieces and self.splitting_ops == ():
            why = (
                f"{captures} captures the pieces between splitting ops, and splitting_ops is empty"
            )
            hint = "use FULL to capture the whole graph"
            yield ConfigProblem("cudagraph_mode, splitting_ops", f"{why}; {hint}")
        if sizes is not None and largest not in (None, found):
            why = f"the largest listed size is {found} and the maximum {largest}"
            names = "cudagraph_capture_sizes, max_cudagraph_capture_size"
            yield ConfigProblem(names, f"{why}; give only one of the two")
        if capturing and sizes == ():
            why = (
                f"{captures} captures, and no size is listed; use mode NONE, or leave the list out"
            )
            yield ConfigProblem("cudagraph_mode, cudagraph_capture_sizes", why)
        if capturing and largest == 0:
            why = f"{captures} captures, and the largest size is 0; use mode NONE"
            yield ConfigProblem("cudagraph_mode, max_cudagraph_capture_size", why)
        # A batch that may run uncaptured keeps its own size, so that any size is reached.
        if sizes and captures.mixed_mode() is not CUDAGraphMode.NONE:
            below = (n for n in self.compile_sizes if isinstance(n, int) and n < found)
            if idle := ", ".join(str(size) for size in below if size not in sizes):
                why = f"no batch runs in {idle}: they are padded"
                hint = f"compile captured sizes, or sizes above {found}"
                yield ConfigProblem("compile_sizes, cudagraph_capture_sizes", f"{why}; {hint}")

    # --- choices settled; each returns a copy ----------------------------------------------------

    def resolve(
        self,
        runtime: RuntimeConfig,
        *,
        registered_splitting_ops: Iterable[str] | None = None,
        attention_ops: Iterable[str] = (),
    ) -> CompilationConfig:
        """A copy for ``runtime`` with nothing left open; resolving it again changes nothing.

        Args:
            runtime: batch limits and ranks.
            registered_splitting_ops: what ``splitting_ops=None`` stands for. If None, the ops are
                not known yet (no model is imported), and only ``splitting_ops`` stays open.
            attention_ops: which splitting ops are attention (for ``fuse_attn_quant``).

        Raises:
            ConfigError: something does not fit ``runtime``; the problems of every step are listed.
        """
        cls = type(self)
        steps: list[Callable[[CompilationConfig], CompilationConfig]] = [
            partial(cls._with_capture_sizes, runtime=runtime),
            partial(cls._fit_decode_sizes, runtime=runtime),
            partial(cls._fit_compile_sizes, runtime=runtime),
            partial(cls._fit_ranges, runtime=runtime),
        ]
        if registered_splitting_ops is not None:
            ops = {"registered": registered_splitting_ops, "attention_ops": attention_ops}
            steps.insert(0, partial(cls.set_splitting_ops_for_v1, **ops))
        problems: list[ConfigProblem] = []
        done = self
        for step in steps:
            try:
                done = step(done)
            except ConfigError as error:
                text = error.message if error.hint is None else f"{error.message} ({error.hint})"
                problems.extend(error.problems or (ConfigProblem(error.where or "", text),))
        if problems:
            raise report(cls.__name__, problems)
        if {"all", "none"}.isdisjoint(done.custom_ops):
            done = done.replace(custom_ops=(done.custom_op_base(), *done.custom_ops))
        return done

    def set_splitting_ops_for_v1(
        self, registered: Iterable[str], attention_ops: Iterable[str] = ()
    ) -> CompilationConfig:
        """A copy with explicit ``splitting_ops``: the registered ones where nothing was chosen.

        Modes 1 and 2 cut nowhere unless told to. Where no op is left to cut at, a
        ``cudagraph_mode`` that needs pieces becomes its ``without_piecewise()``, with a warning.
        """
        if self.mode in _WHOLE:
            return self if self.splitting_ops is not None else self.replace(splitting_ops=())
        if self.pass_config.fuse_attn_quant and not self.use_inductor_graph_partition:
            return self.set_splitting_ops_for_attn_fusion(registered, attention_ops)
        return self if self.splitting_ops is not None else self._split_at(registered)

    def set_splitting_ops_for_attn_fusion(
        self, registered: Iterable[str], attention_ops: Iterable[str]
    ) -> CompilationConfig:
        """A copy that cuts nowhere at attention, so that a pass can fuse it.

        Raises:
            ConfigError: ``splitting_ops`` names attention, or ``fuse_attn_quant`` is off.
        """
        attention = sorted(set(attention_ops))
        cut = [op for op in attention if _has_op(self.splitting_ops or (), op)]
        if not self.pass_config.fuse_attn_quant or (self.splitting_ops is None and not attention):
            raise ConfigError(
                "attention stays in the graph only with fuse_attn_quant, and where attention_ops "
                "or splitting_ops tell which ops it is",
                where="pass_config.fuse_attn_quant",
            )
        if cut:
            raise ConfigError(
                "fuse_attn_quant needs attention inside the pieces, and the graph is cut at "
                + ", ".join(cut),
                where="splitting_ops",
                hint="remove it from splitting_ops, or use use_inductor_graph_partition",
            )
        if self.splitting_ops is not None:
            return self
        return self._split_at(op for op in registered if not _has_op(attention, op))

    def _split_at(self, ops: Iterable[str]) -> CompilationConfig:
        chosen, captures = tuple(sorted(set(ops))), self.cudagraph_mode
        if not chosen and captures.requires_piecewise_compilation():
            fallback = captures.without_piecewise()
            _log.warning(
                "there is no op to cut at, so there are no pieces to capture: "
                "cudagraph_mode %s becomes %s",
                captures,
                fallback,
            )
            captures = fallback
        return self.replace(splitting_ops=chosen, cudagraph_mode=captures)

    def post_init_cudagraph_sizes(self, runtime: RuntimeConfig) -> CompilationConfig:
        """A copy with explicit capture sizes (none if nothing is captured) and ``compile_sizes``."""
        return self._with_capture_sizes(runtime)._with_compile_sizes()

    def _with_capture_sizes(self, runtime: RuntimeConfig) -> CompilationConfig:
        captured: tuple[int, ...] = ()
        if self.cudagraph_mode is not CUDAGraphMode.NONE:
            found = resolve_capture_sizes(
                self.cudagraph_capture_sizes,
                self.max_cudagraph_capture_size,
                max_num_seqs=runtime.max_num_seqs,
                max_num_batched_tokens=runtime.max_num_batched_tokens,
                decode_query_lens=runtime.query_lens,
            )
            ranks = self._ranks_that_cut(runtime.tensor_parallel_size)
            captured = tuple(size for size in found if size % ranks == 0)
            if found and not captured:
                raise ConfigError(
                    f"no capture size is a multiple of {ranks}, over which the sequence is cut",
                    where="cudagraph_capture_sizes",
                    hint="list multiples, or switch pass_config.enable_sp off",
                )
            if dropped := ", ".join(str(size) for size in found if size not in captured):
                _log.warning(
                    "capture sizes %s are dropped: the sequence is cut over %s", dropped, ranks
                )
        elif self.cudagraph_capture_sizes:
            _log.warning(
                "cudagraph_mode NONE captures nothing: cudagraph_capture_sizes are dropped"
            )
        return self.replace(
            cudagraph_capture_sizes=captured, max_cudagraph_capture_size=max(captured, default=0)
        )

    def _ranks_that_cut(self, tensor_parallel_size: int) -> int:
        """Over how many ranks the tokens of a batch are cut."""
        return tensor_parallel_size if self.pass_config.enable_sp else 1

    def _with_compile_sizes(self) -> CompilationConfig:
        """A copy with the capture sizes in place of a reference to them in ``compile_sizes``."""
        if "cudagraph_capture_sizes" not in self.compile_sizes:
            return self
        if self.cudagraph_capture_sizes is None:
            raise self._open("cudagraph_capture_sizes")
        named = [size for size in self.compile_sizes if isinstance(size, int)]
        return self.replace(compile_sizes=(*named, *self.cudagraph_capture_sizes))

    def adjust_cudagraph_sizes_for_spec_decode(
        self, uniform_decode_query_len: int, tensor_parallel_size: int = 1
    ) -> CompilationConfig:
        """A copy whose capture sizes are all multiples of the query length of a decode batch.

        With ``pass_config.enable_sp`` they are multiples of ``tensor_parallel_size`` too.
        ``resolve()`` leaves sizes as they are: the dispatcher rounds, for decode batches only.

        Raises:
            ConfigError: the sizes are not chosen yet, or no multiple fits under the maximum.
        """
        sizes, largest = self.cudagraph_capture_sizes, self.max_cudagraph_capture_size
        if sizes is None or largest is None:
            raise self._open("cudagraph_capture_sizes")
        adjusted = adjust_sizes_for_spec_decode(
            sizes,
            uniform_decode_query_len,
            max_size=largest,
            tensor_parallel_size=self._ranks_that_cut(tensor_parallel_size),
        )
        return self.replace(
            cudagraph_capture_sizes=adjusted, max_cudagraph_capture_size=max(adjusted, default=0)
        )

    def _fit_decode_sizes(self, runtime: RuntimeConfig) -> CompilationConfig:
        """Itself, if decode batches of every query length have a size to be captured in."""
        captures = self.cudagraph_mode
        decode = captures.separate_routine() and captures.decode_mode() is CUDAGraphMode.FULL
        if decode and self.cudagraph_capture_sizes and self.max_cudagraph_capture_size:
            for query_len in runtime.query_lens:
                self.adjust_cudagraph_sizes_for_spec_decode(query_len, runtime.tensor_parallel_size)
        return self

    def _fit_compile_sizes(self, runtime: RuntimeConfig) -> CompilationConfig:
        """A copy with its compile sizes settled, each of which a batch can have."""
        # Where the capture sizes could not be chosen, that is the problem.
        done = self if self.cudagraph_capture_sizes is None else self._with_compile_sizes()
        largest = runtime.max_num_batched_tokens
        beyond = [size for size in done.compile_sizes if isinstance(size, int) and size > largest]
        if beyond:
            raise ConfigError(
                f"no batch reaches {', '.join(map(str, beyond))}; the largest batch is {largest}",
                where="compile_sizes",
                hint="remove these sizes, or raise max_num_batched_tokens",
            )
        return done

    def _fit_ranges(self, runtime: RuntimeConfig) -> CompilationConfig:
        """A copy with the endpoints that cut something: the largest batch itself does not."""
        ranges = derive_ranges(self.compile_ranges_endpoints, runtime.max_num_batched_tokens)
        return self.replace(compile_ranges_endpoints=tuple(each.end for each in ranges[:-1]))

    # --- what follows from it --------------------------------------------------------------------

    @property
    def bs_to_padded_graph_size(self) -> tuple[int | None, ...]:
        """Entry ``n`` is the captured size that serves ``n`` tokens; empty if nothing is captured."""
        if self.cudagraph_capture_sizes is None:
            raise self._open("cudagraph_capture_sizes")
        return padded_sizes(self.cudagraph_capture_sizes) if self.cudagraph_capture_sizes else ()

    def get_compile_ranges(
        self, max_size: int | None = None, *, is_encoder: bool = False
    ) -> tuple[Range, ...]:
        """The ranges that are compiled, ascending, without the single sizes.

        Args:
            max_size: the largest batch; None, or ``is_encoder``, leaves the last range open-ended.

        Raises:
            ConfigError: an endpoint lies beyond the largest batch.
        """
        return derive_ranges(
            self.compile_ranges_endpoints, max_size, open_ended=is_encoder or max_size is None
        )

    def range_table(self, max_size: int | None = None, *, is_encoder: bool = False) -> RangeTable:
        """Ranges and single sizes with one look-up; arguments as ``get_compile_ranges``."""
        ranges = self.get_compile_ranges(max_size, is_encoder=is_encoder)
        sizes = self._with_compile_sizes().compile_sizes
        return RangeTable(ranges, (size for size in sizes if isinstance(size, int)))

    def custom_op_base(self) -> Literal["all", "none"]:
        """What holds for an op without a rule: the base given, or the one of mode and backend."""
        if "all" in self.custom_ops:
            return "all"
        compiled = self.mode is not CompilationMode.NONE and self.backend == "inductor"
        return "none" if compiled or "none" in self.custom_ops else "all"

    def is_custom_op_enabled(self, op: str) -> bool:
        """Whether the custom op named ``op`` runs as such, by its own rule or the base."""
        if self.custom_op_base() == "all":
            return f"-{op}" not in self.custom_ops
        return f"+{op}" in self.custom_ops

    def custom_op_log_check(
        self, in_model: Iterable[str], known: Iterable[str] = ()
    ) -> tuple[str, ...]:
        """Log which of the model's custom ops are enabled; warn of, and return, idle rules.

        Args:
            in_model: custom ops that the model has.
            known: every registered custom op, to tell a typing error from an absent op.
        """
        present, registered = set(in_model), set(known)
        _log.debug("custom ops: %s", {op: self.is_custom_op_enabled(op) for op in sorted(present)})
        idle = [rule for rule in self.custom_ops if rule[0] in "+-" and rule[1:] not in present]
        notes = tuple(
            f"custom op rule {rule!r} has no effect: "
            + ("the model has no such op" if rule[1:] in registered else "no such op is registered")
            for rule in idle
        )
        for note in notes:
            _log.warning("%s", note)
        return notes

    def splitting_ops_contain_attention(self, attention_ops: Iterable[str]) -> bool:
        """Whether the graph is cut at every one of ``attention_ops`` (and there is one)."""
        if self.splitting_ops is None:
            raise self._open("splitting_ops")
        attention = list(attention_ops)
        return bool(attention) and all(_has_op(self.splitting_ops, op) for op in attention)

    def is_attention_compiled_piecewise(self, attention_ops: Iterable[str]) -> bool:
        """Whether attention stays outside the compiled pieces, by either way of cutting."""
        if not self.splitting_ops_contain_attention(attention_ops):
            return False
        if self.use_inductor_graph_partition:
            return self.backend == "inductor" and self.mode is not CompilationMode.NONE
        return self.mode is CompilationMode.PIECEWORK_COMPILE

    def init_backend(
        self, runtime: RuntimeConfig | None = None, *, prefix: str = "", is_encoder: bool = False
    ) -> str | Callable[..., Any]:
        """What Dynamo is given as its backend in this mode: `piecework.runtime.backend_of`."""
        backend_of = import_qualified("piecework.runtime:backend_of", where="backend")
        return backend_of(self, runtime, prefix=prefix, is_encoder=is_encoder)  # type: ignore[no-any-return]

    def hash_factors(self) -> dict[str, str]:
        """What is hashed, as canonical text by dotted name: the fields whose role is KEY.

        Raises:
            ConfigError: an option or a pass has no stable form (an object, a pass that is missing),
                or ``compile_sizes`` refers to capture sizes that are not chosen yet.
        """
        base = self.custom_op_base()
        rules = {op for op in self.custom_ops if op[0] == ("-" if base == "all" else "+")}
        factors = factors_of(self._with_compile_sizes())
        factors["custom_ops"] = ",".join([base, *sorted(rules)])
        if self.splitting_ops is not None:  # their order means nothing
            factors["splitting_ops"] = ",".join(sorted(set(self.splitting_ops)))
        return factors

    def compute_hash(self) -> str:
        """SHA-256 of what decides compiled and emitted code; equal in all processes and machines."""
        return digest(self.hash_factors())

    def _open(self, field: str) -> ConfigError:
        return ConfigError(f"{field} is not settled yet", where=field, hint="call resolve() first")


def _has_op(names: Iterable[str], op: str) -> bool:
    """Whether ``op`` is named, itself or by ``ns::op``, which stands for every overload."""
    listed = set(names)
    return op in listed or op.partition(".")[0] in listed
