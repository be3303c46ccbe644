"""Everything that decides how a model is compiled, as one frozen, validated configuration."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import AliasChoices

from piecework.errors import ConfigError, ConfigProblem, short_methods
from piecework.runtime.batch import sizes as batch_sizes
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable, derive_ranges
from piecework.runtime.config import groups, model
from piecework.runtime.config.groups import (
    CompilationMode,
    DynamicShapesConfig,
    PassConfig,
    RuntimeConfig,
    StitchingConfig,
)
from piecework.runtime.config.model import key, no_key

_WHOLE = (CompilationMode.STOCK_TORCH_COMPILE, CompilationMode.DYNAMO_TRACE_ONCE)
_log = logging.getLogger(__name__)


@short_methods
class CompilationConfig(model.FrozenModel):
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

    mode: groups.ModeField = key(
        CompilationMode.PIECEWORK_COMPILE,
        "`NONE` (0): as written; `STOCK_TORCH_COMPILE` (1); `DYNAMO_TRACE_ONCE` (2): one trace, not "
        "split; `PIECEWORK_COMPILE` (3), also called `VLLM_COMPILE`: split, compile, stitch.",
    )
    backend: groups.BackendName = key(
        "inductor",
        "What compiles a piece: `inductor`, `eager` (nothing does) or a qualified name; in modes 1 "
        "and 2 torch.compile's backend.",
    )
    debug_dump_path: Path | None = no_key(
        None, "A folder that receives the stages of each compilation."
    )
    cache_dir: Path | None = no_key(
        None, "The compile cache's folder; None is one in the user's cache folder."
    )
    compile_cache_save_format: Literal["binary"] = no_key(
        "binary", "One checked file an artifact; `unpacked` is refused."
    )
    custom_ops: groups.CustomOps = key(
        (),
        "Which custom ops a model runs as such (`config.is_custom_op_enabled(op)`): `all` or `none` "
        "(where Inductor compiles, by default), `+op`, `-op`.",
    )
    splitting_ops: groups.OpNames | None = key(
        None,
        "Where the graph is cut: `ns::op` or `ns::op.overload`. None is every op registered with "
        "`piecework.splitting_op`; an empty list cuts nowhere.",
    )
    repeated_layers: tuple[str, ...] = no_key(
        (), "Modules whose children share one trace where torch finds them alike, by dotted names."
    )
    repeated_blocks: Literal["found", "off"] | tuple[str, ...] = key(
        "found",
        "Where a graph without splitting ops is cut: between alike modules that are `found` (4 of "
        "one class, of 8 operators each, none a convolution), or that modules of these names hold; "
        "`off`: nowhere.",
    )
    compile_mm_encoder: Literal[False] = no_key(
        False, "Refused if true: compile an encoder under `set_model_tag(…, is_encoder=True)`."
    )
    strict: bool = no_key(
        False, "Refuse what is warned of, such as a splitting op that is not in the graph."
    )
    compile_sizes: groups.CompileSizes = no_key(
        (), 'Batch sizes with code of their own; `"cudagraph_capture_sizes"` stands for those.'
    )
    compile_ranges_endpoints: groups.Endpoints = no_key(
        (),
        "Last sizes of ranges: `[1, e0] [e0+1, e1] …`; also `compile_ranges_split_points`.",
        validation_alias=AliasChoices("compile_ranges_endpoints", "compile_ranges_split_points"),
    )
    inductor_compile_config: groups.Options = key(
        {}, "Options for Inductor, by its own names (`max_autotune`, …)."
    )
    single_size_inductor_config: groups.Options = key(
        {}, "Further ones where code is for one batch size, such as `coordinate_descent_tuning`."
    )
    compile_workers: groups.PositiveInt = no_key(
        1, "Forked processes that compile at the same time; one where CUDA is in use."
    )
    inductor_passes: groups.Passes = key(
        {}, "Inductor pass slots and what runs there: a qualified name, or a callable (in Python)."
    )
    cudagraph_mode: groups.CUDAGraphModeField = key(
        CUDAGraphMode.NONE,
        "What is captured: `NONE`, `PIECEWISE` (the pieces), `FULL` (the whole forward), or both by "
        "the batch: `FULL_DECODE_ONLY`, `FULL_AND_PIECEWISE` (FULL for decode batches).",
    )
    cudagraph_num_of_warmups: groups.Natural = no_key(
        0, "Runs of a batch shape before it is captured."
    )
    cudagraph_capture_sizes: groups.Sizes | None = no_key(
        None, "Batch sizes to capture. None: 1, 2, 4, by 8 to 256, by 16; in tokens and requests."
    )
    max_cudagraph_capture_size: groups.Natural | None = no_key(
        None, "The largest one. None: of those listed, or twice a decode batch, at most 512."
    )
    cudagraph_copy_inputs: bool = no_key(
        True, "Copy inputs into buffers before a replay; or pass views of `static_inputs(size)`."
    )
    cudagraph_specialize_lora: bool = no_key(
        True, "Capture once with and once without active adapters."
    )
    use_inductor_graph_partition: bool = key(
        False, "Let Inductor cut the compiled code at the splitting ops; the graph stays whole."
    )
    pass_config: PassConfig = key(PassConfig(), "Which graph passes run.")
    dynamic_shapes_config: DynamicShapesConfig = key(
        DynamicShapesConfig(), "How dynamic dimensions are traced."
    )
    stitching_config: StitchingConfig = key(StitchingConfig(), "Levers of the stitched function.")

    def conflicts(self) -> Iterator[ConfigProblem]:
        mode, captures, nothing = self.mode, self.cudagraph_mode, CUDAGraphMode.NONE
        sizes, largest = self.cudagraph_capture_sizes, self.max_cudagraph_capture_size
        pieces = captures.requires_piecewise_compilation()
        partition = "use_inductor_graph_partition"
        if self.use_inductor_graph_partition and self.backend != "inductor":
            yield ConfigProblem(f"{partition}, backend", "only Inductor partitions a graph")
        if self.use_inductor_graph_partition and not mode:
            yield ConfigProblem(f"{partition}, mode", "mode NONE compiles nothing to partition")
        if (pieces and mode in _WHOLE) or (captures is not nothing and not mode):
            why = f"mode {mode} makes nothing that {captures} could capture; use PIECEWORK_COMPILE"
            yield ConfigProblem("cudagraph_mode, mode", why)
        if pieces and self.splitting_ops == ():
            why = f"there are no splitting ops, so no pieces for {captures}; use FULL"
            yield ConfigProblem("cudagraph_mode, splitting_ops", why)
        if sizes is not None and largest not in (None, max(sizes, default=0)):
            why = f"the largest of {sizes} is not {largest}; give only one of the two"
            yield ConfigProblem("cudagraph_capture_sizes, max_cudagraph_capture_size", why)
        if captures is not nothing and (sizes == () or largest == 0):
            why = f"{captures} captures, and there is no size to capture; use mode NONE"
            yield ConfigProblem("cudagraph_mode, cudagraph_capture_sizes", why)
        # A batch that may run uncaptured keeps its own size, so that any size is reached.
        if sizes and captures.mixed_mode() is not nothing:
            below = [n for n in self.compile_sizes if isinstance(n, int) and n < max(sizes)]
            if idle := ", ".join(str(n) for n in below if n not in sizes):
                why = f"no batch runs in {idle}: they are padded; compile captured or larger sizes"
                yield ConfigProblem("compile_sizes, cudagraph_capture_sizes", why)

    # --- choices settled; each returns a copy ----------------------------------------------------

    def resolve(
        self,
        runtime: RuntimeConfig,
        *,
        registered_splitting_ops: Iterable[str] | None = None,
        attention_ops: Iterable[str] = (),
    ) -> Self:
        """A copy for ``runtime`` with nothing left open; resolving it again changes nothing.

        Args:
            runtime: batch limits and ranks.
            registered_splitting_ops: what ``splitting_ops=None`` stands for. If None, the ops are
                not known yet (no model is imported), and only ``splitting_ops`` stays open.
            attention_ops: which splitting ops are attention (for ``fuse_attn_quant``).

        Raises:
            ConfigError: something does not fit ``runtime``; the problems of every step are listed.
        """
        done, problems, largest = self, list[ConfigProblem](), runtime.max_num_batched_tokens
        steps: dict[str, tuple[Any, ...]] = {
            "set_splitting_ops_for_v1": (registered_splitting_ops, attention_ops),
            "_with_capture_sizes": (runtime,),
            "_fit_compile_sizes": (largest,),
            "_fit_ranges": (largest,),
        }
        if registered_splitting_ops is None:
            del steps["set_splitting_ops_for_v1"]
        for step, given in steps.items():
            try:
                done = getattr(done, step)(*given)
            except ConfigError as error:
                text = error.message if error.hint is None else f"{error.message} ({error.hint})"
                problems += error.problems or [ConfigProblem(error.where or "", text)]
        if problems:
            raise model.report(type(self).__name__, problems)
        if {"all", "none"}.isdisjoint(done.custom_ops):
            done = done.replace(custom_ops=(done.custom_op_base(), *done.custom_ops))
        return done

    def set_splitting_ops_for_v1(
        self, registered: Iterable[str], attention_ops: Iterable[str] = ()
    ) -> Self:
        """A copy with explicit ``splitting_ops``: what is registered, or none in modes 1 and 2."""
        if self.mode in _WHOLE:
            return self if self.splitting_ops is not None else self.replace(splitting_ops=())
        if self.pass_config.fuse_attn_quant and not self.use_inductor_graph_partition:
            return self.set_splitting_ops_for_attn_fusion(registered, attention_ops)
        return self._split_at(registered)

    def set_splitting_ops_for_attn_fusion(
        self, registered: Iterable[str], attention_ops: Iterable[str]
    ) -> Self:
        """A copy that cuts nowhere at attention, so that a pass can fuse it."""
        attention = sorted(set(attention_ops))
        if not self.pass_config.fuse_attn_quant or (self.splitting_ops is None and not attention):
            raise ConfigError(
                "attention stays in the graph only with fuse_attn_quant, and where attention_ops "
                "or splitting_ops tell which ops it is",
                where="pass_config.fuse_attn_quant",
            )
        if cut := [op for op in attention if _has_op(self.splitting_ops or (), op)]:
            raise ConfigError(
                f"fuse_attn_quant needs attention inside the pieces: don't cut at {', '.join(cut)}",
                where="splitting_ops",
            )
        return self._split_at(op for op in registered if not _has_op(attention, op))

    def _split_at(self, ops: Iterable[str]) -> Self:
        """A copy with ``ops`` as its splitting ops, unless it has its own."""
        if self.splitting_ops is not None:
            return self
        chosen, captures = tuple(sorted(set(ops))), self.cudagraph_mode
        if not chosen and captures.requires_piecewise_compilation():
            captures = captures.without_piecewise()
            why = "there is no op to cut at, so there are no pieces to capture"
            _log.warning("%s: cudagraph_mode %s becomes %s", why, self.cudagraph_mode, captures)
        return self.replace(splitting_ops=chosen, cudagraph_mode=captures)

    def post_init_cudagraph_sizes(self, runtime: RuntimeConfig) -> Self:
        """A copy with explicit capture sizes (none if nothing is captured) and compile sizes."""
        return self._with_capture_sizes(runtime)._with_compile_sizes()

    def _with_capture_sizes(self, runtime: RuntimeConfig) -> Self:
        captured: tuple[int, ...] = ()
        given, ranks = self.cudagraph_capture_sizes, runtime.tensor_parallel_size
        if self.cudagraph_mode is not CUDAGraphMode.NONE:
            found = batch_sizes.resolve_capture_sizes(
                given,
                self.max_cudagraph_capture_size,
                max_num_seqs=runtime.max_num_seqs,
                max_num_batched_tokens=runtime.max_num_batched_tokens,
                decode_query_lens=runtime.query_lens,
            )
            cut = self.pass_config.enable_sp
            captured = tuple(size for size in found if not cut or size % ranks == 0)
            if dropped := ", ".join(str(size) for size in found if size not in captured):
                why = f"the sequence is cut over {ranks}"
                _log.warning("capture sizes %s are dropped: %s", dropped, why)
        elif given:
            _log.warning("cudagraph_mode NONE captures nothing: capture sizes are dropped")
        done = self._capturing(captured)
        if captured and self.cudagraph_mode.separate_routine():
            for length in runtime.query_lens:  # decode batches of each need a size
                done.adjust_cudagraph_sizes_for_spec_decode(length, ranks)
        return done

    def _capturing(self, sizes: tuple[int, ...]) -> Self:
        return self.replace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes, default=0)
        )

    def _with_compile_sizes(self) -> Self:
        """A copy with the capture sizes in place of a reference to them in ``compile_sizes``."""
        if "cudagraph_capture_sizes" not in self.compile_sizes:
            return self
        captured = self._settled("cudagraph_capture_sizes")
        named = [size for size in self.compile_sizes if isinstance(size, int)]
        return self.replace(compile_sizes=(*named, *captured))

    def adjust_cudagraph_sizes_for_spec_decode(
        self, uniform_decode_query_len: int, tensor_parallel_size: int = 1
    ) -> Self:
        """A copy whose capture sizes are all multiples of the query length of a decode batch.

        ``resolve()`` leaves sizes as they are: the dispatcher rounds, for decode batches only.
        """
        adjusted = batch_sizes.adjust_sizes_for_spec_decode(
            self._settled("cudagraph_capture_sizes"),
            uniform_decode_query_len,
            max_size=self._settled("max_cudagraph_capture_size"),
            tensor_parallel_size=tensor_parallel_size if self.pass_config.enable_sp else 1,
        )
        return self._capturing(adjusted)

    def _fit_compile_sizes(self, largest: int) -> Self:
        """A copy with its compile sizes settled, each of which a batch can have."""
        # Where the capture sizes could not be chosen, that is the problem.
        done = self if self.cudagraph_capture_sizes is None else self._with_compile_sizes()
        beyond = [size for size in done.compile_sizes if isinstance(size, int) and size > largest]
        if beyond:
            raise ConfigError(
                f"no batch reaches {', '.join(map(str, beyond))}; the largest batch is {largest}",
                where="compile_sizes",
                hint="remove these sizes, or raise max_num_batched_tokens",
            )
        return done

    def _fit_ranges(self, largest: int) -> Self:
        """A copy with the endpoints that cut something: the largest batch itself does not."""
        ranges = derive_ranges(self.compile_ranges_endpoints, largest)
        return self.replace(compile_ranges_endpoints=tuple(each.end for each in ranges[:-1]))

    # --- what follows from it --------------------------------------------------------------------

    @property
    def bs_to_padded_graph_size(self) -> tuple[int | None, ...]:
        """Entry ``n`` is the captured size that serves ``n`` tokens; empty if none is captured."""
        sizes = self._settled("cudagraph_capture_sizes")
        return batch_sizes.padded_sizes(sizes) if sizes else ()

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
        singles = (Range(size, size) for size in sizes if isinstance(size, int))
        return RangeTable([*ranges, *singles])

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

    def custom_op_log_check(self, in_model: Iterable[str]) -> tuple[str, ...]:
        """Log which of the model's custom ops are enabled; warn of, and return, idle rules."""
        present = sorted(set(in_model))
        _log.debug("custom ops: %s", {op: self.is_custom_op_enabled(op) for op in present})
        idle = tuple(r for r in self.custom_ops if r[0] in "+-" and r[1:] not in present)
        if idle:
            _log.warning("custom op rules for ops that the model has not: %s", ", ".join(idle))
        return idle

    def splitting_ops_contain_attention(self, attention_ops: Iterable[str]) -> bool:
        """Whether the graph is cut at every one of ``attention_ops`` (and there is one)."""
        cut, attention = self._settled("splitting_ops"), list(attention_ops)
        return bool(attention) and all(_has_op(cut, op) for op in attention)

    def is_attention_compiled_piecewise(self, attention_ops: Iterable[str]) -> bool:
        """Whether attention stays outside the compiled pieces, by either way of cutting."""
        by_mode = self.mode is CompilationMode.PIECEWORK_COMPILE
        by_inductor = self.use_inductor_graph_partition
        return self.splitting_ops_contain_attention(attention_ops) and (by_mode or by_inductor)

    def init_backend(
        self, runtime: RuntimeConfig | None = None, *, prefix: str = "", is_encoder: bool = False
    ) -> str | Callable[..., Any]:
        """What Dynamo is given as its backend in this mode: `piecework.runtime.backend_of`."""
        backend_of = model.import_qualified("piecework.runtime:backend_of", where="backend")
        return backend_of(self, runtime, prefix=prefix, is_encoder=is_encoder)  # type: ignore[no-any-return]

    def hash_factors(self) -> dict[str, str]:
        """What is hashed, as canonical text by dotted name."""
        base = self.custom_op_base()
        rules = {op for op in self.custom_ops if op[0] == ("-" if base == "all" else "+")}
        factors = model.factors_of(self._with_compile_sizes())
        factors["custom_ops"] = ",".join([base, *sorted(rules)])
        if self.splitting_ops is not None:  # their order means nothing
            factors["splitting_ops"] = ",".join(sorted(set(self.splitting_ops)))
        return factors

    def compute_hash(self) -> str:
        """SHA-256 of what decides compiled and emitted code; equal in all processes."""
        return model.digest(self.hash_factors())

    def _settled(self, field: str) -> Any:
        value = getattr(self, field)
        if value is None:
            raise ConfigError(
                f"{field} is not settled yet", where=field, hint="call resolve() first"
            )
        return value


def _has_op(names: Iterable[str], op: str) -> bool:
    """Whether ``op`` is named, itself or by ``ns::op``, which stands for every overload."""
    listed = set(names)
    return op in listed or op.partition(".")[0] in listed
