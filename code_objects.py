"""Compiled Python code as a tree. In: code objects. Out: all code in them, and the names that code reads from its globals. Torch is not needed."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable, Iterator


def with_inner_code(code: Iterable[types.CodeType]) -> Iterator[types.CodeType]:
    """Code objects and all code in them: of inner functions, lambdas, comprehensions, class bodies."""
    for each in code:
        yield each
        yield from with_inner_code(c for c in each.co_consts if isinstance(c, types.CodeType))


def global_names(code: types.CodeType) -> set[str]:
    """Names that code reads from its globals, or from builtins; code in it not counted."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return {str(i.argval) for i in dis.get_instructions(code) if i.opname in loads}
