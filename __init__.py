"""piecework: a stitching compiler and runtime for PyTorch inference.

Capture a model once, cut it at the operators that stay outside, compile the pieces, and read the
one function that runs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from piecework.faces import face

if TYPE_CHECKING:
    from piecework.codegen import SplitItem as SplitItem
    from piecework.codegen import StitchedSource as StitchedSource
    from piecework.codegen import check_op as check_op
    from piecework.codegen import compile_execution_fn as compile_execution_fn
    from piecework.codegen import generate_execution_code as generate_execution_code
    from piecework.codegen import split_graph as split_graph
    from piecework.codegen.stitch.source import verify as verify
    from piecework.errors import PieceworkError as PieceworkError
    from piecework.runtime.compile import compile as compile
    from piecework.runtime.compile import load as load
    from piecework.runtime.config.compilation import CompilationConfig as CompilationConfig
    from piecework.runtime.config.compilation import RuntimeConfig as RuntimeConfig
    from piecework.runtime.counters import counters as counters
    from piecework.runtime.decorators import ignore_torch_compile as ignore_torch_compile
    from piecework.runtime.decorators import support_torch_compile as support_torch_compile
    from piecework.runtime.splitting_op import declare_full_graphs as declare_full_graphs
    from piecework.runtime.splitting_op import declare_rows as declare_rows
    from piecework.runtime.splitting_op import splitting_op as splitting_op
    from piecework.runtime.stitched import StitchedModule as StitchedModule

__version__ = "0.1.0"

_ROOMS = ("bench", "codegen", "errors", "golden", "integrations", "runtime")
__all__, __getattr__, __dir__ = face(__name__, __file__, _ROOMS)
