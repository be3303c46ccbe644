"""From graph to plan. In: a stitching graph (`split_gm`). Out: an `ir.Module` and the values of its constants.

Every FX node becomes at most one statement; what cannot be written is an `UnsupportedNode` that names the node and its
source line. Nothing is executed and the graph is not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import torch
import torch.fx
from torch.fx.graph import CodeGen

from piecework.codegen.graph.consts import short_type, to_text
from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan import ir
from piecework.codegen.plan.liveness import insert_deletes
from piecework.codegen.plan.names import NameTable
from piecework.codegen.split.regions import regions_in
from piecework.codegen.stitch.inline import Inlined, InlinePlan, plan_inlining
from piecework.codegen.stitch.lower_node import ModuleState, NodeLowering, Scope
from piecework.errors import UnsupportedNode, short_methods


@short_methods
@dataclass(frozen=True, slots=True)
class LowerOptions:
    """What may differ between two emissions of one graph.

    Attributes:
        submods: names of submodules to call through ``__vllm_submods__``; None means every submodule that is not a
            plain GraphModule (those are inlined).
        bound: placeholder name → path of the weight, for placeholders held as module-level names.
        direct: operator → callable to use in its place (a splitting op's own implementation).
        emit_del: write ``del`` after each last use.
        line_numbers: put ``file:line`` rather than ``file`` into comments.
        banner: lines of the header comment.
        digests: name of a submodule → a short digest of what it computes, for the header.
    """

    submods: Collection[str] | None = None
    bound: Mapping[str, str] = field(default_factory=dict)
    direct: Mapping[object, Callable[..., object]] = field(default_factory=dict)
    emit_del: bool = True
    line_numbers: bool = True
    banner: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


def option_goes(name: str, parameters: Collection[str]) -> str:
    """Where a function with these parameters wants an option of lowering; "" for what is none."""
    if name not in {each.name for each in fields(LowerOptions)}:
        return ""
    how = f"LowerOptions({name}=...)"
    if "options" in parameters:
        return f"it is one of the options: options={how}"
    return f"generate_source(split_gm, {how}) of piecework.codegen takes it"


def lower(
    split_gm: torch.fx.GraphModule, options: LowerOptions | None = None
) -> tuple[ir.Module, list[object]]:
    """Lower ``split_gm`` to a module plan.

    Returns:
        The plan, and the values of ``__vllm_consts__`` in order.

    Raises:
        UnsupportedNode: a node that has no source form, or a region of autocast or the like that does not end.
    """
    return _Lowering(split_gm, options or LowerOptions()).run()


class _Lowering:
    """Lowers one stitching graph: names first, then the shared functions, then the entry."""

    def __init__(self, split_gm: torch.fx.GraphModule, options: LowerOptions) -> None:
        if type(split_gm.graph._codegen) is not CodeGen:
            raise UnsupportedNode(
                "the graph takes its inputs as a pytree, which its emitted function would not",
                where=type(split_gm.graph._codegen).__name__,
                hint="flatten it first: gm.graph.set_codegen(torch.fx.graph.CodeGen())",
            )
        self.gm = split_gm
        self.options = options
        self.plan: InlinePlan = plan_inlining(split_gm, options.submods)
        self.state = ModuleState(self.plan, line_numbers=options.line_numbers)
        self.aliases: dict[str, ir.Alias] = {}
        self.functions: list[ir.Function] = []
        self.module_names = NameTable(frozenset({*self._possible_roots(), ENTRY_NAME}))

    def run(self) -> tuple[ir.Module, list[object]]:
        for key, inlined in self.plan.shared.items():
            self.state.function_names[key] = self.module_names.claim(inlined.name)
        self._claim_aliases()
        bound = self._bind_weights()
        names, scope, parameters = self._entry_scope(bound)
        for inlined in self.plan.shared.values():
            self._lower_shared(inlined)
        entry = self._lower_entry(names, scope, parameters)
        module = ir.Module(
            imports=("torch", *sorted(self.state.imports - {"torch"})),
            aliases=tuple(self.aliases.values()),
            functions=tuple(self.functions),
            entry=entry,
            submod_names=tuple(self.state.submod_index),
            const_specs=self.state.consts.specs,
            bound=tuple(row for _, _, row in bound),
            banner=self.options.banner,
            digests=tuple(self.options.digests.get(name, "") for name in self.state.submod_index),
        )
        return module, self.state.consts.values

    # --- before any function -------------------------------------------------------------------

    def _possible_roots(self) -> set[str]:
        """First parts of every import that this lowering may need, whether it then does or not."""
        roots = {"torch", "operator"}
        for gm in (self.gm, *self.plan.graphs):
            for node in gm.graph.nodes:
                path = self.state.path_of(node.target) if node.op == "call_function" else None
                if path is not None:
                    roots.add(path.root)
        return roots

    def _claim_aliases(self) -> None:
        """One module-level name per operator that is called straight from a splitting submodule, or past the dispatcher."""
        inside = (node for gm in self.plan.graphs for node in gm.graph.nodes)
        past = [
            node
            for node in inside
            if node.op == "call_function" and self._implementation(node.target) is not None
        ]
        for node in (*self.plan.direct_calls, *past):
            if id(node.target) in self.state.alias_of:
                continue
            implementation = self._implementation(node.target)
            short = getattr(node.target, "__name__", None)
            name = self.module_names.claim(
                short.partition(".")[0] if isinstance(short, str) else "op"
            )
            if implementation is not None:
                value = self.state.consts.add(implementation)
                note = f"{node.target}: its own implementation, past the dispatcher"
            else:
                value, note = self.state.function(node), ""
            self.aliases[name] = ir.Alias(name, value, note)
            self.state.alias_of[id(node.target)] = name

    def _implementation(self, target: object) -> Callable[..., object] | None:
        direct = self.options.direct
        return direct.get(target) if isinstance(target, Hashable) else None

    def _bind_weights(self) -> list[tuple[torch.fx.Node, str, ir.BoundName]]:
        rows = []
        for node in self.gm.graph.nodes:
            if node.op == "placeholder" and node.name in self.options.bound:
                name = self.module_names.claim(node.name)
                path = self.options.bound[node.name]
                value = value_of(node)
                kind = (
                    short_type(value, self.state.symbols) if isinstance(value, torch.Tensor) else ""
                )
                rows.append((node, name, ir.BoundName(name, path, kind)))
        return rows

    # --- functions -----------------------------------------------------------------------------

    def _entry_scope(
        self, bound: Sequence[tuple[torch.fx.Node, str, ir.BoundName]]
    ) -> tuple[NameTable, Scope, tuple[ir.Parameter, ...]]:
        """What the entry starts with; a size that is a parameter has its name in comments too, and no other value's."""
        names = NameTable(self.module_names.names())
        scope: Scope = {node: name for node, name, _ in bound}
        parameters = self._parameters(self.gm, names, scope, skip=frozenset(scope))
        sizes = {
            str(value): name
            for node, name in reversed(scope.items())
            if isinstance(value := value_of(node), torch.SymInt)
        }
        taken = {*scope.values(), *(node.name for node in self.gm.graph.nodes)}
        self.state.symbols.know(sizes, taken)
        return names, scope, parameters

    def _lower_entry(
        self, names: NameTable, scope: Scope, parameters: tuple[ir.Parameter, ...]
    ) -> ir.Function:
        own = {parameter.name for parameter in parameters}
        legend = self._legend({node: name for node, name in scope.items() if name in own})
        borrowed = frozenset(name for name in scope.values() if name not in own)
        body = self._lower_graph(self.gm, names, scope, prefix="")
        return self._finish(ENTRY_NAME, parameters, body, borrowed, True, legend)

    def _legend(self, names_of: Mapping[torch.fx.Node, str]) -> str:
        """Where each size in the comments can be read: ``sizes: s0 = tokens.shape[0]``."""
        told: dict[str, str] = {}
        for node, name in names_of.items():
            value = value_of(node)
            if not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                symbol = self.state.symbols(size)
                if symbol.isidentifier():
                    told.setdefault(symbol, f"{symbol} = {name}.shape[{dim}]")
        for node, name in names_of.items():
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                same = self.state.symbols(value)  # the trace found two sizes to be one
                if same in told and same != name:
                    told.setdefault(name, f"{name} = {same}")
        return f"sizes: {', '.join(told.values())}" if told else ""

    def _lower_shared(self, inlined: Inlined) -> None:
        """Lower one function that several splitting submodules share; differing literals are its last parameters."""
        gm, name = inlined.graph_module, self.state.function_names[inlined.key]
        names = NameTable(self.module_names.names())
        scope: Scope = {}
        parameters = list(self._parameters(gm, names, scope))
        lifted: dict[tuple[int, int], str] = {}
        for literal in inlined.lifted:
            lifted[literal.node, literal.ordinal] = names.claim(literal.name)
            parameters.append(ir.Parameter(lifted[literal.node, literal.ordinal]))
        body = self._lower_graph(gm, names, scope, prefix=inlined.target, lifted=lifted)
        takes = self.state.takes_submods[name] = any(
            stmt.piece or stmt.kind == "nested" for stmt in body
        )
        count = len(inlined.members)
        note = f"shared by {count} submodules" if count > 1 else ""
        self.functions.append(self._finish(name, tuple(parameters), body, frozenset(), takes, note))

    def _finish(
        self,
        name: str,
        parameters: tuple[ir.Parameter, ...],
        body: list[ir.Statement],
        borrowed: frozenset[str],
        takes_submods: bool,
        note: str,
    ) -> ir.Function:
        stmts = tuple(body)
        if self.options.emit_del:
            stmts = insert_deletes(stmts, borrowed | {p.name for p in parameters})
        return ir.Function(name, parameters, stmts, takes_submods, note)

    def _parameters(
        self,
        gm: torch.fx.GraphModule,
        names: NameTable,
        scope: Scope,
        skip: Collection[torch.fx.Node] = frozenset(),
    ) -> tuple[ir.Parameter, ...]:
        parameters: list[ir.Parameter] = []
        for node in gm.graph.find_nodes(op="placeholder"):
            if node in skip:
                continue
            target = str(node.target)
            prefix = "**" if target.startswith("**") else "*" if target.startswith("*") else ""
            name = names.claim(node.name)
            default = None
            if node.args and not prefix and gm is self.gm:
                where = partial(node_where, node)
                default = to_text(node.args[0], self._no_node, self.state.consts, where)
            parameter = ir.Parameter(name, prefix, default)
            problem = _misplaced(parameter, parameters)
            if problem is not None:
                raise UnsupportedNode(
                    f"a placeholder {problem}",
                    where=node_where(node),
                    hint="reorder the placeholders",
                )
            scope[node] = name
            parameters.append(parameter)
        return tuple(parameters)

    @staticmethod
    def _no_node(node: torch.fx.Node) -> str:
        raise UnsupportedNode("the default of a placeholder is a node", where=node_where(node))

    # --- statements ----------------------------------------------------------------------------

    def _lower_graph(
        self,
        gm: torch.fx.GraphModule,
        names: NameTable,
        scope: Scope,
        *,
        prefix: str,
        lifted: Mapping[tuple[int, int], str] | None = None,
    ) -> list[ir.Statement]:
        body: list[ir.Statement] = []
        regions = regions_in(gm.graph)
        opening, closing = {each.enter for each in regions}, {each.leave for each in regions}
        for number, node in enumerate(gm.graph.nodes):
            if node.op == "placeholder" or node in scope:
                continue
            lower_node = NodeLowering(self.state, gm, names, scope, prefix, lifted or {}, number)
            stmt = lower_node.statement(node)
            if stmt is not None:
                body.append(replace(stmt, kind="finally") if node in closing else stmt)
            if node in opening:
                body.append(ir.Statement("try:", "try"))
            if node.op == "output":
                return body  # nodes after the output never run
        body.append(ir.Statement("return None", "return"))
        return body


def _misplaced(parameter: ir.Parameter, before: list[ir.Parameter]) -> str | None:
    """Why Python does not allow ``parameter`` after ``before``, or does not allow to pass it by position."""
    kinds = [each.kind for each in before]
    if "**" in kinds:
        return "follows **kwargs"
    if "*" in kinds and parameter.kind != "**":
        return "follows *args, so that it could only be passed by a name that may have changed"
    if not parameter.kind and parameter.default is None and before and before[-1].default:
        return "without a default follows one with a default"
    return None
