"""Figures of the GPU benchmark.

What is cut off in the middle leaves what it had.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from piecework.bench.decoder import EIGHT_B, TINY, DecoderShape
from piecework.bench.measure.result import Row, Target
from piecework.errors import PieceworkError
from piecework.runtime.batch.sizes import default_capture_sizes

Step = Callable[[], object]
Clock = Callable[[Step, str], float]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is, and until when there is time."""

    device: str
    # compiles the pieces of the parts that compare ways to replay; the kernels are the same for all
    backend: str
    compiler: str  # compiles where compiling is what is looked at
    shape: DecoderShape
    layers: tuple[int, ...]
    deep_layers: tuple[int, ...]
    batches: tuple[int, ...]
    capture_layers: int
    capture_sizes: tuple[int, ...]
    rounds: int
    llama: Mapping[str, int]
    tokens: int
    out: Path | None = None
    deadline: float = math.inf  # by `time.monotonic`

    @property
    def in_time(self) -> bool:
        return time.monotonic() < self.deadline


_SIZES = ["vocab_size", "hidden_size", "intermediate_size"]
_SIZES += ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
_ONE_B = dict(zip(_SIZES, (32000, 2048, 8192, 16, 32, 8), strict=True))
_SMALL = dict(zip(_SIZES, (97, 32, 64, 2, 4, 2), strict=True))
_CAPTURED = default_capture_sizes(272)[:35]
FULL = Scale(
    *("cuda", "eager", "inductor", EIGHT_B, (32,), (80,), (1, 8, 64), 32, _CAPTURED, 60, _ONE_B, 64)
)
QUICK = Scale("cpu", "eager", "eager", TINY, (2,), (4,), (1, 4), 3, (1, 2, 4, 8), 3, _SMALL, 4)


class Rows:
    """What one part found.

    Args:
        part: its name.
        out: folder of ``gpu.jsonl``, to which lines are added; None for none.

    Attributes:
        clean: nothing failed, and no target was missed.
    """

    def __init__(self, part: str, out: Path | None) -> None:
        self.part, self._file = part, None if out is None else out / "gpu.jsonl"
        self.failed = self.missed = False
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)

    def _save(self, kind: str, values: Mapping[str, object]) -> None:
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"part": self.part, "kind": kind, **values}) + "\n")

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            setting = " ".join(f"{key}={value}" for key, value in row.setting.items())
            ratios = "  ".join(f"{ratio:.3f}× {name}" for name, ratio in row.ratios.items())
            print(
                f"{self.part}  {setting}  {row.contender}: {_readable(row.seconds)}  {ratios}  {row.note}",
                flush=True,
            )
            seconds = None if math.isnan(row.seconds) else row.seconds
            self._save("row", {**asdict(row), "seconds": seconds})

    def targets(self, targets: Iterable[Target]) -> None:
        for target in targets:
            sign, word = "≤" if target.at_most else "≥", "met" if target.met else "MISSED"
            print(
                f"{self.part}  {target.name} {word}: {target.text}: {target.measured:.3f} ({sign} {target.bound:g})",
                flush=True,
            )
            self.missed |= not target.met
            self._save("target", {**asdict(target), "met": target.met})

    def note(self, text: str) -> None:
        print(f"{self.part}  {text}", flush=True)
        self._save("note", {"text": text})

    @contextmanager
    def attempt(self, setting: Mapping[str, object], contender: str) -> Iterator[None]:
        """Whatever fails in the block becomes a row of this contender that says why."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - it is told, and the next goes on
            traceback.print_exc()
            sys.stderr.flush()
            self.failed = True
            why = f"{type(error).__name__}: {error}"[:500]
            self.add([Row(dict(setting), contender, math.nan, note=f"failed: {why}")])
            try:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except RuntimeError:
                raise SystemExit(f"{self.part}: the device is lost: {why}") from error


def _readable(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    return f"{seconds * 1e6:.1f} µs" if seconds < 0.01 else f"{seconds:.3f} s"


def checked(step: Step, expected: torch.Tensor) -> Step:
    """``step``, which returns what the plain model returns, the first time and again.

    Raises:
        PieceworkError: it doesn't.
    """
    low = expected.dtype in (torch.bfloat16, torch.float16)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if low else {"rtol": 1e-4, "atol": 1e-4}
    for _ in range(2):
        got = step()
        if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
            raise PieceworkError(f"returns no tensor of shape {list(expected.shape)}")
        if not torch.allclose(got, expected, **tolerance):
            worst = (got.float() - expected.float()).abs().max().item()
            raise PieceworkError(f"differs from the plain model, by {worst} at most")
    return step


def times(
    contenders: Mapping[str, Step],
    scale: Scale,
    seconds: Clock,
    rows: Rows,
    setting: Mapping[str, object],
) -> dict[str, float]:
    """The median of each contender over interleaved rounds, the order alternating."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(scale.rounds):
        order = list(found) if index % 2 == 0 else list(reversed(found))
        for name in order:
            value = None
            with rows.attempt(setting, name):
                value = seconds(contenders[name], scale.device)
            if value is None:
                del found[name]
            else:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def timed_rows(setting: dict[str, object], found: Mapping[str, float], reference: str) -> list[Row]:
    """A row for each contender, with how many times the reference's time it takes."""
    base = found.get(reference)
    return [
        Row(setting, name, seconds, {} if base is None else {reference: seconds / base})
        for name, seconds in found.items()
    ]


def targets_of(
    where: str, asked: Iterable[tuple[str, str, float, Mapping[str, float], str, str, bool]]
) -> tuple[Target, ...]:
    """Targets for quotients of two contenders' times; of those that failed there are none.

    Args:
        asked: the target's name, what is compared, the bound, times by contender, the two contenders, and whether the bound is an upper one.
    """
    return tuple(
        Target(name, f"{text}, {where}", bound, found[one] / found[other], at_most=at_most)
        for name, text, bound, found, one, other, at_most in asked
        if one in found and other in found
    )


def host_seconds(step: Step, device: str) -> float:
    """How long the host is busy with one step, the device being idle before."""
    step()
    synchronize(device)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def step_seconds(step: Step, device: str) -> float:
    """How long a step takes in a row of them, host and device overlapping as they can."""
    repeat = 5
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
