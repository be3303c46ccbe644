"""The traces of a model at work: names in a profile, times, counts, differences from eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from piecework.errors import ConfigError, short_methods
from piecework.runtime.counters import counters
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.pieces.report import counted
from piecework.runtime.traces.traced_model import TracedModel

if TYPE_CHECKING:
    from piecework.runtime.call.shadow import Shadow
    from piecework.runtime.graphs.serve.metrics import Metrics
    from piecework.runtime.observe.profile import Profile


@short_methods
class Observed:
    """The part of a `StitchedModule` that looks at calls."""

    traces: tuple[TracedModel, ...]
    backend: PieceworkBackend
    _require: Callable[[str], tuple[TracedModel, ...]]
    _change: Callable[[str], AbstractContextManager[None]]
    _lock: AbstractContextManager[object]
    _on_trace: Callable[[TracedModel], object] | None

    def _summary(self) -> str:
        """The model's name and what was made of it, in a line."""
        if not self.traces:
            return f"{self.backend.prefix}, not compiled yet"
        report = self.traces[0].program.compiled
        graphs = [each.static.graphs for each in self.traces if each.static]
        captured = {shape.num_tokens for held in graphs for _, shape in held.bytes_by_descriptor()}
        different = f" ({report.unique} different)" if report.unique != report.pieces else ""
        parts = (
            self.backend.prefix,
            f"{counted(report.pieces, 'piece')}{different}",
            counted(report.splitting, "cut") if report.splitting else "",
            report.compiler,
            f"{len(self.traces)} traces" if len(self.traces) > 1 else "",
            f"captured for {', '.join(map(str, sorted(captured)))}" if captured else "",
        )
        return ", ".join(filter(None, parts))

    def named_pieces(self) -> AbstractContextManager[None]:
        """Show pieces and operators by name and layer in ``torch.profiler`` for the block."""
        return self._named("piece to name", by_layer=True)

    @contextmanager
    def _named(self, what: str, *, by_layer: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self._require(what):
                stack.enter_context(each.named_pieces(by_layer=by_layer))
            yield

    def profile(self, *args: object, profiled_calls: int = 20, **kwargs: object) -> Profile:
        """Where a forward spends its time: a row for each piece and operator, by torch's profiler.

        Args:
            args, kwargs: the model's.
            profiled_calls: how many forwards are timed, without the profiler and with it.
        """
        from piecework.runtime.observe.profile import profile_calls

        what = "piece to profile"
        stages = {label: code for e in self._require(what) for label, code in e.stages().items()}
        if type(profiled_calls) is not int or profiled_calls < 1:
            why = f"profiled_calls must be a positive number; got {profiled_calls!r}"
            raise ConfigError(why, where="profiled_calls")
        named = self._named(what, by_layer=False)
        return profile_calls(lambda: self(*args, **kwargs), named, stages, profiled_calls)  # type: ignore[operator]

    def metrics(self, *, name: str | None = None, profile: Profile | None = None) -> Metrics:
        """What calls ran as, what graphs hold, and the process's counters, with ``prometheus()``.

        Args:
            name: tells this model from others of the process; by default its class's.
            profile: what `profile` gave, for the time of each piece.
        """
        from piecework.runtime.graphs.serve.metrics import Metrics, ModelMetrics

        if name is not None and not isinstance(name, str):
            raise ConfigError(f"a model's name is a text; got {name!r}", where="name")
        if profile is not None and not hasattr(profile, "rows"):
            given = type(profile).__qualname__
            raise ConfigError(f"profile takes what profile(...) returned; got a {given}")
        phases: dict[str, float] = {}
        for each in self.traces:
            for phase, seconds in dict(each.program.phases).items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        model = ModelMetrics(
            name=name or self.backend.prefix,
            calls=tuple(row for each in self.traces for row in each.calls()),
            graph_bytes={
                (mode.name, descriptor.describe()): size
                for each in self.traces
                if each.static is not None
                for (mode, descriptor), size in each.static.graphs.bytes_by_descriptor().items()
            },
            traces=len(self.traces),
            phase_seconds=phases,
            stages=() if profile is None else profile.rows,
        )
        return Metrics((model,), counters.snapshot())

    @contextmanager
    def shadow(self, *, every: int = 1) -> Iterator[Shadow]:
        """Run the uncompiled graph of each piece beside it for the block, and compare.

        Calls get what the pieces computed, and run uncaptured; nothing can be changed meanwhile.

        Args:
            every: compare each call of so many, the first one among them.

        Returns:
            What is found so far: the ``first`` piece that differs, all ``differences``, how many
            ``calls``, and pieces that are ``left_out`` since running them twice could show.

        Example:
            >>> with stitched.shadow() as found:
            ...     stitched(x)
            >>> print(found)
        """
        from piecework.runtime.call.shadow import Shadow

        found = Shadow(every)
        self._require("piece to compare")
        with self._change("shadow()"), ExitStack() as stack:
            with self._lock:
                for each in self.traces:
                    stack.enter_context(each.shadowed(found))
                self._on_trace = lambda made: stack.enter_context(made.shadowed(found))
            try:
                yield found
            finally:
                with self._lock:
                    self._on_trace = None
                    stack.close()
