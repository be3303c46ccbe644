"""What one expression of emitted text does, by Python's rules of evaluation. In: a syntax tree and what names mean. Out: its value, and events in order.

Nothing of the text is executed. `grammar` has refused what is not part of emitted expressions; what is wrong with the rest is an
`EmitError` that names the line.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from piecework.codegen.graph.targets import ABSENT, attribute_at_rest
from piecework.codegen.plan.literals import read_literal
from piecework.codegen.plan.names import BUILTINS, CONSTS, SUBMODS
from piecework.codegen.proof.grammar import line_at
from piecework.codegen.proof.trace import Container, Escapes, Event, Known, Linkage, Value, picked
from piecework.errors import EmitError

_BINARY: dict[type[ast.operator], object] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod},
    **{ast.Pow: operator.pow, ast.MatMult: operator.matmul, ast.LShift: operator.lshift},
    **{ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_},
    **{ast.BitXor: operator.xor},
}
_COMPARE: dict[type[ast.cmpop], object] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge},
}
_UNARY: dict[type[ast.unaryop], object] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}


class Submods:
    """``__vllm_submods__`` itself: it can be indexed for a call and handed on, nothing else."""


THE_SUBMODS = Submods()


@dataclass(slots=True)
class Frame:
    """Names of the function that is run; at module level there are none.

    Attributes:
        locals: every name that the function binds anywhere.
        values: those that are bound now.
        statement: number of the statement; deletes count with the one that they follow.
        last_use: for names bound by a statement, the statement that used them last.
        deleted: the statement after which a name was deleted.
    """

    locals: frozenset[str] = frozenset()
    values: dict[str, Value | Submods] = field(default_factory=dict)
    statement: int = 0
    last_use: dict[str, int] = field(default_factory=dict)
    deleted: dict[str, int] = field(default_factory=dict)


Arguments = tuple[tuple[Value, ...], tuple[tuple[str, Value], ...]]


class Expressions:
    """Evaluates the expressions of one module.

    Attributes:
        module: what names mean at module level; a function is its definition.
        frame: what they mean in the function that is run.
        events: what was done so far.
    """

    def __init__(
        self,
        code: str,
        module: dict[str, Value | ast.FunctionDef],
        linked: Linkage,
        enter: Callable[[ast.Call, ast.FunctionDef], Value],
    ) -> None:
        self.code = code
        self.module = module
        self.submod_names = linked.submod_names
        self.consts = [Known(value) for value in linked.consts]
        self.enter = enter
        self.frame = Frame()
        self.events: list[Event] = []
        self.escapes = Escapes()
        self.serial = 0
        # Dotted paths that were looked up; who changes `module` clears it.
        self.paths: dict[tuple[str, ...], Known] = {}

    def error(self, node: ast.AST, why: str) -> EmitError:
        """What to raise about ``node``: an error that shows its line."""
        line = getattr(node, "lineno", 0)
        return EmitError(why, where=line_at(self.code, line) if line else None)

    def value(self, node: ast.expr) -> Value:
        """Evaluate an operand: a nested call of ``slice`` or of a namedtuple builds one."""
        return _EVALUATE[type(node)](self, node)

    def statement_value(self, node: ast.expr) -> Value:
        """Evaluate what a statement consists of: a call is an event."""
        return _EVALUATE_STATEMENT[type(node)](self, node)

    # --- names -----------------------------------------------------------------------------------

    def _name(self, node: ast.Name) -> Value:
        name = node.id
        frame = self.frame
        value = frame.values.get(name)
        if name in frame.last_use and value is not None:  # most are of this kind
            frame.last_use[name] = frame.statement
            # A statement never binds __vllm_submods__ itself.
            return value  # type: ignore[return-value]
        if name in frame.locals:
            if value is None:
                raise self.error(node, f"{name!a} is used before it is defined or after its del")
            if value is THE_SUBMODS:
                raise self.error(node, f"{SUBMODS} is used other than to call its entries")
            assert not isinstance(value, Submods)
            return value
        found = self.module.get(name)
        if found is not None:
            if isinstance(found, ast.FunctionDef):
                raise self.error(node, f"function {name!a} is used other than to be called")
            return found
        if name not in BUILTINS:
            raise self.error(node, f"{name!a} is not defined")
        return Known(getattr(builtins, name), is_global=True)

    def _is_builtin(self, name: str) -> bool:
        """True if ``name`` means what it does in every Python module."""
        return name not in self.module and name not in self.frame.locals

    def _path(self, node: ast.Attribute) -> Known | None:
        """What a dotted path leads to that starts at an import or a builtin; None if it starts at anything else."""
        names = [node.attr]
        base = node.value
        while type(base) is ast.Attribute:
            names.append(base.attr)
            base = base.value
        if type(base) is not ast.Name or base.id in self.frame.locals:
            return None
        key = (base.id, *names)
        known = self.paths.get(key)
        if known is None:
            value = self._name(base)
            if type(value) is not Known or not value.is_global:
                return None
            for name in reversed(names):
                value = self._attribute_of(node, value.value, name)
            known = self.paths[key] = value
        return known

    def _attribute_of(self, node: ast.expr, owner: object, attribute: str) -> Known:
        found = attribute_at_rest(owner, attribute)
        if found is ABSENT:
            raise self.error(node, f"{attribute!a} is not found, or only code can tell what it is")
        return Known(found, is_global=True)

    def _attribute(self, node: ast.Attribute) -> Value:
        known = self._path(node)
        if known is not None:
            return known
        owner = self.value(node.value)
        if type(owner) is Known and owner.is_global:
            return self._attribute_of(node, owner.value, node.attr)
        return self._event(node, "call", getattr, (owner, Known(node.attr)))

    # --- literals, containers, operators ---------------------------------------------------------

    def _constant(self, node: ast.Constant) -> Value:
        return Known(node.value)

    def _tuple(self, node: ast.Tuple) -> Value:
        return self._container(tuple, [_EVALUATE[type(each)](self, each) for each in node.elts])

    def _list(self, node: ast.List) -> Value:
        return self._container(list, [_EVALUATE[type(each)](self, each) for each in node.elts])

    def _dict(self, node: ast.Dict) -> Value:
        items: list[Value] = []
        for key, value in zip(node.keys, node.values, strict=True):
            assert key is not None
            name = self.value(key)
            if not _is_constant(name):
                raise self.error(node, "a computed value is the key of a dict, which runs its hash")
            items += (name, self.value(value))
        return self._container(dict, items)

    def _slice(self, node: ast.Slice) -> Value:
        parts = (node.lower, node.upper, node.step)
        values = [_NONE if part is None else _EVALUATE[type(part)](self, part) for part in parts]
        return self._container(slice, values)

    def _container(self, kind: type, items: Sequence[Value]) -> Container:
        self.serial += 1
        return Container(kind, tuple(items), self.serial)

    def _subscript(self, node: ast.Subscript) -> Value:
        base, index = node.value, node.slice
        if type(base) is ast.Name and base.id == CONSTS and self._is_builtin(CONSTS):
            place = index.value if type(index) is ast.Constant else None
            if type(place) is not int or not 0 <= place < len(self.consts):
                raise self.error(node, f"there is no constant {ast.unparse(index)}")
            return self.consts[place]
        owner = _EVALUATE[type(base)](self, base)
        key = _EVALUATE[type(index)](self, index)
        return self._event(node, "call", operator.getitem, (owner, key))

    def _unary(self, node: ast.UnaryOp) -> Value:
        literal = read_literal(node)
        if literal is not None:
            return Known(literal.value)
        return self._event(node, "call", _UNARY[type(node.op)], (self.value(node.operand),))

    def _binary(self, node: ast.BinOp) -> Value:
        literal = read_literal(node)
        if literal is not None:
            return Known(literal.value)
        left, right = self.value(node.left), self.value(node.right)
        return self._event(node, "call", _BINARY[type(node.op)], (left, right))

    def _compare(self, node: ast.Compare) -> Value:
        left, right = self.value(node.left), self.value(node.comparators[0])
        return self._event(node, "call", _COMPARE[type(node.ops[0])], (left, right))

    # --- calls -----------------------------------------------------------------------------------

    def _nested_call(self, node: ast.Call) -> Value:
        return self.call(node, nested=True)

    def call(self, node: ast.Call, *, nested: bool = False) -> Value:
        """Evaluate a call; a nested one of a container's type builds the container."""
        func = node.func
        target: Value | None
        if type(func) is ast.Attribute:
            target = self._path(func)
            if target is None:
                owner = self.value(func.value)
                if type(owner) is not Known or not owner.is_global:
                    return self._method(node, owner, func.attr)
                target = self._attribute_of(func, owner.value, func.attr)
        elif type(func) is ast.Name:
            function = None if func.id in self.frame.locals else self.module.get(func.id)
            if isinstance(function, ast.FunctionDef):
                return self.enter(node, function)
            target = self._name(func)
        elif type(func) is ast.Subscript and _is_name(func.value, SUBMODS):
            return self._submod(node, func)
        elif type(func) is ast.Call and self._is_method_look_up(func):
            name = func.args[1]
            assert isinstance(name, ast.Constant)
            return self._method(node, self.value(func.args[0]), name.value)
        else:
            target = self.value(func)
        if type(target) is not Known:
            raise self.error(node, "a computed value is called")
        args, kwargs = self.arguments(node)
        if nested and not kwargs and _builds(target, len(args)):
            assert isinstance(target.value, type)
            return self._container(target.value, args)
        return self._event(node, "call", target.value, args, kwargs)

    def _submod(self, node: ast.Call, func: ast.Subscript) -> Value:
        """``__vllm_submods__[i](...)``."""
        if self.frame.values.get(SUBMODS) is not THE_SUBMODS:
            raise self.error(node, f"{SUBMODS} is not what was passed")
        index = func.slice.value if type(func.slice) is ast.Constant else None
        if type(index) is not int or not 0 <= index < len(self.submod_names):
            raise self.error(node, f"there is no submodule {ast.unparse(func.slice)}")
        args, kwargs = self.arguments(node)
        return self._event(node, "submod", self.submod_names[index], args, kwargs)

    def _is_method_look_up(self, func: ast.Call) -> bool:
        """``getattr(x, "name")``, as the name of a method is written that is no identifier."""
        return (
            _is_name(func.func, "getattr")
            and self._is_builtin("getattr")
            and len(func.args) == 2
            and not func.keywords
            and type(func.args[1]) is ast.Constant
            and type(func.args[1].value) is str
        )

    def _method(self, node: ast.Call, receiver: Value, method: object) -> Value:
        args, kwargs = self.arguments(node)
        return self._event(node, "method", method, (receiver, *args), kwargs)

    def arguments(self, node: ast.Call) -> Arguments:
        """Evaluate the arguments of a call, in order."""
        args = tuple([_EVALUATE[type(each)](self, each) for each in node.args])
        if not node.keywords:
            return args, ()
        kwargs: list[tuple[str, Value]] = []
        for keyword in node.keywords:
            if keyword.arg is not None:
                kwargs.append((keyword.arg, self.value(keyword.value)))
                continue
            assert isinstance(keyword.value, ast.Dict)
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if not isinstance(key, ast.Constant) or type(key.value) is not str:
                    raise self.error(node, "** of a dict whose keys are not strings")
                kwargs.append((key.value, self.value(value)))
        if len(kwargs) > 1 and len({name for name, _ in kwargs}) != len(kwargs):
            raise self.error(node, "a keyword is given twice")
        return args, tuple(kwargs)

    def _event(
        self,
        node: ast.expr,
        kind: str,
        target: object,
        args: tuple[Value, ...],
        kwargs: tuple[tuple[str, Value], ...] = (),
    ) -> Value:
        if target is operator.getitem and len(args) == 2 and not kwargs:
            index = args[1].value if type(args[1]) is Known else None
            element = picked(self.escapes.elements_of(args[0]), index)
            if element is not None:
                return element
        for value in args:
            if type(value) is Container:
                self.escapes.note(value)
        for _, value in kwargs:
            if type(value) is Container:
                self.escapes.note(value)
        event = Event(kind, target, args, kwargs, node.lineno)
        self.events.append(event)
        return event


# What evaluates a node of each type that `grammar` lets through.
_EVALUATE: dict[type[ast.expr], Callable[..., Value]] = {
    ast.Name: Expressions._name,
    ast.Constant: Expressions._constant,
    ast.Call: Expressions._nested_call,
    ast.Attribute: Expressions._attribute,
    ast.Subscript: Expressions._subscript,
    ast.Tuple: Expressions._tuple,
    ast.List: Expressions._list,
    ast.Dict: Expressions._dict,
    ast.Slice: Expressions._slice,
    ast.UnaryOp: Expressions._unary,
    ast.BinOp: Expressions._binary,
    ast.Compare: Expressions._compare,
}
_EVALUATE_STATEMENT: dict[type[ast.expr], Callable[..., Value]] = {
    **_EVALUATE,
    ast.Call: Expressions.call,
}
_NONE = Known(None)


def _is_constant(value: Value) -> bool:
    if isinstance(value, Container):
        return value.kind is tuple and all(map(_is_constant, value.items))
    return isinstance(value, Known)


def _is_name(node: ast.expr, name: str) -> bool:
    return type(node) is ast.Name and node.id == name


def _builds(target: Known, count: int) -> bool:
    """True if a nested call of ``target`` is how a slice or a namedtuple is written."""
    if target.is_global:
        return target.value is slice and count == 3
    kind = target.value
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
