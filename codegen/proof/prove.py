"""Proves that emitted text does what its graph does: both run on tokens, and each call of the text has to be the next one of the graph.

What emitted text may consist of is what is read here; any other syntax is refused with its line. That leaves a straight line, so one run
says what every run does. No operator is called and no submodule; what is imported is the modules that the text names.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch.fx

from piecework.codegen.graph.origin import node_where
from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.literals import read_literal
from piecework.codegen.plan.names import CONSTS, SUBMODS
from piecework.codegen.proof import graph_run
from piecework.codegen.proof.graph_run import Event, GraphRun, Linkage, Sameness, Token
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


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved equal: the number of events (calls), and of the statements that ran."""

    events: int
    statements: int


def prove(
    code: str, split_gm: torch.fx.GraphModule, linked: Linkage, *, tree: ast.Module | None = None
) -> Proof:
    """Prove that ``code`` computes what ``split_gm`` computes, in the same order.

    Args:
        code: an emitted module, edited or not.
        split_gm: the stitching graph.
        linked: what the text's names stand for.
        tree: ``code``, parsed.

    Raises:
        EmitError: the first difference, with the line of the text and the node of the graph.
    """
    graph = graph_run.run_graph(split_gm, linked)
    run = TextRun(code, parse_text(code) if tree is None else tree, ENTRY_NAME, graph, linked)
    run.define(graph.held)
    run.check_signature(node for node, _ in graph.parameters)
    return run.prove([token for _, token in graph.parameters])


def parse_text(code: str, what: str = "stitching source") -> ast.Module:
    """``code`` as a syntax tree."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError) as error:
        raise EmitError(f"{what} is not Python: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise EmitError(f"{what} is not Python: it is nested too deeply for its parser") from error


@dataclass(frozen=True, slots=True)
class _Submod:
    target: str


class TextRun:
    """Runs a text beside what its graph did.

    Attributes:
        functions: name → definition, as it is written.
        module: name → value, at module level; ``literals`` are those that are numbers and the like.
    """

    def __init__(
        self, code: str, tree: ast.Module, entry: str, graph: GraphRun, linked: Linkage
    ) -> None:
        self.code, self.tree, self.entry = code, tree, entry
        self.graph, self.direct = graph, linked.direct
        self.next = 0  # of the graph's events
        self.statements = 0
        self.same = Sameness().same
        self.functions = {
            each.name: each for each in tree.body if isinstance(each, ast.FunctionDef)
        }
        if entry not in self.functions:
            raise EmitError(f"the text defines no function {entry}")
        self.module: dict[str, object] = {}
        self.literals: dict[str, object] = {}
        self._imports: dict[str, object] = {}
        self._defaults: tuple[object, ...] = ()  # of the entry
        self._locals: dict[str, object] = {}
        self._bound: frozenset[str] = frozenset()  # what the function binds or deletes anywhere
        self._bound_by = {name: _bound_in(each) for name, each in self.functions.items()}
        self._submods = [_Submod(f"submod {name}") for name in linked.submod_names]
        self._consts = linked.consts
        self._line = 0
        self._region = ""  # what the statement that runs may do with one

    def define(self, held: Mapping[str, object]) -> None:
        """Run the module level, with ``held`` in it."""
        self.module.update(held)
        for stmt in self.tree.body:
            self._guarded(partial(self._module_level, stmt))

    def prove(self, tokens: Sequence[object]) -> Proof:
        """Check that the entry does with ``tokens`` what the graph does, and all of it."""
        function = self.functions[self.entry]
        given = {SUBMODS: self._submods} if function.args.kwonlyargs else {}
        returned = self._guarded(partial(self._run_function, function, tokens, given))
        if self.next < len(self.graph.events):
            node = self.graph.events[self.next].node
            raise EmitError("the text ends before this node", where=node_where(node))
        if not self.same(self.graph.returned, returned):
            self.refuse(function.body[-1], "the text returns something else than the graph")
        return Proof(len(self.graph.events), self.statements)

    def check_signature(self, placeholders: Iterable[torch.fx.Node]) -> None:
        """Check that the entry's parameters are the placeholders, in kind and default."""
        given = self.functions[self.entry].args
        stars = [kind for kind, each in (("*", given.vararg), ("**", given.kwarg)) if each]
        kinds, nodes = ["" for _ in given.args] + stars, list(placeholders)
        if len(kinds) != len(nodes):
            raise EmitError(f"the text takes {len(kinds)} inputs and the graph {len(nodes)}")
        first = len(given.args) - len(self._defaults)
        for number, (node, kind) in enumerate(zip(nodes, kinds, strict=True)):
            target = str(node.target)
            wanted = target[: len(target) - len(target.lstrip("*"))]
            expected = () if wanted else tuple(node.args[:1])
            found = self._defaults[number - first : number - first + 1] if number >= first else ()
            if kind != wanted or not Sameness().same(expected, found):
                where = node_where(node)
                raise EmitError(f"parameter {kind}{target} differs in kind or default", where=where)

    def refuse(self, at: ast.AST | int, why: str) -> NoReturn:
        line = at if isinstance(at, int) else getattr(at, "lineno", 0)
        raise EmitError(why, where=self._line_at(line) if line else None)

    def _line_at(self, line: int) -> str:
        lines = self.code.splitlines()
        return f"line {line}: {lines[line - 1].strip() if 0 < line <= len(lines) else ''}"

    def _no_part(self, at: ast.AST, of: str) -> NoReturn:
        self.refuse(at, f"{type(at).__name__} is not part of emitted {of}")

    def _guarded(self, runs: Callable[[], object]) -> object:
        try:
            return runs()
        except EmitError:
            raise
        except RecursionError as error:
            why = "functions of the text call each other, or are nested, too deeply"
            raise EmitError(why) from error
        except Exception as error:  # noqa: BLE001 - whatever a text does wrong
            self.refuse(self._line, f"the text fails where it runs: {error}")

    # --- statements --------------------------------------------------------------------------------

    def _module_level(self, stmt: ast.stmt) -> None:
        self._line = stmt.lineno
        match stmt:
            case ast.Import(names):
                for each in names:
                    if each.asname:
                        self.refuse(stmt, "import ... as is not part of emitted modules")
                    importlib.import_module(each.name)
                    root = each.name.partition(".")[0]
                    self._imports[root] = sys.modules[root]
            case ast.Assign([ast.Name(name)], value):
                literal = read_literal(value)
                if literal is not None:
                    self.literals[name] = literal.value
                elif not self._is_path(value) and not _is_entry(value, CONSTS):
                    self._no_part(value, "modules")
                self._bind(self.module, stmt, name, self._value(value))
            case ast.FunctionDef():
                self._check_plain(stmt)
                self._bind(self.module, stmt, stmt.name, stmt)
                if stmt.name == self.entry:
                    self._defaults = tuple(map(self._value, stmt.args.defaults))
            case _:
                self._no_part(stmt, "modules")

    def _bind(self, scope: dict[str, object], at: ast.AST, name: str, value: object) -> None:
        if name.startswith("__") or name in self._imports:
            why = "is a name of Python's, an import or the emitted module, which no text may bind"
            self.refuse(at, f"{name!a} {why}")
        if scope is self.module and name in scope:
            self.refuse(at, f"{name!a} is bound twice at module level")
        scope[name] = value

    def _check_plain(self, function: ast.FunctionDef) -> None:
        given = function.args
        names = [each for each in ast.walk(given) if isinstance(each, ast.arg)]
        noted = [each.annotation for each in names] + [function.returns, *function.decorator_list]
        if any(noted) or getattr(function, "type_params", None):
            self.refuse(function, "decorators and annotations are not part of emitted modules")
        more = [*given.posonlyargs, *filter(None, given.kw_defaults)]
        if function.name != self.entry:
            more += [*given.defaults, *filter(None, (given.vararg, given.kwarg))]
        if more or [each.arg for each in given.kwonlyargs] not in ([], [SUBMODS]):
            self.refuse(function, f"the only parameter that is not plain is {SUBMODS}")

    def _run_function(
        self, function: ast.FunctionDef, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> object:
        given = function.args
        # The entry is run with one token for what a star collects.
        names = [*given.args, *filter(None, (given.vararg, given.kwarg))]
        wanted = {SUBMODS: self._submods} if given.kwonlyargs else {}
        if len(args) != len(names) or kwargs != wanted:
            self.refuse(self._line, f"{function.name} is called with other arguments than it takes")
        before = self._locals, self._bound, self._region
        self._locals, self._bound = dict(kwargs), self._bound_by[function.name]
        for name, value in zip(names, args, strict=True):
            self._bind(self._locals, function, name.arg, value)
        *body, last = function.body
        if not isinstance(last, ast.Return):
            body.append(last)
        self._block(body, last)
        returned = None
        if isinstance(last, ast.Return):
            self._line, self._region = last.lineno, ""
            self.statements += 1
            returned = None if last.value is None else self._value(last.value)
        self._locals, self._bound, self._region = before
        return returned

    def _block(self, body: Sequence[ast.stmt], after: ast.stmt, region: str = "") -> None:
        for stmt, following in zip(body, [*body, after][1:], strict=True):
            self._line = stmt.lineno
            self._region = "opens" if isinstance(following, ast.Try) else region
            self.statements += not isinstance(stmt, (ast.Delete, ast.Try, ast.Pass))
            match stmt:
                case ast.Assign([target], value):
                    self._assign(stmt, target, self._value(value))
                case ast.Expr(value):
                    self._value(value)
                case ast.Delete(targets):
                    for name in self._names(stmt, targets, "only names are deleted"):
                        if self._locals.pop(name, self) is self:
                            self.refuse(stmt, f"{name!a} is not defined")
                case ast.Try(inner, [], [], [ast.Expr(ast.Call())] as closing):
                    self._block(inner, inner[-1])
                    self._block(closing, closing[-1], "closes")
                case ast.Try():
                    why = "a try does something else than to close a region by one call"
                    self.refuse(stmt, why)
                case ast.Pass():
                    pass
                case ast.Return():
                    self.refuse(stmt, "a function must end with its only return")
                case _:
                    self._no_part(stmt, "functions")

    def _assign(self, stmt: ast.stmt, target: ast.expr, value: object) -> None:
        names = self._names(stmt, [target], "only names are assigned to")
        values: Any = [value]
        if not isinstance(target, ast.Name):
            values, count = value, len(names)
            if isinstance(value, Token) and value.size == count:
                values = [value.element(index) for index in range(count)]
            elif type(value) not in (tuple, list) or len(values) != count:
                why = f"unpacks a result that is not known to have {count} elements"
                self.refuse(stmt, why)
        for name, each in zip(names, values, strict=True):
            self._bind(self._locals, stmt, name, each)

    def _names(self, stmt: ast.stmt, targets: Sequence[ast.expr], why: str) -> list[str]:
        if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
            targets = targets[0].elts
        names = [each.id for each in targets if isinstance(each, ast.Name)]
        if len(names) != len(targets) or len({*names}) != len(names):
            self.refuse(stmt, why)
        return names

    # --- expressions -------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._named(node, name)
            case ast.UnaryOp() | ast.BinOp() if (literal := read_literal(node)) is not None:
                return literal.value
            case ast.Call():
                return self._call(node)
            case ast.Subscript(ast.Name(name), ast.Constant(index)) if _is_entry(node, name):
                table: Any = self._consts if name == CONSTS else self._named(node, name)
                if not 0 <= index < len(table):  # type: ignore[operator]
                    self.refuse(node, f"{name} has no entry {index!a}")
                return table[index]
            case ast.Subscript(value, index):
                return self.called(
                    node.lineno, operator.getitem, self._value(value), self._index(index)
                )
            case ast.Tuple(items):
                return tuple(map(self._value, items))
            case ast.List(items):
                return [*map(self._value, items)]
            case ast.Dict(keys, values) if None not in keys:
                pairs = zip(keys, values, strict=True)
                return {self._value(key): self._value(each) for key, each in pairs}  # type: ignore[arg-type]
            case ast.Attribute(value, name):
                if self._is_path(node):
                    return getattr(self._value(value), name)
                return self.event(node.lineno, getattr, self._value(value), name)
            case ast.UnaryOp(sign, operand):
                return self._sign(node, sign, operand)
            case ast.BinOp(left, sign, right) | ast.Compare(left, [sign], [right]):
                return self._sign(node, sign, left, right)
        self._no_part(node, "expressions")

    def _named(self, node: ast.expr, name: str) -> object:
        outside = () if name in self._bound else (self.module, self._imports)
        for scope in (self._locals, *outside):
            if name in scope:
                return scope[name]
        if name.startswith("__") or name in self._bound or not hasattr(builtins, name):
            self.refuse(node, f"{name!a} is not defined")
        return getattr(builtins, name)

    def _is_path(self, node: ast.expr) -> bool:
        """Whether ``node`` is read off an import or a builtin."""
        while isinstance(node, ast.Attribute):
            node = node.value
        if not isinstance(node, ast.Name):
            return False
        if node.id in self._locals or node.id in self._bound or node.id in self.module:
            return False
        builtin = hasattr(builtins, node.id) and not node.id.startswith("__")
        return builtin or node.id in self._imports

    def _sign(self, node: ast.expr, sign: ast.AST, *operands: ast.expr) -> object:
        function = _SIGNS.get(type(sign).__name__)
        return self.event(node.lineno, function, *map(self._value, operands))

    def _index(self, node: ast.expr) -> object:
        match node:
            case ast.Tuple(items):
                return tuple(map(self._index, items))
            case ast.Slice(lower, upper, step):
                return slice(*(each and self._value(each) for each in (lower, upper, step)))
        return self._value(node)

    def _call(self, node: ast.Call) -> object:
        head: list[Any]
        match node.func:
            case ast.Attribute(value, name) if not self._is_path(node.func):
                call, head = self.called_method, [self._value(value), name]
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name))], []):
                call, head = self.called_method, [self._value(value), name]
            case function:
                call, head = self.called, [self._value(function)]
        given = [self._value(each) for each in node.args]
        keywords: dict[str, object] = {}
        for each in node.keywords:
            if each.arg is None and not isinstance(each.value, ast.Dict):
                self.refuse(node, "** of something other than a dict in place")
            value = self._value(each.value)
            more = value if each.arg is None else {each.arg: value}
            if more.keys() & keywords.keys():
                self.refuse(node, "a keyword is passed twice")
            keywords.update(more)
        return call(node.lineno, *head, *given, **keywords)

    # --- what the text calls -----------------------------------------------------------------------

    def called(self, line: int, target: object, /, *args: object, **kwargs: object) -> object:
        """A call of a function."""
        if isinstance(target, ast.FunctionDef):
            return self._run_function(target, args, kwargs)
        if isinstance(target, _Submod):
            target = target.target
        elif target is operator.getitem and len(args) == 2 and not kwargs:
            found = graph_run.picked(*args)
            if found:
                return found[0]
        elif graph_run.builds(target, kwargs):
            return target(*args)  # type: ignore[operator]
        return self.event(line, target, *args, **kwargs)

    def called_method(
        self, line: int, value: object, name: str, /, *args: object, **kwargs: object
    ) -> object:
        return self.event(line, f".{name}", value, *args, **kwargs)

    def event(self, line: int, target: object, /, *args: object, **kwargs: object) -> Token:
        """The result of the graph's next call, which has to be this one."""
        if self.next >= len(self.graph.events):
            self.refuse(line, "the text does something that the graph does not")
        event = self.graph.events[self.next]
        self.next += 1
        if event.target is not target and not self._is_target(event.target, target):
            self._differ(line, event, "a call of something else")
        if len(event.args) != len(args) or len(event.kwargs) != len(kwargs):
            self._differ(line, event, "another number of arguments")
        for place, (ours, theirs) in enumerate(zip(event.args, args, strict=True)):
            if ours is not theirs and not self.same(ours, theirs):
                self._differ(line, event, f"another argument {place}")
        for (name, ours), (key, theirs) in zip(event.kwargs.items(), kwargs.items(), strict=True):
            if name != key or not self.same(ours, theirs):
                self._differ(line, event, f"another argument {name!a}")
        if event.region and event.region != self._region:
            what = f"this {event.region} a region, which a finally has to close"
            self._differ(line, event, what)
        return event.result

    def _is_target(self, ours: object, theirs: object) -> bool:
        if isinstance(ours, str) or isinstance(theirs, str):
            return type(ours) is type(theirs) and ours == theirs
        try:
            return ours in self.direct and self.direct[ours] is theirs
        except TypeError:  # not hashable, so it has no other implementation
            return False

    def _differ(self, line: int, event: Event, what: str) -> NoReturn:
        raise EmitError(
            f"the text differs from the graph: {what}",
            where=f"{self._line_at(line)}; {node_where(event.node)}",
            hint="an edited file must still do what the graph does; a generated one that differs is a defect",
        )


def _bound_in(function: ast.FunctionDef) -> frozenset[str]:
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name))
    return frozenset(node.id for node in names if not isinstance(node.ctx, ast.Load))


def _is_entry(node: ast.expr, table: str) -> bool:
    """Whether ``node`` is an entry of ``table``, which is ``__vllm_consts__`` or ``__vllm_submods__``."""
    match node:
        case ast.Subscript(ast.Name(name), ast.Constant(index)):
            return name == table and table in (CONSTS, SUBMODS) and type(index) is int
    return False
