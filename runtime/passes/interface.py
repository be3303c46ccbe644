"""What a graph pass is: it changes an Inductor graph in place and says how often it matched.

Compiled code is reused only if the same passes made it, so a pass is identified by its code and state.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

import torch.fx

from piecework.errors import ConfigError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.model import import_qualified
from piecework.runtime.store.digest import digest_of
from piecework.scope import set_for

PassFunction = Callable[[torch.fx.Graph], int | None]


class InductorPass:
    """Base of passes with settings; a plain function will do for the others (`as_inductor_pass`).

    A pass changes the graph in place and returns how often it matched, or None if it does not count.
    Its attributes are settings and part of its identity, so it keeps no results on itself.

    Example:
        >>> class Swap(InductorPass):
        ...     def __init__(self, old, new):
        ...         self.old, self.new = old, new
        ...     def __call__(self, graph):
        ...         found = graph.find_nodes(op="call_function", target=self.old)
        ...         for node in found:
        ...             node.target = self.new
        ...         return len(found)
    """

    def __call__(self, graph: torch.fx.Graph) -> int | None:
        """Change ``graph`` in place; return the number of matches, or None."""
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    @property
    def name(self) -> str:
        """What reports and errors call it."""
        return type(self).__name__

    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        """Whether the pass runs for these batch sizes; None means all sizes."""
        return True

    def state(self) -> Mapping[str, object]:
        """The settings that decide what the pass does: every attribute, unless a subclass differs."""
        declared = (cls.__dict__.get("__slots__", ()) for cls in type(self).__mro__)
        slots = (name for each in declared for name in ([each] if isinstance(each, str) else each))
        found = {name: getattr(self, name) for name in slots if hasattr(self, name)}
        return found | getattr(self, "__dict__", {})

    def uuid(self) -> str:
        """SHA-256 over the class (its code, and all that this reaches) and `state`.

        Raises:
            Unidentifiable: an attribute has no stable form, or the code reads what can't be seen;
                define ``uuid`` then.
        """
        return digest_of((type(self), dict(self.state())), f"pass {self.name}")

    @staticmethod
    def hash_source(*sources: object) -> str:
        """SHA-256 over code: of functions and classes, of other objects' classes, and of texts."""
        known = (str, type, types.FunctionType, types.MethodType)
        return digest_of(
            [each if isinstance(each, known) else type(each) for each in sources], "hash_source"
        )

    @staticmethod
    def hash_dict(settings: Mapping[str, object]) -> str:
        """SHA-256 over settings, whatever their order."""
        return digest_of(dict(sorted(settings.items())), "hash_dict")


class CallableInductorPass(InductorPass):
    """A function as a pass.

    Args:
        function: takes the graph; may return a number of matches.
        uuid: its identity, a text or what one can be made of; by default what the function does.
        name: what reports call it; the function's name by default.
    """

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
    """The pass that a configuration means: a pass, its class, a function, or the name of one.

    Args:
        value: as given in ``CompilationConfig.inductor_passes``.
        where: the field, for the error.

    Raises:
        ConfigError: the name can't be imported, or it names nothing that can be called.
    """
    if isinstance(value, str):
        value = import_qualified(value, where=where)
    if isinstance(value, InductorPass):
        return value
    if isinstance(value, type):
        try:
            value = value()
        except TypeError as error:
            raise ConfigError(
                f"pass {value.__qualname__} can't be made without arguments: {error}",
                where=where,
                hint="give an instance of it",
            ) from error
        return value if isinstance(value, InductorPass) else as_inductor_pass(value, where=where)
    if not callable(value):
        raise ConfigError(
            f"a pass must be callable, not a {type(value).__qualname__}",
            where=where,
            hint="give a function of a graph, an InductorPass, or the qualified name of one",
        )
    return CallableInductorPass(value)


@dataclass(frozen=True, slots=True)
class PassContext:
    """What a pass may read while it runs.

    Attributes:
        compile_range: the batch sizes of the code that is made; None means all of them.
        facts: what the trace knows of its symbols, as text.
    """

    compile_range: Range | None = None
    facts: str = ""


_CURRENT: ContextVar[PassContext | None] = ContextVar("piecework_pass_context", default=None)


def pass_context(
    compile_range: Range | None, facts: str = ""
) -> AbstractContextManager[PassContext]:
    """Tell the passes that run inside which batch range is compiled, and under which facts.

    Example:
        >>> with pass_context(Range(1, 16)):
        ...     manager(graph)
    """
    return set_for(_CURRENT, PassContext(compile_range, facts))


def get_pass_context() -> PassContext:
    """The context of the innermost `pass_context`; one for all batch sizes outside of any."""
    return _CURRENT.get() or PassContext()
