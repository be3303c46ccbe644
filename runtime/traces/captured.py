"""What is captured of a model's traces: static graphs of each, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self

from piecework.errors import ConfigError, NotThereError, RankError, short_methods
from piecework.runtime import torch_compat
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.batch.sizes import require_whole_number, sizes_to_capture
from piecework.runtime.config.groups import RuntimeConfig
from piecework.runtime.pieces.ranks import runs_alone
from piecework.runtime.traces.traced_model import TracedModel

if TYPE_CHECKING:
    from piecework.runtime.batch.coverage import Coverage
    from piecework.runtime.graphs.plan.options import CaptureOptions
    from piecework.runtime.graphs.plan.phase import CaptureWatcher
    from piecework.runtime.graphs.serve.model import CapturedModel
    from piecework.runtime.graphs.serve.report import CallRow, Measurement, MemoryReport


@short_methods
class Captures:
    """The part of a `StitchedModule` that captures its traces and serves static graphs."""

    traces: tuple[TracedModel, ...]
    runtime_config: RuntimeConfig | None
    _again: Callable[[], object] | None = None  # what the last `capture` did
    _none_was_worth = False  # the last that was asked for was measured, and no graph of it was kept
    _require: Callable[[str], tuple[TracedModel, ...]]
    _change: Callable[[str], AbstractContextManager[None]]
    _trace_of_one: Callable[[Sequence[int] | None, CaptureOptions], TracedModel | None]
    _switched_off: Callable[[], bool]
    _serve_by_captured: Callable[[], None]

    def capture(
        self,
        sizes: Iterable[int] | None = None,
        *,
        memory_budget: int | None = None,
        progress: bool | CaptureWatcher = True,
        estimate: bool = True,
        **options: object,
    ) -> Self:
        """Capture the pieces, the whole forward, or both as static graphs, per batch size.

        A call is padded to the next captured size where that is declared (``pad=True``), replayed
        by emitted source (``static_graphs.source_for``), and trimmed; others run as before.

        Args:
            sizes: batch sizes; by default the configuration's, or the usual steps.
            memory_budget: bytes that the captures may take; sizes that don't fit are dropped.
            progress: print the memory report and a progress bar; or a watcher of one's own.
            estimate: measure a few captures first, for the memory report.
            options: fields of `CaptureOptions`, such as ``mode="FULL_AND_PIECEWISE"``.

        Returns:
            This module.

        Raises:
            StaticGraphError: a graph can't be captured; what was captured before it serves.

        Example:
            >>> stitched = piecework.compile(model, (x,)).capture([1, 2, 4, 8])
            >>> print(stitched.static_graphs.source_for(4))
        """
        from piecework.runtime.graphs.plan.options import CaptureOptions

        if not self.traces and self._switched_off():
            return self
        self._require("graph to capture")
        sizes = sizes_to_capture(sizes)
        if memory_budget is not None and (type(memory_budget) is not int or memory_budget < 0):
            why = f"a memory budget is a number of bytes; got {memory_budget!r}"
            raise ConfigError(why, where="memory_budget")
        if type(progress) is not bool and not hasattr(progress, "started"):
            raise ConfigError(f"progress is True, False or a watcher; got {progress!r}")
        runtime = options.setdefault("runtime", self.runtime_config)
        if runtime is not None:
            options["runtime"] = RuntimeConfig.given(runtime, "runtime")
        wish = CaptureOptions(**options)
        how = {"progress": progress, "estimate": estimate}
        quiet = {"memory_budget": memory_budget, "progress": False, "estimate": False}
        with self._change("capture()"):
            self._none_was_worth = False
            before, self._again = self._again, partial(self.capture, sizes, **quiet, **options)
            try:
                rest = None if sizes is None else list(sizes)
                single = self._trace_of_one(rest, wish)
                if single is not None:
                    fixed = self.traces[0].batch_of_one()
                    made = single.capture_graphs(
                        [1], wish, memory_budget=memory_budget, fixed=fixed, **how
                    )
                    rest = None if rest is None else [size for size in rest if size != 1]
                    memory_budget = memory_budget and memory_budget - made.graphs.nbytes
                if rest != []:
                    self.traces[0].capture_graphs(rest, wish, memory_budget=memory_budget, **how)
            except BaseException:
                if not any(each.static for each in self.traces):
                    self._again = before  # nothing is captured, and would not be by trying again
                raise
        self._serve_by_captured()
        return self

    @property
    def was_captured(self) -> bool:
        """Whether `wake_up` knows what to capture."""
        return self._again is not None

    def sleep(self) -> None:
        """Give the static graphs and their memory back, until `wake_up`; calls run uncaptured."""
        with self._change("sleep()"):
            for each in self.traces:
                platform = each.static and each.static.graphs.platform
                each.entry.capture(None)
                if platform:
                    platform.release_cached_memory()

    def wake_up(self) -> None:
        """Capture again what the last `capture` did, after `sleep` or a `rebind`."""
        if self._again is None:
            raise self._nothing()
        self._again()
        self._serve_by_captured()

    def measure(
        self, sizes: Iterable[int] | None = None, *, seconds: float = 0.3, **options: object
    ) -> Measurement:
        """Capture, time each size eager, stitched and captured, and keep graphs that were worth it.

        A graph that was slower than another way by more than 2% is given up. Calls are made with
        zeros, and what they write is put back.

        Args:
            sizes, options: as for `capture`.
            seconds: how long each size is timed.
        """
        from piecework.runtime.graphs.serve.report import CAPTURED, Measurement

        if not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ConfigError(f"seconds must be a positive number; got {seconds!r}")
        options.setdefault("progress", False)
        if not all(runs_alone(each.program, self.runtime_config) for each in self.traces):
            why = "a model that several processes run together is not measured, by as many clocks"
            hint = "measure one share alone, and capture the sizes that are worth it on all ranks"
            raise RankError(why, hint=hint)
        self.capture(sizes, **options)
        rows = [row for each in self.traces for row in each.measure(seconds=seconds)]
        device = self.static_graphs.graphs.platform.device.type
        found = Measurement(tuple(sorted(rows, key=lambda row: row.size)), device)
        worth = found.worth_capturing
        if any(row.best != CAPTURED for row in rows):
            for each in self.traces:
                each.entry.capture(None)
            self._again = None
            if worth:
                self.capture(worth, **options)
            self._none_was_worth = not worth
        self._serve_by_captured()
        return found

    @property
    def static_graphs(self) -> CapturedModel:
        """The static graphs of the first trace that has some: coverage, memory, replay source."""
        return self._captured()[0]

    def _captured(self) -> list[CapturedModel]:
        """The static graphs of each trace that has some, one at least."""
        found = [each.static for each in self.traces if each.static is not None]
        if not found:
            raise self._nothing()
        return found

    def dispatch(
        self,
        num_tokens: int,
        uniform_decode: bool = False,
        has_lora: bool = False,
        num_active_loras: int = 0,
        *,
        valid_modes: Collection[CUDAGraphMode] | None = None,
        invalid_modes: Collection[CUDAGraphMode] | None = None,
        axes: Mapping[str, Hashable] | None = None,
        query_len: int | None = None,
    ) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """What a batch runs as now, for an engine that pads state of its own to the captured size.

        Args:
            num_tokens: the batch's own size; the rest as for `CudagraphDispatcher.dispatch`.

        Returns:
            Mode and descriptor; NONE and the batch's own size where nothing is captured.
        """
        require_whole_number(num_tokens)
        kind = (uniform_decode, has_lora, num_active_loras)
        modes = {"valid_modes": valid_modes, "invalid_modes": invalid_modes}
        for each in self.traces:
            if each.static is not None and each.static.serves(num_tokens):
                dispatch = each.static.dispatcher.dispatch
                return dispatch(num_tokens, *kind, **modes, axes=axes, query_len=query_len)
        return CUDAGraphMode.NONE, BatchDescriptor(num_tokens)

    def coverage(self, max_num_batched_tokens: int | None = None) -> Coverage:
        """How each batch size runs: captured, padded or uncaptured, and why; it prints as a table.

        Args:
            max_num_batched_tokens: the largest batch to list; by default one above the captured.
        """
        largest = max_num_batched_tokens
        if largest is not None and not (isinstance(largest, int) and largest > 0):
            why = f"the largest batch to list must be a positive whole number; got {largest!r}"
            raise ConfigError(why, where="max_num_batched_tokens")
        from piecework.runtime.batch.coverage import Coverage

        captured = self._captured()
        rows = [row for each in captured for row in each.coverage(largest)]
        why = next((each.unpadded for each in captured if each.unpadded), None)
        note = f"not padded: {why}" if why else ""
        return Coverage(sorted(rows, key=lambda row: row.first), note)

    def call_report(self) -> list[CallRow]:
        """What calls since `capture` ran as, how many, and why; all where nothing is captured."""
        if not self.traces:
            raise self._nothing()
        captured = [each for each in self.traces if each.static is not None]
        rows = [row for each in captured or self.traces for row in each.calls()]
        return sorted(rows, key=lambda row: -row.calls)

    def memory_report(self) -> MemoryReport:
        """What the static graphs were expected to take, and take."""
        first, *others = (each.memory_report() for each in self._captured())
        for other in others:
            first = replace(
                first, held={**other.held, **first.held}, dropped=(*first.dropped, *other.dropped)
            )
        return first

    def _nothing(self) -> NotThereError:
        if self._none_was_worth:
            why = "nothing is captured: of the sizes measured, each was slower from a graph"
            return NotThereError(why, hint="capture(sizes) captures them nevertheless")
        where = None if self.traces else torch_compat.compiler_off()
        hint = "call capture(sizes) first" if self._again is None else "call wake_up()"
        return NotThereError("nothing is captured", where=where, hint=hint)
