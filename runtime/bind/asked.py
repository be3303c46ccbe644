"""What code may look up. In: the code that a trace went through. Out: whose code it is, and the names that it may ask an object for; and what functions answer about the process."""

from __future__ import annotations

import dis
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch

from piecework.code_objects import with_inner_code

_TORCH = os.path.dirname(torch.__file__) + os.sep

_DEVICES = ("cpu", "cuda", "xpu", "mps")


def _autocast_dtypes() -> tuple[torch.dtype, ...]:
    return tuple(map(torch.get_autocast_dtype, _DEVICES))


def _ranks() -> tuple[int, int] | None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


_ANSWERED: dict[object, Callable[[], object]] = {
    torch.are_deterministic_algorithms_enabled: torch.are_deterministic_algorithms_enabled,
    torch.backends.cudnn.is_acceptable: lambda: torch.backends.cudnn.enabled,
    torch._C._get_cublas_allow_tf32: torch._C._get_cublas_allow_tf32,
    torch.get_autocast_dtype: _autocast_dtypes,
    torch.get_autocast_gpu_dtype: _autocast_dtypes,
    torch.is_autocast_cache_enabled: torch.is_autocast_cache_enabled,
    sys.getrecursionlimit: sys.getrecursionlimit,
    sys.get_int_max_str_digits: sys.get_int_max_str_digits,
    **{
        getattr(torch.distributed, name): _ranks
        for name in ("is_initialized", "get_rank", "get_world_size")
        if hasattr(torch.distributed, name)
    },
}
#: By identity, functions whose answer Dynamo takes for constant and nobody else compares → what they answer from.
ANSWERS = {id(function): read for function, read in _ANSWERED.items()}


def is_torchs(code: types.CodeType) -> bool:
    """Whether code is torch's own, which nobody edits while it runs."""
    return code.co_filename.startswith(_TORCH)


def may_ask(asked: frozenset[str] | None, name: str) -> bool:
    """Whether the traced code may look ``name`` up: it names it, Python does for an operator, or it computes names (None).

    Libraries add methods to ``torch.nn.Module`` as they are imported, which say nothing of a model that doesn't know them.
    """
    dunder = name.startswith("__") and name.endswith("__")
    return asked is None or dunder or name in asked


def names_in(code: Iterable[types.CodeType]) -> frozenset[str] | None:
    """What code may ask an object for: the names and texts in it. None where it asks for names that are not written there."""
    found: set[str] = set()
    for each in with_inner_code(code):
        if _is_models(each) and not _COMPUTES.isdisjoint(each.co_names):
            return None
        found.update(each.co_names)
        found.update(value for value in each.co_consts if isinstance(value, str))
    return frozenset(found)


def _is_models(code: types.CodeType) -> bool:
    """Whether code may belong to the model: it is not torch's, Python's or ours, which the trace went through as well."""
    name = code.co_filename
    if is_torchs(code) or name.startswith(_OURS):
        return False
    return not name.startswith(_PYTHONS) or "-packages" + os.sep in name


def asks_strides(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may call a tensor's ``stride``: a layer's, which is no method, does not count."""
    return any(
        step.argval == "stride" and (step.opname == "LOAD_METHOD" or _loads_method(step))
        for each in models_code(code)
        for step in dis.get_instructions(each)
    )


def _loads_method(step: dis.Instruction) -> bool:
    """From Python 3.12 on, a bit of ``LOAD_ATTR`` says that what is loaded is called."""
    return sys.version_info >= (3, 12) and step.opname == "LOAD_ATTR" and bool((step.arg or 0) & 1)


def compares_identity(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may ask if two things are one object; with a constant, such as None, it asks for no more than a value."""
    for each in models_code(code):
        steps = [step for step in dis.get_instructions(each) if step.opname != "CACHE"]
        if "id" in each.co_names or "is_" in each.co_names or "is_not" in each.co_names:
            return True
        if any(b.opname == "IS_OP" and a.opname != "LOAD_CONST" for a, b in pairwise(steps)):
            return True
    return False


def texts_in(code: Iterable[types.CodeType]) -> frozenset[str]:
    """The texts in the model's code, with which it may ask a dictionary."""
    return frozenset().union(*map(_texts, models_code(code)))


def models_names(code: Iterable[types.CodeType]) -> frozenset[str]:
    """The names and texts in the model's code, by which it may ask an object for something."""
    return texts_in(code).union(*(each.co_names for each in models_code(code)))


def models_code(code: Iterable[types.CodeType]) -> list[types.CodeType]:
    """The model's own code among some, and all code in it."""
    return [each for each in with_inner_code(list(code)) if _is_models(each)]


def asks_dynamo(code: Iterable[tuple[Mapping[str, object], types.CodeType]]) -> bool:
    """Whether the model's code may ask if it is Dynamo that goes through it, which no other run of it answers as a trace does.

    Args:
        code: with its global names.
    """
    asked = torch.compiler.is_dynamo_compiling
    return any(
        asked.__name__ in each.co_names
        or any(scope[name] is asked for name in scope.keys() & set(each.co_names))
        for scope, each in code
        if _is_models(each)
    )


def tried_in(code: Iterable[types.CodeType]) -> frozenset[str]:
    """The names that code asks for and goes on without, since it catches what a look-up that finds nothing raises; Dynamo guards no such look-up.

    They are those of the code that catches, and of what it calls by name or by an operator.
    """
    every = list(with_inner_code(code))
    tried = [each for each in every if _catches(each)]
    names: set[str] = set()
    while tried:
        names.update(*(each.co_names for each in tried), *map(_texts, tried))
        every = [each for each in every if each not in tried]
        tried = [each for each in every if _is_called(each.co_name, names)]
    return frozenset(names)


def asks_grad_mode(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code asks torch if gradients are recorded.

    To ask it with whether to checkpoint activations, as libraries of models do, changes no result, and torch's own code asks which of
    two ways to the same result to take.
    """
    return any(
        name == torch.is_grad_enabled.__name__
        and _CHECKPOINTING not in "".join(names[max(0, n - 3) : n + 3])
        for each in models_code(code)
        for names in (_names_in_order(each),)
        for n, name in enumerate(names)
    )


def _names_in_order(code: types.CodeType) -> list[str]:
    steps = dis.get_instructions(code)
    return [step.argval for step in steps if type(step.argval) is str and step.opname != "CACHE"]


def _is_called(name: str, names: set[str]) -> bool:
    return name in names or (name.startswith("__") and name != "__call__")


def _texts(code: types.CodeType) -> list[str]:
    return [each for each in code.co_consts if isinstance(each, str)]


def _catches(code: types.CodeType) -> bool:
    if not code.co_exceptiontable or is_torchs(code) or code.co_filename.startswith(_OURS):
        return False
    steps = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    caught = [before for before, each in pairwise(steps) if each.opname == "CHECK_EXC_MATCH"]
    if not _is_models(code):  # Python's own, which names what it catches
        return any(each.argval in _FINDS_NOTHING for each in caught)
    if any(each.opname != "LOAD_GLOBAL" or each.argval not in _OF_VALUES for each in caught):
        return True
    bare = any(a.opname == "PUSH_EXC_INFO" and b.opname == "POP_TOP" for a, b in pairwise(steps))
    return bare or "suppress" in code.co_names


_CHECKPOINTING = "gradient_checkpointing"
_FINDS_NOTHING = frozenset(("KeyError", "AttributeError", "LookupError", "NameError"))
# What values raise, lengths, types and imports, which are guarded.
_OF_VALUES = frozenset(
    (
        *("AssertionError", "ImportError", "IndexError", "ModuleNotFoundError"),
        *("NotImplementedError", "OverflowError", "RuntimeError", "StopIteration"),
        *("TypeError", "ValueError", "ZeroDivisionError"),
    )
)
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_COMPUTES = frozenset(
    ("getattr", "hasattr", "attrgetter", "methodcaller", "vars", "dir", "eval", "exec", "__dict__")
)
