"""From one captured graph to one callable. In: a flat graph (Dynamo's, or any other). Out: split, compiled, stitched and bound.

It keeps what it made for inspection and runs nothing on real data.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import assert_never

import torch
import torch.fx

from piecework.codegen import LowerOptions, SplitItem, StitchedSource, generate_source, split_graph
from piecework.codegen.bind import compile_execution_fn
from piecework.codegen.origin import SymbolNames, origin_of_piece, value_of
from piecework.codegen.split import SplittingOp as SplittingOpLike
from piecework.codegen.split import SplittingOps
from piecework.codegen.splitting import operator_name
from piecework.codegen.structure import input_signature, structure_of
from piecework.errors import CaptureError, ConfigError, SplitError
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
from piecework.runtime.passes import PassReport, PostGradPassManager
from piecework.runtime.pieces.custom_ops import check_custom_ops
from piecework.runtime.pieces.layer_names import NamedOp, share_layer_names
from piecework.runtime.pieces.manager import CompilerManager
from piecework.runtime.pieces.piecewise import PiecewiseBackend, PiecewiseCompileInterpreter
from piecework.runtime.pieces.precompiled import compile_ahead, different_pieces
from piecework.runtime.pieces.recurrent import recurrent_layers
from piecework.runtime.pieces.report import Piece, RangeRow, Report, differences
from piecework.runtime.splitting_op import registry

Admits = Callable[[torch.fx.GraphModule], str | None]


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

    Attributes:
        graph: the captured graph.
        split_gm: the stitching graph.
        piecewise_graphs: the submodules, splitting ones included, in order.
        source: the emitted source.
        backends: submodule name → `PiecewiseBackend`.
        compiler_manager: compiles pieces, equal ones once.
        phases: seconds per phase.
        range_table: batch ranges and single sizes; None when one compiled form serves every batch.
        compile_ranges: its entries, or ``(None,)``.
        batch_symbol: the symbol of the batch size: the first dynamic dimension of the first tensor input that has one.
        batch_input: which graph input, and which of its dimensions (None for a size itself), is the batch size.
        submod_lists: ``__vllm_submods__`` for each of ``compile_ranges``.
        direct_ops: the splitting ops that the source calls past the dispatcher.
        named_ops: operators that pieces call in place of those that are given a layer's name.
        dump: writes the stages to ``debug_dump_path``, if there is one.
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
    ) -> None:
        self.config = config or CompilationConfig()
        self.prefix = prefix
        self.is_encoder = is_encoder
        self.trace = trace
        self._tag = current_model_tag().tag
        self.declared_ops = (
            splitting_ops if splitting_ops is not None else self.config.splitting_ops
        )
        self.compiler_manager = CompilerManager(self._compiler_config())
        self._runtime = runtime_config
        self.range_table = self._range_table(runtime_config)
        self._place = (
            {}
            if runtime_config is None
            else {"rank": runtime_config.rank, "dp_rank": runtime_config.dp_rank}
        )
        self.compile_ranges: tuple[Range | None, ...] = (
            (None,) if self.range_table is None else self.range_table.entries
        )
        self.batch_symbol: str | None = None
        self.batch_input: tuple[int, int | None] | None = None
        self.submod_lists: tuple[list[Callable[..., object]], ...] = ()
        self.direct_ops = DirectOps()
        self.named_ops: tuple[NamedOp, ...] = ()
        self.phases: dict[str, float] = {}
        self.dump = Dump(None)
        self.graph: torch.fx.GraphModule | None = None
        self.split_gm: torch.fx.GraphModule | None = None
        self.piecewise_graphs: list[SplitItem] = []
        self.backends: dict[str, PiecewiseBackend] = {}
        self.source: StitchedSource | None = None

    @property
    def inductor_config(self) -> dict[str, object]:
        return dict(self.config.inductor_compile_config)

    def configure_post_pass(self) -> PostGradPassManager | None:
        """The passes that run on every piece; None where the compiler runs none."""
        return self.compiler_manager.passes

    def collect_standalone_compile_artifacts(self) -> StandaloneCompiledArtifacts:
        """The compiled form of each piece and batch range as bytes; equal ones once.

        Raises:
            BindError: the compiler makes nothing that can be kept.
        """
        artifacts = StandaloneCompiledArtifacts()
        for name, piece in self.backends.items():
            for compile_range, data in piece.to_bytes().items():
                artifacts.insert(name, str(compile_range or "all"), data)
        return artifacts

    def __call__(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[object]
    ) -> Callable[..., object]:
        """Compile ``graph`` for Dynamo: the result takes the graph's inputs, weights included."""
        counters.num_graphs_seen += 1
        self.prepare(graph)
        function = self.bind()
        if self.range_table is None:
            return _without_grad(function)
        return _without_grad(
            lambda *args: function(*args, __vllm_submods__=self.submods_for(self.batch_size(args)))
        )

    def prepare(
        self,
        graph: torch.fx.GraphModule,
        bound: Mapping[str, str] | None = None,
        admits: Admits | None = None,
    ) -> None:
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
        self.dump = Dump.open(self.config, self.prefix or "model", **self._place)
        try:
            self._prepare(graph, bound, admits)
        except NotAdmitted:
            self.dump.discard()
            raise
        except BaseException as error:
            self.dump.finish(self.backends, self.phases, error)
            raise
        self.dump.finish(self.backends, self.phases)  # again when it is bound

    def _prepare(
        self,
        graph: torch.fx.GraphModule,
        bound: Mapping[str, str] | None,
        admits: Admits | None,
    ) -> None:
        self.dump.captured(graph)
        self.graph = graph
        check_custom_ops(self.config, graph)
        self.batch_symbol, self.batch_input = _batch_of(graph)
        if self.range_table is not None:
            self._fit_ranges(graph)
        with self._phase("split"):
            ops = [*self._splitting_ops(graph), *recurrent_layers(graph.graph)]
            self.split_gm, self.piecewise_graphs = split_graph(
                graph, ops, asserted=torch_compat.asserted_symbols
            )
            if self.compiler_manager.may_share_names():
                self.named_ops = share_layer_names(self.split_gm, self.piecewise_graphs)
        names = [i.submod_name for i in self.piecewise_graphs if not i.is_splitting_graph]
        if admits is not None:
            self._require_admitted(names, admits)
        trace.artifact("config", lambda: config_text(self.config))
        trace.artifact("split_graph", lambda: readable_graph(self.split_gm))
        self.dump.split(self.split_gm, self.piecewise_graphs)
        counters.num_piecewise_graphs_seen += len(self.piecewise_graphs)
        if self.config.cudagraph_mode is not CUDAGraphMode.NONE:
            refuse_mutations(mutations_in(self.split_gm, names, bound or held_by_source(graph)))
        with self._phase("compile"):
            inputs = list(map(value_of, self.split_gm.graph.find_nodes(op="placeholder")))
            self.compiler_manager.initialize_cache(
                graph, inputs, tag=self._tag, runtime_config=self._runtime
            )
            interpreter = PiecewiseCompileInterpreter(self.split_gm, names, self.config, self)
            self.backends = interpreter.backends  # filled as it runs: a failure leaves what is made
            with self._compiled_ahead(names):
                interpreter.run(*inputs)
        with self._phase("emit"):
            self.source = generate_source(self.split_gm, self._lower_options(names, bound or {}))
        trace.artifact("stitched_source", lambda: str(self.source))
        self.dump.stitched(self.source)
        if self.compiler_manager.cache is not None:
            self.compiler_manager.cache.write_texts(self.split_gm, self.source.code)

    def _fit_ranges(self, graph: torch.fx.GraphModule) -> None:
        """Leave out sizes and ranges that other traces serve; refuse those that none does."""
        assert self.range_table is not None
        if self.batch_symbol is None and self.trace is not Trace.ANOTHER:
            raise ConfigError(
                "there are compile sizes or ranges, and no input has a dynamic batch dimension",
                where="compile_sizes, compile_ranges_endpoints",
                hint="mark the batch dimension with torch._dynamo.mark_dynamic",
            )
        if self.batch_symbol is None:
            self.range_table, self.compile_ranges = None, (None,)
            return
        low, high = _bounds_of(graph, self.batch_input)
        match self.trace:
            case Trace.ONLY:
                pass
            case Trace.FIRST:  # smaller batches than two may be another's
                self.range_table = self.range_table.within(min(low or 0, 2), None)
            case Trace.ANOTHER:
                self.range_table = self.range_table.within(low, high)
            case _:
                assert_never(self.trace)
        self.range_table.require_reachable(low, high)
        self.compile_ranges = self.range_table.entries

    def bind(
        self, weights: Mapping[str, object] | None = None, *, code: str | None = None
    ) -> FunctionType:
        """Execute the emitted source with the compiled pieces.

        Args:
            weights: values of the bound names.
            code: an edited text to execute in its place.
        """
        assert self.source is not None
        with self._phase("bind"):
            names = self.source.submod_names
            per_range = [self.callables(each) for each in self.compile_ranges]
            self.submod_lists = tuple([found[name] for name in names] for found in per_range)
            text = self.source.code if code is None else code
            function = compile_execution_fn(
                text, per_range[-1], names, self.source.consts, bound=weights
            )
            publish_submods(function, self.submod_lists[-1])
        if code is None:
            self.dump.finish(self.backends, self.phases)
        return function

    def bind_safely(
        self, weights: Mapping[str, object], *, code: str | None = None
    ) -> tuple[Callable[..., object], Callable[[int], Sequence[Callable[..., object]]]]:
        """The same graph stitched without shortcuts: operators through the dispatcher, pieces by their public form.

        Args:
            weights: weight path → tensor, for the names that the source binds.
            code: an edited text to execute in place of the generated one.

        Returns:
            The function, and what gives its ``__vllm_submods__`` for a batch size.
        """
        assert self.source is not None and self.split_gm is not None
        source, consts = self.source, self.source.consts
        if code is not None:
            operators = {id(value): op for op, value in source.options.direct.items()}
            consts = tuple(operators.get(id(value), value) for value in consts)
        elif source.options.direct:
            source = generate_source(self.split_gm, replace(source.options, direct={}))
            consts = source.consts
        per_range = [self.callables(each, public=True) for each in self.compile_ranges]
        lists = [tuple(found[name] for name in source.submod_names) for found in per_range]
        bound = {row.name: weights[row.path] for row in source.module.bound}
        function = compile_execution_fn(
            source.code if code is None else code,
            per_range[-1],
            source.submod_names,
            consts,
            bound=bound,
        )
        table = self.range_table
        return function, lambda batch: lists[0 if table is None else table.index(batch)]

    def submods_for(self, batch: int) -> list[Callable[..., object]]:
        """``__vllm_submods__`` for a batch size, in O(log ranges).

        Raises:
            InputError: the size is outside every compiled range; they are listed.
        """
        if self.range_table is None:
            return self.submod_lists[0]
        return self.submod_lists[self.range_table.index(batch)]

    def batch_size(self, inputs: Sequence[object]) -> int:
        """The batch size that graph inputs (weights included) have."""
        assert self.batch_input is not None
        index, dim = self.batch_input
        value = inputs[index]
        return value.size(dim) if isinstance(value, torch.Tensor) and dim is not None else value

    def callables(
        self, compile_range: Range | None = None, *, public: bool = False
    ) -> dict[str, Callable[..., object]]:
        """What each entry of ``__vllm_submods__`` is for one range of batch sizes.

        Args:
            public: the compiler's public callable, also where the piece may be entered past it.
        """
        if public or not self.config.stitching_config.direct_artifact_entry:
            return {
                name: piece.runnable_for(compile_range) for name, piece in self.backends.items()
            }
        return {n: piece.direct_runnable_for(compile_range) for n, piece in self.backends.items()}

    def pieces(self) -> tuple[Piece, ...]:
        found = []
        for name, piece in self.backends.items():
            assert piece.graph is not None and piece.structure is not None
            origin = origin_of_piece(piece.graph, SymbolNames(), line_numbers=False)
            runnable = piece.runnable_for(self.compile_ranges[0])
            found.append(
                Piece(
                    name, piece.structure.key, origin.module, piece.seconds, runnable, piece.reused
                )
            )
        return tuple(found)

    def report(self) -> Report:
        structures = [(n, p.structure) for n, p in self.backends.items() if p.structure is not None]
        return Report(
            model=self.prefix or "model",
            compiler=self.compiler_manager.compiler.name,
            pieces=len(self.backends),
            unique=len({structure.key for _, structure in structures}),
            splitting=sum(item.is_splitting_graph for item in self.piecewise_graphs),
            phases=dict(self.phases),
            ranges=tuple(map(self._range_row, self.compile_ranges)),
            differences=differences(structures),
            passes=self._pass_report(),
        )

    def _pass_report(self) -> PassReport | None:
        manager = self.compiler_manager.passes
        wanted = self.config.pass_config.report_matches
        return manager.report() if wanted and manager is not None else None

    def _range_row(self, compile_range: Range | None) -> RangeRow:
        entries = [piece.entries[compile_range] for piece in self.backends.values()]
        return RangeRow(
            batches="all" if compile_range is None else str(compile_range),
            compiles=sum(not entry.reused for entry in entries),
            seconds=sum(entry.seconds for entry in entries),
        )

    def _range_table(self, runtime_config: RuntimeConfig | None) -> RangeTable | None:
        if not (self.config.compile_sizes or self.config.compile_ranges_endpoints):
            return None
        largest = None if runtime_config is None else runtime_config.max_num_batched_tokens
        return self.config.range_table(largest, is_encoder=self.is_encoder)

    # --- steps -----------------------------------------------------------------------------------

    @contextmanager
    def _compiled_ahead(self, names: Sequence[str]) -> Iterator[None]:
        """Show progress and use workers while the pieces are compiled, as far as somebody asked for that."""
        manager = self.compiler_manager
        if manager.progress is None and manager.config.compile_workers == 1:
            yield
            return
        assert self.split_gm is not None
        ahead = different_pieces(self.split_gm, names, self.compile_ranges, self.batch_symbol)
        if manager.progress is not None:
            manager.progress.started(len(ahead))
        try:
            compile_ahead(manager, ahead)
            yield
        finally:
            if manager.progress is not None:
                manager.progress.ended()

    def _require_admitted(self, names: Sequence[str], admits: Admits) -> None:
        assert self.split_gm is not None
        seen: set[str] = set()
        for name in names:
            piece = self.split_gm.get_submodule(name)
            assert isinstance(piece, torch.fx.GraphModule)
            key = structure_of(piece, describe_input=input_signature).key
            reason = None if key in seen else admits(piece)
            seen.add(key)
            if reason is not None:
                raise NotAdmitted(f"{name}: {reason}")

    def _splitting_ops(self, graph: torch.fx.GraphModule) -> Sequence[SplittingOpLike]:
        inside = self.config.use_inductor_graph_partition  # Inductor cuts the compiled code instead
        if self.declared_ops is None:
            return () if inside else registry.names()
        declared = SplittingOps(self.declared_ops)
        missing = declared.missing_from(graph.graph)
        unknown = [name for name in missing if "::" in name and not _is_registered(name)]
        if unknown:
            raise SplitError(
                f"splitting op {unknown[0]} is not registered with torch",
                hint="check its spelling, and import the module that defines it first",
            )
        return () if inside else self.declared_ops

    def _compiler_config(self) -> CompilationConfig:
        """The configuration with the splitting ops where the compiler itself cuts at them."""
        if not self.config.use_inductor_graph_partition or self.declared_ops is None:
            return self.config
        return self.config.replace(splitting_ops=tuple(SplittingOps(self.declared_ops).declared))

    def _lower_options(self, pieces: Sequence[str], bound: Mapping[str, str]) -> LowerOptions:
        levers = self.config.stitching_config
        report = self.report()
        cuts = [each.graph.graph for each in self.piecewise_graphs if each.is_splitting_graph]
        called = (operator_name(node.target) for graph in cuts for node in graph.nodes)
        ops = sorted({name for name in called if name})
        banner = (
            f"model: {self.prefix or 'model'}",
            f"pieces: {report.pieces}, unique: {report.unique}, compiler: {report.compiler}",
            f"splitting ops: {', '.join(ops) or 'none'} ({report.splitting} submodules)",
        )
        return LowerOptions(
            submods=pieces,
            bound=bound if levers.bind_weights else {},
            direct=self._direct() if levers.direct_splitting_ops else {},
            emit_del=levers.emit_del,
            banner=banner,
        )

    def _direct(self) -> dict[object, Callable[..., object]]:
        """Implementations that the stitched code may call past the dispatcher, by operator."""
        self.direct_ops = DirectOps.of(
            (node.target, _device_of(node))
            for item in self.piecewise_graphs
            if item.is_splitting_graph
            for node in item.graph.graph.nodes
            if node.op == "call_function"
        )
        return self.direct_ops.implementations

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with trace.timed(name):
                yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start


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


def publish_submods(
    function: Callable[..., object], submods: Sequence[Callable[..., object]]
) -> None:
    """Make ``submods`` the list that ``function`` uses when it is given none.

    A tuple: CPython indexes it faster than a list, and the difference is a part of what stitching costs.
    """
    function.__kwdefaults__["__vllm_submods__"] = tuple(submods)  # type: ignore[attr-defined]


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


def _bounds_of(
    graph: torch.fx.GraphModule, batch_input: tuple[int, int | None] | None
) -> tuple[int | None, int | None]:
    """The smallest and the largest batch that the trace allows; None where there is no bound."""
    assert batch_input is not None
    index, dim = batch_input
    value = value_of(graph.graph.find_nodes(op="placeholder")[index])
    return torch_compat.symbol_range(value if dim is None else value.shape[dim])


def _batch_of(graph: torch.fx.GraphModule) -> tuple[str | None, tuple[int, int | None] | None]:
    """The batch symbol, and the graph input (and dimension) to read it from."""
    for index, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        value = value_of(node)
        sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else (value,)
        for dim, size in enumerate(sizes):
            symbol = torch_compat.symbol_of(size)
            if symbol is not None and symbol.isidentifier():
                return symbol, (index, dim if isinstance(value, torch.Tensor) else None)
    return None, None
