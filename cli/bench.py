"""``piecework bench``: in, the name of a benchmark; out, its table, and a JSON file and a plot if a folder is given."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from piecework.cli.console import compile_progress
from piecework.errors import UsageError

#: Name → what it measures. Each is run by a module of `piecework.bench`, with ``main(arguments) -> exit code``.
BENCHMARKS = {
    "stitching": "B1: the stitching alone, over no-op pieces",
    "host_overhead": "B2, B3: host overhead of a whole forward",
    "decode_step": "B12: a decode step of transformers, attention, cache and head included",
    "compile_time": "B4: cold compile time against depth",
    "warm_start": "B5: warm start of an artifact against depth",
    "emission": "B6: emission time against nodes",
    "gpu": "B8 to B11: captured pieces on a GPU; needs one",
    "models": "lists of models beside eager and torch.compile; takes hours",
}
NEEDS_GPU = "gpu"
TAKES_HOURS = "models"


def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help=f"One of {', '.join(BENCHMARKS)}, or all.", metavar="NAME")
    ] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and plots.")] = None,
) -> None:
    """Run a benchmark (or all): check correctness, measure ratios in one run, and print a table.

    All leaves out what needs a GPU where there is none, and models. What follows the name is handed on (models --help).
    Exit code 1 if a target is missed, 2 if a GPU is missing.
    """
    if name != "all" and name not in BENCHMARKS:
        raise UsageError(
            f"there is no benchmark {name!r}", hint=f"there are {', '.join(BENCHMARKS)}"
        )
    if name == "all" and context.args:
        raise UsageError(
            f"no benchmark is named to hand {context.args[0]} on to", hint="name one of them"
        )
    if out is not None:
        from piecework.runtime.bundle import require_writable

        require_writable(out)
    arguments = [*([] if out is None else ["--out", str(out)]), *context.args]
    import torch

    left_out = {TAKES_HOURS} | (set() if torch.cuda.is_available() else {NEEDS_GPU})
    codes = set()
    for each in BENCHMARKS if name == "all" else (name,):
        if name == "all" and each in left_out:
            continue
        typer.echo(f"{each}: {BENCHMARKS[each]}")
        main = ".__main__" if each == NEEDS_GPU else ""
        with compile_progress():
            codes.add(import_module(f"piecework.bench.{each}{main}").main(arguments))
    if max(codes):
        raise typer.Exit(max(codes))
