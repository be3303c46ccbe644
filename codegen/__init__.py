"""Code generation, pure: a graph in, readable stitching source out; no files, no device."""

from piecework.codegen.proof.prove import Proof
from piecework.codegen.split.split import SplitItem, split_graph
from piecework.codegen.split.splitting import OpReport, check_op
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.codegen.stitch.lower import LowerOptions
from piecework.codegen.stitch.source import (
    StitchedSource,
    generate_execution_code,
    generate_source,
    verify,
)

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
