"""Proves that emitted text does what its graph does: each of its calls has to be the graph's next.

Python runs the text on tokens, its calls, signs, attributes and items being reports to the proof.
A text is a straight line (all else is refused), so one run says what every run does.
"""

import ast
import builtins
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NoReturn

import torch.fx

from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan import ir
from piecework.codegen.plan.ir import Proof
from piecework.codegen.plan.literals import is_literal
from piecework.codegen.plan.names import CONSTS, SUBMODS
from piecework.codegen.proof.graph_run import (
    Event,
    GraphRun,
    Linkage,
    Named,
    Sameness,
    builds,
    picked,
    run_graph,
)
from piecework.errors import EmitError

_SIGNS: Mapping[str, Callable[..., object]] = {
    **{"Add": operator.add, "Sub": operator.sub, "Mult": operator.mul, "Div": operator.truediv},
    **{"FloorDiv": operator.floordiv, "Mod": operator.mod, "Pow": operator.pow},
    **{"MatMult": operator.matmul, "LShift": operator.lshift, "RShift": operator.rshift},
    **{"BitAnd": operator.and_, "BitOr": operator.or_, "BitXor": operator.xor},
    **{"Eq": operator.eq, "NotEq": operator.ne, "Lt": operator.lt, "LtE": operator.le},
    **{"Gt": operator.gt, "GtE": operator.ge, "USub": operator.neg, "UAdd": operator.pos},
    **{"Invert": operator.invert, "Not": operator.not_},
}
_SYNTAX = {
    *(ast.Module, ast.Import, ast.alias, ast.FunctionDef, ast.arguments, ast.arg),
    *(ast.Assign, ast.Expr, ast.Delete, ast.Return, ast.Try, ast.Pass),
    *(ast.Name, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Attribute, ast.Subscript),
    *(ast.Call, ast.keyword, ast.Slice, ast.UnaryOp, ast.BinOp, ast.Compare),
    *(sign for kind in (ast.unaryop, ast.operator, ast.cmpop) for sign in kind.__subclasses__()),
}
_STATEMENTS = (ast.Assign, ast.Expr, ast.Delete, ast.Return, ast.Pass)
_PROOF, _DEFAULTS, _FILE = "__proof__", "__entry_defaults__", "<proof>"

At = tuple[int, str]  # a line, and what the statement there may do with a region


def linkage_of(module: ir.Module, options: ir.LowerOptions, consts: Sequence[object]) -> Linkage:
    """What the names of a stitching plan's text stand for."""
    bound = {row.placeholder: row.name for row in module.bound}
    return Linkage(module.submod_names, consts, bound, options.direct)


def prove(
    code: str, split_gm: torch.fx.GraphModule, linked: Linkage, tree: ast.Module | None = None
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order."""
    graph = run_graph(split_gm, linked)
    try:
        text = Reporting(code, tree or parsed(code), graph.held)
        return TextRun(code, graph, linked).prove(text)
    except RecursionError as error:
        why = "functions of the text call each other, or are nested, too deeply"
        raise EmitError(why) from error


def refuse(code: str, line: int, why: str) -> NoReturn:
    raise EmitError(why, where=_line_of(code, line) if line else None)


def _line_of(code: str, line: int) -> str:
    lines = code.splitlines()
    return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"


def parsed(code: str) -> ast.Module:
    """The syntax tree of a text; `EmitError` if it is not Python."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EmitError(f"stitching source is not Python: {error}") from error


class Reporting(ast.NodeTransformer):
    """A text as a syntax tree, which was ``tree``; calls, signs, attributes and items report."""

    def __init__(
        self, code: str, tree: ast.Module, held: Mapping[str, object], entry: str = ENTRY_NAME
    ) -> None:
        self.code, self.entry = code, entry
        self.statements = 0
        self.stars: list[str] | None = None  # the kinds of the entry's parameters
        self.takes_submods = False
        self._region = ""  # what the statement that is read may do with one
        bound, imports = {*held, *_targets(tree.body)}, set[str]()
        for stmt in tree.body:
            if isinstance(stmt, ast.Import):
                imports |= {each.name.partition(".")[0] for each in stmt.names}
                if any(each.asname for each in stmt.names):
                    self.refuse(stmt, "import ... as is not part of emitted modules")
        # Of the others only names are read: no text may read ``__import__``.
        self._paths = {e for e in {*imports, *dir(builtins)} - bound if not e.startswith("__")}
        self.tree = self.visit(tree)
        if self.stars is None:
            raise EmitError(f"the text defines no function {entry}")

    def refuse(self, at: ast.AST, why: str) -> NoReturn:
        refuse(self.code, getattr(at, "lineno", 0), why)

    def _no_part(self, node: ast.AST) -> NoReturn:
        self.refuse(node, f"{type(node).__name__} is not part of emitted text there")

    def _require_open(self, at: ast.AST, name: str, *but: str) -> None:
        if name.startswith("__") and name not in but:
            self.refuse(at, f"{name!a} is a name that no text may bind or read")

    def visit(self, node: Any) -> Any:
        match node:
            case ast.Constant() | ast.expr_context():
                return node
            case ast.Name(name):
                read = (CONSTS, SUBMODS) if isinstance(node.ctx, ast.Load) else ()
                self._require_open(node, name, *read)
                return node
            case ast.expr() if is_literal(node):
                return node
            case ast.Module():
                self._check_module(node)
            case ast.FunctionDef():
                return self._function(node)
            case ast.Call():
                return self._call(node)
            case ast.Attribute() | ast.Subscript() if not isinstance(node.ctx, ast.Load):
                self.refuse(node, "only names are assigned to and deleted")
            case ast.Attribute(value, name) if not self._is_path(node):
                return self._report(node, "attribute", self.visit(value), _constant(name))
            case ast.Subscript(value, index) if not _is_entry(node, CONSTS, SUBMODS):
                return self._report(node, "item", self.visit(value), self.visit(index))
            case ast.Attribute() | ast.Subscript():
                return node
            case ast.Slice(lower, upper, step):
                given = [each or _constant(None) for each in (lower, upper, step)]
                return self._report(node, "part", *map(self.visit, given))
            case ast.UnaryOp(sign, operand):
                return self._sign(node, sign, operand)
            case ast.BinOp(left, sign, right) | ast.Compare(left, [sign], [right]):
                return self._sign(node, sign, left, right)
            case ast.Compare():
                self._no_part(node)
        if type(node) not in _SYNTAX:
            self._no_part(node)
        return self.generic_visit(node)

    # --- statements --------------------------------------------------------------------------------

    def _check_module(self, module: ast.Module) -> None:
        for stmt in module.body:
            match stmt:
                case ast.Import() | ast.FunctionDef():
                    pass
                case ast.Assign([ast.Name()], value) if (
                    is_literal(value) or self._is_path(value) or _is_entry(value, CONSTS)
                ):
                    pass
                case _:
                    self._no_part(stmt)

    def _function(self, function: ast.FunctionDef) -> list[ast.stmt]:
        given, is_entry = function.args, function.name == self.entry
        names = [each for each in ast.walk(given) if isinstance(each, ast.arg)]
        self._require_open(function, function.name)
        for each in names:
            self._require_open(each, each.arg, SUBMODS)
        noted = [each.annotation for each in names] + [function.returns, *function.decorator_list]
        if any(noted) or getattr(function, "type_params", None):
            self.refuse(function, "decorators and annotations are not part of emitted modules")
        stars = [("*", given.vararg), ("**", given.kwarg)]
        more = [*given.posonlyargs, *filter(None, given.kw_defaults)]
        more += [] if is_entry else [*given.defaults, *(each for _, each in stars if each)]
        if more or [each.arg for each in given.kwonlyargs] not in ([], [SUBMODS]):
            self.refuse(function, f"the only parameter that is not plain is {SUBMODS}")
        function.body = self._block(function.body) or [ast.Pass(**_FIRST)]
        if not is_entry:
            return [function]
        self.takes_submods = bool(given.kwonlyargs)
        self.stars = ["" for _ in given.args] + [kind for kind, each in stars if each]
        # It is run with one token for what a star collects; its defaults are read for themselves.
        found = [self.visit(each) for each in given.defaults]
        defaults = ast.Tuple(found, ast.Load(), **_FIRST)
        given.args += [each for _, each in stars if each]
        given.vararg, given.kwarg, given.defaults = None, None, []
        kept = ast.Name(_DEFAULTS, ast.Store(), **_FIRST)
        return [ast.Assign([kept], defaults, **_FIRST), function]

    def _block(self, body: Sequence[ast.stmt], region: str = "") -> list[ast.stmt]:
        """The statements of a block."""
        found: list[ast.stmt] = []
        for stmt, following in zip(body, [*body[1:], None], strict=True):
            match stmt:
                case ast.Try(inner, [], [], [ast.Expr(ast.Call())] as closing):
                    found += [*self._block(inner), *self._block(closing, "closes")]
                case ast.Try():
                    why = "a try does something else than to close a region by one call"
                    self.refuse(stmt, why)
                case ast.Return() if following is not None:
                    self.refuse(stmt, "a function must end with its only return")
                case _ if isinstance(stmt, _STATEMENTS):
                    self.statements += not isinstance(stmt, (ast.Delete, ast.Pass))
                    self._region = "opens" if isinstance(following, ast.Try) else region
                    found.append(self.visit(stmt))
                case _:
                    self._no_part(stmt)
        return found

    # --- expressions -------------------------------------------------------------------------------

    def _report(
        self, node: ast.expr, kind: str, *parts: ast.expr, keywords: Sequence[ast.keyword] = ()
    ) -> ast.expr:
        line = node.lineno
        given = [_constant((line, self._region)), *parts]
        call = ast.Call(_METHODS[kind], given, [*keywords], **_FIRST)
        call.lineno = call.end_lineno = line
        return call

    def _call(self, node: ast.Call) -> ast.expr:
        match node.func:
            case ast.Attribute(value, name) if not self._is_path(node.func):
                kind, head = "method", [self.visit(value), _constant(name)]
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name))], []):
                kind, head = "method", [self.visit(value), _constant(name)]
            case function:
                kind, head = "called", [self.visit(function)]
        for each in node.keywords:
            each.value = self.visit(each.value)
        given = map(self.visit, node.args)
        return self._report(node, kind, *head, *given, keywords=node.keywords)

    def _sign(self, node: ast.expr, sign: ast.AST, *operands: ast.expr) -> ast.expr:
        name = type(sign).__name__
        if name not in _SIGNS:
            self._no_part(node)
        return self._report(node, "sign", _constant(name), *map(self.visit, operands))

    def _is_path(self, node: ast.expr) -> bool:
        """Whether ``node`` is read off an import or a builtin."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self._paths


# Where a made node lies that can't fail; only a report has a line.
_FIRST: dict[str, Any] = {"lineno": 1, "col_offset": 0, "end_lineno": 1, "end_col_offset": 0}
_METHODS = {
    kind: ast.Attribute(ast.Name(_PROOF, ast.Load(), **_FIRST), kind, ast.Load(), **_FIRST)
    for kind in ("called", "method", "attribute", "item", "part", "sign")
}


def _constant(value: object) -> ast.Constant:
    return ast.Constant(value, **_FIRST)  # type: ignore[arg-type]


def _targets(body: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements and those in them bind or delete, and parameters."""
    for stmt in body:
        if isinstance(stmt, ast.FunctionDef):
            parameters = (each for each in ast.walk(stmt.args) if isinstance(each, ast.arg))
            yield from (stmt.name, *(each.arg for each in parameters))
        yield from _targets([*getattr(stmt, "body", ()), *getattr(stmt, "finalbody", ())])
        found = [*getattr(stmt, "targets", ())]
        for each in found:
            if isinstance(each, ast.Name):
                yield each.id
            found += getattr(each, "elts", ())


def _is_entry(node: ast.expr, *tables: str) -> bool:
    match node:
        case ast.Subscript(ast.Name(name), ast.Constant(index)):
            return name in tables and type(index) is int
    return False


class TextRun:
    """Runs a text beside what its graph did: what the text reports has to be the next event."""

    def __init__(self, code: str, graph: GraphRun, linked: Linkage) -> None:
        self.code, self.graph, self.direct = code, graph, linked.direct
        self.next = 0  # of the graph's events
        self.same = Sameness().same
        self.submods = [Named("submod", name) for name in linked.submod_names]
        self.scope: dict[str, Any] = {
            **{"__name__": "piecework_proof", _PROOF: self, CONSTS: list(linked.consts)},
            **graph.held,
        }

    def prove(self, text: Reporting) -> Proof:
        try:
            exec(compile(text.tree, _FILE, "exec", dont_inherit=True), self.scope)
            returned = self.run_entry(text)
        except (EmitError, RecursionError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever a text does wrong
            frames = traceback.walk_tb(error.__traceback__)
            lines = [line for frame, line in frames if frame.f_code.co_filename == _FILE]
            refuse(self.code, [0, *lines][-1], f"the text fails where it runs: {error}")
        if self.next < len(self.graph.events):
            node = self.graph.events[self.next].node
            raise EmitError("the text ends before this node", where=node_where(node))
        if not self.same(self.graph.returned, returned):
            raise EmitError("the text returns something else than the graph")
        return Proof(len(self.graph.events), text.statements)

    def run_entry(self, text: Reporting) -> object:
        """What the entry returns of the graph's inputs."""
        self._check_signature(text.stars or [])
        tokens = [token for _, token in self.graph.parameters]
        submods = {SUBMODS: self.submods} if text.takes_submods else {}
        return self.scope[ENTRY_NAME](*tokens, **submods)

    def _check_signature(self, kinds: Sequence[str]) -> None:
        """Check that the entry's parameters are the placeholders, in kind and default."""
        nodes = [node for node, _ in self.graph.parameters]
        if len(kinds) != len(nodes):
            raise EmitError(f"the text takes {len(kinds)} inputs and the graph {len(nodes)}")
        defaults = self.scope[_DEFAULTS]
        first = len([kind for kind in kinds if not kind]) - len(defaults)
        for number, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
            target = str(node.target)
            wanted = target[: len(target) - len(target.lstrip("*"))]
            expected = () if wanted else tuple(node.args[:1])
            found = defaults[number - first : number - first + 1] if number >= first else ()
            if kind != wanted or not Sameness().same(expected, found):
                where = node_where(node)
                raise EmitError(f"parameter {kind}{target} differs in kind or default", where=where)

    # --- what the text reports ---------------------------------------------------------------------

    def called(self, at: At, target: object, /, *args: object, **kwargs: object) -> object:
        if isinstance(target, FunctionType) and target.__globals__ is self.scope:
            return target(*args, **kwargs)
        if target is operator.getitem and len(args) == 2 and not kwargs:
            # The graph may have known the size of a nested graph's result only after its run.
            found = () if self._comes_next(*args) else picked(*args)
            if found:
                return found[0]
        elif builds(target, kwargs):
            return target(*args)  # type: ignore[operator]
        return self.event(at, target, *args, **kwargs)

    def _comes_next(self, value: object, index: object) -> bool:
        """Whether the graph's next call picks this item."""
        for event in self.graph.events[self.next : self.next + 1]:
            if event.target is operator.getitem and len(event.args) == 2:
                return event.args[0] is value and self.same(event.args[1], index)
        return False

    def method(
        self, at: At, value: object, name: str, /, *args: object, **kwargs: object
    ) -> object:
        return self.event(at, Named("method", name), value, *args, **kwargs)

    def attribute(self, at: At, value: object, name: str) -> object:
        return self.event(at, getattr, value, name)

    def item(self, at: At, value: object, index: object) -> object:
        return self.called(at, operator.getitem, value, index)

    def part(self, at: At, *parts: object) -> slice:
        return slice(*parts)

    def sign(self, at: At, name: str, *operands: object) -> object:
        return self.event(at, _SIGNS[name], *operands)

    def event(self, at: At, target: object, /, *args: object, **kwargs: object) -> object:
        """The result of the graph's next call, which has to be this one."""
        if self.next >= len(self.graph.events):
            refuse(self.code, at[0], "the text does something that the graph does not")
        event = self.graph.events[self.next]
        self.next += 1
        if event.target is not target and not self._is_target(event.target, target):
            self._differ(at, event, "a call of something else")
        if len(event.args) != len(args) or len(event.kwargs) != len(kwargs):
            self._differ(at, event, "another number of arguments")
        for place, (ours, theirs) in enumerate(zip(event.args, args, strict=True)):
            if not self.same(ours, theirs):
                self._differ(at, event, f"another argument {place}")
        for (name, ours), (key, theirs) in zip(event.kwargs.items(), kwargs.items(), strict=True):
            if name != key or not self.same(ours, theirs):
                self._differ(at, event, f"another argument {name!a}")
        if event.region and event.region != at[1]:
            what = f"this {event.region} a region, which a finally has to close"
            self._differ(at, event, what)
        return event.result

    def _is_target(self, ours: object, theirs: object) -> bool:
        if isinstance(ours, Named):
            return ours == theirs
        try:
            return ours in self.direct and self.direct[ours] is theirs
        except TypeError:  # not hashable, so it has no other implementation
            return False

    def _differ(self, at: At, event: Event, what: str) -> NoReturn:
        raise EmitError(
            f"the text differs from the graph: {what}",
            where=f"{_line_of(self.code, at[0])}; {node_where(event.node)}",
            hint="an edited file must still do what the graph does; a generated one that differs is a defect",
        )
