"""Warm start against depth (B5).

An artifact is loaded with empty caches and no compiler on ``PATH``. Beside it: compiling cold; stock ``torch.compile`` with the caches that an earlier process filled, and with empty ones
that are filled from ``torch.compiler.save_cache_artifacts``; and a package of the whole model by AOTInductor. Importing torch is not counted.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import piecework
from piecework.bench.compile_time import build
from piecework.bench.measure.apart import apart
from piecework.bench.measure.line_up import command
from piecework.bench.measure.result import Result, Row, Target, machine

DEPTHS = (8, 32, 80)
# As tables and plots name them.
_COLD, _LOAD = "piecework, cold", "piecework.load"


def measure_here(contender: str, layers: str, folder: str) -> dict[str, object]:
    """Start one contender in this process; the caller chooses its caches.

    Args:
        contender: ``stock`` (which saves its caches), ``saved caches``, ``cold`` (which saves the artifact), ``load``, ``package`` (which only makes it) or ``aot``.
        folder: where the artifact lies; caches and package lie beside it.
    """
    saved, package = f"{folder}.caches", f"{folder}.pt2"
    model, x = build(int(layers))
    with torch.no_grad():
        expected = model(x)
    start, processor = time.perf_counter(), time.process_time()
    parts: dict[str, float] = {}
    if contender == "package":
        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        return {}
    if contender == "aot":
        compiled = torch._inductor.aoti_load_package(package)
    elif contender in ("stock", "saved caches"):
        if contender == "saved caches":
            torch.compiler.load_cache_artifacts(Path(saved).read_bytes())
            parts["load caches"] = time.perf_counter() - start
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
    else:
        importlib.import_module("piecework.runtime.compile")
        parts["import"] = time.perf_counter() - start
        if contender == "cold":
            compiled = piecework.compile(model, (x,))
        else:
            compiled = piecework.load(folder, model)
            parts |= compiled.report().phases
    called = time.perf_counter()
    with torch.no_grad():
        result = compiled(x)
    end, used = time.perf_counter(), time.process_time() - processor
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    if contender == "cold":
        compiled.save(folder)
    if contender == "stock":
        made = torch.compiler.save_cache_artifacts()
        assert made is not None
        Path(saved).write_bytes(made[0])
    parts["first call"] = end - called
    return {"seconds": end - start, "processor": used, "parts": parts}


def measure(contender: str, depth: int, folder: Path, caches: str) -> Any:
    """One start in a process of its own, with caches below ``folder``."""
    no_compiler = {"PATH": str(folder / "nothing"), "CXX": ""} if contender == "load" else {}
    arguments = [contender, str(depth), str(folder / f"artifact_{depth}")]
    return apart("piecework.bench.warm_start", arguments, folder / caches, **no_compiler)


def run(layers: Sequence[int] = DEPTHS) -> Result:
    rows: list[Row] = []
    targets: list[Target] = []
    for depth in layers:
        with tempfile.TemporaryDirectory(prefix="piecework-bench-") as name:
            folder = Path(name)
            found = {_COLD: measure("cold", depth, folder, "first")}
            measure("stock", depth, folder, "filled")
            found["stock, caches filled"] = measure("stock", depth, folder, "filled")
            found["stock, caches saved"] = measure("saved caches", depth, folder, "saved")
            measure("package", depth, folder, "packaged")
            found["AOTInductor"] = measure("aot", depth, folder, "empty")
            found[_LOAD] = measure("load", depth, folder, "empty")
        seconds = {key: each["seconds"] for key, each in found.items()}
        for contender, each in found.items():
            note = ", ".join(f"{part} {took:.3f}" for part, took in each["parts"].items())
            ratio = seconds[contender] / seconds[_COLD]
            text = f"{note}; processor {each['processor']:.2f}"
            rows.append(
                Row({"layers": depth}, contender, seconds[contender], {"cold": ratio}, text)
            )
        if depth >= 32:
            of_cold = seconds[_LOAD] / seconds[_COLD]
            targets.append(Target("B5", f"{depth} layers, seconds", 1.0, seconds[_LOAD]))
            targets.append(Target("B5", f"{depth} layers, of a cold start", 0.05, of_cold))
    return Result("Warm start against depth", tuple(rows), tuple(targets), machine(), unit="s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``warm_start.json`` and a plot; 1 if a target is missed."""
    return command(run, arguments, measure_here)


if __name__ == "__main__":
    raise SystemExit(main())
