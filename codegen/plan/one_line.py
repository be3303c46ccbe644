"""Pieces of Python on one line: arguments, indices, operators, targets, signatures. How lines are broken is for `formatting`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from piecework.codegen.plan.ir import Function, Parameter
from piecework.codegen.plan.literals import literal_text
from piecework.codegen.plan.names import SUBMODS, is_identifier


def operand(text: str, *, receiver: bool = False) -> str:
    """``text`` beside a sign, or before a dot or a bracket: numbers that would be read otherwise there are in brackets."""
    loose = text.startswith("-") or (" " in text and text.endswith("j"))
    number = receiver and (text[0].isdigit() or text.startswith("{"))
    return f"({text})" if loose or number else text


def arguments_text(args: Iterable[str], kwargs: Sequence[tuple[str, str]] = ()) -> str:
    """Positional arguments, then named ones.

    From the first name on that can't be written as a keyword, the rest goes into one dict: order is kept.
    """
    parts = list(args)
    for number, (key, value) in enumerate(kwargs):
        if not is_identifier(key):
            rest = ", ".join(f"{literal_text(name)}: {each}" for name, each in kwargs[number:])
            parts.append(f"**{{{rest}}}")
            break
        parts.append(f"{key}={value}")
    return ", ".join(parts)


def attribute_text(value: str, name: str) -> str:
    if is_identifier(name):
        return f"{operand(value, receiver=True)}.{name}"
    return f"getattr({value}, {literal_text(name)})"


def targets_text(targets: Sequence[str], unpack: bool) -> str:
    if not targets:
        return ""
    return f"({targets[0]},) = " if unpack and len(targets) == 1 else f"{', '.join(targets)} = "


def tuple_text(items: Sequence[str]) -> str:
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"


def signature_text(function: Function) -> str:
    """``def name(parameters):``; what takes ``__vllm_submods__`` takes it by keyword."""
    parameters = list(function.parameters)
    if function.takes_submods:
        ends = len(parameters) - (bool(parameters) and parameters[-1].kind == "**")
        parameters.insert(ends, Parameter(SUBMODS, "k"))
    kinds = [each.kind for each in parameters]
    parts: list[str] = []
    for number, each in enumerate(parameters):
        if each.kind == "k" and not {"*", "k"} & {*kinds[:number]}:
            parts.append("*")
        stars = each.kind if each.kind in ("*", "**") else ""
        default = "" if each.default is None else f"={each.default}"
        parts.append(f"{stars}{each.name}{default}")
        if each.kind == "/" and kinds[number + 1 : number + 2] != ["/"]:
            parts.append("/")
    return f"def {function.name}({', '.join(parts)}):"
