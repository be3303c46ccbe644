"""What benchmarks that time contenders side by side share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from piecework.bench.measure.result import Result

Report = Callable[[str], None]


def options_of(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark's command, with what all of them take."""
    parser = argparse.ArgumentParser(prog=f"python -m piecework.bench.{name}", description=text)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON and the plot")
    return parser


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


def run_line_ups(
    parser: argparse.ArgumentParser,
    name: str,
    run: Callable[..., Result],
    arguments: Sequence[str] | None,
    **defaults: object,
) -> int:
    """Run a benchmark of layers and batches as its options say; 1 if a target is missed."""
    for each in ("layers", "batches"):
        parser.add_argument(f"--{each}", type=int, nargs="+", default=defaults[each])
    for each, kind in (("rounds", int), ("seconds", float)):
        text = "of each setting, at most"
        parser.add_argument(f"--{each}", type=kind, default=defaults[each], help=text)
    parser.add_argument("--no-stock", action="store_true", help="leave torch.compile out")
    options = vars(parser.parse_args(arguments))
    console, start = Console(stderr=True), time.monotonic()

    def report(text: str) -> None:
        console.print(f"{time.monotonic() - start:4.0f} s  {text}", style="dim")

    out, stock = options.pop("out"), not options.pop("no_stock")
    result = run(**options, stock=stock, report=report)
    return result.finish(out, name, Console(width=110))
