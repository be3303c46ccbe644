"""What the code that a trace went through may ask for, read from its names."""

from __future__ import annotations

import dis
import os
import sys
import types
from collections.abc import Iterable
from pathlib import Path

import torch

from piecework.code_objects import with_inner_code

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_CHECKPOINTING = "gradient_checkpointing"


def models_code(code: Iterable[types.CodeType]) -> list[types.CodeType]:
    """The model's own code among some, and all code in it; not torch's, Python's or ours."""
    return [each for each in with_inner_code(list(code)) if _is_models(each.co_filename)]


def _is_models(file: str) -> bool:
    if file.startswith((_TORCH, _OURS)):
        return False
    return not file.startswith(_PYTHONS) or "-packages" + os.sep in file


def models_names(code: Iterable[types.CodeType]) -> frozenset[str]:
    """The names and texts in the model's code, by which it may ask an object for something."""
    found: set[str] = set()
    for each in models_code(code):
        found.update(each.co_names, (text for text in each.co_consts if isinstance(text, str)))
    return frozenset(found)


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


def asks_autocast(code: Iterable[types.CodeType]) -> bool:
    """Whether the model's code may ask for autocast, also where it is off."""
    return any("autocast" in name for name in models_names(code))


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
