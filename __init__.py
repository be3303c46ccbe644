"""piecework: a stitching compiler and runtime for PyTorch inference.

Capture a model once, cut it at the operators that stay outside, compile the pieces, and read the one function that runs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from piecework.codegen import (
        SplitItem,
        StitchedSource,
        check_op,
        compile_execution_fn,
        generate_execution_code,
        split_graph,
    )
    from piecework.codegen.source import verify
    from piecework.errors import PieceworkError
    from piecework.runtime.compile import compile, load
    from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
    from piecework.runtime.counters import counters
    from piecework.runtime.decorators import ignore_torch_compile, support_torch_compile
    from piecework.runtime.splitting_op import declare_rows, splitting_op
    from piecework.runtime.stitched import StitchedModule

__version__ = "0.1.0"

__all__ = [
    "CompilationConfig",
    "PieceworkError",
    "RuntimeConfig",
    "SplitItem",
    "StitchedModule",
    "StitchedSource",
    "check_op",
    "compile",
    "compile_execution_fn",
    "counters",
    "declare_rows",
    "generate_execution_code",
    "ignore_torch_compile",
    "load",
    "split_graph",
    "splitting_op",
    "support_torch_compile",
    "verify",
]

# Names are loaded when they are first used, so that the command line and the cache start without torch.
_HOME = {
    "CompilationConfig": "piecework.runtime.config.compilation",
    "PieceworkError": "piecework.errors",
    "RuntimeConfig": "piecework.runtime.config.compilation",
    "SplitItem": "piecework.codegen",
    "StitchedModule": "piecework.runtime.stitched",
    "StitchedSource": "piecework.codegen",
    "check_op": "piecework.codegen",
    "compile": "piecework.runtime.compile",
    "compile_execution_fn": "piecework.codegen",
    "counters": "piecework.runtime.counters",
    "declare_rows": "piecework.runtime.splitting_op",
    "generate_execution_code": "piecework.codegen",
    "ignore_torch_compile": "piecework.runtime.decorators",
    "load": "piecework.runtime.compile",
    "split_graph": "piecework.codegen",
    "splitting_op": "piecework.runtime.splitting_op",
    "support_torch_compile": "piecework.runtime.decorators",
    "verify": "piecework.codegen.source",
}
_ROOMS = ("bench", "codegen", "errors", "golden", "integrations", "runtime")


def __getattr__(name: str) -> object:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"piecework.{name}")
    raise AttributeError(f"module 'piecework' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
