"""From graph to plan: every FX node becomes at most one statement; nothing is executed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.fx
from torch.fx.graph import CodeGen

from piecework.codegen.graph.consts import short_type, to_text
from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan import ir
from piecework.codegen.plan.names import NameTable
from piecework.codegen.stitch.inline import Inlined, plan_inlining
from piecework.codegen.stitch.lower_node import FunctionLowering, ModuleState, Scope
from piecework.errors import UnsupportedNode, short_methods


@short_methods
@dataclass(frozen=True, slots=True)
class LowerOptions:
    """What may differ between two emissions of one graph."""

    # names of submodules to call through ``__vllm_submods__``; None means every submodule that is
    # not a plain GraphModule (those are inlined)
    submods: Collection[str] | None = None
    # placeholder name → path of the weight, for placeholders held as module-level names
    bound: Mapping[str, str] = field(default_factory=dict)
    # operator → callable to use in its place (a splitting op's own implementation)
    direct: Mapping[object, Callable[..., object]] = field(default_factory=dict)
    emit_del: bool = True  # write ``del`` after each last use
    banner: tuple[str, ...] = ()  # lines of the header comment
    # name of a submodule → a short digest of what it computes, for the header
    digests: Mapping[str, str] = field(default_factory=dict)


def lower(
    split_gm: torch.fx.GraphModule, options: LowerOptions | None = None
) -> tuple[ir.Module, list[object]]:
    """Lower ``split_gm`` to a module plan."""
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
        self.plan = plan_inlining(split_gm, options.submods)
        self.state = ModuleState(self.plan)
        self.names = NameTable(frozenset({*self._possible_roots(), ENTRY_NAME}))

    def run(self) -> tuple[ir.Module, list[object]]:
        state = self.state
        for key, inlined in self.plan.shared.items():
            state.function_names[key] = self.names.claim(inlined.path.replace(".", "_"))
        aliases = self._aliases()
        scope: Scope = {}
        bound = [
            self._bound(node, scope)
            for node in self.gm.graph.find_nodes(op="placeholder")
            if node.name in self.options.bound
        ]
        names, held = NameTable(self.names.names()), frozenset(scope.values())
        parameters = self._parameters(self.gm, names, scope)
        # A size that is a parameter has its name in comments too, and no other value's.
        sizes = {
            str(value): name
            for node, name in reversed(scope.items())
            if isinstance(value := value_of(node), torch.SymInt)
        }
        state.symbols.know(sizes, {*scope.values(), *(node.name for node in self.gm.graph.nodes)})
        functions = [self._shared(each) for each in self.plan.shared.values()]
        legend = self._legend({node: name for node, name in scope.items() if name not in held})
        body = FunctionLowering(state, self.gm, names, scope).body()
        entry = self._function(ENTRY_NAME, parameters, body, held, True, legend)
        module = ir.Module(
            imports=("torch", *sorted(state.imports - {"torch"})),
            aliases=aliases,
            functions=tuple(functions),
            entry=entry,
            submod_names=tuple(state.submod_index),
            const_specs=state.consts.specs,
            bound=tuple(bound),
            banner=self.options.banner,
            digests=tuple(self.options.digests.get(name, "") for name in state.submod_index),
        )
        return module, state.consts.values

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

    def _aliases(self) -> tuple[ir.Alias, ...]:
        """A module-level name per operator of a splitting submodule, or past the dispatcher."""
        inside = [n for gm in self.plan.graphs for n in gm.graph.nodes if n.op == "call_function"]
        past = [node for node in inside if self._implementation(node.target) is not None]
        aliases: list[ir.Alias] = []
        for node in (*self.plan.direct_calls, *past):
            if id(node.target) in self.state.alias_of:
                continue
            implementation = self._implementation(node.target)
            short = getattr(node.target, "__name__", None)
            name = self.names.claim(short.partition(".")[0] if isinstance(short, str) else "op")
            if implementation is not None:
                value = self.state.consts.add(implementation)
                note = f"{node.target}: its own implementation, past the dispatcher"
            else:
                value, note = self.state.function(node), ""
            aliases.append(ir.Alias(name, value, note))
            self.state.alias_of[id(node.target)] = name
        return tuple(aliases)

    def _implementation(self, target: object) -> Callable[..., object] | None:
        return self.options.direct.get(target) if isinstance(target, Hashable) else None

    def _bound(self, node: torch.fx.Node, scope: Scope) -> ir.BoundName:
        """A weight that the module holds."""
        name = scope[node] = self.names.claim(node.name)
        value = value_of(node)
        kind = short_type(value, self.state.symbols) if isinstance(value, torch.Tensor) else ""
        return ir.BoundName(name, self.options.bound[node.name], kind, node.name)

    # --- functions -----------------------------------------------------------------------------

    def _legend(self, names_of: Mapping[torch.fx.Node, str]) -> str:
        """Where each size in the comments can be read: ``sizes: s0 = tokens.shape[0]``."""
        legend: dict[str, str] = {}
        values = [(name, value_of(node)) for node, name in names_of.items()]
        for name, value in values:
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                symbol = self.state.symbols(size)
                if symbol.isidentifier():
                    legend.setdefault(symbol, f"{symbol} = {name}.shape[{dim}]")
        for name, value in values:
            if isinstance(value, torch.SymInt):
                same = self.state.symbols(value)  # the trace found two sizes to be one
                if same in legend and same != name:
                    legend.setdefault(name, f"{name} = {same}")
        return f"sizes: {', '.join(legend.values())}" if legend else ""

    def _shared(self, inlined: Inlined) -> ir.Function:
        """One function that several splitting submodules share."""
        gm, name = inlined.graph_module, self.state.function_names[inlined.key]
        names = NameTable(self.names.names())
        scope: Scope = {}
        parameters = self._parameters(gm, names, scope)
        lifted = {(hole.node, hole.ordinal): names.claim(wish) for hole, wish in inlined.lifted}
        parameters += [ir.Parameter(each) for each in lifted.values()]
        body = FunctionLowering(self.state, gm, names, scope, inlined.path, lifted).body()
        takes = any(stmt.piece or stmt.kind == "nested" for stmt in body)
        self.state.takes_submods[name] = takes
        count = len(inlined.graph_of)
        note = f"shared by {count} submodules" if count > 1 else ""
        return self._function(name, parameters, body, frozenset(), takes, note)

    def _function(
        self,
        name: str,
        parameters: list[ir.Parameter],
        body: list[ir.Statement],
        borrowed: frozenset[str],
        takes_submods: bool,
        note: str,
    ) -> ir.Function:
        stmts = tuple(body)
        if self.options.emit_del:
            stmts = ir.insert_deletes(stmts, borrowed | {each.name for each in parameters})
        return ir.Function(name, tuple(parameters), stmts, takes_submods, note)

    def _parameters(
        self, gm: torch.fx.GraphModule, names: NameTable, scope: Scope
    ) -> list[ir.Parameter]:
        """The placeholders of ``gm`` that are not in ``scope`` yet."""
        parameters: list[ir.Parameter] = []
        for node in gm.graph.find_nodes(op="placeholder"):
            if node in scope:
                continue
            target = str(node.target)
            prefix = target[: len(target) - len(target.lstrip("*"))]
            name = names.claim(node.name)
            default = None
            if node.args and not prefix and gm is self.gm:
                where = partial(node_where, node)
                default = to_text(node.args[0], _no_node, self.state.consts, where)
            scope[node] = name
            parameters.append(ir.Parameter(name, prefix, default))
        return parameters


def _no_node(node: torch.fx.Node) -> str:
    raise UnsupportedNode("the default of a placeholder is a node", where=node_where(node))
