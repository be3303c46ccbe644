"""Runs a user's passes inside Inductor, for the batch ranges that they are for, and reports what they matched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.fx

from piecework.codegen.graph.origin import results_of
from piecework.errors import PieceCompileError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.passes.interface import InductorPass, as_inductor_pass, get_pass_context
from piecework.runtime.store.digest import digest_of

#: Inductor's option that the manager goes into; user passes for it run inside the manager.
POST_GRAD_SLOT = "post_grad_custom_post_pass"


@dataclass(frozen=True, slots=True)
class PassRun:
    """One pass on one graph.

    Attributes:
        name: the pass.
        compile_range: batch sizes of the code that is made; None means all.
        matches: how often it matched; None when it does not count.
        seconds: how long it took.
    """

    name: str
    compile_range: Range | None
    matches: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class PassReport:
    """What the passes did; ``str()`` gives one line per pass.

    Code that comes from a cache was changed by the passes when it was made, and is not counted again.
    """

    runs: tuple[PassRun, ...]

    def matches(self, name: str) -> int:
        """How often the pass called ``name`` matched; 0 if it never ran."""
        return sum(run.matches or 0 for run in self.runs if run.name == name)

    def __str__(self) -> str:
        lines = []
        for name in dict.fromkeys(run.name for run in self.runs):
            runs = [run for run in self.runs if run.name == name]
            counts = any(run.matches is not None for run in runs)
            matches = f"{self.matches(name)} matches" if counts else "matches not counted"
            seconds = sum(run.seconds for run in runs)
            lines.append(f"pass {name}: {matches} in {len(runs)} graphs, {seconds:.3f} s")
        return "\n".join(lines)


class PostGradPassManager:
    """Runs passes one after another on Inductor's graph, those that apply to the batch range at hand.

    Args:
        passes: in order of execution.

    Example:
        >>> manager = PostGradPassManager([Swap(aten.sin, aten.cos)])
        >>> with pass_context(Range(1, 16)):
        ...     manager(graph)
        >>> print(manager.report())
    """

    def __init__(self, passes: Iterable[InductorPass] = ()) -> None:
        self.passes = tuple(passes)
        self._runs: list[PassRun] = []

    @classmethod
    def from_config(cls, config: CompilationConfig) -> PostGradPassManager:
        """The user's pass for Inductor's last slot, if there is one.

        Raises:
            ConfigError: the pass can't be imported or called.
        """
        given = config.inductor_passes.get(POST_GRAD_SLOT)
        where = f"inductor_passes.{POST_GRAD_SLOT}"
        return cls([] if given is None else [as_inductor_pass(given, where=where)])

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Run the passes that apply to the current `pass_context`.

        Raises:
            PieceCompileError: a pass raised, or changed the number of the graph's results; names it.
        """
        compile_range = get_pass_context().compile_range
        for each in self.applicable(compile_range):
            start = time.perf_counter()
            results = len(results_of(graph))
            try:
                matches = each(graph)
            except Exception as error:
                raise PieceCompileError(
                    f"pass {each.name} failed: {type(error).__name__}: {error}",
                    hint="leave it out of inductor_passes",
                ) from error
            if len(results_of(graph)) != results:
                raise PieceCompileError(
                    f"pass {each.name} left a graph with {len(results_of(graph))} results "
                    f"in place of {results}",
                    hint="a pass may change how results are computed, and not how many there are",
                )
            seconds = time.perf_counter() - start
            self._runs.append(PassRun(each.name, compile_range, matches, seconds))

    def applicable(self, compile_range: Range | None) -> tuple[InductorPass, ...]:
        """The passes that run for these batch sizes."""
        return tuple(p for p in self.passes if p.is_applicable_for_range(compile_range))

    def uuid(self) -> str:
        """SHA-256 over the passes that run now and what they may read: batch range and facts of the trace.

        Inductor keeps code under it. Code made under other facts would bring a guard along that
        this trace does not have.

        Raises:
            Unidentifiable: a pass has no stable form.
        """
        context = get_pass_context()
        passes = self.applicable(context.compile_range)
        parts = [str(context.compile_range), context.facts, *(each.uuid() for each in passes)]
        return digest_of(parts, "passes")

    def uuid_for_inductor(self) -> str | None:
        """`uuid`; None, which keeps Inductor from caching, where a pass has no stable form."""
        try:
            return self.uuid()
        except Unidentifiable:
            return None

    def inductor_options(self, config: CompilationConfig) -> dict[str, object]:
        """Inductor's pass options: this manager, and the user's passes for other slots."""
        options: dict[str, object] = {
            POST_GRAD_SLOT: torch_compat.as_inductor_graph_pass(self, self.uuid_for_inductor)
        }
        for slot, value in config.inductor_passes.items():
            if slot != POST_GRAD_SLOT:
                options[slot] = self._recorded(
                    as_inductor_pass(value, where=f"inductor_passes.{slot}")
                )
        return options

    def report(self) -> PassReport:
        """What the passes did so far."""
        return PassReport(tuple(self._runs))

    def _recorded(self, each: InductorPass) -> Callable[[torch.fx.Graph], None]:
        """One user pass of another slot, range-gated, timed and counted as those here are."""
        alone = PostGradPassManager([each])
        alone._runs = self._runs
        return torch_compat.as_inductor_graph_pass(alone, alone.uuid_for_inductor)
