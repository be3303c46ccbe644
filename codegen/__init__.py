"""Code generation: a graph in, readable stitching source out. Pure: no environment, no files, no device, no global state."""

from piecework.codegen.bind import compile_execution_fn
from piecework.codegen.lower import LowerOptions
from piecework.codegen.op_check import OpReport, check_op
from piecework.codegen.source import (
    StitchedSource,
    generate_execution_code,
    generate_source,
    verify,
)
from piecework.codegen.split import SplitItem, split_graph
from piecework.codegen.verify import Proof

__all__ = [
    "LowerOptions",
    "OpReport",
    "Proof",
    "SplitItem",
    "StitchedSource",
    "check_op",
    "compile_execution_fn",
    "generate_execution_code",
    "generate_source",
    "split_graph",
    "verify",
]
