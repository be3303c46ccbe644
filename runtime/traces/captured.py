"""What is captured of a model's traces. In: batch sizes and options. Out: static graphs of each trace that is captured, given up and captured again, and what they say together.

What one trace captures, and how it is served, is the business of `piecework.runtime.graphs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from piecework.errors import ConfigError, NotThereError, RankError
from piecework.runtime import torch_compat
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import require_whole_number, sizes_to_capture
from piecework.runtime.config.groups import RuntimeConfig
from piecework.runtime.pieces.ranks import runs_alone
from piecework.runtime.traces.traces import Traces

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import Coverage
    from piecework.runtime.graphs.plan.options import CaptureOptions
    from piecework.runtime.graphs.plan.phase import CaptureWatcher
    from piecework.runtime.graphs.serve.measured import Measurement
    from piecework.runtime.graphs.serve.model import CapturedModel
    from piecework.runtime.graphs.serve.report import CallRow, MemoryReport


class CapturedTraces:
    """The static graphs of a model's traces; methods are those of `StitchedModule`.

    Attributes:
        again: captures what the last `capture` did; None if there was none.
        none_was_worth: the last that was asked for was measured, and no graph of it was kept.
    """

    def __init__(self, traces: Traces, runtime_config: RuntimeConfig | None) -> None:
        self._traces = traces
        self._runtime_config = runtime_config
        self.again: Callable[[], object] | None = None
        self.none_was_worth = False

    def all(self) -> list[CapturedModel]:
        """The static graphs of each trace that has some, one at least.

        Raises:
            BindError: nothing is captured.
        """
        found = [each.static for each in self._traces.made if each.static is not None]
        if not found:
            raise self._nothing()
        return found

    def calls(self) -> list[CallRow]:
        """What calls ran as: those of traces that have static graphs, or of all where none has.

        Raises:
            BindError: nothing is compiled.
        """
        made = self._traces.made
        if not made:
            raise self._nothing()
        captured = [each for each in made if each.static is not None]
        return [row for each in captured or made for row in each.calls()]

    def _nothing(self) -> NotThereError:
        if self.none_was_worth:
            return NotThereError(
                "nothing is captured: of the sizes that were measured, each was slower from a graph",
                hint="capture(sizes) captures them nevertheless",
            )
        return NotThereError(
            "nothing is captured",
            where=None if self._traces.made else torch_compat.compiler_off(),
            hint="call capture(sizes) first" if self.again is None else "call wake_up()",
        )

    def capture(
        self,
        sizes: Iterable[int] | None,
        *,
        memory_budget: int | None = None,
        progress: bool | CaptureWatcher = True,
        estimate: bool = True,
        **options: object,
    ) -> None:
        from piecework.runtime.graphs.plan.options import CaptureOptions

        if not self._traces.made and self._traces.switched_off():
            return
        self._traces.require("graph to capture")
        sizes = sizes_to_capture(sizes)
        if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 0):
            raise ConfigError(
                f"a memory budget is a number of bytes; got {memory_budget!r}",
                where="memory_budget",
            )
        if type(progress) is not bool and not hasattr(progress, "started"):
            raise ConfigError(f"progress is True, False or a watcher; got {progress!r}")
        runtime = options.setdefault("runtime", self._runtime_config)
        if runtime is not None:
            options["runtime"] = RuntimeConfig.given(runtime, "runtime")
        for each in self._traces.made:
            each.entry.require_idle("capture()")
        wish = CaptureOptions.given(options)
        wanted = None if sizes is None else list(sizes)
        with self._traces.changes.one("capture()"):
            self.none_was_worth = False
            before, self.again = self.again, partial(
                self.capture,
                sizes,
                memory_budget=memory_budget,
                progress=False,
                estimate=False,
                **options,
            )
            try:
                self._capture(wanted, wish, memory_budget, progress, estimate)
            except BaseException:
                if not any(each.static for each in self._traces.made):
                    self.again = before  # nothing is captured, and would not be by trying again
                raise

    def _capture(
        self,
        wanted: list[int] | None,
        wish: CaptureOptions,
        memory_budget: int | None,
        progress: bool | CaptureWatcher,
        estimate: bool,
    ) -> None:
        """Capture the trace of one row, if there is one, and that of the other sizes."""
        first, *_ = self._traces.made
        single = self._traces.of_one(wanted, wish)
        if single is not None:
            captured = single.capture_graphs(
                [1],
                wish,
                memory_budget=memory_budget,
                progress=progress,
                estimate=estimate,
                fixed=first.batch_of_one(),
            )
            wanted = None if wanted is None else [size for size in wanted if size != 1]
            memory_budget = memory_budget and memory_budget - captured.graphs.nbytes
        if wanted != []:
            first.capture_graphs(
                wanted, wish, memory_budget=memory_budget, progress=progress, estimate=estimate
            )

    def sleep(self) -> None:
        with self._traces.changes.one("sleep()"), self._traces.lock:
            made = self._traces.made
            platforms = [each.static.graphs.platform for each in made if each.static]
            self._give_up()
            for platform in platforms:
                platform.release_cached_memory()

    def _give_up(self) -> None:
        for each in self._traces.made:
            each.give_up_graphs()

    def wake_up(self) -> None:
        if self.again is None:
            raise self._nothing()
        self.again()

    def measure(
        self, sizes: Iterable[int] | None, seconds: float, options: dict[str, Any]
    ) -> Measurement:
        from piecework.runtime.graphs.serve.measured import CAPTURED, Measurement

        made = self._traces.made
        if not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigError(f"seconds must be a positive number; got {seconds!r}")
        options.setdefault("progress", False)
        if not all(runs_alone(each.program, self._runtime_config) for each in made):
            raise RankError(
                "a model that several processes run together is not measured: each would call it as often as its own clock says",
                hint="measure one share of the model alone, and capture the sizes that are worth it on all ranks",
            )
        self.capture(sizes, **options)
        rows = [row for each in self._traces.made for row in each.measure(seconds=seconds)]
        found = Measurement(tuple(sorted(rows, key=lambda row: row.size)), self._device())
        worth = found.worth_capturing
        if any(row.best != CAPTURED for row in rows):
            self._give_up()
            self.again = None
            if worth:
                self.capture(worth, **options)
            self.none_was_worth = not worth
        return found

    def _device(self) -> str:
        held = (each.static.graphs for each in self._traces.made if each.static)
        return next((graphs.platform.device.type for graphs in held), "cpu")

    def dispatch(
        self, num_tokens: int, *kind: Any, **named: Any
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        require_whole_number(num_tokens)
        for each in self._traces.made:
            if each.static is not None and each.static.serves(num_tokens):
                return each.static.dispatcher.dispatch(num_tokens, *kind, **named)
        return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

    def coverage(self, largest: int | None) -> Coverage:
        from piecework.runtime.batch.coverage import Coverage

        captured = self.all()
        rows = [row for each in captured for row in each.coverage(largest)]
        why = next((each.unpadded for each in captured if each.unpadded), None)
        note = f"not padded: {why}" if why else ""
        return Coverage(sorted(rows, key=lambda row: row.first), note)

    def memory_report(self) -> MemoryReport:
        first, *others = (each.memory_report() for each in self.all())
        for other in others:
            first = replace(
                first, held={**other.held, **first.held}, dropped=(*first.dropped, *other.dropped)
            )
        return first
