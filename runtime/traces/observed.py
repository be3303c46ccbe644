"""The traces of a model at work. In: traces, and for how long or by what to look at them. Out: names in a profile, times, counts, differences from the uncompiled pieces.

Nothing here stays once it was asked for: calls pay for it in the block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from piecework.errors import ConfigError
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


@contextmanager
def named_pieces(
    traces: Traces, what: str = "piece to name", *, by_layer: bool = True
) -> Iterator[None]:
    """Show pieces and operators by name in ``torch.profiler`` for the block."""
    with ExitStack() as stack:
        for each in traces.require(what):
            stack.enter_context(each.named_pieces(by_layer=by_layer))
        yield


def profile(traces: Traces, call: Callable[[], object], profiled_calls: int) -> Profile:
    """Where ``call``, a forward, spends its time."""
    from piecework.runtime.observe.profile import profile_calls

    what = "piece to profile"
    stages: dict[str, tuple[str, ...]] = {}
    for each in traces.require(what):
        stages |= each.stages()
    if type(profiled_calls) is not int or profiled_calls < 1:
        raise ConfigError(
            f"profiled_calls must be a positive number; got {profiled_calls!r}",
            where="profiled_calls",
        )
    return profile_calls(call, named_pieces(traces, what, by_layer=False), stages, profiled_calls)


def metrics(traces: Traces, name: str | None, profile: Profile | None) -> Metrics:
    """What the calls of a model ran as, what its graphs hold, and the process's counters."""
    from piecework.runtime.graphs.serve.metrics import Metrics, ModelMetrics
    from piecework.runtime.observe.profile import Profile

    if name is not None and not isinstance(name, str):
        raise ConfigError(f"a model's name is a text; got {name!r}", where="name")
    if profile is not None and not isinstance(profile, Profile):
        raise ConfigError(
            f"profile takes what profile(...) returned; got a {type(profile).__qualname__}",
            where="profile",
        )
    made = traces.made
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
        name=name or traces.backend.prefix,
        calls=tuple(row for each in made for row in each.calls()),
        graph_bytes=held,
        traces=len(made),
        phase_seconds=phases,
        stages=() if profile is None else profile.rows,
    )
    return Metrics((model,), counters.snapshot())


@contextmanager
def shadow(traces: Traces, every: int) -> Iterator[Shadow]:
    """Run the uncompiled graph of each piece beside it for the block, and compare."""
    from piecework.runtime.call.shadow import Shadow

    found = Shadow(every)
    traces.require("piece to compare")
    with traces.changes.one("shadow()"), ExitStack() as stack:
        with traces.lock:
            for each in traces.made:
                stack.enter_context(each.shadowed(found))
            found.require_some()
            traces.on_trace = lambda made: stack.enter_context(made.shadowed(found))
        try:
            yield found
        finally:
            with traces.lock:
                traces.on_trace = None
                stack.close()
