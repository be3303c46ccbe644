"""piecework: a stitching compiler and runtime for PyTorch inference.

Capture a model once, cut it at the operators that stay outside, compile the pieces, and read the one function that runs them.
"""

from piecework.codegen import (
    SplitItem,
    StitchedSource,
    compile_execution_fn,
    generate_execution_code,
    split_graph,
)
from piecework.errors import PieceworkError
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.splitting_op import splitting_op
from piecework.runtime.stitched import StitchedModule, compile

__version__ = "0.1.0"

__all__ = [
    "CompilationConfig",
    "PieceworkError",
    "SplitItem",
    "StitchedModule",
    "StitchedSource",
    "compile",
    "compile_execution_fn",
    "counters",
    "generate_execution_code",
    "split_graph",
    "splitting_op",
]
