"""B8 to B11: captured pieces on a GPU. In: a device. Out: host time, step time, staging and capture, each against its contenders.

A part that fails is reported and does not hide the others. Without a GPU, ``--device cpu --quick`` only shows that it runs.

Run it with ``python -m piecework.bench.gpu``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from piecework.bench.gpu_model import PiecewiseForward
from piecework.bench.result import Result, Row, Target, machine
from piecework.errors import PieceworkError, UsageError
from piecework.runtime.graphs.capture import format_bytes
from piecework.runtime.graphs.sizes import default_capture_sizes
from piecework.runtime.inputs import StaticInputs

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is."""

    device: str
    layers: tuple[int, ...]
    width: int
    batches: tuple[int, ...]
    capture_layers: int
    capture_sizes: tuple[int, ...]
    rounds: int


FULL = Scale("cuda", (32, 80), 4096, (1, 8, 64), 32, default_capture_sizes(272)[:35], 200)
QUICK = Scale("cpu", (2,), 32, (1, 4), 3, (1, 2, 4, 8), 5)


@torch.no_grad()
def host_and_step_time(scale: Scale) -> Result:
    """B8 and B9: a decode step by wrappers, by a bare replay loop, and as one graph."""
    rows = []
    for layers in scale.layers:
        model = PiecewiseForward(layers, scale.width, scale.batches, scale.device)
        model.capture()
        for batch in scale.batches:
            contenders = {
                "bare loop": model.bare(batch),
                "wrappers": model.by_wrappers(batch, whole=False),
                "one graph": model.by_wrappers(batch, whole=True),
            }
            _check(model, batch, contenders)
            setting: dict[str, object] = {"layers": layers, "batch": batch}
            host = _times(contenders, scale, _host_seconds)
            whole = _times(contenders, scale, _step_seconds)
            rows += _rows({**setting, "what": "host"}, host, "bare loop")
            rows += _rows({**setting, "what": "step"}, whole, "one graph")
    note = "What wrappers take over the bare loop is what the targets B8 and B9 leave to win."
    return Result("B8, B9: one decode step", tuple(rows), (), _machine(), (note,))


@torch.no_grad()
def staging(scale: Scale) -> Result:
    """B10: eight inputs into static buffers, padded, by one launch and by a copy and a fill each."""
    dtypes = [torch.int64, torch.int32] * 4
    examples = {
        f"input {i}": torch.zeros(1, dtype=d, device=scale.device) for i, d in enumerate(dtypes)
    }
    kinds = ("triton", "reference") if scale.device == "cuda" else ("reference",)
    staged = {k: StaticInputs.allocate(examples, 256, kernel=k) for k in kinds}
    rows, targets = [], []
    for count, padded in ((1, 1), (37, 40), (250, 256)):
        tensors = [torch.arange(count, device=scale.device).to(d) for d in dtypes]
        results = [inputs.stage(tensors, padded) for inputs in staged.values()]
        for one, other in zip(results[0], results[-1], strict=True):
            if not torch.equal(one, other):
                raise PieceworkError(f"staging {count} rows differs between {kinds}")
        contenders = {kind: _stager(staged[kind], tensors, padded) for kind in kinds}
        found = _times(contenders, scale, _step_seconds)
        rows += _rows({"rows": count, "padded": padded}, found, kinds[-1])
        if "triton" in found:
            gain = found["reference"] / found["triton"]
            targets.append(Target("B10", f"times faster at {count} rows", 3.0, gain, at_most=False))
    return Result("B10: staging eight inputs", tuple(rows), tuple(targets), _machine())


@torch.no_grad()
def capture(scale: Scale) -> Result:
    """B11: time and memory of capturing many sizes of many pieces, against what was foretold."""
    model = PiecewiseForward(scale.capture_layers, scale.width, scale.capture_sizes, scale.device)
    start = time.perf_counter()
    estimate = model.estimate()
    rows = [Row({"step": "estimate"}, "piecework", time.perf_counter() - start)]
    report = model.capture()
    pieces = sum(outcome.pieces for outcome in report.outcomes)
    note = f"{pieces} graphs, {format_bytes(report.nbytes)}"
    rows.append(Row({"step": "capture"}, "piecework", report.seconds, note=note))
    deviation = abs(estimate.total / max(1, report.nbytes) - 1)
    text = f"deviation of the estimate ({format_bytes(estimate.total)})"
    targets = (Target("B11", text, 0.1, deviation),)
    return Result("B11: capture", tuple(rows), targets, _machine(), unit="s")


PARTS: Mapping[str, Callable[[Scale], Result]] = {
    "steps": host_and_step_time,
    "staging": staging,
    "capture": capture,
}


def _stager(
    inputs: StaticInputs, tensors: Sequence[torch.Tensor], padded: int
) -> Callable[[], object]:
    return lambda: inputs.stage(tensors, padded)


def _check(model: PiecewiseForward, batch: int, contenders: Mapping[str, Step]) -> None:
    """Every contender returns what the plain forward returns, before anything is timed."""
    x = model.inputs.views(batch)[0]
    x.normal_()
    want = model.plain(x.clone())
    for name, step in contenders.items():
        for _ in range(2):
            got = step()
        if not isinstance(got, torch.Tensor) or not torch.allclose(
            got[:batch], want, rtol=1e-2, atol=1e-2
        ):
            raise PieceworkError(f"{name} differs from the plain forward at batch {batch}")


def _times(
    contenders: Mapping[str, Step], scale: Scale, seconds: Callable[[Step, str], float]
) -> dict[str, float]:
    """The median of each contender over interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(scale.rounds):
        for name, step in contenders.items():
            found[name].append(seconds(step, scale.device))
    return {name: statistics.median(values) for name, values in found.items()}


def _host_seconds(step: Step, device: str) -> float:
    """How long the host is busy with one step, the device being idle before."""
    _synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _step_seconds(step: Step, device: str) -> float:
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
    """Run every part; 1 if one failed or missed a target, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m piecework.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder for JSON and plots")
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        error = UsageError(
            "there is no CUDA device", hint="--device cpu --quick shows that it runs"
        )
        print(f"UsageError: {error}", file=sys.stderr)
        return 2
    size = QUICK if options.quick else FULL
    scale = Scale(**{**_fields(size), "device": options.device})
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
        clean &= result.met
        for path in [] if options.out is None else result.save(options.out, f"gpu_{name}"):
            print(f"wrote {path}")
    return 0 if clean else 1


def _fields(scale: Scale) -> dict[str, object]:
    return {name: getattr(scale, name) for name in Scale.__slots__}


if __name__ == "__main__":
    raise SystemExit(main())
