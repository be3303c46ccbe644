"""The steps from one traced graph to a `Program`: split, compile, emit."""

from __future__ import annotations

import functools
import hashlib
import logging
import pprint
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch.fx import GraphModule
from torch.overrides import resolve_name

from piecework.codegen import LowerOptions, SplitItem, generate_source, split_graph
from piecework.codegen.graph.origin import SymbolNames, value_of
from piecework.codegen.graph.structure import Structure
from piecework.codegen.split.splitting import SplittingOp as SplittingOpLike
from piecework.codegen.split.splitting import SplittingOps, operator_name, recurrent_layers
from piecework.errors import ConfigError, SplitError, did_you_mean, tell
from piecework.runtime import torch_compat
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.ranges import Range, RangeTable
from piecework.runtime.counters import counters
from piecework.runtime.observe.dump import Dump, config_text, readable
from piecework.runtime.pieces import program as programs
from piecework.runtime.pieces.layer_names import share_layer_names
from piecework.runtime.pieces.manager import get_fake_args_from_graph
from piecework.runtime.pieces.parallel import compile_ahead, different_pieces
from piecework.runtime.pieces.piecewise import PiecewiseBackend, PiecewiseCompileInterpreter
from piecework.runtime.pieces.program import Batch, Graphs, Program, Trace, timed
from piecework.runtime.pieces.ranks import require_agreement, together
from piecework.runtime.pieces.report import Piece, RangeRow, Report, counted, differences
from piecework.runtime.splitting_op import registry
from piecework.runtime.trace import writes
from piecework.runtime.trace.every_size import EverySize
from piecework.runtime.watch.direct_ops import DirectOps

if TYPE_CHECKING:
    from piecework.runtime.pieces.backend import PieceworkBackend

_log = logging.getLogger(__name__)


class Compilation:
    """One graph on its way through a backend, and what a piece asks of it."""

    def __init__(self, backend: PieceworkBackend, graph: GraphModule, dump: Dump) -> None:
        self.graph, self.dump, self._backend = graph, dump, backend
        self.name = backend.prefix or "model"
        self.config, self.compiler_manager = backend.config, backend.compiler_manager
        self.phases: dict[str, float] = {}  # seconds
        self.backends: dict[str, PiecewiseBackend] = {}  # compiled forms by submodule
        self.batch = Batch()
        self.range_table = backend.range_table  # of those asked for, what the trace serves

    @property
    def batch_symbol(self) -> str | None:
        return self.batch.symbol

    @property
    def compile_ranges(self) -> tuple[Range | None, ...]:
        return programs.ranges_of(self.range_table)

    def run(self, bound: Mapping[str, str], tried: EverySize | None) -> Program:
        graph, levers = self.graph, self.config.stitching_config
        self.dump.write("01_captured.py", lambda: readable(graph))
        self.batch = _batch_of(graph, self._backend.batch_of_first)
        self.range_table = self._fitting_ranges()
        ops = [*self._splitting_ops(), *recurrent_layers(graph.graph)]
        with timed(self.phases, "split"):
            split_gm, items = self._split(ops)
        names = [i.submod_name for i in items if not i.is_splitting_graph]
        self.together = together(split_gm, items, self.range_table)
        if tried is not None:  # which runs the pieces, and what waits for others in them
            require_agreement(self, self._backend.runtime_config)
        known = {} if tried is None else tried.before(split_gm, names)
        torch_compat.trace_artifact("config", lambda: config_text(self.config))
        torch_compat.trace_artifact(
            "split_graph", lambda: split_gm.print_readable(print_output=False)
        )
        self.dump.split(split_gm, items)
        counters.num_piecewise_graphs_seen += len(items)
        if self.config.cudagraph_mode is not CUDAGraphMode.NONE:
            writes.refuse_mutations(split_gm, names, bound)
        with timed(self.phases, "compile"):
            self._compile(split_gm, names, known)
        if tried is not None:
            tried.after(self.backends)
        structures = {name: each.compiled_of()[1] for name, each in self.backends.items()}
        report = self._report(items, structures)
        with timed(self.phases, "emit"):
            direct = _direct_ops(items, graph) if levers.direct_splitting_ops else DirectOps()
            options = LowerOptions(
                submods=names,
                bound=bound if levers.bind_weights else {},
                direct=direct.implementations,
                emit_del=levers.emit_del,
                banner=self._banner(items, SplittingOps(ops), report),
                digests=_digests(structures),
            )
            source = generate_source(split_gm, options)
        torch_compat.trace_artifact("stitched_source", lambda: str(source))
        self.dump.write("03_plan.txt", lambda: pprint.pformat(source.module, width=120))
        self.dump.write("04_stitched.py", lambda: source.code)
        self.compiler_manager.write_texts(split_gm, structures, source.code)
        graphs = Graphs(graph, split_gm, tuple(items))
        return Program(
            name=self.name,
            config=self.config,
            graphs=lambda: graphs,
            backends=self.backends,
            source=source,
            range_table=self.range_table,
            batch=self.batch,
            batch_place=_place_of(graph, self.batch.symbol),
            direct_ops=direct,
            pieces=tuple(Piece.of(name, each) for name, each in self.backends.items()),
            together=self.together,
            compiled=report,
            phases=self.phases,
            dump=self.dump,
        )

    def _split(self, ops: Sequence[SplittingOpLike]) -> tuple[GraphModule, list[SplitItem]]:
        inside, declared = self.config.use_inductor_graph_partition, self._backend.declared_ops
        blocks: Literal["found", "off"] | Sequence[str] = self.config.repeated_blocks
        torch_compat.settle_asserts(map(value_of, self.graph.graph.nodes))
        split_gm, items = split_graph(
            self.graph,
            ops,
            asserted=torch_compat.asserted_symbols,
            blocks="off" if inside or declared == () else blocks,
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
        self, split_gm: GraphModule, names: Sequence[str], structures: dict[str, Structure]
    ) -> None:
        """Fill ``backends`` with the pieces' compiled forms."""
        manager, backend = self.compiler_manager, self._backend
        progress, inputs = manager.progress, get_fake_args_from_graph(split_gm)
        manager.initialize_cache(
            self.graph, inputs, tag=backend.tag, runtime_config=backend.runtime_config
        )
        ranges, symbol = self.compile_ranges, self.batch.symbol
        requests = different_pieces(split_gm, names, ranges, symbol, structures)
        interpreter = PiecewiseCompileInterpreter(split_gm, names, self.config, self, structures)
        self.backends = interpreter.backends  # filled as it runs: a failure leaves what is made
        try:
            count = counted(len(requests), "compilation")
            progress.note(f"{self.name}: traced; {count} for {counted(len(names), 'piece')}")
            progress.started(len(requests))
            compile_ahead(manager, requests)
            interpreter.run(*inputs)
        finally:
            progress.ended()

    def _report(self, items: Sequence[SplitItem], structures: Mapping[str, Structure]) -> Report:
        pieces, manager = self.backends.values(), self.compiler_manager
        passes = manager.passes if self.config.pass_config.report_matches else None
        return Report(
            model=self.name,
            compiler=manager.compiler.name,
            pieces=len(pieces),
            unique=len({each.key for each in structures.values()}),
            splitting=sum(item.is_splitting_graph for item in items),
            phases={},  # `Program.report` adds them
            ranges=tuple(RangeRow.of(each, pieces) for each in self.compile_ranges),
            differences=differences(structures),
            passes=None if passes is None else passes.report(),
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
        index, dim = self.batch.input
        value = value_of(self.graph.graph.find_nodes(op="placeholder")[index])
        size = value if dim is None else value.shape[dim]
        if self.batch.symbol is None:  # the trace serves one size
            fixed = self._backend.batch_of_first is not None and dim is not None
            return RangeTable([Range(size, size)]) if fixed and type(size) is int and size else None
        low, high = torch_compat.symbol_range(size)
        if which is Trace.FIRST:  # smaller batches than two may be another's
            table = table.within(min(low or 0, 2), None)
        elif which is Trace.ANOTHER:
            table = table.within(low, high)
        table.require_reachable(low, high)
        return table

    def _splitting_ops(self) -> Sequence[SplittingOpLike]:
        inside = self.config.use_inductor_graph_partition  # Inductor cuts the compiled code instead
        ops = self._backend.declared_ops
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

    def _banner(
        self, items: Sequence[SplitItem], is_cut: SplittingOps, report: Report
    ) -> tuple[str, ...]:
        cuts = [each.graph.graph for each in items if each.is_splitting_graph]
        calling = [called for cut in cuts if (called := list(filter(is_cut, cut.nodes)))]
        ops = sorted({_op_name(node.target) for nodes in calling for node in nodes})
        where = f" ({counted(len(calling), 'submodule')})" if ops else ""
        return (
            f"model: {self.name}",
            f"pieces: {report.pieces}, unique: {report.unique}, compiler: {report.compiler}",
            f"splitting ops: {', '.join(ops) or 'none'}{where}",
        )


def _digests(structures: Mapping[str, Structure]) -> dict[str, str]:
    """What each piece computes, in eight digits that are the same in every process."""
    known: dict[str, str] = {}  # equal pieces have one
    for structure in structures.values():
        if not structure.local and structure.key not in known:
            # Torch numbers symbols as it likes; here they count in order of first sight.
            text = SymbolNames()("\n".join(structure.lines)).encode("utf-8", "surrogatepass")
            known[structure.key] = hashlib.sha256(text).hexdigest()[:8]
    return {name: known[each.key] for name, each in structures.items() if each.key in known}


def _direct_ops(items: Sequence[SplitItem], graph: GraphModule) -> DirectOps:
    """Implementations that the stitched code may call past the dispatcher, by operator."""
    calls: list[tuple[object, str | None]] = []
    if torch_compat.autocast_enabled():  # which an operator may have rules for
        return DirectOps.of(calls)
    for item in items:
        for node in item.graph.graph.nodes if item.is_splitting_graph else ():
            if node.op == "call_function":
                values = map(value_of, node.all_input_nodes)
                device = (v.device.type for v in values if isinstance(v, torch.Tensor))
                calls.append((node.target, next(device, None)))
    written = functools.cache(lambda: writes.written_later(graph, {target for target, _ in calls}))
    return DirectOps.of(calls, lambda target: target in written())


def require_registered(splitting_ops: Sequence[SplittingOpLike] | None) -> None:
    """Check that torch knows the splitting ops that are named."""
    for name in SplittingOps(splitting_ops or ()).declared:
        namespace, colons, rest = name.partition("::")
        op, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), op, None) if colons else None
        if colons and (packet is None or (overload and overload not in packet.overloads())):
            near = did_you_mean(name, registry.names())
            hint = "check its spelling, and import the module that defines it first"
            raise SplitError(
                f"splitting op {name} is not registered with torch",
                hint=f"{near} If not, {hint}" if near else hint,
            )


def _batch_of(graph: GraphModule, place: tuple[str, int] | None) -> Batch:
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


def _place_of(graph: GraphModule, symbol: str | None) -> tuple[str, int] | None:
    for node in graph.graph.find_nodes(op="placeholder") if symbol is not None else ():
        for dim, size in enumerate(getattr(value_of(node), "shape", ())):
            if torch_compat.symbol_of(size) == symbol:
                return node.name, dim
    return None


def _op_name(op: object) -> str:
    """How a splitting op is written: ``ns::op``, a path that torch knows, or where it is from."""
    known = op if isinstance(op, str) else operator_name(op) or resolve_name(op)
    return known or f"{getattr(op, '__module__', '')}.{getattr(op, '__qualname__', op)}"
