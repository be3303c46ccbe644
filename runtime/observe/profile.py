"""Where a forward spends its time, as a table or a trace file, by torch's profiler.

The profiler's own cost is in every row; compare rows with each other.
"""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from piecework.errors import UsageError
from piecework.runtime import torch_compat
from piecework.runtime.batch.coverage import aligned

_KERNEL = re.compile(r"^\s+(?:cpp_fused\w*|cpp_\w*|triton_\w+\.run)\(", re.MULTILINE)
_EXTERNAL = re.compile(
    r"^\s+(?:\w+ = )?(?:extern_kernels\.\w+|(?:torch\.ops|aten)\.[\w.]+)\(", re.MULTILINE
)


class StageRow(NamedTuple):
    """One stage of a forward."""

    name: str  # the piece, with the modules in it, or the operator
    calls: float  # how often it ran in a forward
    microseconds: float  # time of one forward in it, on the host
    device_microseconds: float  # the same on the device; 0 without one
    bytes: float  # memory that one forward allocates in it and leaves allocated at its end
    # launches of generated kernels in its code; None where the code is not known
    kernels: int | None = None
    external: int | None = None  # calls of library kernels in its code, likewise


@dataclass(frozen=True, slots=True)
class Profile:
    """A forward by stages, slowest first; ``str()`` gives the table."""

    rows: tuple[StageRow, ...]  # pieces and operators
    forward_microseconds: float  # one forward, profiler off
    calls: int  # how many forwards were profiled

    def __str__(self) -> str:
        total = sum(row.microseconds for row in self.rows) or 1.0
        cells = [("stage", "calls", "µs", "share", "device µs", "bytes", "kernels", "external")]
        for name, calls, host, device, held, *launches in self.rows:
            times = f"{host:.1f}", f"{host / total:.0%}", f"{device:.1f}" if device else ""
            counts = ["" if number is None else str(number) for number in launches]
            cells.append((name, f"{calls:g}", *times, f"{held:.0f}", *counts))
        head = f"{self.forward_microseconds:.0f} µs a forward without the profiler; "
        return f"{head}{self.calls} profiled\n{aligned(cells)}"


def profile_calls(
    call: Callable[[], object],
    named: AbstractContextManager[object],
    stages: Mapping[str, Sequence[str]],
    calls: int,
) -> Profile:
    """Run ``call`` ``calls`` times plainly and as often under torch's profiler."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    each = (time.perf_counter() - start) / calls
    with named:
        with torch.profiler.profile(activities=_activities(), profile_memory=True):
            call()  # what a process's first profiler sets up is no part of a forward
        with torch.profiler.profile(activities=_activities(), profile_memory=True) as profiler:
            for _ in range(calls):
                call()
    found = {event.key: event for event in profiler.key_averages()}
    rows = []
    for name, sources in stages.items():
        event = found.get(name)
        if event is None:
            continue
        texts = "\n".join(sources)
        row = StageRow(
            name=name,
            calls=event.count / calls,
            microseconds=event.cpu_time_total / calls,
            device_microseconds=event.device_time_total / calls,
            bytes=(event.cpu_memory_usage + event.device_memory_usage) / calls,
            kernels=len(_KERNEL.findall(texts)) if texts else None,
            external=len(_EXTERNAL.findall(texts)) if texts else None,
        )
        rows.append(row)
    rows.sort(key=lambda row: -row.microseconds)
    return Profile(tuple(rows), each * 1e6, calls)


def require_writable(path: Path) -> None:
    """Raise `UsageError` unless ``path`` can be a file of a folder that is there."""
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder", hint="name a file, such as trace.json")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {str(path.absolute().parent)!r} to write into")


def write_trace(
    path: Path, call: Callable[[], object], named: Iterable[AbstractContextManager[object]]
) -> Counter[str]:
    """Run ``call`` under torch's profiler and write what it saw as a trace for Perfetto."""
    require_writable(path)
    with ExitStack() as stack:
        for each in named:
            stack.enter_context(each)
        with torch.profiler.profile(activities=_activities()) as profiler:
            call()
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.absolute().parent) as folder:
            written = Path(folder) / path.name
            profiler.export_chrome_trace(str(written), **torch_compat.marks_for_trace())
            written.replace(path)
    except OSError as error:
        raise UsageError(f"can't write {str(path)!r}: {error.strerror}") from error
    return Counter({event.key: event.count for event in profiler.key_averages()})


def _activities() -> list[torch.profiler.ProfilerActivity]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return activities
