"""Everything that decides how a model is compiled, as one frozen, validated configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AliasChoices, Field

from piecework.errors import ConfigError, short_methods
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable, derive_ranges
from piecework.runtime.batch.sizes import padded_sizes
from piecework.runtime.config import resolve as config_resolve
from piecework.runtime.config.groups import (
    CompilationMode,
    CUDAGraphModeField,
    DynamicShapesConfig,
    DynamicShapesType,
    ModeField,
    PassConfig,
    RuntimeConfig,
    StitchingConfig,
)
from piecework.runtime.config.model import (
    KEY,
    KEY_AS_SET,
    Conflict,
    FrozenModel,
    digest,
    factors_of,
    ignored,
)
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.config.values import (
    BackendName,
    CaptureSizes,
    CompileSizes,
    CustomOps,
    Endpoints,
    OpNames,
    Options,
    Passes,
    has_op,
)

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
    compile_cache_save_format: Annotated[
        Literal["binary", "unpacked"], ignored("both formats hold the same artifacts")
    ] = Field(
        "binary",
        description="`binary`: one checked file an artifact, safe for many processes. The field's `unpacked` is refused: "
        "`debug_dump_path` writes what can be looked into.",
    )
    custom_ops: Annotated[CustomOps, KEY_AS_SET] = Field(
        (),
        description="Which custom ops run as such: `all` or `none`, then `+op` and `-op`. Without a "
        "base, `none` where Inductor compiles and `all` elsewhere. A model asks with "
        "`config.is_custom_op_enabled(op)`; its graph is held to the rules: calling an op that a rule "
        "switches off is an error, `+ns::op` of an op that it does not call a warning.",
    )
    splitting_ops: Annotated[OpNames | None, KEY_AS_SET] = Field(
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
        bool, ignored("it decides whether an encoder is compiled, not how")
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
    cudagraph_capture_sizes: Annotated[CaptureSizes | None, ignored(_A_CAPTURE_SIZE)] = Field(
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

    def conflicts(self) -> Iterable[Conflict]:
        return config_resolve.conflicts_of(self)

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
        return config_resolve.resolve(self, runtime, registered_splitting_ops, attention_ops)

    def set_splitting_ops_for_v1(
        self, registered: Iterable[str], attention_ops: Iterable[str] = ()
    ) -> CompilationConfig:
        """A copy with explicit ``splitting_ops``: the registered ones where nothing was chosen.

        Modes 1 and 2 cut nowhere unless told to. Where no op is left to cut at, a
        ``cudagraph_mode`` that needs pieces becomes its ``without_piecewise()``, with a warning.
        """
        return config_resolve.with_splitting_ops(self, registered, attention_ops)

    def set_splitting_ops_for_attn_fusion(
        self, registered: Iterable[str], attention_ops: Iterable[str]
    ) -> CompilationConfig:
        """A copy that cuts nowhere at attention, so that a pass can fuse it.

        Raises:
            ConfigError: ``splitting_ops`` names attention, or ``fuse_attn_quant`` is off.
        """
        return config_resolve.with_attention_inside(self, registered, attention_ops)

    def post_init_cudagraph_sizes(self, runtime: RuntimeConfig) -> CompilationConfig:
        """A copy with explicit capture sizes (none if nothing is captured) and ``compile_sizes``."""
        return config_resolve.with_compile_sizes(config_resolve.with_capture_sizes(self, runtime))

    def adjust_cudagraph_sizes_for_spec_decode(
        self, uniform_decode_query_len: int, tensor_parallel_size: int = 1
    ) -> CompilationConfig:
        """A copy whose capture sizes are all multiples of the query length of a decode batch.

        With ``pass_config.enable_sp`` they are multiples of ``tensor_parallel_size`` too.
        ``resolve()`` leaves sizes as they are: the dispatcher rounds, for decode batches only.

        Raises:
            ConfigError: the sizes are not chosen yet, or no multiple fits under the maximum.
        """
        return config_resolve.with_spec_decode_sizes(
            self, uniform_decode_query_len, tensor_parallel_size
        )

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
        sizes = config_resolve.with_compile_sizes(self).compile_sizes
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
        return bool(attention) and all(has_op(self.splitting_ops, op) for op in attention)

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
        mark = "-" if base == "all" else "+"
        rules = sorted(op for op in self.custom_ops if op[0] == mark)
        settled = config_resolve.with_compile_sizes(self)
        return factors_of(settled) | {"custom_ops": ",".join([base, *rules])}

    def compute_hash(self) -> str:
        """SHA-256 of what decides compiled and emitted code; equal in all processes and machines."""
        return digest(self.hash_factors())

    def _open(self, field: str) -> ConfigError:
        return ConfigError(f"{field} is not settled yet", where=field, hint="call resolve() first")
