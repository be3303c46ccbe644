"""Every error that piecework raises on purpose: what went wrong, where, and what to do next.

Nothing here imports torch, so that any layer may raise these.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Kind = TypeVar("Kind", bound=type)


class PieceworkError(Exception):
    """Base of all typed errors: ``message``, where it happened, and a hint.

    Args:
        message: what failed and why, one sentence.
        where: the node, file, field or file:line that it concerns.
        hint: the next thing to try.
    """

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.message = message
        self.where = where
        self.hint = hint
        text = message if where is None else f"{message} ({where})"
        super().__init__(text if hint is None else f"{text}. Hint: {hint}")


class CaptureError(PieceworkError):
    """The model could not be captured as one graph (a graph break, an unsupported output)."""


class SplitError(PieceworkError):
    """The graph could not be split (an unknown or unfit splitting op)."""


class UnsupportedNode(PieceworkError):
    """A node or an argument that cannot be written as source."""


class EmitError(PieceworkError):
    """Emitted source did not compile, or did not prove equal to its graph."""


class BindError(PieceworkError):
    """Callables, constants or weights do not fit the emitted source."""


class NotThereError(BindError, AttributeError):
    """A stitched module has no such thing yet: it is not compiled, or not captured."""


class InputError(PieceworkError):
    """An input at run time breaks what the trace assumed of it.

    Attributes:
        refused_by: the entry that refused the call before anything ran; None for any other error.
        places: flattened arguments and dimensions (None for strides, identity or kind) that another
            trace could serve; None if it is not about sizes.
    """

    refused_by: object = None
    places: frozenset[tuple[int, int | None]] | None = None


class StaticGraphError(PieceworkError):
    """A static graph could not be captured, or would replay on memory that is not its input."""


class PieceCompileError(PieceworkError):
    """A compiler failed on one piece.

    Attributes:
        whatever_is_traced: it would fail on any other trace of the model as well.
    """

    whatever_is_traced: bool = False


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One thing wrong with a configuration: the dotted field it concerns, and what is wrong."""

    field: str
    message: str


class ConfigError(PieceworkError):
    """A configuration field is unknown, out of range or in conflict with another.

    ``problems`` lists everything found in one validation; it is empty where only ``message`` tells.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        problems: tuple[ConfigProblem, ...] = (),
    ) -> None:
        self.problems = problems
        super().__init__(message, where=where, hint=hint)
        if problems and hint is not None:  # the message ends with a list, one problem a line
            self.args = (f"{message}\nHint: {hint}",)


class Unidentifiable(ConfigError):
    """What decides what is compiled has no stable form, so nothing made with it is kept."""


class ArtifactError(PieceworkError):
    """A saved artifact is missing, damaged or made for something else."""


class RankError(PieceworkError):
    """Processes that run one model together would do different things, or one of them is gone."""


class CacheError(PieceworkError):
    """A cache directory is unsafe or unusable, or was asked for something impossible."""


class UsageError(PieceworkError):
    """The command line was used wrongly (exit code 2)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``did you mean mode?`` where one of ``known`` is near to ``name``, else ""."""
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def tell(problem: PieceworkError, *, strict: bool) -> None:
    """Raise ``problem`` if ``strict``; else warn of it where code outside of piecework called."""
    if strict:
        raise problem
    level = depth = 1
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("piecework."):
            level = depth + 2  # the frame that called it
        frame, depth = frame.f_back, depth + 1
    warnings.warn(str(problem), stacklevel=level)


def short_errors(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose typed errors leave it without piecework's own frames, and Dynamo's.

    ``PIECEWORK_FULL_TRACEBACK=1`` keeps all. Arguments that it does not take are a `ConfigError`.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            try:
                inspect.signature(function).bind(*args, **kwargs)
            except TypeError:
                raise _misfit(function, error, kwargs) from None
            raise  # from inside
        except PieceworkError as error:
            if full_tracebacks():
                raise
            error.__cause__ = None if _in_compiler(error.__cause__) else error.__cause__
            error.__suppress_context__ = True
            raise error.with_traceback(None)  # noqa: B904  # its cause is settled

    return run


def short_methods(kind: Kind) -> Kind:
    """A class whose ``__init__`` and public methods, but for ``forward``, have `short_errors`."""
    for name, each in list(vars(kind).items()):
        public = name == "__init__" or not (name.startswith("_") or name == "forward")
        if public and inspect.isfunction(each):
            setattr(kind, name, short_errors(each))
    return kind


def _misfit(function: Callable[..., object], error: TypeError, named: Iterable[str]) -> ConfigError:
    """What Python says of arguments that ``function`` does not take, and those that it takes."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    near = {did_you_mean(name, parameters) for name in named if name not in parameters} - {""}
    takes = f"it takes {', '.join(parameters)}" if parameters else "it takes no arguments"
    hint = "; ".join(sorted(near)) or takes
    return ConfigError(str(error), where=function.__qualname__, hint=hint)


def full_tracebacks() -> bool:
    """Whether the user asked to see everything that lies behind an error."""
    return os.environ.get("PIECEWORK_FULL_TRACEBACK", "0") not in ("", "0")


def _in_compiler(cause: BaseException | None) -> bool:
    """Whether an exception came up through torch's compiler."""
    while cause is not None:
        if isinstance(cause, PieceworkError) or type(cause).__module__.startswith(_COMPILERS):
            return True
        frames = traceback.walk_tb(cause.__traceback__)
        names = (str(frame.f_globals.get("__name__")) for frame, _ in frames)
        if any(each.startswith(_COMPILERS) for each in names):
            return True
        cause = cause.__cause__
    return False


_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx.experimental")
