"""From one traced graph to a `Program`. In: a flat graph (Dynamo's, or any other) and a configuration. Out: split, compiled and stitched, ready to be bound.

It runs nothing on real data.
"""

from __future__ import annotations

import enum
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, assert_never

import torch
import torch.fx
from torch.overrides import resolve_name

from piecework.codegen import LowerOptions, SplitItem, generate_source, split_graph
from piecework.codegen.graph.origin import SymbolNames, value_of
from piecework.codegen.graph.structure import input_signature, structure_of
from piecework.codegen.split.split import SplittingOp as SplittingOpLike
from piecework.codegen.split.split import SplittingOps
from piecework.codegen.split.splitting import operator_name
from piecework.errors import BindError, CaptureError, ConfigError, SplitError, tell
from piecework.runtime import torch_compat
from piecework.runtime.analysis.writes import held_by_source, mutations_in, refuse_mutations
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.bind.direct_ops import DirectOps
from piecework.runtime.cache.artifacts import StandaloneCompiledArtifacts
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.groups import CompilationMode
from piecework.runtime.counters import counters
from piecework.runtime.model_tag import current_model_tag, model_tag_is_set
from piecework.runtime.observe import trace
from piecework.runtime.observe.dump import Dump, config_text
from piecework.runtime.passes import PostGradPassManager
from piecework.runtime.pieces.custom_ops import check_custom_ops
from piecework.runtime.pieces.layer_names import share_layer_names
from piecework.runtime.pieces.manager import CompilerManager
from piecework.runtime.pieces.piecewise import PiecewiseBackend, PiecewiseCompileInterpreter
from piecework.runtime.pieces.precompiled import compile_ahead, different_pieces
from piecework.runtime.pieces.program import (
    Batch,
    Program,
    called_forms,
    ranges_of,
    timed,
    unique_pieces,
)
from piecework.runtime.pieces.recurrent import recurrent_layers
from piecework.runtime.splitting_op import registry

Admits = Callable[[torch.fx.GraphModule], str | None]

_log = logging.getLogger(__name__)


class NotAdmitted(CaptureError):
    """A piece may not be compiled as it was traced; the caller traces it in another way."""


class Trace(enum.Enum):
    """Which of a model's traces a backend is for."""

    ONLY = "the only one"
    FIRST = "the first of those that it takes"
    ANOTHER = "another"


class PieceworkBackend:
    """A Dynamo backend: splits a graph, compiles its pieces, and emits and binds the stitching source.

    Args:
        config: what to do; the default configuration if None.
        prefix: a label for the model, used in reports and the banner.
        is_encoder: the last batch range is open-ended.
        splitting_ops: where to cut; overrides the configuration's.
        runtime_config: tells the largest batch; without it the last batch range is open-ended.
        trace: which of the model's traces this is for; others may serve sizes that this one does not.
        deferred: make the compiler, and refuse one that there is not, when something is compiled.

    Attributes:
        compiler_manager: compiles pieces, equal ones once.
        range_table: batch ranges and single sizes that were asked for; None when one compiled form serves every batch.
        used: a graph was given to it, whatever became of it.
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
        self.config = config or CompilationConfig()
        self.prefix = prefix
        self.is_encoder = is_encoder
        self.trace = trace
        self.tag = current_model_tag().tag
        self.declared_ops = (
            splitting_ops if splitting_ops is not None else self.config.splitting_ops
        )
        self.compiler_manager = CompilerManager(self._compiler_config())
        self.runtime_config = runtime_config
        self.range_table = self._range_table()
        self.used = False
        self._program: Program | None = None
        if not deferred:
            self.require_compiler()

    def require_compiler(self) -> None:
        """Raise `ConfigError` if there is no such compiler as is configured."""
        self.compiler_manager.compiler  # noqa: B018 - it is made

    @property
    def program(self) -> Program:
        """What was made of the last graph.

        Raises:
            BindError: none was compiled yet.
        """
        if self._program is None:
            raise BindError("nothing is compiled yet", hint="call prepare(graph) first")
        return self._program

    @property
    def graph(self) -> torch.fx.GraphModule:
        return self.program.graph

    @property
    def split_gm(self) -> torch.fx.GraphModule:
        return self.program.split_gm

    @property
    def piecewise_graphs(self) -> tuple[SplitItem, ...]:
        return self.program.items

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return ranges_of(self.range_table)

    @property
    def inductor_config(self) -> dict[str, object]:
        return dict(self.config.inductor_compile_config)

    def configure_post_pass(self) -> PostGradPassManager | None:
        """The passes that run on every piece; None where the compiler runs none."""
        return self.compiler_manager.passes

    def collect_standalone_compile_artifacts(self) -> StandaloneCompiledArtifacts:
        """The compiled form of each piece and batch range as bytes; equal ones once.

        Raises:
            BindError: nothing is compiled yet, or the compiler makes nothing that can be kept.
        """
        artifacts = StandaloneCompiledArtifacts()
        for name, piece in self.program.backends.items():
            for compile_range, data in piece.to_bytes().items():
                artifacts.insert(name, str(compile_range or "all"), data)
        return artifacts

    def __call__(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        """Compile ``graph`` for Dynamo: the result takes the graph's inputs, weights included."""
        counters.num_graphs_seen += 1
        program = self.prepare(graph)
        function = program.bind()
        if program.range_table is None:
            return _without_grad(function)
        size, submods_for = program.batch.size, program.submods_for
        return _without_grad(
            lambda *args: function(*args, __vllm_submods__=submods_for(size(args)))
        )

    def prepare(
        self,
        graph: torch.fx.GraphModule,
        bound: Mapping[str, str] | None = None,
        admits: Admits | None = None,
    ) -> Program:
        """Split ``graph``, compile its pieces and emit the source.

        Must run while the tracing context of the capture is open, if there is one.

        Args:
            graph: flat placeholders with fake values, and a flat tuple of outputs.
            bound: placeholder name → weight path, for weights to hold as module-level names.
            admits: why a piece may not be compiled; None if it may. Asked for each different piece, before any is compiled.

        Raises:
            NotAdmitted: ``admits`` gave a reason; nothing was compiled, and no dump is left.
            SplitError: a splitting op is unknown.
            StaticGraphError: pieces are to be captured, and one writes to the model's own tensors.
            PieceCompileError: a compiler failed.
            UnsupportedNode: a node can't be written as source.
            ConfigError: ``debug_dump_path`` can't be written to.
        """
        self.used = True
        runtime = self.runtime_config
        place = {} if runtime is None else {"rank": runtime.rank, "dp_rank": runtime.dp_rank}
        dump = Dump.open(self.config, self.prefix or "model", **place)
        making = _Compilation(self, graph, dump)
        try:
            self._program = making.run(bound or {}, admits)
        except NotAdmitted:
            dump.discard()
            raise
        except BaseException as error:
            dump.finish(making.backends, making.phases, error)
            raise
        dump.finish(making.backends, making.phases)  # again when it is bound
        return self._program

    def adopt(self, program: Program) -> None:
        """Take a program that was made in another process for what was made of the last graph."""
        self.used, self._program = True, program

    def require_registered(self) -> None:
        """Check that torch knows the splitting ops that are named.

        Raises:
            SplitError: it does not know one.
        """
        names = () if self.declared_ops is None else SplittingOps(self.declared_ops).declared
        unknown = [name for name in names if "::" in name and not _is_registered(name)]
        if unknown:
            raise SplitError(
                f"splitting op {unknown[0]} is not registered with torch",
                hint="check its spelling, and import the module that defines it first",
            )

    def _range_table(self) -> RangeTable | None:
        if not (self.config.compile_sizes or self.config.compile_ranges_endpoints):
            return None
        runtime = self.runtime_config
        largest = None if runtime is None else runtime.max_num_batched_tokens
        return self.config.range_table(largest, is_encoder=self.is_encoder)

    def _compiler_config(self) -> CompilationConfig:
        """The configuration with the splitting ops where the compiler itself cuts at them."""
        if not self.config.use_inductor_graph_partition or self.declared_ops is None:
            return self.config
        return self.config.replace(splitting_ops=tuple(SplittingOps(self.declared_ops).declared))


class _Compilation:
    """One graph on its way to a `Program`: what a piece asks of its backend, and what is made so far."""

    def __init__(self, settings: PieceworkBackend, graph: torch.fx.GraphModule, dump: Dump) -> None:
        self.settings = settings
        self.config = settings.config
        self.compiler_manager = settings.compiler_manager
        self.graph = graph
        self.dump = dump
        self.phases: dict[str, float] = {}
        self.backends: dict[str, PiecewiseBackend] = {}
        self.batch = Batch()
        self.range_table = settings.range_table

    @property
    def batch_symbol(self) -> str | None:
        return self.batch.symbol

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return ranges_of(self.range_table)

    def run(self, bound: Mapping[str, str], admits: Admits | None) -> Program:
        graph, manager = self.graph, self.compiler_manager
        self.dump.captured(graph)
        check_custom_ops(self.config, graph)
        self.batch = _batch_of(graph)
        self.range_table = self._fitting_ranges()
        with timed(self.phases, "split"):
            ops = [*self._splitting_ops(), *recurrent_layers(graph.graph)]
            split_gm, items = split_graph(
                graph, ops, asserted=torch_compat.asserted_symbols, blocks=self._blocks()
            )
            if manager.may_share_names():
                share_layer_names(split_gm, items)
        names = [i.submod_name for i in items if not i.is_splitting_graph]
        _log.info(
            "%s: traced %d nodes, batch size %s; %d pieces, cut at %s",
            self.settings.prefix or "model",
            len(graph.graph.nodes),
            self.batch.symbol or "fixed",
            len(names),
            ", ".join(map(str, ops)) or "nothing",
        )
        if admits is not None:
            _require_admitted(split_gm, names, admits)
        trace.artifact("config", lambda: config_text(self.config))
        trace.artifact("split_graph", lambda: readable_graph(split_gm))
        self.dump.split(split_gm, items)
        counters.num_piecewise_graphs_seen += len(items)
        if self.config.cudagraph_mode is not CUDAGraphMode.NONE:
            refuse_mutations(mutations_in(split_gm, names, bound or held_by_source(graph)))
        with timed(self.phases, "compile"):
            inputs = list(map(value_of, split_gm.graph.find_nodes(op="placeholder")))
            manager.initialize_cache(
                graph, inputs, tag=self.settings.tag, runtime_config=self.settings.runtime_config
            )
            interpreter = PiecewiseCompileInterpreter(split_gm, names, self.config, self)
            self.backends = interpreter.backends  # filled as it runs: a failure leaves what is made
            with self._compiled_ahead(split_gm, names):
                interpreter.run(*inputs)
        direct = DirectOps()
        with timed(self.phases, "emit"):
            if self.config.stitching_config.direct_splitting_ops:
                direct = _direct_ops(items)
            options = self._lower_options(names, items, bound, direct, SplittingOps(ops))
            source = generate_source(split_gm, options)
        trace.artifact("stitched_source", lambda: str(source))
        self.dump.stitched(source)
        if manager.cache is not None:
            manager.cache.write_texts(split_gm, source.code)
        passes = manager.passes if self.config.pass_config.report_matches else None
        return Program(
            name=self.settings.prefix or "model",
            config=self.config,
            graph=graph,
            split_gm=split_gm,
            items=tuple(items),
            backends=self.backends,
            source=source,
            range_table=self.range_table,
            batch=self.batch,
            direct_ops=direct,
            compiler=manager.compiler.name,
            phases=self.phases,
            passes=None if passes is None else passes.report(),
            dump=self.dump,
            submod_lists=called_forms(
                self.backends,
                source.submod_names,
                self.range_table,
                direct=self.config.stitching_config.direct_artifact_entry,
            ),
        )

    def _fitting_ranges(self) -> RangeTable | None:
        """The ranges without sizes that other traces serve; those that none does are refused."""
        table, which = self.settings.range_table, self.settings.trace
        if table is None:
            return None
        if self.batch.symbol is None and which is not Trace.ANOTHER:
            raise ConfigError(
                "there are compile sizes or ranges, and no input has a dynamic batch dimension",
                where="compile_sizes, compile_ranges_endpoints",
                hint="mark the batch dimension with torch._dynamo.mark_dynamic",
            )
        if self.batch.symbol is None:
            return None
        low, high = _bounds_of(self.graph, self.batch)
        match which:
            case Trace.ONLY:
                pass
            case Trace.FIRST:  # smaller batches than two may be another's
                table = table.within(min(low or 0, 2), None)
            case Trace.ANOTHER:
                table = table.within(low, high)
            case _:
                assert_never(which)
        table.require_reachable(low, high)
        return table

    @contextmanager
    def _compiled_ahead(
        self, split_gm: torch.fx.GraphModule, names: Sequence[str]
    ) -> Iterator[None]:
        """Show progress and use workers while the pieces are compiled, as far as somebody asked for that."""
        manager = self.compiler_manager
        if manager.progress is None and manager.config.compile_workers == 1:
            yield
            return
        ahead = different_pieces(split_gm, names, self.compile_ranges, self.batch.symbol)
        if manager.progress is not None:
            manager.progress.started(len(ahead))
        try:
            compile_ahead(manager, ahead)
            yield
        finally:
            if manager.progress is not None:
                manager.progress.ended()

    def _blocks(self) -> Literal["found", "off"] | Sequence[str]:
        if self.config.use_inductor_graph_partition or self.settings.declared_ops == ():
            return "off"
        return self.config.repeated_blocks

    def _splitting_ops(self) -> Sequence[SplittingOpLike]:
        inside = self.config.use_inductor_graph_partition  # Inductor cuts the compiled code instead
        ops = self.settings.declared_ops
        if ops is None:
            return () if inside else registry.names()
        self.settings.require_registered()
        missing = SplittingOps(ops).missing_from(self.graph.graph)
        if missing and self.settings.trace is not Trace.ANOTHER:
            tell(
                SplitError(
                    f"splitting ops that are named and not in the graph: {', '.join(missing)}",
                    where=self.settings.prefix or "model",
                    hint="check the spelling, or leave them out; a graph calls what the model's code calls (torch.sin, not aten::sin)",
                ),
                strict=self.config.strict,
            )
        return () if inside else ops

    def _lower_options(
        self,
        pieces: Sequence[str],
        items: Sequence[SplitItem],
        bound: Mapping[str, str],
        direct: DirectOps,
        is_cut: SplittingOps,
    ) -> LowerOptions:
        levers = self.config.stitching_config
        unique = unique_pieces(self.backends)
        splitting = sum(item.is_splitting_graph for item in items)
        cuts = [each.graph.graph for each in items if each.is_splitting_graph]
        called = (node.target for graph in cuts for node in graph.nodes if is_cut(node))
        ops = sorted({operator_name(op) or resolve_name(op) or _name_of(op) for op in called})
        banner = (
            f"model: {self.settings.prefix or 'model'}",
            f"pieces: {len(self.backends)}, unique: {unique}, compiler: {self.compiler_manager.compiler.name}",
            f"splitting ops: {', '.join(ops) or 'none'} ({splitting} submodules)",
        )
        return LowerOptions(
            submods=pieces,
            bound=bound if levers.bind_weights else {},
            direct=direct.implementations,
            emit_del=levers.emit_del,
            banner=banner,
            digests=dict(self._digests()),
        )

    def _digests(self) -> Iterator[tuple[str, str]]:
        """What each piece computes, in eight digits that are the same in every process; pieces without such are left out."""
        known: dict[str, str] = {}  # equal pieces have one
        for name, piece in self.backends.items():
            structure = piece.compiled_of()[1]
            if not structure.portable:
                continue
            if structure.key not in known:
                # Torch numbers symbols as it likes; here they count in order of first sight.
                text = SymbolNames()("\n".join(structure.lines)).encode("utf-8", "surrogatepass")
                known[structure.key] = hashlib.sha256(text).hexdigest()[:8]
            yield name, known[structure.key]


def _require_admitted(split_gm: torch.fx.GraphModule, names: Sequence[str], admits: Admits) -> None:
    seen: set[str] = set()
    for name in names:
        piece = split_gm.get_submodule(name)
        assert isinstance(piece, torch.fx.GraphModule)
        key = structure_of(piece, describe_input=input_signature).key
        reason = None if key in seen else admits(piece)
        seen.add(key)
        if reason is not None:
            raise NotAdmitted(f"{name}: {reason}")


def _direct_ops(items: Sequence[SplitItem]) -> DirectOps:
    """Implementations that the stitched code may call past the dispatcher, by operator."""
    return DirectOps.of(
        (node.target, _device_of(node))
        for item in items
        if item.is_splitting_graph
        for node in item.graph.graph.nodes
        if node.op == "call_function"
    )


def piecework_dynamo_backend(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., object]:
    """The entry point behind ``torch.compile(model, backend="piecework")``.

    Args:
        options: fields of `CompilationConfig`, as in ``torch.compile(..., options={...})``. In mode ``DYNAMO_TRACE_ONCE``
            the graph stays whole; Dynamo keeps its guards in any case.
        mode: Inductor's presets of ``torch.compile(..., mode=...)``, which piecework has none of.

    Raises:
        PieceworkError: as `PieceworkBackend`; Dynamo wraps it in ``BackendCompilerFailed``.
        ConfigError: the options hold a mode in which piecework compiles nothing, or a ``cudagraph_mode``; or ``mode`` is given.
    """
    if mode is not None:
        raise ConfigError(
            f"torch.compile's mode {mode!r} is a preset of Inductor's, and the backend is piecework",
            where="mode",
            hint="pass options={...} with fields of piecework.CompilationConfig: inductor_compile_config takes Inductor's "
            "own",
        )
    counters.num_models_seen += 1
    config = CompilationConfig(**(options or {}))
    if config.mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE):
        raise ConfigError(
            f"mode {config.mode} leaves nothing for the piecework backend to compile",
            where="mode",
            hint="call torch.compile with another backend, or not at all",
        )
    if config.cudagraph_mode is not CUDAGraphMode.NONE:
        raise ConfigError(
            f"cudagraph_mode {config.cudagraph_mode} would have no effect: torch.compile has no step at which to capture",
            where="cudagraph_mode",
            hint="piecework.compile(model, …).capture(sizes) captures",
        )
    whole = config.mode is CompilationMode.DYNAMO_TRACE_ONCE and config.splitting_ops is None
    tag = current_model_tag()
    prefix = tag.tag if model_tag_is_set() else ""
    backend = PieceworkBackend(config, prefix, tag.is_encoder, splitting_ops=() if whole else None)
    return backend(graph, example_inputs)


def readable_graph(graph: torch.fx.GraphModule | None) -> str:
    """A graph and its submodules as Python that people can read; "" for none."""
    return "" if graph is None else graph.print_readable(print_output=False)


def _without_grad(function: Callable[..., object]) -> Callable[..., object]:
    """``function`` for inference: under a grad mode that is on, it runs with it off."""

    def run(*args: object) -> object:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return function(*args)
        return function(*args)

    return run


def _is_registered(name: str) -> bool:
    namespace, _, rest = name.partition("::")
    op, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return packet is not None and (not overload or overload in packet.overloads())


def _device_of(node: torch.fx.Node) -> str | None:
    for source in node.all_input_nodes:
        value = value_of(source)
        if isinstance(value, torch.Tensor):
            return value.device.type
    return None


def _bounds_of(graph: torch.fx.GraphModule, batch: Batch) -> tuple[int | None, int | None]:
    """The smallest and the largest batch that the trace allows; None where there is no bound."""
    index, dim = batch.input
    value = value_of(graph.graph.find_nodes(op="placeholder")[index])
    return torch_compat.symbol_range(value if dim is None else value.shape[dim])


def _batch_of(graph: torch.fx.GraphModule) -> Batch:
    for index, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        value = value_of(node)
        sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)
        for dim, size in enumerate(sizes):
            symbol = torch_compat.symbol_of(size)
            if symbol is not None and symbol.isidentifier():
                return Batch(symbol, (index, dim if isinstance(value, torch.Tensor) else None))
    return Batch()


def _name_of(function: object) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
