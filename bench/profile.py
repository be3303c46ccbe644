"""Where one way to run a forward spends its time. In: the name of a contender of `host_overhead`. Out: the functions that take most of it, sampled by py-spy.

It compiles first and samples only calls; py-spy (``pip install py-spy``) must be allowed to read this process.

Run it with ``python -m piecework.bench.profile conventional piecework``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from piecework.bench.host_overhead import calls_for
from piecework.bench.llama_shaped import REGISTRATIONS, token_ids
from piecework.errors import PieceworkError

RATE = 1000
_DIGEST = re.compile(r"[a-z0-9]{40,}\.py")
_PLACE = re.compile(r" \((?:.*/)?([^/()]+?)(?::\d+)?\)$")


def sample(
    call: Callable[[], object], seconds: float, *, native: bool = False
) -> Counter[tuple[str, ...]]:
    """Stacks from ``call`` on, outermost frame first, with the number of samples that each was seen in.

    Args:
        call: what is called over and over, on this thread.
        seconds: of sampling.
        native: C and C++ functions have frames of their own; otherwise their time is that of the Python function that calls them.

    Raises:
        PieceworkError: py-spy is missing, or may not read this process.
    """
    spy = shutil.which("py-spy")
    if spy is None:
        raise PieceworkError("py-spy is not installed", hint="pip install py-spy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stacks.txt")
        command = [spy, "record", "--format", "raw", "--rate", str(RATE)]
        command += ["--duration", str(round(seconds)), "--pid", str(os.getpid())]
        command += ["--native"] if native else []
        with subprocess.Popen(
            [*command, "--output", str(path)], stderr=subprocess.PIPE, text=True
        ) as watcher:
            _loop(call, watcher)
            said = watcher.stderr.read() if watcher.stderr is not None else ""
        if watcher.returncode != 0 or not path.exists():
            raise PieceworkError(f"py-spy failed: {said.strip()}")
        return _below_loop(path.read_text())


def _loop(call: Callable[[], object], watcher: subprocess.Popen[str]) -> None:
    while watcher.poll() is None:
        for _ in range(20):
            call()


def _below_loop(text: str) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        at = next((i for i, frame in enumerate(frames) if frame.startswith("_loop (")), None)
        if at is not None and len(frames) > at + 1:
            found[tuple(frames[at + 1 :])] += int(count)
    return found


def by_function(stacks: Counter[tuple[str, ...]]) -> Counter[str]:
    """Samples per innermost function; an interpreter's own frames count for the Python function that they run."""
    found: Counter[str] = Counter()
    for frames, count in stacks.items():
        inner = [frame for frame in frames if not frame.startswith(("_PyEval_", "_PyFunction_"))]
        found[_name((inner or frames)[-1])] += count
    return found


def _name(frame: str) -> str:
    """``function (file.py)``: line numbers, folders and digests left out."""
    place = _PLACE.search(frame)
    if place is None:
        return frame
    function, file = frame[: place.start()], place.group(1)
    if _DIGEST.fullmatch(file):
        return "compiled pieces (Inductor)"
    return f"{function} ({'emitted' if file.startswith('<piecework:') else file})"


def profile(
    contender: str, layers: int, batch: int, registration: str, seconds: float, native: bool
) -> Table:
    """Sample one contender and lay the result out."""
    torch.set_num_threads(1)
    calls = calls_for(layers, registration)
    if contender not in calls:
        raise PieceworkError(f"there is no contender {contender!r}", hint=", ".join(calls))
    call, ids = calls[contender], token_ids(batch)
    with torch.no_grad():
        for _ in range(50):
            call(ids)
        start = time.thread_time()
        for _ in range(50):
            call(ids)
        each = (time.thread_time() - start) / 50
        stacks = sample(lambda: call(ids), seconds, native=native)
    counts = by_function(stacks)
    total = sum(counts.values())
    table = Table(title=f"{contender}: {each * 1e6:.0f} µs a call, {total} samples")
    for name in ("share", "µs a call", "function"):
        table.add_column(name, justify="left" if name == "function" else "right")
    for function, count in counts.most_common(25):
        share = count / total
        table.add_row(f"{share:.1%}", f"{share * each * 1e6:.1f}", function)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample each contender and print its table."""
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.profile", description=__doc__)
    parser.add_argument("contenders", nargs="+", help="such as conventional, piecework, limit")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--op", choices=sorted(REGISTRATIONS), default="custom_op")
    parser.add_argument("--seconds", type=float, default=10.0, help="of sampling, per contender")
    parser.add_argument("--native", action="store_true", help="show C and C++ functions as well")
    options = parser.parse_args(arguments)
    console = Console(width=140)
    for contender in options.contenders:
        console.print(
            profile(
                contender,
                options.layers,
                options.batch,
                options.op,
                options.seconds,
                options.native,
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
