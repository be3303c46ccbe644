"""piecework: a stitching compiler and runtime for PyTorch inference.

Capture a model once, cut it at the operators that stay outside, compile the pieces, and read the one function that runs them.
"""

# ruff: noqa: F401  (what is imported for type checkers is what the package hands on)

from __future__ import annotations

from typing import TYPE_CHECKING

from piecework.faces import face

if TYPE_CHECKING:
    from piecework.codegen import (
        SplitItem,
        StitchedSource,
        check_op,
        compile_execution_fn,
        generate_execution_code,
        split_graph,
    )
    from piecework.codegen.stitch.source import verify
    from piecework.errors import PieceworkError
    from piecework.runtime.compile import compile, load
    from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
    from piecework.runtime.counters import counters
    from piecework.runtime.decorators import ignore_torch_compile, support_torch_compile
    from piecework.runtime.splitting_op import declare_full_graphs, declare_rows, splitting_op
    from piecework.runtime.stitched import StitchedModule

__version__ = "0.1.0"

_ROOMS = ("bench", "codegen", "errors", "golden", "integrations", "runtime")
__all__, __getattr__, __dir__ = face(__name__, __file__, _ROOMS)
