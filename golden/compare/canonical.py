"""Operands in words that two sources share. In: expressions of one outline. Out: their text with constants by description and renamed values.

An index into a table only counts; it says nothing about whether two sources mean the same. No difference is judged here.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from piecework.golden.compare.align import Mark, mark_of
from piecework.golden.compare.outline import Argument, Outline, Step
from piecework.golden.compare.tables import CONSTS


def constant_names(outline: Outline) -> dict[int, str]:
    """Index → description, numbered where several constants have the same one."""
    total = Counter(outline.consts.values())
    seen: Counter[str] = Counter()
    names: dict[int, str] = {}
    for index in sorted(outline.consts):
        description = outline.consts[index]
        seen[description] += 1
        several = total[description] > 1
        names[index] = f"{description} #{seen[description]}" if several else description
    return names


@dataclass(frozen=True, slots=True)
class Canon:
    """How one side writes its operands: ``rename`` maps its names to those of the other side; ``submods`` is its table, ``digests``
    say what each of them computes."""

    constants: Mapping[int, str]
    submods: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    def name(self, name: str) -> str:
        return self.rename.get(name, name)

    def argument(self, argument: Argument) -> str:
        text = self.expression(argument.expr)
        return f"{argument.name}={text}" if argument.name else text

    def arguments(self, step: Step) -> tuple[str, ...]:
        return tuple(self.argument(each) for each in step.arguments)

    def results(self, step: Step) -> tuple[str, ...]:
        return tuple(self.name(each) for each in step.results)

    def callee(self, step: Step) -> str:
        root, dot, rest = step.callee.partition(".")
        return self.name(root) + dot + rest if root else step.callee

    def expression(self, expr: ast.expr) -> str:
        return ast.unparse(_Rewrite(self).visit(copy.deepcopy(expr)))

    def source(self, text: str) -> str:
        """``text``, one expression, rewritten; unchanged if it is none."""
        try:
            return self.expression(ast.parse(text, mode="eval").body)
        except SyntaxError:
            return text

    def mark(self, step: Step) -> Mark:
        mark = mark_of(step, self.arguments)
        binds = tuple(self.name(each) for each in mark.binds)
        callee = self.callee(step) if mark.callee else ""
        digest = self.digests.get(step.callee, "") if mark.kind == "piece" else ""
        return Mark(mark.kind, callee, mark.reads, binds, mark.module, digest)


class _Rewrite(ast.NodeTransformer):
    def __init__(self, canon: Canon) -> None:
        self.canon = canon

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(index))):
                if name == CONSTS and index in self.canon.constants:
                    return ast.Name(f"{CONSTS}[{self.canon.constants[index]}]", ast.Load())
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Name(self.canon.name(node.id), node.ctx)
