"""Marks on layers while a model is traced. In: groups of layers. Out: a trace that goes through the first of each group, and has one node for each call of another.

A marked layer has a ``forward`` of its own, for the time of the trace. Called outside of it, it does what it did before. Dynamo's lock
is held meanwhile, so that no other thread's trace sees a mark.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch.utils import _pytree as pytree

from piecework.runtime import torch_compat
from piecework.runtime.bind.facts import MARK
from piecework.runtime.regions.alike import Alike
from piecework.runtime.regions.found import Group

FILE = __file__
_FRAMES = re.compile(r'^\s*File "([^"\n]+)", line', re.MULTILINE)


class Refused(Exception):
    """A trace can't be shared; the text says why.

    Attributes:
        names: attributes that layers of a group must agree in, for another attempt.
        apart: a layer to leave out of its group, for another attempt.
    """

    def __init__(
        self,
        text: str,
        names: frozenset[object] = frozenset(),
        apart: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(text)
        self.names, self.apart = names, apart


@dataclass(eq=False, slots=True)
class Recorded:
    """What the trace of a group's first layer was given and gave, as fake values; what stood around it, and the code that it went through."""

    given: object = None
    before: tuple[object, ...] = ()
    around: tuple[object, ...] = ()
    result: object = None
    code: tuple[types.CodeType, ...] = ()
    written: torch_compat.Written | None = None
    done: bool = False
    served: bool = False
    _before: int = 0

    def begin(self, given: object) -> None:
        self.done, self._before = False, len(torch_compat.traced_calls())
        self.written = torch_compat.written_so_far()
        self.given, self.around, self.before = given, _around(), kinds_of(given)

    def end(self, result: object) -> None:
        self.code += tuple(torch_compat.traced_calls()[self._before :])
        self.result, self.done = result, True


@dataclass(eq=False, slots=True)
class Mark:
    """One function that a marked trace calls: where the first layer of a group begins or ends, or in place of another layer.

    Attributes:
        kind: ``"enter"``, ``"leave"`` or ``"call"``.
        alike: the layer that is called, beside the first.
    """

    kind: str
    group: Group
    alike: Alike | None = None


@dataclass(eq=False, slots=True)
class Marks:
    """The marks of one trace.

    Attributes:
        groups: what is marked.
        by_function: the mark that a function in the graph is.
        recorded: what is known of each group's first layer.
        refused: why a call could not stand for a layer; None if each could.
    """

    groups: Sequence[Group]
    by_function: dict[object, Mark] = field(default_factory=dict)
    refused: Refused | None = None
    recorded: list[Recorded] = field(default_factory=list)

    @contextmanager
    def put_on(self) -> Iterator[None]:
        """The layers are marked in the block."""
        marked: list[torch.nn.Module] = []
        with torch_compat.one_trace_at_a_time():
            try:
                for group in self.groups:
                    record = Recorded()
                    self.recorded.append(record)
                    marked.append(group.first)
                    self._mark(group.first, _first(*self._ends(group, record)))
                    for alike in group.others:
                        marked.append(alike.second)
                        self._mark(alike.second, _other(self._call(group, alike, record)))
                yield
            finally:
                for layer in marked:
                    layer.__dict__.pop("forward", None)

    def _mark(self, layer: torch.nn.Module, make: Callable[..., Callable[..., object]]) -> None:
        forward = make(type(layer).forward)
        forward.__dict__[MARK] = True
        layer.__dict__["forward"] = types.MethodType(forward, layer)

    def _ends(
        self, group: Group, record: Recorded
    ) -> tuple[Callable[..., object], Callable[..., object]]:
        def enter(*args: object, **kwargs: object) -> torch.Tensor:
            record.begin((args, kwargs))
            self._require_written(record)
            return torch.empty(())

        def leave(result: object) -> torch.Tensor:
            given = record.given
            self._require_written(record)
            if not same_kinds(record.before, kinds_of(given)) or record.around != _around():
                self._refuse("it changes the kind of an argument, or what is around it")
            if not _is_plain(result, (torch.Tensor,)):
                self._refuse(f"it returns a {type(result).__qualname__}")
            tensors = [each for each in _leaves(result) if isinstance(each, torch.Tensor)]
            if len(
                {id(each) for each in [*tensors, *_leaves(given)]} & set(map(id, tensors))
            ) < len(tensors) or set(map(id, tensors)) & set(map(id, _leaves(given))):
                self._refuse("it returns one of its arguments, or one tensor twice")
            record.end(result)
            return torch.empty(())

        self.by_function[torch._dynamo.allow_in_graph(enter)] = Mark("enter", group)
        self.by_function[torch._dynamo.allow_in_graph(leave)] = Mark("leave", group)
        return enter, leave

    def _call(self, group: Group, alike: Alike, record: Recorded) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            given = args, kwargs
            # A layer is odd if another was served before: else the first one is.
            odd = alike.second if record.served else group.first
            if not record.done:
                self._refuse("another layer of its kind is called before the first one", odd)
            self._require_written(record)
            if not _is_plain((args, tuple(kwargs.values())), _ARGUMENTS):
                self._refuse("it is given something else than tensors, numbers, texts and None")
            if not same_kinds(kinds_of(given), record.before) or _around() != record.around:
                self._refuse(
                    "it is given tensors of another kind, or another number, than the first one",
                    odd,
                )
            made = torch_compat.MemoryLike()
            for old, new in zip(_leaves(record.given), _leaves(given), strict=True):
                if not made.is_like(old, new):
                    self._refuse(
                        "its arguments share memory otherwise than those of the first one", odd
                    )
            record.served = True
            mode = torch_compat.fake_mode_of(_leaves(record.result))
            try:
                with torch_compat.no_new_guards(mode):
                    return pytree.tree_map_only(torch.Tensor, made.tensor, record.result)
            except RuntimeError as error:
                self._refuse(f"its results can't be told without it: {error}")

        self.by_function[torch._dynamo.allow_in_graph(call)] = Mark("call", group, alike)
        return call

    def _require_written(self, record: Recorded) -> None:
        """Refuse if code found other things written now than the first layer did when it began."""
        now = torch_compat.written_so_far()
        if now is None or not now.is_as(record.written):
            self._refuse("attributes or objects were written, which layers might ask for")

    def _refuse(self, why: str, apart: torch.nn.Module | None = None) -> NoReturn:
        self.refused = self.refused or Refused(why, apart=apart)
        raise self.refused

    def caused(self, error: BaseException) -> Refused | None:
        """Why a trace failed, if a mark is the reason."""
        if isinstance(error, Refused) or self.refused is not None:
            return error if isinstance(error, Refused) else self.refused
        inner: BaseException | None = error
        while inner is not None:
            frames = _FRAMES.findall(str(inner))
            if frames and frames[-1] == FILE:
                return Refused("it is given, or returns, what no graph can pass")
            inner = inner.__cause__
        return None


def _first(enter, leave):  # type: ignore[no-untyped-def]
    def left(result):  # type: ignore[no-untyped-def]
        leave(result)
        return result

    is_traced = torch.compiler.is_dynamo_compiling  # no global: Dynamo would reach torch by it

    def make(function):  # type: ignore[no-untyped-def]
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if not is_traced():
                return function(self, *args, **kwargs)
            enter(*args, **kwargs)
            return left(
                function(self, *args, **kwargs)
            )  # no variable: Dynamo names values after them

        return forward

    return make


def _other(call):  # type: ignore[no-untyped-def]
    is_traced = torch.compiler.is_dynamo_compiling  # no global: Dynamo would reach torch by it

    def make(function):  # type: ignore[no-untyped-def]
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            if not is_traced():
                return function(self, *args, **kwargs)
            return call(*args, **kwargs)

        return forward

    return make


_ARGUMENTS = (torch.Tensor, int, torch.SymInt, float, bool, str, type(None))


def _is_plain(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value is one of ``kinds``, or tuples of such; a list or dictionary could be written to."""
    if type(value) is tuple:
        return all(_is_plain(each, (*kinds, type(None))) for each in value)
    return isinstance(value, kinds)


def _leaves(value: object) -> list[object]:
    return pytree.tree_leaves(value, is_leaf=lambda each: each is None)


def kinds_of(value: object) -> tuple[object, ...]:
    """What code may ask of values without reading tensors: structure, constants, kinds of tensors."""
    leaves, structure = pytree.tree_flatten(value, is_leaf=lambda each: each is None)
    return (structure, *map(_kind_of, leaves))


def _kind_of(value: object) -> object:
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride(), value.storage_offset())
        return (
            torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.Tensor,
            value.dtype,
            value.layout,
            value.device,
            value.dim(),
            value.requires_grad,
            sizes,
        )
    return value if isinstance(value, torch.SymInt) else (type(value), repr(value))


def same_kinds(one: object, other: object) -> bool:
    """Whether values were of the same kinds, by what is known of sizes now."""
    if isinstance(one, tuple):
        return (
            isinstance(other, tuple) and len(one) == len(other) and all(map(same_kinds, one, other))
        )
    if type(one) in _SIZES and type(other) in _SIZES:
        return bool(torch_compat.plain_expr(one) == torch_compat.plain_expr(other))
    return type(one) is type(other) and one == other


_SIZES = (int, torch.SymInt)


def _around() -> tuple[object, ...]:
    """What of torch's state decides what operators do."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind)]
    casts = tuple(
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
    )
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*casts, torch.is_autocast_cache_enabled(), *modes, torch.get_default_dtype())
