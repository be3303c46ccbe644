"""Sets that code makes. In: the code that a trace went through. Out: whether it may make one and go through it.

It reads byte code and runs nothing. Where it can't tell what a set is for, it may be gone through.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator

from piecework.runtime.bind.asked import models_code

_KINDS = ("set", "frozenset")
_METHODS = frozenset(
    (
        *("union", "intersection", "difference", "symmetric_difference", "discard"),
        *("intersection_update", "difference_update", "symmetric_difference_update"),
    )
)
_VIEWS = ("keys", "items")
_OPERATORS = ("&", "|", "-", "^")
_COMPREHENSION = "<setcomp>"
_NAMED = ("LOAD_METHOD", "LOAD_ATTR")
_NOTHING = ("CACHE", "EXTENDED_ARG", "RESUME", "NOP")
_ENDS = ("GET_ITER", "FOR_ITER", "STORE_FAST", "STORE_DEREF", "POP_TOP", "RETURN_VALUE")
_ORDERLESS = ("all", "any", "len", "max", "min", "sorted")
_ONLY_ASKED = ("CONTAINS_OP", "COMPARE_OP", "POP_TOP")
_FAR = 8


def goes_through_sets(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may make a set for more than to ask what is in it."""
    return any(_goes_through(each) for each in models_code(code))


def _goes_through(code: types.CodeType) -> bool:
    if code.co_name == _COMPREHENSION:
        return False  # who calls it has the set
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NOTHING]
    return any(
        made is None or not _is_only_asked(steps, start, made)
        for start, made in _made(steps)
        if not _is_raised(steps, start)
    ) or _combines_views(steps)


def _made(steps: list[dis.Instruction]) -> Iterator[tuple[int, int | None]]:
    """At which step each set begins to be made, and after which it lies on top of the stack; None where that can't be told."""
    for index, step in enumerate(steps):
        of_kind = step.opname == "LOAD_GLOBAL" and step.argval in _KINDS
        if of_kind or getattr(step.argval, "co_name", None) == _COMPREHENSION:
            yield index, _called(steps, index)
        elif step.opname == "BUILD_SET":
            filled = index + 2 < len(steps) and steps[index + 2].opname == "SET_UPDATE"
            yield index, index + 2 if filled else index
        elif step.opname == "LOAD_CONST" and type(step.argval) is frozenset:
            if steps[index + 1].opname != "SET_UPDATE":
                yield index, index
        elif (
            step.opname in ("SET_ADD", "SET_UPDATE") and steps[index - 2].opname != "BUILD_SET"
        ) or (step.opname in _NAMED and step.argval in _METHODS):
            yield index, None


def _called(steps: list[dis.Instruction], start: int) -> int | None:
    """The step that calls what step ``start`` loads."""
    depth = 0
    for index in range(start, len(steps)):
        step = steps[index]
        if _jumps(step):
            return None
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if step.opname in ("CALL", "CALL_FUNCTION") and depth <= 1:
            return index if depth == 1 else None
    return None


def _is_raised(steps: list[dis.Instruction], start: int) -> bool:
    """Whether a step is on the way to an error, which says what is in the set."""
    for step in steps[start:]:
        if step.opname == "RAISE_VARARGS":
            return True
        if _jumps(step) or step.opname in _ENDS:
            return False
    return False


def _jumps(step: dis.Instruction) -> bool:
    return step.opname.startswith("JUMP") or "_JUMP_" in step.opname


def _is_only_asked(steps: list[dis.Instruction], start: int, made: int) -> bool:
    before, after = steps[start - 1], steps[made + 1]
    if after.opname in ("PRECALL", "CALL"):
        orderless = before.opname == "LOAD_GLOBAL" and before.argval in _ORDERLESS
        return orderless and after.arg == 1
    if after.opname != "STORE_FAST":
        return after.opname in _ONLY_ASKED
    loads = [i for i, step in enumerate(steps) if _loads(step, after.argval)]
    return all(
        steps[i].opname.startswith("LOAD_FAST") and steps[i + 1].opname == "CONTAINS_OP"
        for i in loads
    )


def _loads(step: dis.Instruction, name: str) -> bool:
    """Whether a step reads a local; from Python 3.13 on, one may read two."""
    named = step.argval == name or (type(step.argval) is tuple and name in step.argval)
    return named and "LOAD" in step.opname


def _combines_views(steps: list[dis.Instruction]) -> bool:
    """Whether what a dictionary's ``keys`` or ``items`` gave may be combined with something, which makes a set."""
    for index, step in enumerate(steps):
        if step.opname == "BINARY_OP" and step.argrepr.rstrip("=") in _OPERATORS:
            for before in reversed(steps[max(0, index - _FAR) : index]):
                if before.opname in _ENDS:
                    break
                if before.opname in _NAMED and before.argval in _VIEWS:
                    return True
    return False
