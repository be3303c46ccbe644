"""Whether what a trace relied on still holds, asked only after something was written.

Where the model was traced, Dynamo's own guards are asked; of a program that was loaded, the plain values that the trace read.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from piecework.runtime import torch_compat
from piecework.runtime.torch_compat import Guarded, Place
from piecework.runtime.watch.places import LookUps, place_text, readable
from piecework.runtime.watch.values import ONE_OBJECT, PlainValue

Variables = Mapping[str, object]
#: Kinds of guards that compare identities.
OBJECTS = {
    *("ID_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "BUILTIN_MATCH"),
    *("NN_MODULE", "CLOSURE_MATCH"),
}


class DynamoJudge:
    """Dynamo's own guards: says what of them does not hold."""

    def __init__(
        self,
        root: Any,
        guards: Sequence[Guarded],
        now: LookUps,
        places: Mapping[Place, str],
        names: Mapping[str, str],
        starts: Mapping[str, Variables],
        variables: dict[str, object],
        apart: tuple[str, ...],
    ) -> None:
        self.guards = guards
        self._places, self._names, self._starts = places, names, starts
        self._globals, self._apart = variables, apart
        self._installed = {n: v for n, v in variables.items() if n.startswith("__builtins_dict__")}
        self._root = self._part(root, set()) if guards else None
        # torch compares identities by number, and the number of an object that is gone can be another's.
        self._alive: list[tuple[Place, weakref.ref[object]]] = []
        for each in guards:
            value = now.at(each.place)
            value = type(value) if each.kind == "TYPE_MATCH" else value
            can_go = value is not None and type(value).__weakrefoffset__ > 0
            if can_go and each.kind in (*OBJECTS, "TYPE_MATCH"):
                self._alive.append((each.place, weakref.ref(value)))

    def _part(self, root: Any, without: set[str]) -> Any:
        return torch_compat.guards_where(
            root, lambda name: not name.startswith(self._apart) and name not in without
        )

    def difference(self, variables: Variables) -> str:
        """What doesn't hold of these variables of the traced function; "" if all does."""
        for place, held in self._alive:
            if held() is None:
                return f"{place_text(place, self._names)} is another than when the model was traced"
        now = LookUps({**self._starts, "local": variables})
        for each in self.guards:
            if each.other and now.at(each.place) is not now.at(each.other):
                one, two = (place_text(place, self._names) or "model" for place in each.places)
                return f"{one} and {two} {ONE_OBJECT} when the model was traced and are two now"
        # The trace was made outside inference mode, and a guard on a tensor knows that.
        with torch.inference_mode(False), torch.no_grad():
            text, _, comment = readable(self._failing(variables), self._names).partition("#")
        line, _, at = comment.partition("(HINT")[0].partition("# ")
        about = ", ".join(filter(None, (line.strip(), at.strip().rpartition("/")[2])))
        path, is_value, value = text.strip().partition(" == ")
        if is_value and " " not in path:
            text = f"{path} was {value} when the model was traced and is another now"
        elif text:
            text = f"what held when the model was traced holds no longer: {text.strip()}"
        return f"{text} ({about})" if about else text

    def less_failing(self, variables: Variables) -> DynamoJudge:
        """One that doesn't look at what fails now."""
        dropped: set[str] = set()
        found = self
        while text := found._failing(variables):
            failing = max((name for name in self._places.values() if name in text), key=len)
            if failing in dropped:
                break
            dropped.add(failing)
            found = self._without(dropped)
        return found

    def _without(self, names: set[str]) -> DynamoJudge:
        dropped = {place for place, name in self._places.items() if name in names}

        def is_left(place: Place) -> bool:
            return not any(place[:n] in dropped for n in range(1, len(place) + 1))

        other: DynamoJudge = object.__new__(DynamoJudge)
        other.__dict__.update(self.__dict__, _root=self._part(self._root, names))
        other.guards = [each for each in self.guards if all(map(is_left, each.places))]
        other._alive = [(place, held) for place, held in self._alive if is_left(place)]
        return other

    def _failing(self, variables: Variables) -> str:
        """The text of the first guard that doesn't hold; "" if all do."""
        if self._root is None:
            return ""
        for name, value in self._installed.items():
            self._globals.setdefault(name, value)
        return torch_compat.failing_guard(self._root, variables)


class ValueJudge:
    """The plain values of a program that was loaded, and Dynamo's names of arguments → their own."""

    def __init__(self, values: Sequence[PlainValue], names: Mapping[str, str]) -> None:
        self.values, self._names = values, names
        self.guards: Sequence[Guarded] = [each.guard for each in values]

    def difference(self, variables: Variables) -> str:
        """What is otherwise than it was; "" if nothing is."""
        now = LookUps({"local": variables})
        return next(filter(None, (each.difference(now, self._names) for each in self.values)), "")

    def less_failing(self, variables: Variables) -> ValueJudge:
        """One that doesn't look at what is otherwise now."""
        now = LookUps({"local": variables})
        return ValueJudge([e for e in self.values if not e.difference(now)], self._names)


Judge = DynamoJudge | ValueJudge
