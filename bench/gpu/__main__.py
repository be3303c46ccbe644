"""B8 to B11 and what else only a GPU tells.

A contender that fails costs its own rows, a part that fails only itself. Without a GPU, ``--device cpu --quick`` runs every line at a
tiny scale on the CPU's static graphs: it shows that it works, and its figures say nothing. ``python bench/on_gpu.py`` runs the tests of
``tests/gpu`` and then each part in a process of its own, from a plain checkout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from piecework.bench.gpu.parts import PARTS
from piecework.bench.gpu.rows import FULL, QUICK, Rows
from piecework.bench.measure.result import machine
from piecework.errors import UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, or all.

    On the CPU no target is held against anything.
    """
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for gpu.jsonl")
    parser.add_argument("--part", choices=[*PARTS, "all"], nargs="+", default=["all"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", help="what compiles pieces where ways to replay are compared")
    parser.add_argument("--compiler", help="what compiles where compiling is looked at")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seconds", type=float, default=540, help="no setting begins after these")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        error = UsageError(
            "there is no CUDA device",
            hint="python -m piecework.bench.gpu --device cpu --quick shows that it runs",
        )
        print(f"UsageError: {error}", file=sys.stderr)
        return 2
    size = QUICK if options.quick else FULL
    scale = replace(
        size,
        device=options.device,
        backend=options.backend or size.backend,
        compiler=options.compiler or size.compiler,
        out=options.out,
        deadline=time.monotonic() + options.seconds,
    )
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none"
    about = "  ".join(f"{key}: {value}" for key, value in {**machine(), "gpu": gpu}.items())
    clean = True
    for name in PARTS if "all" in options.part else options.part:
        rows = Rows(name, options.out)
        if not scale.in_time:
            rows.note("no time left")
            continue
        rows.note(about)
        start = time.perf_counter()
        with rows.attempt({}, "the part"):
            PARTS[name](scale, rows)
        rows.note(f"took {time.perf_counter() - start:.0f} s")
        clean &= not rows.failed and (options.device == "cpu" or not rows.missed)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
