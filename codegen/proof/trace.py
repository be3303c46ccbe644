"""The values and events that two descriptions of one program are compared by. In: nothing; this is the vocabulary of `verify`.

A trace knows neither nodes nor text. An event is whatever may do something when it runs: a call, a method, a submodule;
building a container, naming a value and picking from a known tuple are none. What an event yields is written as the event itself,
so that two values are the same if they are the same object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Linkage:
    """What the names of a text stand for.

    Attributes:
        submod_names: what ``__vllm_submods__`` holds, by name; those submodules are opaque, all others are looked into.
        consts: what ``__vllm_consts__`` holds.
        bound: name in the text → path of the weight that it holds.
        bound_placeholders: name of a placeholder → path of the weight that is held for it.
        direct: operator → the callable that the text may call in its place.
    """

    submod_names: Sequence[str] = ()
    consts: Sequence[object] = ()
    bound: Mapping[str, str] = field(default_factory=dict)
    bound_placeholders: Mapping[str, str] = field(default_factory=dict)
    direct: Mapping[object, object] = field(default_factory=dict)


class Input(NamedTuple):
    """A parameter of ``execution_fn``, by position."""

    position: int


class Bound(NamedTuple):
    """A weight that the module holds, by its path."""

    path: str


@dataclass(slots=True, eq=False)
class Event:
    """``kind`` is "call" (target: the callable), "method" (its name) or "submod" (its name); ``line`` is for messages.

    ``parts`` are the elements of what it yields, if the text unpacks that.
    """

    kind: str
    target: object
    args: tuple[Value, ...]
    kwargs: tuple[tuple[str, Value], ...]
    line: int
    parts: tuple[Element, ...] | None = None


@dataclass(slots=True, eq=False)
class Element:
    """One element of what ``event`` yields."""

    event: Event


@dataclass(slots=True, eq=False)
class Known:
    """A Python object: a literal, a constant, or (``is_global``) something that a dotted path leads to."""

    value: object
    is_global: bool = False


@dataclass(slots=True, eq=False)
class Container:
    """A tuple, list, dict (keys and values in turn), slice or namedtuple built at this point of the program.

    ``serial`` tells one object from another equal one: lists and dicts can be changed.
    """

    kind: type
    items: tuple[Value, ...]
    serial: int


Value = Input | Bound | Event | Element | Known | Container


class Escapes:
    """Which mutable containers were handed to an event: from then on their elements are not known any more."""

    def __init__(self) -> None:
        self._serials: set[int] = set()

    def note(self, value: Value) -> None:
        """``value`` was handed on, with everything in it."""
        if type(value) is Container:
            self._serials.add(value.serial)
            for item in value.items:
                self.note(item)

    def elements_of(self, value: Value) -> tuple[Value, ...] | None:
        """The elements of a sequence as far as they are certain, else None."""
        if type(value) is not Container:
            return None
        if value.kind is tuple or (value.kind is list and value.serial not in self._serials):
            return value.items
        return None


def picked(elements: tuple[Value, ...] | None, index: object) -> Value | None:
    """The element at a literal ``index``, or None if that is not certain."""
    if elements is None or type(index) is not int or not -len(elements) <= index < len(elements):
        return None
    return elements[index]
