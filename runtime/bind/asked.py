"""What code may look up. In: the code that a trace went through. Out: whose code it is, and the names that it may ask an object for."""

from __future__ import annotations

import os
import types
from collections.abc import Iterable
from pathlib import Path

import torch

from piecework.code_objects import with_inner_code

_TORCH = os.path.dirname(torch.__file__) + os.sep


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


_PYTHONS = os.path.dirname(os.__file__) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_COMPUTES = frozenset(
    ("getattr", "hasattr", "attrgetter", "methodcaller", "vars", "dir", "eval", "exec", "__dict__")
)
