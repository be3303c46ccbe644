"""Code generation, pure: a graph in, readable stitching source out; no files, no device."""

from typing import TYPE_CHECKING

from piecework.faces import face

if TYPE_CHECKING:
    from piecework.codegen.plan.ir import LowerOptions as LowerOptions
    from piecework.codegen.plan.ir import Proof as Proof
    from piecework.codegen.split.split import split_graph as split_graph
    from piecework.codegen.split.splitting import OpReport as OpReport
    from piecework.codegen.split.splitting import SplitItem as SplitItem
    from piecework.codegen.split.splitting import check_op as check_op
    from piecework.codegen.stitch.bind import compile_execution_fn as compile_execution_fn
    from piecework.codegen.stitch.source import StitchedSource as StitchedSource
    from piecework.codegen.stitch.source import generate_execution_code as generate_execution_code
    from piecework.codegen.stitch.source import generate_source as generate_source
    from piecework.codegen.stitch.source import verify as verify

__all__, __getattr__, __dir__ = face(__name__, __file__)
