"""From one traced graph to a `Program`: the Dynamo backend, and what it makes."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from piecework.codegen.split.splitting import SplitItem, SplittingOps
from piecework.codegen.split.splitting import SplittingOp as SplittingOpLike
from piecework.errors import BindError, ConfigError, short_errors
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.compilers.passes import PostGradPassManager
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.groups import CompilationMode
from piecework.runtime.config.model import import_qualified
from piecework.runtime.counters import counters
from piecework.runtime.model_tag import current_model_tag, model_tag_is_set
from piecework.runtime.observe.dump import Dump
from piecework.runtime.pieces.bound_call import BoundCall, bound_names, modules_traced, name_inputs
from piecework.runtime.pieces.manager import CompilerManager
from piecework.runtime.pieces.program import Program, Trace, ranges_of
from piecework.runtime.splitting_op import registry
from piecework.runtime.store.artifacts import StandaloneCompiledArtifacts
from piecework.runtime.trace.errors import tell_of_gradients
from piecework.runtime.trace.every_size import EverySize, NotAdmitted


class PieceworkBackend:
    """A Dynamo backend: splits a graph, compiles its pieces, emits and binds the stitching source.

    Args:
        prefix: a label for the model, used in reports and the banner.
        is_encoder: the last batch range is open-ended.
        splitting_ops: where to cut; overrides the configuration's.
        runtime_config: tells the largest batch; without it the last batch range is open-ended.
        trace: which of the model's traces this is for.
        deferred: refuse a compiler that there is not when something is compiled.
    """

    def __init__(
        self,
        config: CompilationConfig | None = None,
        prefix: str = "",
        is_encoder: bool = False,
        *,
        splitting_ops: Sequence[SplittingOpLike] | None = None,
        runtime_config: RuntimeConfig | None = None,
        trace: Trace = Trace.ONLY,
        deferred: bool = False,
    ) -> None:
        self.config = config = config or CompilationConfig()
        self.prefix, self.is_encoder, self.trace = prefix, is_encoder, trace
        # where the model's first trace has its batch size: `Program.batch_place`
        self.batch_of_first: tuple[str, int] | None = None
        self.tag = current_model_tag().tag
        self.declared_ops = config.splitting_ops if splitting_ops is None else splitting_ops
        self.runtime_config = runtime_config
        self.range_table: RangeTable | None = None  # what was asked for; None: all sizes alike
        if config.compile_sizes or config.compile_ranges_endpoints:
            largest = None if runtime_config is None else runtime_config.max_num_batched_tokens
            self.range_table = config.range_table(largest, is_encoder=is_encoder)
        if config.use_inductor_graph_partition and self.declared_ops is not None:
            # The compiler itself cuts there.
            config = config.replace(splitting_ops=SplittingOps(self.declared_ops).declared)
        self.compiler_manager = CompilerManager(config)
        self.used = False  # a graph was given to it, whatever became of it
        self._program: Program | None = None
        if not deferred:
            self.require_compiler()

    def require_compiler(self) -> None:
        """Raise `ConfigError` if there is no such compiler as is configured."""
        self.compiler_manager.compiler  # noqa: B018 - it is made

    @property
    def program(self) -> Program:
        """What was made of the last graph; `BindError` where none was compiled yet."""
        if self._program is None:
            raise BindError("nothing is compiled yet", hint="call prepare(graph) first")
        return self._program

    @property
    def piecewise_graphs(self) -> tuple[SplitItem, ...]:
        return self.program.items

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return ranges_of(self.range_table)

    def configure_post_pass(self) -> PostGradPassManager | None:
        """The passes that run on every piece; None where the compiler runs none."""
        return self.compiler_manager.passes

    def collect_standalone_compile_artifacts(self) -> StandaloneCompiledArtifacts:
        """The compiled form of each piece and batch range as bytes; equal ones once."""
        artifacts = StandaloneCompiledArtifacts()
        for name, piece in self.program.backends.items():
            for compile_range, data in piece.to_bytes().items():
                artifacts.insert(name, str(compile_range or "all"), data)
        return artifacts

    def __call__(
        self, graph: GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        """Compile for Dynamo; the first call binds the weights, let go when their model dies."""
        counters.num_graphs_seen += 1
        paths, models = name_inputs(graph), modules_traced(graph)
        program = self.prepare(graph, bound_names(graph, paths) if models else None)
        call = BoundCall(program, paths)
        for each in models:
            weakref.finalize(each, call.release)
        return call

    def prepare(
        self,
        graph: GraphModule,
        bound: Mapping[str, str] | None = None,
        tried: EverySize | None = None,
    ) -> Program:
        """Split, compile, emit, in the open tracing context; ``bound``: weight path by input."""
        from piecework.runtime.pieces.compilation import Compilation  # not for what is loaded

        self.used = True
        runtime = self.runtime_config
        place = {} if runtime is None else {"rank": runtime.rank, "dp_rank": runtime.dp_rank}
        dump = Dump.open(self.config, self.prefix or "model", **place)
        making = Compilation(self, graph, dump)
        try:
            self._program = making.run(bound or {}, tried)
        except NotAdmitted:
            dump.discard()
            raise
        except BaseException as error:
            dump.finish(making.backends, making.phases, error)
            raise
        dump.finish(making.backends, making.phases)  # again when it is bound
        return self._program

    def adopt(self, program: Program) -> None:
        self.used, self._program = True, program


def backend_of(
    config: CompilationConfig,
    runtime: RuntimeConfig | None = None,
    *,
    prefix: str = "",
    is_encoder: bool = False,
) -> str | Callable[..., Any]:
    """The backend of ``config``; see ``CompilationConfig.init_backend``."""
    if config.mode is CompilationMode.NONE:
        raise ConfigError(
            "mode NONE compiles nothing, so it has no backend",
            where="mode",
            hint="choose PIECEWORK_COMPILE, or run the model as it is",
        )
    if config.mode is CompilationMode.PIECEWORK_COMPILE:
        if runtime is not None:
            config = config.resolve(runtime, registered_splitting_ops=registry.names())
        name = prefix or ("" if runtime is None else runtime.model_name)
        return PieceworkBackend(config, name, is_encoder, runtime_config=runtime)
    if config.backend in torch.compiler.list_backends(exclude_tags=()):
        return config.backend
    return import_qualified(config.backend, where="backend")


@short_errors
def piecework_dynamo_backend(
    graph: GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., object]:
    """The entry point behind ``torch.compile(model, backend="piecework")``."""
    counters.num_models_seen += 1
    config = CompilationConfig(**(options or {}))
    idle = config.mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE)
    if mode is not None or idle or config.cudagraph_mode is not CUDAGraphMode.NONE:
        raise ConfigError(
            f"torch.compile's mode={mode!r}, or options with mode {config.mode} and cudagraph_mode "
            f"{config.cudagraph_mode}, would have no effect with the piecework backend",
            where="mode, cudagraph_mode",
            hint="give Inductor's own options as inductor_compile_config; "
            "piecework.compile(model, …).capture(sizes) captures",
        )
    arguments = [each for each in example_inputs if not isinstance(each, torch.nn.Parameter)]
    tell_of_gradients(arguments, config.strict)
    whole = config.mode is CompilationMode.DYNAMO_TRACE_ONCE and config.splitting_ops is None
    tag = current_model_tag()
    prefix = tag.tag if model_tag_is_set() else ""
    backend = PieceworkBackend(config, prefix, tag.is_encoder, splitting_ops=() if whole else None)
    return backend(graph, example_inputs)
