"""The steps from one traced graph to a `Program`: split, compile, emit."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Literal, Protocol

import torch
import torch.fx
from torch.overrides import resolve_name

from piecework.codegen import LowerOptions, SplitItem, StitchedSource, generate_source, split_graph
from piecework.codegen.graph.origin import SymbolNames, value_of
from piecework.codegen.graph.structure import Structure
from piecework.codegen.split.split import SplittingOp as SplittingOpLike
from piecework.codegen.split.split import SplittingOps
from piecework.codegen.split.splitting import operator_name, recurrent_layers
from piecework.errors import ConfigError, SplitError, did_you_mean, tell
from piecework.runtime import torch_compat
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.counters import counters
from piecework.runtime.observe import trace
from piecework.runtime.observe.dump import Dump, config_text
from piecework.runtime.pieces.layer_names import share_layer_names
from piecework.runtime.pieces.manager import CompilerManager
from piecework.runtime.pieces.parallel import compile_ahead, different_pieces
from piecework.runtime.pieces.piecewise import PiecewiseBackend, PiecewiseCompileInterpreter
from piecework.runtime.pieces.program import (
    Batch,
    Graphs,
    Program,
    called_forms,
    ranges_of,
    timed,
    unique_pieces,
)
from piecework.runtime.pieces.ranks import require_agreement, together
from piecework.runtime.pieces.report import counted
from piecework.runtime.splitting_op import registry
from piecework.runtime.trace.every_size import EverySize
from piecework.runtime.trace.writes import (
    held_by_source,
    mutations_in,
    refuse_mutations,
    written_later,
)
from piecework.runtime.watch.direct_ops import DirectOps

_TORCHS_OWN = ("aten", "prim", "prims")
_log = logging.getLogger(__name__)


class Trace(enum.Enum):
    """Which of a model's traces a backend is for."""

    ONLY = "the only one"
    FIRST = "the first of those that it takes"
    ANOTHER = "another"


class Backend(Protocol):
    """What a compilation needs of the backend that it belongs to."""

    prefix: str
    config: CompilationConfig
    compiler_manager: CompilerManager
    declared_ops: Sequence[SplittingOpLike] | None
    range_table: RangeTable | None
    runtime_config: RuntimeConfig | None
    tag: str
    trace: Trace
    batch_of_first: tuple[str, int] | None


class Compilation:
    """One graph on its way through a backend, and what a piece asks of it.

    Attributes:
        graph: what was traced.
        name: a label for the model.
        splitting_ops: where to cut; None: at every operator that is registered for it.
        range_table: the batch ranges and single sizes among those asked for that the trace serves.
        batch: where the graph has its batch size.
        phases: seconds per phase.
        backends: submodule name → its compiled forms.
    """

    def __init__(self, backend: Backend, graph: torch.fx.GraphModule, dump: Dump) -> None:
        self.graph, self.dump, self._backend = graph, dump, backend
        self.name = backend.prefix or "model"
        self.config, self.splitting_ops = backend.config, backend.declared_ops
        self.compiler_manager = backend.compiler_manager
        self.range_table = backend.range_table
        self.phases: dict[str, float] = {}
        self.backends: dict[str, PiecewiseBackend] = {}
        self.batch = Batch()

    @property
    def batch_symbol(self) -> str | None:
        return self.batch.symbol

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return ranges_of(self.range_table)

    def run(self, bound: Mapping[str, str], tried: EverySize | None) -> Program:
        graph, manager = self.graph, self.compiler_manager
        self.dump.captured(graph)
        _check_custom_ops(self.config, graph)
        self.batch = _batch_of(graph, self._backend.batch_of_first)
        self.range_table = self._fitting_ranges()
        ops = [*self._splitting_ops(), *recurrent_layers(graph.graph)]
        split_gm, items = self._split(ops)
        names = [i.submod_name for i in items if not i.is_splitting_graph]
        if tried is not None:  # which runs the pieces, and what waits for others in them
            found = partial(together, split_gm, items, self.range_table)
            require_agreement(SimpleNamespace(together=found), self._backend.runtime_config)
        structures = {} if tried is None else tried.before(split_gm, names)
        trace.artifact("config", lambda: config_text(self.config))
        trace.artifact("split_graph", lambda: split_gm.print_readable(print_output=False))
        self.dump.split(split_gm, items)
        counters.num_piecewise_graphs_seen += len(items)
        if self.config.cudagraph_mode is not CUDAGraphMode.NONE:
            refuse_mutations(mutations_in(split_gm, names, bound or held_by_source(graph)))
        with timed(self.phases, "compile"):
            self._compile(split_gm, names, structures)
        if tried is not None:
            tried.after(self.backends)
        with timed(self.phases, "emit"):
            levers = self.config.stitching_config
            direct = _direct_ops(items, graph) if levers.direct_splitting_ops else DirectOps()
            options = self._lower_options(names, items, bound, direct, SplittingOps(ops))
            source = generate_source(split_gm, options)
        trace.artifact("stitched_source", lambda: str(source))
        self.dump.stitched(source)
        if manager.cache is not None:
            pieces = {name: each.compiled_of()[1] for name, each in self.backends.items()}
            manager.cache.write_texts(split_gm, pieces, source.code)
        return self._program(split_gm, items, direct, source)

    def _split(
        self, ops: Sequence[SplittingOpLike]
    ) -> tuple[torch.fx.GraphModule, list[SplitItem]]:
        with timed(self.phases, "split"):
            torch_compat.settle_asserts(map(value_of, self.graph.graph.nodes))
            split_gm, items = split_graph(
                self.graph,
                ops,
                asserted=torch_compat.asserted_symbols,
                blocks=self._blocks(),
                module=torch_compat.graph_module,
            )
            if self.compiler_manager.may_share_names():
                share_layer_names(split_gm, items)
        _log.info(
            "%s: traced %d nodes, batch size %s; %d pieces, cut at %s",
            self.name,
            len(self.graph.graph.nodes),
            self.batch.symbol or "fixed",
            sum(not each.is_splitting_graph for each in items),
            ", ".join(map(_op_name, ops)) or "nothing",
        )
        return split_gm, items

    def _compile(
        self,
        split_gm: torch.fx.GraphModule,
        names: Sequence[str],
        structures: dict[str, Structure],
    ) -> None:
        """Fill ``backends`` with the pieces' compiled forms."""
        inputs = list(map(value_of, split_gm.graph.find_nodes(op="placeholder")))
        self.compiler_manager.initialize_cache(
            self.graph, inputs, tag=self._backend.tag, runtime_config=self._backend.runtime_config
        )
        manager, progress = self.compiler_manager, self.compiler_manager.progress
        requests = different_pieces(
            split_gm, names, self.compile_ranges, self.batch.symbol, structures
        )
        interpreter = PiecewiseCompileInterpreter(split_gm, names, self.config, self, structures)
        self.backends = interpreter.backends  # filled as it runs: a failure leaves what is made
        try:
            if progress is not None:
                progress.note(
                    f"{self.name}: traced; {counted(len(requests), 'compilation')} for "
                    f"{counted(len(names), 'piece')}"
                )
                progress.started(len(requests))
            compile_ahead(manager, requests)
            interpreter.run(*inputs)
        finally:
            if progress is not None:
                progress.ended()

    def _program(
        self,
        split_gm: torch.fx.GraphModule,
        items: Sequence[SplitItem],
        direct: DirectOps,
        source: StitchedSource,
    ) -> Program:
        manager = self.compiler_manager
        passes = manager.passes if self.config.pass_config.report_matches else None
        return Program(
            name=self.name,
            config=self.config,
            graphs=partial(Graphs, self.graph, split_gm, tuple(items)),
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
        table, which = self.range_table, self._backend.trace
        if table is None:
            return None
        if self.batch.symbol is None and which is not Trace.ANOTHER:
            raise ConfigError(
                "there are compile sizes or ranges, and no input has a dynamic batch dimension",
                where="compile_sizes, compile_ranges_endpoints",
                hint="mark the batch dimension with torch._dynamo.mark_dynamic",
            )
        if self.batch.symbol is None:
            return self._own_size()
        low, high = _bounds_of(self.graph, self.batch)
        if which is Trace.FIRST:  # smaller batches than two may be another's
            table = table.within(min(low or 0, 2), None)
        elif which is Trace.ANOTHER:
            table = table.within(low, high)
        table.require_reachable(low, high)
        return table

    def _own_size(self) -> RangeTable | None:
        """The one size that a trace without a batch symbol serves."""
        index, dim = self.batch.input
        value = value_of(self.graph.graph.find_nodes(op="placeholder")[index])
        if (
            self._backend.batch_of_first is None
            or dim is None
            or not isinstance(value, torch.Tensor)
        ):
            return None
        size = value.shape[dim]
        return RangeTable([Range(size, size)]) if type(size) is int and size else None

    def _blocks(self) -> Literal["found", "off"] | Sequence[str]:
        if self.config.use_inductor_graph_partition or self.splitting_ops == ():
            return "off"
        return self.config.repeated_blocks

    def _splitting_ops(self) -> Sequence[SplittingOpLike]:
        inside = self.config.use_inductor_graph_partition  # Inductor cuts the compiled code instead
        ops = self.splitting_ops
        if ops is None:
            return () if inside else registry.names()
        require_registered(ops)
        missing = SplittingOps(ops).missing_from(self.graph.graph)
        if missing and self._backend.trace is not Trace.ANOTHER:
            tell(
                SplitError(
                    f"splitting ops that are named and not in the graph: {', '.join(missing)}",
                    where=self.name,
                    hint="check the spelling, or leave them out; a graph calls what the model's "
                    "code calls: torch.sin without quotes, not aten::sin, and no method of a tensor",
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
        cuts = [each.graph.graph for each in items if each.is_splitting_graph]
        calling = [called for cut in cuts if (called := list(filter(is_cut, cut.nodes)))]
        targets = {node.target for nodes in calling for node in nodes}
        ops = sorted(set(map(_op_name, targets)))
        where = f" ({counted(len(calling), 'submodule')})" if ops else ""
        banner = (
            f"model: {self.name}",
            f"pieces: {len(self.backends)}, unique: {unique}, compiler: {self.compiler_manager.compiler.name}",
            f"splitting ops: {', '.join(ops) or 'none'}{where}",
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
        """What each piece computes, in eight digits that are the same in every process."""
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


def _check_custom_ops(config: CompilationConfig, graph: torch.fx.GraphModule) -> None:
    """Hold ``graph`` to the rules of ``custom_ops``; a rule names ``ns::op``, or ``op`` of any
    namespace but torch's own.

    Raises:
        ConfigError: a rule switches an op off, and the graph calls it.
    """
    if not any(rule[0] in "+-" for rule in config.custom_ops):
        return
    called = {operator_name(node.target) for node in graph.graph.nodes}
    full = {name for name in called if name and name.partition("::")[0] not in _TORCHS_OWN}
    present = full | {name.partition("::")[2] for name in full}
    # What is switched off is rightly absent, and a bare name may be one of the model's layers, which is no operator.
    unseen = {rule[1:] for rule in config.custom_ops if rule[0] == "-" or "::" not in rule}
    config.custom_op_log_check(present | unseen, registry.names())
    broken = [rule for rule in config.custom_ops if rule[0] == "-" and rule[1:] in present]
    if broken:
        raise ConfigError(
            f"rule {broken[0]!r} switches a custom op off, and the model calls it",
            where="custom_ops",
            hint=f"let the model ask config.is_custom_op_enabled({broken[0][1:]!r}) before it calls the op, or leave out the rule",
        )


def _direct_ops(items: Sequence[SplitItem], graph: torch.fx.GraphModule) -> DirectOps:
    """Implementations that the stitched code may call past the dispatcher, by operator."""
    calls = [
        (node.target, _device_of(node))
        for item in items
        if item.is_splitting_graph
        for node in item.graph.graph.nodes
        if node.op == "call_function"
    ]
    written = functools.cache(lambda: written_later(graph, {target for target, _ in calls}))
    return DirectOps.of(calls, lambda target: target in written())


def require_registered(splitting_ops: Sequence[SplittingOpLike] | None) -> None:
    """Check that torch knows the splitting ops that are named.

    Raises:
        SplitError: it does not know one.
    """
    names = () if splitting_ops is None else SplittingOps(splitting_ops).declared
    unknown = [name for name in names if "::" in name and not _is_registered(name)]
    if unknown:
        near = did_you_mean(unknown[0], registry.names()).replace(
            "?", "? If not, check its spelling"
        )
        raise SplitError(
            f"splitting op {unknown[0]} is not registered with torch",
            hint=(near or "check its spelling,") + " and import the module that defines it first",
        )


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


def _batch_of(graph: torch.fx.GraphModule, place: tuple[str, int] | None) -> Batch:
    """The first dynamic size of an input; with a ``place``, the size there, dynamic or not."""
    for index, node in enumerate(graph.graph.find_nodes(op="placeholder")):
        value = value_of(node)
        tensor = isinstance(value, torch.Tensor)
        for dim, size in enumerate(value.shape if tensor else (value,)):
            here = index, dim if tensor else None
            symbol = torch_compat.symbol_of(size)
            known = symbol if symbol is not None and symbol.isidentifier() else None
            if (node.name, here[1]) == place or (place is None and known is not None):
                return Batch(known, here)
    return Batch() if place is None else _batch_of(graph, None)


def _op_name(op: object) -> str:
    """How a splitting op is said: ``ns::op``, a path that torch knows, or where it is from."""
    known = op if isinstance(op, str) else operator_name(op) or resolve_name(op)
    return known or f"{getattr(op, '__module__', '')}.{getattr(op, '__qualname__', op)}"
