"""B8 to B11: captured pieces on a GPU. In: a device. Out: host time, step time, staging and capture, each against its contenders and targets.

A part that fails is reported and does not hide the others. Without a GPU, ``--device cpu --quick`` runs every line of it at a tiny
scale on the CPU's static graphs: it shows that it works, and its figures say nothing.

Run it with ``python -m piecework.bench.gpu``; it takes some ten minutes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from piecework.bench.gpu_contenders import Contenders, stitch
from piecework.bench.gpu_model import EIGHT_B, TINY, DecoderShape, build, token_ids
from piecework.bench.result import Result, Row, Target, machine
from piecework.errors import PieceworkError, UsageError
from piecework.runtime.batch.sizes import default_capture_sizes
from piecework.runtime.graphs.plan.phase import format_bytes
from piecework.runtime.graphs.stage.inputs import StaticInputs

Step = Callable[[], object]
Clock = Callable[[Step, str], float]

B8_BARE, B8_CONVENTIONAL = 1.05, 1.5
B9_WHOLE, B9_BARE = 1.02, 1.03
B10, B11 = 3.0, 0.1


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    device: str
    backend: str
    shape: DecoderShape
    layers: tuple[int, ...]
    batches: tuple[int, ...]
    capture_layers: int
    capture_sizes: tuple[int, ...]
    rounds: int


FULL = Scale(
    "cuda", "eager", EIGHT_B, (32, 80), (1, 8, 64), 32, default_capture_sizes(272)[:35], 60
)
QUICK = Scale("cpu", "eager", TINY, (2,), (1, 4), 3, (1, 2, 4, 8), 3)


@torch.no_grad()
def steps(scale: Scale) -> Result:
    """B8 and B9: one decode step, by every contender."""
    rows: list[Row] = []
    targets: list[Target] = []
    for layers in scale.layers:
        model = build(layers, scale.shape, scale.device)
        ids = token_ids(max(scale.batches), scale.shape, scale.device)
        found = Contenders(model, ids, scale.batches, scale.backend)
        for batch in scale.batches:
            contenders = found.steps(batch)
            check_equal(contenders, model(ids[:batch]))
            host = times(contenders, scale, host_seconds)
            whole = times(contenders, scale, step_seconds)
            setting: dict[str, object] = {"layers": layers, "batch": batch}
            rows += _rows({**setting, "what": "host"}, host, "bare loop")
            rows += _rows({**setting, "what": "step"}, whole, "one graph")
            targets += step_targets(f"{layers} layers, batch {batch}", host, whole)
        del model, found, contenders
        torch.compiler.reset()  # it holds what it compiled, and so the weights
    note = "Host: time until the step is queued, the device being idle before. Step: time of one in a row of them."
    return Result("B8, B9: one decode step", tuple(rows), tuple(targets), _machine(), (note,))


def step_targets(
    where: str, host: Mapping[str, float], whole: Mapping[str, float]
) -> tuple[Target, ...]:
    """B8 and B9 of one setting, from the times of each contender.

    Example:
        >>> host = {"bare loop": 100.0, "piecework": 104.0, "conventional": 208.0}
        >>> whole = {"bare loop": 100.0, "piecework": 101.0, "one graph": 100.0}
        >>> [(target.name, target.measured, target.met) for target in step_targets("here", host, whole)]
        [('B8', 1.04, True), ('B8', 2.0, True), ('B9', 1.01, True), ('B9', 1.01, True)]
    """
    ours = host["piecework"]
    return (
        Target("B8", f"host time over the bare loop, {where}", B8_BARE, ours / host["bare loop"]),
        Target(
            "B8",
            f"conventional's host time over ours, {where}",
            B8_CONVENTIONAL,
            host["conventional"] / ours,
            at_most=False,
        ),
        Target(
            "B9",
            f"step over one graph, {where}",
            B9_WHOLE,
            whole["piecework"] / whole["one graph"],
        ),
        Target(
            "B9",
            f"step over the bare loop, {where}",
            B9_BARE,
            whole["piecework"] / whole["bare loop"],
        ),
    )


def check_equal(contenders: Mapping[str, Step], expected: torch.Tensor) -> None:
    """Every contender returns what the plain model returns, the first time and again, before anything is timed.

    Raises:
        PieceworkError: one doesn't; the message names it.
    """
    low = expected.dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if low else {"rtol": 1e-4, "atol": 1e-4}
    for name, step in contenders.items():
        for _ in range(2):
            got = step()
            if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
                raise PieceworkError(f"{name} returns no tensor of shape {list(expected.shape)}")
            if not torch.allclose(got, expected, **tolerance):
                raise PieceworkError(f"{name} differs from the plain model")


@torch.no_grad()
def staging(scale: Scale) -> Result:
    """B10: eight inputs into static buffers, padded, by one launch and by a copy and a fill each."""
    dtypes = [torch.int64, torch.int32] * 4
    examples = {
        f"input {i}": torch.zeros(1, dtype=d, device=scale.device) for i, d in enumerate(dtypes)
    }
    kinds = ("triton", "reference") if scale.device == "cuda" else ("reference",)
    staged = {kind: StaticInputs.allocate(examples, 256, kernel=kind) for kind in kinds}
    rows, targets = [], []
    for count, padded in ((1, 1), (37, 40), (250, 256)):
        tensors = [torch.arange(count, device=scale.device).to(d) for d in dtypes]
        results = [inputs.stage(tensors, padded) for inputs in staged.values()]
        for one, other in zip(results[0], results[-1], strict=True):
            if not torch.equal(one, other):
                raise PieceworkError(f"staging {count} rows differs between {kinds}")
        contenders = {kind: _stager(staged[kind], tensors, padded) for kind in kinds}
        found = times(contenders, scale, step_seconds)
        rows += _rows({"rows": count, "padded": padded}, found, kinds[-1])
        if "triton" in found:
            gain = found["reference"] / found["triton"]
            targets.append(Target("B10", f"times faster at {count} rows", B10, gain, at_most=False))
    return Result("B10: staging eight inputs", tuple(rows), tuple(targets), _machine())


def launches(scale: Scale) -> Result:
    """B10: how many kernels and copies the device runs to stage eight inputs."""
    examples = {f"input {i}": torch.zeros(1, device=scale.device) for i in range(8)}
    tensors = [torch.ones(37, device=scale.device) for _ in range(8)]
    kinds = ("triton", "reference") if scale.device == "cuda" else ("reference",)
    rows, targets = [], []
    for kind in kinds:
        inputs = StaticInputs.allocate(examples, 64, kernel=kind)
        inputs.stage(tensors, 40)
        _synchronize(scale.device)
        with torch.profiler.profile() as profile:
            start = time.perf_counter()
            inputs.stage(tensors, 40)
            _synchronize(scale.device)
            seconds = time.perf_counter() - start
        on_gpu = torch.autograd.DeviceType.CUDA
        count = sum(event.device_type == on_gpu for event in profile.events())
        rows.append(Row({"inputs": 8}, kind, seconds, note=f"{count} on the device"))
        if kind == "triton":
            targets.append(Target("B10", "launches that stage eight inputs", 1, count))
    return Result("B10: launches", tuple(rows), tuple(targets), _machine())


@torch.no_grad()
def capture(scale: Scale) -> Result:
    """B11: time and memory of capturing many sizes of many pieces, against what was foretold."""
    model = build(scale.capture_layers, scale.shape, scale.device)
    ids = token_ids(max(scale.capture_sizes), scale.shape, scale.device)
    stitched = stitch(model, ids, scale.backend)
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.enable()
    stitched.capture(scale.capture_sizes, progress=False)
    profile.disable()
    total = time.perf_counter() - start
    static = stitched.static_graphs
    report, memory = static.report, stitched.memory_report()
    if report is None or memory.estimate is None:
        raise PieceworkError("the capture left no report")
    pieces = sum(outcome.pieces for outcome in report.outcomes)
    note = f"{pieces} graphs, {format_bytes(report.nbytes)}"
    rows = (
        Row({"step": "estimate, and replay source"}, "piecework", total - report.seconds),
        Row({"step": "capture"}, "piecework", report.seconds, note=note),
    )
    deviation = abs(memory.estimate.total / max(1, report.nbytes) - 1)
    text = f"deviation of the estimate ({format_bytes(memory.estimate.total)})"
    targets = [Target("B11", text, B11, deviation)]
    if scale.device == "cuda":
        share = _seconds_in(profile, "capture_end") / total
        text = "share of the time in the driver, which instantiates when a capture ends"
        targets.append(Target("B11", text, 0.5, share, at_most=False))
    return Result("B11: capture", rows, tuple(targets), _machine(), unit="s")


PARTS: Mapping[str, Callable[[Scale], Result]] = {
    "steps": steps,
    "staging": staging,
    "launches": launches,
    "capture": capture,
}


def _seconds_in(profile: cProfile.Profile, function: str) -> float:
    """Cumulated seconds in functions of that name."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return sum(row[3] for (_, _, name), row in stats.items() if name == function)


def _stager(
    inputs: StaticInputs, tensors: Sequence[torch.Tensor], padded: int
) -> Callable[[], object]:
    return lambda: inputs.stage(tensors, padded)


def times(contenders: Mapping[str, Step], scale: Scale, seconds: Clock) -> dict[str, float]:
    """The median of each contender over interleaved rounds, the order alternating."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for index in range(scale.rounds):
        for name in order if index % 2 == 0 else reversed(order):
            found[name].append(seconds(contenders[name], scale.device))
    return {name: statistics.median(values) for name, values in found.items()}


def host_seconds(step: Step, device: str) -> float:
    """How long the host is busy with one step, the device being idle before."""
    step()
    _synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def step_seconds(step: Step, device: str) -> float:
    """How long a step takes in a row of them, host and device overlapping as they can."""
    repeat = 5
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / repeat


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _rows(setting: dict[str, object], found: Mapping[str, float], reference: str) -> list[Row]:
    return [
        Row(setting, name, seconds, {reference: seconds / found[reference]})
        for name, seconds in found.items()
    ]


def _machine() -> dict[str, object]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {**machine(), "gpu": device}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every part; 1 if one failed or missed a target, 2 without a GPU.

    On the CPU no target is held against anything.
    """
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for JSON and plots")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backend", default="eager", help="what compiles the pieces")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        error = UsageError(
            "there is no CUDA device",
            hint="python -m piecework.bench.gpu --device cpu --quick shows that it runs",
        )
        print(f"UsageError: {error}", file=sys.stderr)
        return 2
    size = QUICK if options.quick else FULL
    scale = replace(size, device=options.device, backend=options.backend)
    clean = True
    for name in PARTS if options.part == "all" else (options.part,):
        try:
            result = PARTS[name](scale)
        except Exception:  # noqa: BLE001 - one part must not hide the others
            traceback.print_exc()
            print(f"{name}: failed", file=sys.stderr)
            clean = False
            continue
        result.print()
        clean &= result.met or options.device == "cpu"
        for path in [] if options.out is None else result.save(options.out, f"gpu_{name}"):
            print(f"wrote {path}")
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
