"""What the benchmarks' commands share."""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from rich.console import Console

from piecework.bench.measure.result import Result

Report = Callable[[str], None]


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, and no gradients, for the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def command(
    run: Callable[..., Result],
    arguments: Sequence[str] | None,
    one: Callable[..., object] | None = None,
) -> int:
    """Run a benchmark from the command line, print what it found, and write ``NAME.json`` and a plot.

    Args:
        run: the benchmark; each of its parameters is an option.
        one: what ``--one``, with its arguments, measures in this process and prints as JSON.

    Returns:
        1 if a target is missed.
    """
    name, text = Path(inspect.getfile(run)).stem, run.__globals__["__doc__"]
    parser = argparse.ArgumentParser(
        prog=f"python -m piecework.bench.{name}",
        description=f"{text}\n{inspect.getdoc(run) or ''}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON and the plot")
    hints, parameters = get_type_hints(run), inspect.signature(run).parameters
    for key, each in parameters.items():
        if each.default is True:
            parser.add_argument(f"--no-{key}", dest=key, action="store_false")
        elif isinstance(each.default, tuple):
            kind = type(each.default[0])
            parser.add_argument(f"--{key}", type=kind, nargs="+", default=each.default)
        elif key != "report":
            kind, choices = type(each.default), get_args(hints[key]) or None
            parser.add_argument(f"--{key}", type=kind, choices=choices, default=each.default)
    if one is not None:
        words = tuple(inspect.signature(one).parameters)
        parser.add_argument("--one", nargs=len(words), metavar=words, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    out, words = options.pop("out"), options.pop("one", None)
    if one is not None and words:
        print(json.dumps(one(*words)))
        return 0
    console, start = Console(stderr=True), time.monotonic()

    def report(text: str) -> None:
        console.print(f"{time.monotonic() - start:4.0f} s  {text}", style="dim")

    return run(**options, **({"report": report} if "report" in parameters else {})).finish(
        out, name
    )
