"""Graph passes of a user's own, run inside Inductor; each is identified by its code and state."""

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch.fx

from piecework.codegen.graph.origin import results_of
from piecework.errors import ConfigError, PieceCompileError, Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.model import import_qualified
from piecework.runtime.store.digest import digest_of
from piecework.scope import set_for

#: Inductor's option that the manager goes into; user passes for it run inside the manager.
POST_GRAD_SLOT = "post_grad_custom_post_pass"
PassFunction = Callable[[torch.fx.Graph], int | None]


class InductorPass:
    """Base of passes with settings; a plain function will do for the others (`as_inductor_pass`).

    A pass changes the graph in place and returns how often it matched, or None if it does not
    count. Its attributes are settings and part of its identity, so it keeps no results on itself.
    """

    def __call__(self, graph: torch.fx.Graph) -> int | None:
        """Change ``graph`` in place; return the number of matches, or None."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    @property
    def name(self) -> str:
        return type(self).__name__

    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        """Whether the pass runs for these batch sizes; None means all sizes."""
        return True

    def uuid(self) -> str:
        """SHA-256 over the class (its code, and all that this reaches) and every attribute.

        Raises:
            Unidentifiable: one has no stable form; define ``uuid`` then.
        """
        _, *content = object.__reduce_ex__(self, 4)[:3]
        return digest_of(content, f"pass {self.name}")


class CallableInductorPass(InductorPass):
    """A function as a pass; ``uuid`` is its identity, by default what the function does."""

    def __init__(
        self, function: PassFunction, uuid: object = None, *, name: str | None = None
    ) -> None:
        self.function = function
        self._uuid = uuid
        self._name = name or getattr(function, "__name__", type(function).__name__)

    def __call__(self, graph: torch.fx.Graph) -> int | None:
        matches = self.function(graph)
        return matches if type(matches) is int else None

    @property
    def name(self) -> str:
        return self._name

    def uuid(self) -> str:
        if isinstance(self._uuid, str) and self._uuid:
            return self._uuid
        identity = self.function if self._uuid is None else ("uuid", self._uuid)
        return digest_of(identity, f"pass {self.name}")


def as_inductor_pass(value: object, *, where: str) -> InductorPass:
    """The pass that a configuration means: a pass, its class, a function, or the name of one."""
    if isinstance(value, str):
        value = import_qualified(value, where=where)
    why = ""
    if isinstance(value, type):
        try:
            value = value()
        except TypeError as error:
            why = f": {error}"
    if isinstance(value, InductorPass):
        return value
    if why or not callable(value):
        hint = "give a function of a graph, or an instance or the qualified name of an InductorPass"
        raise ConfigError(f"{value!r} is no pass{why}", where=where, hint=hint)
    return CallableInductorPass(value)


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may read while it runs."""

    compile_range: Range | None = None  # the batch sizes of the code; None means all of them
    facts: str = ""  # what the trace knows of its symbols, as text


_CURRENT: ContextVar[PassContext | None] = ContextVar("piecework_pass_context", default=None)


def pass_context(
    compile_range: Range | None, facts: str = ""
) -> AbstractContextManager[PassContext]:
    """Tell the passes that run inside which batch range is compiled, and under which facts."""
    return set_for(_CURRENT, PassContext(compile_range, facts))


def get_pass_context() -> PassContext:
    """The context of the innermost `pass_context`; one for all batch sizes outside of any."""
    return _CURRENT.get() or PassContext()


class PassRun(NamedTuple):
    """A pass on one graph; ``matches`` is None when it does not count."""

    name: str
    compile_range: Range | None
    matches: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class PassReport:
    """What the passes did, where code was made; ``str()`` gives one line per pass."""

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
    """Runs passes in order on Inductor's graph, those that apply to the batch range at hand."""

    def __init__(self, passes: Iterable[InductorPass] = ()) -> None:
        self.passes = tuple(passes)
        self._runs: list[PassRun] = []

    @classmethod
    def from_config(cls, config: CompilationConfig) -> Self:
        """The user's pass for Inductor's last slot, if there is one."""
        given = config.inductor_passes.get(POST_GRAD_SLOT)
        where = f"inductor_passes.{POST_GRAD_SLOT}"
        return cls([] if given is None else [as_inductor_pass(given, where=where)])

    def __call__(self, graph: torch.fx.Graph) -> None:
        compile_range = get_pass_context().compile_range
        for each in self.passes:
            if not each.is_applicable_for_range(compile_range):
                continue
            start, results = time.perf_counter(), len(results_of(graph))
            try:
                matches = each(graph)
            except Exception as error:
                why = f"pass {each.name} failed: {type(error).__name__}: {error}"
                raise PieceCompileError(why, hint="leave it out of inductor_passes") from error
            if (left := len(results_of(graph))) != results:
                raise PieceCompileError(
                    f"pass {each.name} left a graph with {left} results in place of {results}",
                    hint="a pass may change how results are computed, and not how many there are",
                )
            seconds = time.perf_counter() - start
            self._runs.append(PassRun(each.name, compile_range, matches, seconds))

    def uuid(self) -> str | None:
        """SHA-256 over the passes that run now and what they may read; None: nothing is cached."""
        now = get_pass_context()
        try:
            run = (p for p in self.passes if p.is_applicable_for_range(now.compile_range))
            ids = [each.uuid() for each in run]
        except Unidentifiable:
            return None
        return digest_of([str(now.compile_range), now.facts, *ids], "passes")

    def inductor_options(self, config: CompilationConfig) -> dict[str, object]:
        """Inductor's pass options: this manager, and the user's passes for other slots likewise."""
        options: dict[str, object] = {}
        for slot, value in {POST_GRAD_SLOT: None, **config.inductor_passes}.items():
            runs = self
            if slot != POST_GRAD_SLOT:
                runs = PostGradPassManager(
                    [as_inductor_pass(value, where=f"inductor_passes.{slot}")]
                )
                runs._runs = self._runs
            options[slot] = torch_compat.as_inductor_graph_pass(runs, runs.uuid)
        return options

    def report(self) -> PassReport:
        return PassReport(tuple(self._runs))
