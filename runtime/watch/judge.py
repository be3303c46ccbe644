"""Whether what a trace relied on still holds, asked only after something was written.

Where the model was traced, Dynamo's own guards are asked; of a loaded program, plain values.
"""

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, Self

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


@dataclass(eq=False)
class DynamoJudge:
    """Dynamo's own guards: says what of them does not hold."""

    guards: Sequence[Guarded]
    root: Any  # Dynamo's check of them; None for none
    starts: Mapping[str, Variables]  # where places begin: kind and name → object
    places: Mapping[Place, str]  # Dynamo's names of places
    names: Mapping[str, str]  # Dynamo's names of arguments → their own
    variables: dict[str, object]  # the globals of the traced function, which Dynamo adds to
    now: InitVar[LookUps]

    def __post_init__(self, now: LookUps) -> None:
        held = self.variables.items()
        self._installed = {n: v for n, v in held if n.startswith("__builtins_dict__")}
        # torch compares identities by number, and the number of an object that is gone can be another's.
        self._alive: list[tuple[Place, weakref.ref[object]]] = []
        for each in self.guards:
            value = now.at(each.place)
            value = type(value) if each.kind == "TYPE_MATCH" else value
            can_go = value is not None and type(value).__weakrefoffset__ > 0
            if can_go and each.kind in (*OBJECTS, "TYPE_MATCH"):
                self._alive.append((each.place, weakref.ref(value)))

    def difference(self, variables: Variables) -> str:
        """What doesn't hold of these variables of the traced function; "" if all does."""
        for place, held in self._alive:
            if held() is None:
                return f"{place_text(place, self.names)} is another than when the model was traced"
        now = LookUps({**self.starts, "local": variables})
        for each in self.guards:
            if each.other and now.at(each.place) is not now.at(each.other):
                one, two = (place_text(place, self.names) or "model" for place in each.places)
                return f"{one} and {two} {ONE_OBJECT} when the model was traced and are two now"
        # The trace was made outside inference mode, and a guard on a tensor knows that.
        with torch.inference_mode(False), torch.no_grad():
            text, _, comment = readable(self._failing(variables), self.names).partition("#")
        line, _, at = comment.partition("(HINT")[0].partition("# ")
        about = ", ".join(filter(None, (line.strip(), at.strip().rpartition("/")[2])))
        path, is_value, value = text.strip().partition(" == ")
        if is_value and " " not in path:
            text = f"{path} was {value} when the model was traced and is another now"
        elif text:
            text = f"what held when the model was traced holds no longer: {text.strip()}"
        return f"{text} ({about})" if about else text

    def less_failing(self, variables: Variables) -> Self:
        """One that doesn't look at what fails now."""
        found, names = copy.copy(self), set[str]()
        while text := found._failing(variables):
            failing = max((name for name in self.places.values() if name in text), key=len)
            if failing in names:
                break
            names.add(failing)
            found.root = torch_compat.guards_where(self.root, lambda name: name not in names)
        dropped = {place for place, name in self.places.items() if name in names}

        def is_left(place: Place) -> bool:
            return not any(place[:n] in dropped for n in range(1, len(place) + 1))

        found.guards = [each for each in self.guards if all(map(is_left, each.places))]
        found._alive = [(place, held) for place, held in self._alive if is_left(place)]
        return found

    def _failing(self, variables: Variables) -> str:
        """The text of the first guard that doesn't hold; "" if all do."""
        if self.root is None:
            return ""
        for name, value in self._installed.items():
            self.variables.setdefault(name, value)
        return torch_compat.failing_guard(self.root, variables)


class ValueJudge:
    """The plain values of a program that was loaded."""

    def __init__(self, values: Sequence[PlainValue], names: Mapping[str, str]) -> None:
        self._values, self._names = values, names
        self.guards: Sequence[Guarded] = [each.guard for each in values]

    def difference(self, variables: Variables) -> str:
        """What is otherwise than it was; "" if nothing is."""
        now = LookUps({"local": variables})
        return next(filter(None, (each.difference(now, self._names) for each in self._values)), "")

    def less_failing(self, variables: Variables) -> Self:
        """One that doesn't look at what is otherwise now."""
        now = LookUps({"local": variables})
        return ValueJudge([e for e in self._values if not e.difference(now)], self._names)


Judge = DynamoJudge | ValueJudge
