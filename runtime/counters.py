"""What happened, in numbers that a test or a user can read and expect changes of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from piecework.errors import ConfigError, did_you_mean, short_methods


@short_methods
@dataclass(slots=True)
class CompilationCounter:
    """Counts since the process started."""

    num_models_seen: int = 0  # given to `piecework.compile` or to the Dynamo backend
    num_graphs_seen: int = 0  # captured by Dynamo
    num_piecewise_graphs_seen: int = 0  # submodules after splitting, splitting ones included
    num_piecewise_capturable_graphs_seen: int = 0  # pieces that are compiled (and may be captured)
    num_backend_compilations: int = 0  # calls of a compiler, whichever it is
    num_inductor_compiles: int = 0  # calls of Inductor
    num_eager_compiles: int = 0  # pieces left as they are by the eager compiler
    num_cudagraph_captured: int = 0  # static graphs
    num_cache_entries_updated: int = 0  # cache entries written
    num_compiled_artifacts_saved: int = 0
    num_compiled_artifacts_loaded: int = 0

    def snapshot(self) -> dict[str, int]:
        """The counts as a plain dictionary."""
        return asdict(self)

    @contextmanager
    def expect(self, **deltas: int) -> Iterator[None]:
        """Check that the block changes the named counters by exactly the given amounts.

        Raises:
            ConfigError: a name is not a counter.
            AssertionError: a counter changed by another amount; all of them are listed.

        Example:
            >>> with counters.expect(num_inductor_compiles=3):
            ...     piecework.compile(model, (x,))
        """
        before = self.snapshot()
        unknown = sorted(set(deltas) - set(before))
        if unknown:
            hint = did_you_mean(unknown[0], before) or f"there are {', '.join(sorted(before))}"
            raise ConfigError(f"no counter named {', '.join(unknown)}", where="expect", hint=hint)
        yield
        after = self.snapshot()
        wrong = [
            f"{name}: expected {delta:+d}, was {after[name] - before[name]:+d}"
            for name, delta in deltas.items()
            if after[name] - before[name] != delta
        ]
        if wrong:
            raise AssertionError("; ".join(wrong))


#: The process's counters, also available as ``piecework.counters``.
counters = CompilationCounter()
