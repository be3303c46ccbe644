"""Systematic mutants of an entry's text. In: the text. Out: texts that say something else, each with what was changed."""

from __future__ import annotations

import ast
from collections.abc import Iterator, MutableSequence

_SIGNS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Is, ast.IsNot, ast.In, ast.NotIn)


def mutants(code: str, every: int = 1, first: int = 0) -> Iterator[tuple[str, str]]:
    """The texts that one edit of ``code`` makes, after what the edit is: each, or one of ``every`` so many."""
    tree = ast.parse(code)
    number = 0
    for node in list(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        for what in _edits(tree, node):
            if number % every == first:
                yield f"line {line}, {type(node).__name__}: {what}", ast.unparse(tree)
            number += 1


def _edits(tree: ast.Module, node: ast.AST) -> Iterator[str]:
    """Edits in place; each is taken back when the next is asked for."""
    match node:
        case ast.BoolOp(op=op, values=values):
            yield from _lists(values)
            for other in (ast.And(), ast.Or()):
                if type(other) is not type(op):
                    yield from _changed(node, "op", other)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield from _changed(node, "operand", ast.UnaryOp(ast.Not(), operand))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            for other in _SIGNS:
                if type(op) is not other:
                    yield from _changed(node, "ops", [other()])
            yield from _changed(node, "left", right)
            yield from _changed(node, "comparators", [left])
        case ast.Compare(ops=ops):
            for place, _ in enumerate(ops):
                for other in (ast.Lt(), ast.Gt(), ast.NotEq()):
                    yield from _changed(node, "ops", [*ops[:place], other, *ops[place + 1 :]])
        case ast.BinOp(left=left):
            for other in (ast.Add(), ast.Sub(), ast.Mult(), ast.FloorDiv(), ast.Mod(), ast.Pow()):
                if type(other) is not type(node.op):
                    yield from _changed(node, "op", other)
        case ast.Constant(value=value):
            for other in _other_values(value):
                yield from _changed(node, "value", other)
        case ast.Name(id=name, ctx=ast.Load()):
            for other in _names_near(tree, node, name):
                yield from _changed(node, "id", other)
        case ast.Attribute(attr=attribute):
            for other in ("shape", "data", "is_cuda", "dtype", "float64", "Tensor", "enable_grad"):
                if other != attribute:
                    yield from _changed(node, "attr", other)
        case ast.Call(func=func, args=args, keywords=keywords):
            yield from _lists(args)
            yield from _lists(keywords)
            yield from _changed(node, "args", [*args, ast.Constant(1)])
            del func
        case ast.Tuple(elts=elements, ctx=ast.Store()):
            read = [_is_read(tree, each) for each in elements]
            if any(read):
                idle = {_swapped(at) for at in range(len(read) - 1) if not any(read[at : at + 2])}
                yield from (what for what in _lists(elements) if what not in idle)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            yield from _lists(elements)
        case ast.Dict(keys=keys, values=values):
            if len(keys) > 1:
                yield from _changed(node, "values", [*values[1:], values[0]])
        case ast.keyword(arg=str() as name):
            yield from _changed(node, "arg", f"{name}_")
        case ast.FunctionDef(body=body):
            yield from _lists(body)
            yield from _changed(node, "body", [*body, ast.Return(ast.Constant(None))])
            yield from _changed(node, "name", f"{node.name}_")
        case ast.If(body=body):
            yield from _changed(node, "test", ast.Constant(False))
            yield from _changed(node, "body", [ast.Pass()])
            yield from _changed(node, "orelse", body)
        case ast.With(body=body):
            yield from _changed(node, "body", [ast.Pass()])
        case ast.Return():
            yield from _changed(node, "value", ast.Constant(None))
        case ast.arguments():
            yield from _parameters(tree, node)
        case ast.Module(body=body):
            yield from _lists(body)


def _parameters(tree: ast.Module, arguments: ast.arguments) -> Iterator[str]:
    for places in (arguments.posonlyargs, arguments.args, arguments.kwonlyargs):
        if any(_is_read(tree, each) for each in places):
            yield from _swaps(places)
    yield from _lists(arguments.defaults)
    for place, default in enumerate(arguments.kw_defaults):
        other = ast.Constant("other") if default is None else None
        arguments.kw_defaults[place] = other
        yield f"default {place} changed"
        arguments.kw_defaults[place] = default


def _changed(node: ast.AST, field: str, value: object) -> Iterator[str]:
    before = getattr(node, field)
    if _dump(before) == _dump(value):
        return
    setattr(node, field, value)
    yield f"{field} changed to {_dump(value)[:60]}"
    setattr(node, field, before)


def _dump(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_dump, value))
    return ast.dump(value) if isinstance(value, ast.AST) else repr(value)


def _lists(items: MutableSequence[ast.AST]) -> Iterator[str]:
    """One left out, one twice, two swapped."""
    for place in range(len(items)):
        item = items.pop(place)
        if items or not isinstance(item, ast.stmt):
            yield f"{place} left out"
        items.insert(place, item)
        items.insert(place, item)
        yield f"{place} twice"
        del items[place]
    yield from _swaps(items)


def _swaps(items: MutableSequence[ast.AST]) -> Iterator[str]:
    for place in range(len(items) - 1):
        pair = items[place], items[place + 1]
        if ast.dump(pair[0]) == ast.dump(pair[1]) or any(map(_is_mapping, pair)):
            continue
        items[place], items[place + 1] = items[place + 1], items[place]
        yield _swapped(place)
        items[place], items[place + 1] = items[place + 1], items[place]


def _swapped(place: int) -> str:
    return f"{place} and {place + 1} swapped"


def _is_mapping(item: ast.AST) -> bool:
    """Whether ``item`` is a ``**more`` of a call: it says the same before a named argument and after it."""
    return isinstance(item, ast.keyword) and item.arg is None


def _other_values(value: object) -> list[object]:
    match value:
        case bool():
            return [not value, int(value), None]
        case int():
            return [value + 1, value - 1, float(value), str(value)]
        case float() | complex():
            return [value + 1, -value] if value else [1.0]
        case str() | bytes():
            return [value + value[:1] if value else "x", None]
        case _:
            return [0, False]


def _names_near(tree: ast.Module, node: ast.Name, name: str) -> list[str]:
    """Other names of the same function: the one before it and the one after it by their order, and one of the module's."""
    for function in tree.body:
        if any(each is node for each in ast.walk(function)):
            found = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
            found |= {each.arg for each in ast.walk(function) if isinstance(each, ast.arg)}
            names = sorted(found)
            at = names.index(name)
            return [each for each in (*names[at - 1 : at], *names[at + 1 : at + 2], "bound") if each != name]  # fmt: skip
    return []


def _is_read(tree: ast.Module, target: ast.AST) -> bool:
    name = target.arg if isinstance(target, ast.arg) else getattr(target, "id", "")
    read = (each for each in ast.walk(tree) if isinstance(each, ast.Name))
    return any(each.id == name and isinstance(each.ctx, ast.Load) for each in read)
