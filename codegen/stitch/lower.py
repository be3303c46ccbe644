"""From graph to plan: every FX node becomes at most one statement; nothing is executed."""

import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from piecework.codegen.graph import origin
from piecework.codegen.graph.consts import LIST_TYPES, ConstTable, describe, short_type, to_text
from piecework.codegen.graph.origin import node_where, value_of
from piecework.codegen.graph.structure import attribute_of, is_liftable
from piecework.codegen.graph.targets import (
    ENTRY_NAME,
    INFIX,
    PREFIX,
    FunctionPath,
    function_path,
    sign_of,
)
from piecework.codegen.plan import ir
from piecework.codegen.plan.ir import LowerOptions
from piecework.codegen.plan.literals import (
    arguments_text,
    attribute_text,
    is_inline_literal,
    literal_text,
    operand,
    targets_text,
)
from piecework.codegen.plan.names import SUBMODS, NameTable, is_identifier
from piecework.codegen.split.regions import regions_in
from piecework.codegen.stitch.inline import (
    Inlined,
    bind_call,
    is_plain,
    plan_inlining,
    returned_value,
)
from piecework.errors import UnsupportedNode

_SEQUENCES = (*LIST_TYPES, tuple)
_OPS = (OpOverload, OpOverloadPacket, HigherOrderOperator)

# What a graph's nodes stand for while it is lowered: a local, a constant, or the caller's expression.
Scope = dict[torch.fx.Node, str]


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
        self.consts = ConstTable()
        self.symbols = origin.SymbolNames()
        self.imports: set[str] = set()
        self.alias_of: dict[int, str] = {}
        self.submod_index: dict[str, int] = {}
        self.function_names: dict[str, str] = {}
        self.takes_submods: dict[str, bool] = {}
        self._paths: dict[int, FunctionPath | None] = {}
        graphs = (split_gm, *(each.graph_module for each in self.plan.groups.values()))
        nodes = (node for gm in graphs for node in gm.graph.nodes)
        self._calls = [node for node in nodes if node.op == "call_function"]
        self.names = NameTable(frozenset({*self._possible_roots(), ENTRY_NAME}))

    def run(self) -> tuple[ir.Module, list[object]]:
        for each in self.plan.shared:
            self.function_names[each.key] = self.names.claim(each.path.replace(".", "_"))
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
        self.symbols.know(sizes, {*scope.values(), *(node.name for node in self.gm.graph.nodes)})
        functions = list(map(self._shared, self.plan.shared))
        legend = self._legend({node: name for node, name in scope.items() if name not in held})
        body = _FunctionLowering(self, self.gm, names, scope).body()
        entry = self._function(ENTRY_NAME, parameters, body, held, True, legend)
        module = ir.Module(
            imports=("torch", *sorted(self.imports - {"torch"})),
            aliases=aliases,
            functions=tuple(functions),
            entry=entry,
            submod_names=tuple(self.submod_index),
            const_specs=self.consts.specs,
            bound=tuple(bound),
            banner=self.options.banner,
            digests=tuple(self.options.digests.get(name, "") for name in self.submod_index),
        )
        return module, self.consts.values

    def path_of(self, target: object) -> FunctionPath | None:
        """The dotted path to a function, if there is one."""
        # The graphs keep their targets alive, so an id stays its own.
        if id(target) not in self._paths:
            self._paths[id(target)] = function_path(target)
        return self._paths[id(target)]

    def function(self, node: torch.fx.Node) -> str:
        """How the function that ``node`` calls is written; notes the import that it needs."""
        alias = self.alias_of.get(id(node.target))
        if alias is not None:
            return alias
        path = self.path_of(node.target)
        if path is None:
            return self.consts.add(node.target)
        if path.module is not None:
            self.imports.add(path.module)
        return str(path.path)

    # --- before any function -------------------------------------------------------------------

    def _possible_roots(self) -> set[str]:
        """First parts of every import that this lowering may need, whether it then does or not."""
        paths = (self.path_of(node.target) for node in self._calls)
        return {"torch", "operator", *(path.root for path in paths if path is not None)}

    def _aliases(self) -> tuple[ir.Alias, ...]:
        """A module-level name per operator of a splitting submodule, or past the dispatcher."""
        direct = [each.direct_call for each in self.plan.groups.values()]
        past = [node for node in self._calls if self._implementation(node.target) is not None]
        aliases: list[ir.Alias] = []
        for node in filter(None, (*direct, *past)):
            if id(node.target) in self.alias_of:
                continue
            implementation = self._implementation(node.target)
            short = getattr(node.target, "__name__", None)
            name = self.names.claim(short.partition(".")[0] if isinstance(short, str) else "op")
            if implementation is not None:
                value = self.consts.add(implementation)
                note = f"{node.target}: its own implementation, past the dispatcher"
            else:
                value, note = self.function(node), ""
            aliases.append(ir.Alias(name, value, note))
            self.alias_of[id(node.target)] = name
        return tuple(aliases)

    def _implementation(self, target: object) -> Callable[..., object] | None:
        return self.options.direct.get(target) if isinstance(target, Hashable) else None

    def _bound(self, node: torch.fx.Node, scope: Scope) -> ir.BoundName:
        """A weight that the module holds."""
        name = scope[node] = self.names.claim(node.name)
        value = value_of(node)
        kind = short_type(value, self.symbols) if isinstance(value, torch.Tensor) else ""
        return ir.BoundName(name, self.options.bound[node.name], kind, node.name)

    # --- functions -----------------------------------------------------------------------------

    def _legend(self, names_of: Mapping[torch.fx.Node, str]) -> str:
        """Where each size in the comments can be read: ``sizes: s0 = tokens.shape[0]``."""
        legend: dict[str, str] = {}
        values = [(name, value_of(node)) for node, name in names_of.items()]
        for name, value in values:
            for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                symbol = self.symbols(size)
                if symbol.isidentifier():
                    legend.setdefault(symbol, f"{symbol} = {name}.shape[{dim}]")
        for name, value in values:
            if isinstance(value, torch.SymInt):
                same = self.symbols(value)  # the trace found two sizes to be one
                if same in legend and same != name:
                    legend.setdefault(name, f"{name} = {same}")
        return f"sizes: {', '.join(legend.values())}" if legend else ""

    def _shared(self, inlined: Inlined) -> ir.Function:
        """One function that several splitting submodules share."""
        gm, name = inlined.graph_module, self.function_names[inlined.key]
        names = NameTable(self.names.names())
        scope: Scope = {}
        parameters = self._parameters(gm, names, scope)
        lifted: dict[tuple[int, int], str] = {}
        for number, wish in inlined.lifted.items():
            hole = inlined.holes_of[inlined.path][number]
            lifted[hole.node, hole.ordinal] = names.claim(wish)
        parameters += [ir.Parameter(each) for each in lifted.values()]
        body = _FunctionLowering(self, gm, names, scope, inlined.path, lifted).body()
        takes = any(stmt.piece or stmt.kind == "nested" for stmt in body)
        self.takes_submods[name] = takes
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
                default = to_text(node.args[0], _no_node, self.consts, where)
            scope[node] = name
            parameters.append(ir.Parameter(name, prefix, default))
        return parameters


def _no_node(node: torch.fx.Node) -> str:
    raise UnsupportedNode("the default of a placeholder is a node", where=node_where(node))


# --- one function ------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _FunctionLowering:
    """Lowers one graph."""

    module: _Lowering
    gm: torch.fx.GraphModule
    names: NameTable
    scope: Scope
    prefix: str = ""
    # literals that became parameters, by their node's number and their own
    lifted: Mapping[tuple[int, int], str] = field(default_factory=dict)
    number: int = 0
    ordinal: int = 0
    uses: list[str] = field(default_factory=list)
    # the names in what a node stands for
    behind: dict[torch.fx.Node, list[str]] = field(default_factory=dict)

    def body(self) -> list[ir.Statement]:
        body: list[ir.Statement] = []
        regions = regions_in(self.gm.graph)
        opening, closing = {each.enter for each in regions}, {each.leave for each in regions}
        for number, node in enumerate(self.gm.graph.nodes):
            if node.op == "placeholder" or node in self.scope:
                continue
            self.number, self.ordinal, self.uses = number, 0, []
            stmt = self._lower(node)
            if stmt is not None:
                body.append(replace(stmt, kind="finally") if node in closing else stmt)
            if node in opening:
                body.append(ir.Statement("try:", "try"))
            if node.op == "output":
                return body  # nodes after the output never run
        return [*body, ir.Statement("return None", "return")]

    def _lower(self, node: torch.fx.Node) -> ir.Statement | None:
        """The statement that ``node`` becomes; None if it becomes an operand of others."""
        match node.op:
            case "get_attr":
                self.scope[node] = self._attribute(node)
                return None
            case "call_function":
                return self._call_function(node)
            case "call_method":
                if not node.args or type(node.target) is not str:
                    raise UnsupportedNode("call_method without a receiver", where=node_where(node))
                method = attribute_text(self._text(node.args[0], node), node.target)
                return self._made(node, f"{method}({self._arguments(node, skip=1)})")
            case "call_module":
                return self._call_module(node)
            case "output":
                text = f"return {self._text(node.args[0], node)}"
                uses = tuple(dict.fromkeys(self.uses))
                return ir.Statement(text, "return", uses=uses, origin=self._origin(node))
        raise UnsupportedNode(f"node kind {node.op!a}", where=node_where(node))

    def _attribute(self, node: torch.fx.Node) -> str:
        target = str(node.target)
        value = self._read(node)
        again = self._read(node)
        if again is not value and not (is_inline_literal(value) and again == value):
            raise UnsupportedNode(
                f"get_attr reads {target!a}, which is another object at each reading (a property or a parametrization)",
                where=node_where(node),
                hint="call the module that computes it, or remove the parametrization",
            )
        return self.module.consts.add(value, attribute=self._path(node))

    def _read(self, node: torch.fx.Node) -> object:
        try:
            return attribute_of(self.gm, str(node.target))
        except AttributeError as error:
            what = "get_attr reads" if node.op == "get_attr" else "call_module of"
            raise UnsupportedNode(
                f"{what} {node.target!a}, which the graph's module does not have",
                where=node_where(node),
            ) from error

    def _path(self, node: torch.fx.Node) -> str:
        return f"{self.prefix}.{node.target}" if self.prefix else str(node.target)

    def _call_function(self, node: torch.fx.Node) -> ir.Statement:
        if not callable(node.target):
            raise UnsupportedNode(
                f"call_function of {describe(node.target)}, which is not callable",
                where=node_where(node),
            )
        text = self._with_sign(node)
        if text is None:
            return self._made(node, f"{self.module.function(node)}({self._arguments(node)})")
        return self._made(node, text, targets=(self._target(node),) if node.users else ())

    def _with_sign(self, node: torch.fx.Node) -> str | None:
        """``x[i]``, ``x.a``, ``x + y`` and ``-x`` for the functions that mean just that."""
        args, target = node.args, node.target
        if node.kwargs or not any(isinstance(arg, torch.fx.Node) for arg in args) or len(args) > 2:
            return None
        if len(args) == 2 and isinstance(args[0], torch.fx.Node):
            if target is operator.getitem:
                value = operand(self._text(args[0], node), receiver=True)
                return f"{value}[{self._text(args[1], node, index=True)}]"
            if target is getattr and type(args[1]) is str and is_identifier(args[1]):
                return attribute_text(self._text(args[0], node), args[1])
        sign = sign_of(INFIX if len(args) == 2 else PREFIX, target)
        if sign is None:
            return None
        texts = [operand(self._text(arg, node)) for arg in args]
        if len(texts) == 1:
            return f"{sign}{' ' if sign == 'not' else ''}{texts[0]}"
        return f"{texts[0]} {sign} {texts[1]}"

    def _call_module(self, node: torch.fx.Node) -> ir.Statement:
        path = self._path(node)
        inlined = self.module.plan.by_target.get(path)
        if inlined is None:
            callee = self._read(node)
            index = self.module.submod_index.setdefault(path, len(self.module.submod_index))
            arguments = self._arguments(node)
            piece = ir.PieceCall(index, arguments, self._leaves(node))
            return self._made(node, f"{SUBMODS}[{index}]({arguments})", callee, piece=piece)
        graph = inlined.graph_of[path]
        if inlined.direct_call is not None:
            return self._call_direct(node, graph, path, inlined.direct_call)
        # Positional only: parameters may have got other names than their placeholders.
        given = [self._text(value, node) for _, value in bind_call(node, graph)]
        holes = inlined.holes_of[path]
        given += [literal_text(holes[number].value) for number in inlined.lifted]
        name = self.module.function_names[inlined.key]
        passes = self.module.takes_submods[name]
        given += [f"{SUBMODS}={SUBMODS}"] * passes
        stmt = self._made(node, f"{name}({', '.join(given)})", graph)
        return replace(stmt, kind="nested") if passes else stmt

    def _call_direct(
        self, node: torch.fx.Node, callee: torch.fx.GraphModule, path: str, call: torch.fx.Node
    ) -> ir.Statement:
        """Write ``call``, which ``callee`` consists of, in place of a call of ``callee``."""
        inside = _FunctionLowering(self.module, callee, self.names, {}, path)
        before = self.uses
        for inner, value in bind_call(node, callee):
            self.uses = inside.behind[inner] = []
            inside.scope[inner] = self._text(value, node)
        self.uses = before
        for inner in callee.graph.find_nodes(op="get_attr"):
            inside.scope[inner] = inside._attribute(inner)
        text = f"{self.module.function(call)}({inside._arguments(call)})"
        self.uses += inside.uses
        if returned_value(callee.graph) is None:
            self.scope[node] = "None"
            return self._made(call, text, targets=())
        return self._made(node, text, callee, stands_for=call)

    def _made(
        self,
        node: torch.fx.Node,
        call: str,
        callee: object = None,
        *,
        targets: tuple[str, ...] | None = None,
        piece: ir.PieceCall | None = None,
        stands_for: torch.fx.Node | None = None,
    ) -> ir.Statement:
        """The statement that gives ``call`` to ``targets``, or to what users take of it."""
        unpack = False
        if targets is None:
            targets, unpack = self._targets(node, callee)
        text = targets_text(targets, unpack) + call
        uses = tuple(dict.fromkeys(self.uses))
        about = self._origin(node, callee) if stands_for is None else self._origin(stands_for)
        return ir.Statement(text, "", targets, unpack, uses, about, piece)

    def _origin(self, node: torch.fx.Node, callee: object = None) -> ir.Origin:
        if isinstance(callee, torch.fx.GraphModule):
            return origin.origin_of_piece(callee, self.module.symbols)
        return origin.origin_of(node, self.module.symbols)

    # --- operands and targets --------------------------------------------------------------------

    def _text(self, value: object, node: torch.fx.Node, *, index: bool = False) -> str:
        if type(value) is torch.fx.Node:  # most are
            return self._refer(value)
        literal = self._literal if self.lifted else literal_text
        where = partial(node_where, node)
        return to_text(value, self._refer, self.module.consts, where, literal, index=index)

    def _literal(self, value: object) -> str:
        """The literal itself, or the parameter that it was lifted to."""
        if not is_liftable(value):
            return literal_text(value)
        lifted = self.lifted.get((self.number, self.ordinal))
        self.ordinal += 1
        return literal_text(value) if lifted is None else lifted

    def _refer(self, node: torch.fx.Node) -> str:
        text = self.scope.get(node)
        if text is None:
            raise UnsupportedNode("a node is used before it is defined", where=node_where(node))
        if node in self.behind:
            self.uses += self.behind[node]
        elif is_identifier(text):
            self.uses.append(text)
        return text

    def _arguments(self, node: torch.fx.Node, skip: int = 0) -> str:
        args = [self._text(arg, node) for arg in node.args[skip:]]
        return arguments_text(args, [(k, self._text(v, node)) for k, v in node.kwargs.items()])

    def _leaves(self, node: torch.fx.Node) -> tuple[str, ...] | None:
        """The arguments of a piece's call in the order in which a capture flattens them."""
        if node.kwargs:
            return None
        ordinal = self.ordinal
        flat = all(type(each) is torch.fx.Node for each in node.args)
        leaves = node.args if flat else pytree.tree_leaves(node.args)
        found = tuple(self._text(each, node) for each in leaves)
        self.ordinal = ordinal  # they were counted already
        return found

    def _target(self, node: torch.fx.Node) -> str:
        name = self.scope[node] = str(self.names.claim(node.name))
        return name

    def _targets(self, node: torch.fx.Node, callee: object) -> tuple[tuple[str, ...], bool]:
        """Names for the results: one per element if every user picks one, else one or none."""
        if not node.users:
            return (), False
        arity = _arity(node, callee)
        if arity is None or not all(_picks_element(user, node, arity) for user in node.users):
            return (self._target(node),), False
        by_index: dict[Any, str] = {}
        for user in node.users:
            index = user.args[1]
            if index not in by_index:
                by_index[index] = self.names.claim(user.name)
            self.scope[user] = by_index[index]
        for index in range(arity):
            if index not in by_index:
                by_index[index] = self.names.claim("unused")
        return tuple(by_index[i] for i in range(arity)), True


def _picks_element(user: torch.fx.Node, producer: torch.fx.Node, arity: int) -> bool:
    if user.target is not operator.getitem or len(user.args) != 2 or user.kwargs:
        return False
    index = user.args[1]
    return user.args[0] is producer and type(index) is int and 0 <= index < arity


def _arity(node: torch.fx.Node, callee: object) -> int | None:
    """How many elements the tuple or list that ``node`` yields is known to have."""
    if isinstance(callee, torch.fx.GraphModule) and is_plain(callee):
        returned = returned_value(callee.graph)
        if not isinstance(returned, torch.fx.Node):
            return len(returned) if type(returned) in _SEQUENCES else None  # type: ignore[arg-type]
        node = returned
    value = origin.value_of(node)
    if type(value) is tuple or (type(value) is list and isinstance(node.target, _OPS)):
        return len(value)
    return None  # a list that somebody else holds may have changed by the time an element is picked
