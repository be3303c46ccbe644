"""The traces of a model at work: names in a profile, times, counts, differences from the uncompiled pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

from piecework.errors import ConfigError, short_methods
from piecework.runtime.counters import counters
from piecework.runtime.pieces.program import unique_pieces
from piecework.runtime.traces.traces import Traces

if TYPE_CHECKING:
    from piecework.runtime.call.shadow import Shadow
    from piecework.runtime.graphs.serve.metrics import Metrics
    from piecework.runtime.observe.profile import Profile


def summary(traces: Traces) -> str:
    """The model's name and what was made of it, in a line."""
    name, made = traces.backend.prefix, traces.made
    if not made:
        return f"{name}, not compiled yet"
    program = made[0].program
    cuts = sum(item.is_splitting_graph for item in program.items)
    kept = [key for each in made if each.static for key in each.static.graphs.bytes_by_descriptor()]
    captured = sorted({shape.num_tokens for _, shape in kept})
    parts = (
        name,
        _count(len(program.backends), "piece", unique_pieces(program.backends)),
        _count(cuts, "cut") if cuts else "",
        program.compiler,
        f"{len(made)} traces" if len(made) > 1 else "",
        f"captured for {', '.join(map(str, captured))}" if captured else "",
    )
    return ", ".join(filter(None, parts))


def _count(number: int, what: str, different: int | None = None) -> str:
    text = f"{number} {what}{'' if number == 1 else 's'}"
    return text if different in (None, number) else f"{text} ({different} different)"


@short_methods
class Observed:
    """The part of a `StitchedModule` that looks at calls; they pay for it in the block alone."""

    _traces: Traces

    def named_pieces(self) -> AbstractContextManager[None]:
        """Show pieces and operators by name and layer in ``torch.profiler`` for the block."""
        return self._named("piece to name", by_layer=True)

    @contextmanager
    def _named(self, what: str, *, by_layer: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self._traces.require(what):
                stack.enter_context(each.named_pieces(by_layer=by_layer))
            yield

    def profile(self, *args: object, profiled_calls: int = 20, **kwargs: object) -> Profile:
        """Where a forward spends its time: a row for each piece and each operator, by torch's profiler.

        Args:
            args, kwargs: the model's.
            profiled_calls: how many forwards are timed, without the profiler and with it.
        """
        from piecework.runtime.observe.profile import profile_calls

        what = "piece to profile"
        stages: dict[str, tuple[str, ...]] = {}
        for each in self._traces.require(what):
            stages |= each.stages()
        if type(profiled_calls) is not int or profiled_calls < 1:
            raise ConfigError(
                f"profiled_calls must be a positive number; got {profiled_calls!r}",
                where="profiled_calls",
            )
        return profile_calls(
            lambda: self(*args, **kwargs),  # type: ignore[operator]
            self._named(what, by_layer=False),
            stages,
            profiled_calls,
        )

    def metrics(self, *, name: str | None = None, profile: Profile | None = None) -> Metrics:
        """What calls ran as, what graphs hold, and the process's counters; ``prometheus()`` of it is the text.

        Args:
            name: tells this model from others of the process; by default its class's.
            profile: what `profile` gave, for the time of each piece.
        """
        from piecework.runtime.graphs.serve.metrics import Metrics, ModelMetrics
        from piecework.runtime.observe.profile import Profile

        if name is not None and not isinstance(name, str):
            raise ConfigError(f"a model's name is a text; got {name!r}", where="name")
        if profile is not None and not isinstance(profile, Profile):
            raise ConfigError(
                f"profile takes what profile(...) returned; got a {type(profile).__qualname__}",
                where="profile",
            )
        made = self._traces.made
        phases: dict[str, float] = {}
        for each in made:
            for phase, seconds in dict(each.program.phases).items():
                phases[phase] = phases.get(phase, 0.0) + seconds
        held = {
            (mode.name, descriptor.describe()): size
            for each in made
            if each.static is not None
            for (mode, descriptor), size in each.static.graphs.bytes_by_descriptor().items()
        }
        model = ModelMetrics(
            name=name or self._traces.backend.prefix,
            calls=tuple(row for each in made for row in each.calls()),
            graph_bytes=held,
            traces=len(made),
            phase_seconds=phases,
            stages=() if profile is None else profile.rows,
        )
        return Metrics((model,), counters.snapshot())

    @contextmanager
    def shadow(self, *, every: int = 1) -> Iterator[Shadow]:
        """Run the uncompiled graph of each piece beside it for the block, on the same inputs, and compare.

        Calls get what the pieces computed, and run uncaptured; the model can't be changed in the block.

        Args:
            every: compare each call of so many, the first one among them.

        Returns:
            What is found so far: the ``first`` piece that differs, all ``differences``, how many ``calls``,
            and pieces that are ``left_out`` since running them twice could show.

        Example:
            >>> with stitched.shadow() as found:
            ...     stitched(x)
            >>> print(found)
        """
        from piecework.runtime.call.shadow import Shadow

        found = Shadow(every)
        self._traces.require("piece to compare")
        with self._traces.changes.one("shadow()"), ExitStack() as stack:
            with self._traces.lock:
                for each in self._traces.made:
                    stack.enter_context(each.shadowed(found))
                found.require_some()
                self._traces.on_trace = lambda made: stack.enter_context(made.shadowed(found))
            try:
                yield found
            finally:
                with self._traces.lock:
                    self._traces.on_trace = None
                    stack.close()
