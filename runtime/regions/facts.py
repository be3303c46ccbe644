"""What the trace of one layer took for given, said of the others. In: guards, values, and which layers are alike. Out: the same facts at the places of each other layer; or why that can't be.

A layer that was not traced is compared with the one that was, fact by fact, before its graph is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from piecework.runtime.bind.facts import (
    CONSTANT_KINDS,
    MISSING,
    Fact,
    Values,
    expected,
    same,
)
from piecework.runtime.bind.guards import Bins
from piecework.runtime.regions.alike import Alike, is_plain
from piecework.runtime.regions.found import Group
from piecework.runtime.regions.marks import Refused
from piecework.runtime.torch_compat import Guarded, Place


@dataclass(frozen=True, slots=True)
class Read:
    """A number or text that the trace read of the first layer, and another layer has otherwise."""

    name: str
    first: object
    second: object


@dataclass(slots=True)
class LayerPlaces:
    """Where a trace found layers and what is in them.

    Args:
        groups: the marked layers.
        values: what is at places while the trace runs.
    """

    groups: Sequence[Group]
    values: Values
    roots: dict[int, Place] = field(default_factory=dict)
    _owners: dict[int, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _holders: dict[int, tuple[int, int]] = field(default_factory=dict)
    _moved: dict[tuple[int, int], Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group in self.groups:
            for layer in group.layers():
                self._holders[id(layer)] = id(group.holder), id(group.holder._modules)
            for alike in group.others:
                for one, other in alike.pairs.values():
                    if one is not other:
                        self._owners[id(one)] = id(group.first)
                        self._owners[id(other)] = id(alike.second)

    def owned(self) -> Mapping[int, int]:
        """By identity: what is in a layer → the layer."""
        return self._owners

    def note(self, guards: Iterable[Guarded]) -> None:
        """Take note of guarded places.

        Raises:
            Refused: one leads to a layer by a way of its own, so that code could tell it from others.
        """
        for guard in guards:
            for place in (guard.place, guard.other):
                if place is not None and id(place) not in self._seen and not self.marked(place):
                    self._note(place)

    def _note(self, place: Place) -> None:
        root: Place | None = None
        for each in place.path():
            self._seen.add(id(each))
            value = self.values.at(each)
            keyed = isinstance(value, (set, frozenset, dict))
            if keyed and any(id(key) in self._owners for key in value):  # type: ignore[attr-defined]
                raise Refused(f"{each.name} holds a layer by itself")
            owner = self._owners.get(id(value))
            if owner is None:
                continue
            if owner == id(value):
                held = each.base is not None and id(self.values.at(each.base))
                if root is not None or held not in self._holders[owner]:
                    raise Refused(f"{each.name} leads to a layer by a way of its own")
                root = each
                self.roots.setdefault(owner, each)
            elif root is None or id(self.values.at(root)) != owner:
                raise Refused(f"{each.name} leads into a layer by a way of its own")

    def marked(self, place: Place) -> bool:
        """Whether it is about a mark of ours."""
        return any(
            each.kind == "attribute"
            and each.key == "forward"
            and each.base is not None
            and id(self.values.at(each.base)) in self._holders
            for each in place.path()
        )

    def in_layer(self, place: Place) -> bool:
        """Whether it is in one of the layers."""
        return any(id(self.values.at(each)) in self._holders for each in place.path())

    def unmarked(self, guard: Guarded) -> Guarded | None:
        """The guard as a trace without marks has it; None if it is about a mark alone."""
        places = [guard.place] if guard.other is None else [guard.place, guard.other]
        if not any(map(self.marked, places)):
            return guard
        found = [self._through_class(each) if self.marked(each) else each for each in places]
        if None in found:
            return None
        return replace(guard, place=found[0], other=found[1] if len(found) > 1 else None)

    def _through_class(self, place: Place) -> Place | None:
        """A place in a layer's own ``forward``, found on its class instead of by the mark that calls it."""
        path = place.path()
        start = next(
            i for i, each in enumerate(path) if each.key == "forward" and self.marked(each)
        )
        layer = path[start - 1]
        kind = type(self.values.at(layer))
        own = kind.forward  # type: ignore[attr-defined]
        first = next((i for i, each in enumerate(path) if self.values.at(each) is own), None)
        if first is None:
            return None
        made = _on_class(layer, kind)
        for before, each in pairwise(path[first:]):
            name = each.name.replace(before.name, made.name, 1)
            made = Place(made, each.kind, each.key, name)
        return made

    def reads(self, group: Group, alike: Alike, guards: Iterable[Guarded]) -> list[Read]:
        """What the trace read and the other layer has otherwise; with what else it read by these names, which is the same there.

        Args:
            guards: those in the first layer.
        """
        equal, differing = [], []
        for guard in guards:
            place = guard.place
            one, other = self.values.at(place), self.values.at(self.moved(group, alike, place))
            if type(one) not in (int, str):
                continue
            read = Read(str(place.key), one, other)
            if same(one, other):
                equal.append(read)
                continue
            owner = None if place.base is None else self.values.at(place.base)
            held = getattr(owner, "__dict__", None)
            plain = isinstance(owner, torch.nn.Module) or is_plain(type(owner))
            if (
                place.kind != "attribute"
                or not plain
                or type(held) is not dict
                or place.key not in held
            ):
                raise Refused(
                    f"{place.name} differs between layers and is no attribute of a plain object"
                )
            differing.append(read)
        names = {each.name for each in differing}
        return [*differing, *(each for each in equal if each.name in names)]

    def of(self, group: Group, place: Place) -> bool:
        """Whether it is in the first layer of a group."""
        root = self.roots.get(id(group.first))
        first = self.values.at(root) if root is not None else None
        return first is not None and any(self.values.at(each) is first for each in place.path())

    def moved(self, group: Group, alike: Alike, place: Place) -> Place:
        """The place in the other layer; the same one if it is in neither."""
        key = id(alike), id(place)
        found = self._moved.get(key)
        if found is None:
            found = self._moved[key] = self._move(group, alike, place)
        return found

    def _move(self, group: Group, alike: Alike, place: Place) -> Place:
        if self.values.at(place) is group.first:
            return self.root(alike.second)
        if place.base is None:
            return place
        base = self.moved(group, alike, place.base)
        if base is place.base:
            return place
        return Place(base, place.kind, place.key, self.moved_name(group, alike, place.name))

    def moved_name(self, group: Group, alike: Alike, name: str) -> str:
        """Dynamo's name of a place in the other layer.

        Raises:
            Refused: the name is not in the first layer.
        """
        start = self.root(group.first).name
        if start not in name:
            raise Refused(f"{name} is not found by way of its layer")
        return name.replace(start, self.root(alike.second).name, 1)

    def moved_name_of(self, alike: Alike, name: str) -> str:
        """`moved_name` of a layer beside the first of its group."""
        group = next(each for each in self.groups if each.first is alike.first)
        return self.moved_name(group, alike, name)

    def root(self, layer: object) -> Place:
        """Where a layer is.

        Raises:
            Refused: the trace did not look at it.
        """
        found = self.roots.get(id(layer))
        if found is None:
            raise Refused("a layer was called that the trace did not look up")
        return found


def say_of_all(
    bins: Bins, places: LayerPlaces, called: frozenset[int], literal: frozenset[object]
) -> None:
    """Add to ``bins`` what holds of the layers that were not traced.

    Args:
        called: the layers that a traced one stood for, by identity.
        literal: attributes whose numbers and texts go to operators only.

    Raises:
        Refused: something holds of the first layer of a group, and not of another.
    """
    for guard in bins.left:
        if any(each is not None and places.in_layer(each) for each in (guard.place, guard.other)):
            raise Refused(
                f"{guard.place.name} is guarded in a way ({guard.kind}) that only Dynamo knows"
            )
    facts, tensors = list(bins.facts), list(bins.tensors)
    first: dict[int, Place] = {}
    for place, tensor in tensors:
        first.setdefault(id(tensor), place)
    for fact in bins.argument_facts:
        if places.in_layer(fact.place) or (fact.other is not None and places.in_layer(fact.other)):
            raise Refused(f"{fact.place.name} is compared with an argument")
    for group in places.groups:
        if id(group.first) in places.roots:
            bins.facts.append(_no_forward(places.root(group.first)))
        inside = [each for each in facts if _touches(places, group, each)]
        looked = [each for each in tensors if places.of(group, each[0])]
        for alike in group.others:
            if id(alike.second) in places.roots:
                bins.facts.append(_no_forward(places.root(alike.second)))
            if id(alike.second) not in called:
                continue
            for fact in inside:
                bins.facts.append(_moved(places, group, alike, fact, literal))
            for place, tensor in looked:
                moved, own = places.moved(group, alike, place), alike.counterpart(tensor)
                assert isinstance(own, torch.Tensor)
                bins.tensors.append((moved, own))
                known = first.setdefault(id(own), moved)
                if known is not moved:
                    seen = expected("DUPLICATE_INPUT", own, None)
                    bins.facts.append(Fact(moved, "DUPLICATE_INPUT", None, seen, known))


def _on_class(layer: Place, kind: type) -> Place:
    """Where a class, or one that it is derived from, has ``forward``."""
    index = next(i for i, each in enumerate(kind.__mro__) if "forward" in each.__dict__)
    held = Place(layer, "type", None, f"type({layer.name})")
    if index:
        order = Place(held, "attribute", "__mro__", f"{held.name}.__mro__")
        held = Place(order, "item", index, f"{order.name}[{index}]")
    names = Place(held, "class dict", None, f"dict({held.name}.__dict__)")
    return Place(names, "item", "forward", f"{names.name}['forward']")


def _no_forward(place: Place) -> Fact:
    return Fact(place, "NOT_PRESENT_IN_GENERIC_DICT", "forward", False)


def _touches(places: LayerPlaces, group: Group, fact: Fact) -> bool:
    return places.of(group, fact.place) or (fact.other is not None and places.of(group, fact.other))


def _moved(
    places: LayerPlaces, group: Group, alike: Alike, fact: Fact, literal: frozenset[object]
) -> Fact:
    values = places.values
    place = places.moved(group, alike, fact.place)
    other = None if fact.other is None else places.moved(group, alike, fact.other)
    one, value = values.at(fact.place), values.at(place)
    seen = MISSING if value is MISSING else expected(fact.kind, value, fact.about)
    if other is not None:
        alike_too = value is values.at(other)
    elif id(one) in alike.pairs:
        alike_too = alike.counterpart(one) is value
        alike_too &= same(seen, fact.expected) or getattr(seen, "value", None) is value
    else:
        alike_too = same(seen, fact.expected) or (
            fact.kind in CONSTANT_KINDS
            and fact.place.key in literal
            and type(one) in (int, str)
            and type(value) is type(one)
        )
    if not alike_too:
        raise Refused(
            f"{place.name} is not as {fact.place.name} is ({fact.kind})",
            frozenset({fact.place.key}),
        )
    return Fact(place, fact.kind, fact.about, seen, other, fact.of_call)
