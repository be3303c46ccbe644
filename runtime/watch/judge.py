"""Whether what a trace relied on still holds, asked only after something was written.

Where the model was traced, Dynamo's own guards are asked; of a program that was loaded, the plain values that they were told as.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import LookUps, place_text, readable
from piecework.runtime.watch.values import OBJECTS, Places, PlainValue, difference

Variables = Mapping[str, object]
ONE_OBJECT = "were one object"
_NOISE = re.compile(r"___(?=\w)|\.? ?Guard failed on a parameter, consider using .*")
_TYPE = re.compile(r"check_type_id\((.+), \d+\), type=<class '([^']+)'>")
_BY_IDENTITY = {*OBJECTS, "TYPE_MATCH"}


class DynamoJudge:
    """Dynamo's own guards: says what of them does not hold.

    Args:
        root: those of them that are asked, as torch checks them; None if there are none.
        guards: what they are about, with what was there; that is held weakly.
        names: Dynamo's names of arguments → their own.
        scope: the globals that places start in.
        installed: the globals that Dynamo gave the traced function, and takes back when it forgets its code.
        variables: all globals of that function.
    """

    def __init__(
        self,
        root: Any,
        guards: Sequence[Guarded],
        names: Mapping[str, str],
        scope: Mapping[str, object],
        installed: Mapping[str, object],
        variables: dict[str, object],
    ) -> None:
        self._root, self._names, self._scope = root, names, scope
        self._installed, self._globals = installed, variables
        self.guards = [each.without_value() for each in guards]
        # torch compares identities by number, and the number of an object that is gone can be another's.
        self._alive = [
            (each.place, held)
            for each in guards
            if each.known and each.kind in _BY_IDENTITY
            for held in (_weakly(type(each.value) if each.kind == "TYPE_MATCH" else each.value),)
            if held is not None
        ]

    def difference(self, variables: Variables) -> str:
        """What doesn't hold of these variables of the traced function; "" if all does."""
        for place, held in self._alive:
            if held() is None:
                return f"{place_text(place, self._names)} is another than when the model was traced"
        return self._apart(variables) or self._failing(variables)

    def _apart(self, variables: Variables) -> str:
        """Which two places that led to one object lead to two now, looked up as Dynamo's names say."""
        scope = {"L": variables, "G": {**self._scope, **self._globals}}
        for each in self.guards:
            if each.other is None:
                continue
            names = (each.place.name, each.other.name)
            try:
                one, other = (eval(name, {**scope}) for name in names)
            except Exception:  # noqa: BLE001 - whatever the user's attributes raise
                one, other = True, False
            if one is not other:
                texts = (place_text(p, self._names) or "model" for p in (each.place, each.other))
                return (
                    f"{' and '.join(texts)} {ONE_OBJECT} when the model was traced and are two now"
                )
        return ""

    def _failing(self, variables: Variables) -> str:
        # The trace was made outside inference mode, and a guard on a tensor knows that.
        with torch.inference_mode(False), torch.no_grad():
            text = self._text(variables)
        return self._readable(text) if text else ""

    def about(self, guards: Sequence[Guarded]) -> Judge:
        """One that looks at these, and at little else if it can."""
        return self  # torch's tree has inner nodes that no guard's name tells of

    def less_failing(self, variables: Variables) -> Judge:
        """One that doesn't look at what fails now."""
        found = self
        dropped: set[str] = set()
        while text := found._text(variables):
            names = [place.name for each in found.guards for place in _on_the_ways(each)]
            failing = max((name for name in names if name and name in text), key=len, default="")
            if not failing or failing in dropped:
                return found
            dropped.add(failing)
            root = torch_compat.guards_where(found._root, lambda name: name not in dropped)
            left = {id(g) for g in found.guards if failing not in {p.name for p in _on_the_ways(g)}}
            found = found._part(root, left)
        return found

    def _text(self, variables: Variables) -> str:
        if self._root is None:
            return ""
        gone = self._installed.keys() - self._globals.keys()
        self._globals.update((name, self._installed[name]) for name in gone)
        try:
            return torch_compat.failing_guard(self._root, variables)
        finally:
            for name in gone:
                self._globals.pop(name, None)

    def _part(self, root: Any, left: set[int]) -> DynamoJudge:
        guards = [each for each in self.guards if id(each) in left]
        part = DynamoJudge(root, guards, self._names, self._scope, self._installed, self._globals)
        places = {place for each in part.guards for place in _on_the_ways(each)}
        part._alive = [(place, held) for place, held in self._alive if place in places]
        return part

    def _readable(self, text: str) -> str:
        """A guard's text as a person would write it: ``rate was 2.0 when the model was traced (return x * self.rate, model.py:12)``."""
        text, _, comment = text.partition("#")
        text = _TYPE.sub(r"\1 == a \2", _NOISE.sub("", readable(text, self._names)))
        where = comment.partition("(HINT")[0].strip()
        line, _, at = where.partition("# ")
        about = f"{line.strip()}, {at.strip().rpartition('/')[2]}" if at else line.strip()
        path, is_value, value = text.strip().partition(" == ")
        told = (
            f"{path} was {value} when the model was traced and is another now"
            if is_value and " " not in path
            else f"what held when the model was traced holds no longer: {text.strip()}"
        )
        return f"{told} ({about})" if about else told


def _weakly(value: object) -> weakref.ref[object] | None:
    try:
        return weakref.ref(value)
    except TypeError:
        return None


def _on_the_ways(guard: Guarded) -> list[Place]:
    return [place for end in guard.places for place in end.path()]


class ValueJudge:
    """The plain values of a program that was loaded.

    Args:
        values: what the trace read.
    """

    def __init__(self, values: Iterable[PlainValue]) -> None:
        self._places = Places()
        self._values: dict[Guarded, PlainValue] = {}
        for value in values:
            place = self._places.of(value.path)
            other = self._places.of(value.other) if value.other else None
            self._values[Guarded(place, value.kind, value.about, other, False, None)] = value

    @property
    def guards(self) -> Sequence[Guarded]:
        return tuple(self._values)

    def difference(self, variables: Variables) -> str:
        """What is otherwise than it was; "" if nothing is."""
        now = LookUps({"local": variables})
        return next(filter(None, (self._failing(guard, now) for guard in self._values)), "")

    def about(self, guards: Sequence[Guarded]) -> ValueJudge:
        """One that looks at these alone."""
        return ValueJudge([self._values[each] for each in guards])

    def less_failing(self, variables: Variables) -> ValueJudge:
        """One that doesn't look at what is otherwise now."""
        now = LookUps({"local": variables})
        return self.about([each for each in self._values if not self._failing(each, now)])

    def _failing(self, guard: Guarded, now: LookUps) -> str:
        return difference(self._values[guard], guard.place, self._places, now)


Judge = DynamoJudge | ValueJudge
