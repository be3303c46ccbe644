"""One trace for layers that are alike. In: a model, and what its configuration says. Out: a flat graph and facts as of a trace of every layer, of which one of each kind was traced; or the reason why each was.

Marks, the graph and the facts are `piecework.runtime.regions`'; here they meet the trace that is running.
"""

from __future__ import annotations

import builtins
import copy
import dis
import logging
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from piecework.runtime import torch_compat
from piecework.runtime.bind.facts import Values
from piecework.runtime.bind.guards import Bins
from piecework.runtime.regions.facts import LayerPlaces, Read, say_of_all
from piecework.runtime.regions.found import Group, repeated_layers
from piecework.runtime.regions.graph import FlatGraph
from piecework.runtime.regions.hidden import require_apart
from piecework.runtime.regions.literals import Origin, Slot, slots_of
from piecework.runtime.regions.marks import FILE, Marks, Refused
from piecework.runtime.torch_compat import Guarded, GuardReader
from piecework.runtime.trace.untold import scopes

_log = logging.getLogger(__name__)
_ATTEMPTS = 3


@dataclass(slots=True)
class RepeatedLayers:
    """What of a model's layers one trace can stand for; asked before each trace, told when one fails.

    Args:
        wish: ``"found"``, ``"off"``, or dotted names of the modules whose children are repeated.

    Attributes:
        refused: why every layer is traced; "" while that is not so.
    """

    wish: str | tuple[str, ...] = "off"
    refused: str = ""
    _equal: frozenset[object] = frozenset()
    _apart: list[torch.nn.Module] = field(default_factory=list)
    _failed: int = 0
    _why: str = ""
    _done: str = ""

    def text(self) -> str:
        """What became of it, for the report; "" if there is nothing to say."""
        if self.refused:
            return f"every layer was traced: {self.refused}"
        return self._done

    def note(self, shared: SharedLayers) -> None:
        """Take note of a trace that was made."""
        self._done = shared.text()

    def marks(self, model: Callable[..., object]) -> Marks | None:
        """The marks for a trace of ``model``; None if each layer is to be traced."""
        if self.wish == "off" or self.refused:
            return None
        named = None if isinstance(self.wish, str) else self.wish
        groups = repeated_layers(model, named, self._equal, self._apart)
        if not groups:
            named_none = f"no module {' or '.join(named)} holds two that are alike" if named else ""
            self.refused = self._why or named_none
            return None
        return Marks(groups)

    def gave_up(self, marks: Marks, error: BaseException) -> bool:
        """Whether a trace failed because of its marks, so that another one may do."""
        why = marks.caused(error)
        if why is None:
            return False
        names = why.names - self._equal
        self._failed, self._why = self._failed + 1, str(why)
        self._equal |= names
        if why.apart is not None:
            self._apart.append(why.apart)
        if not (names or why.apart is not None) or self._failed >= _ATTEMPTS:
            self.refused = self._why
        _log.info("repeated layers are traced again: %s", why)
        return True


@dataclass(slots=True)
class SharedLayers:
    """The marks of the trace that is running.

    Args:
        model: what is traced.
        marks: the marks on its layers.
    """

    model: Callable[..., object]
    marks: Marks
    _places: LayerPlaces | None = None
    _called: frozenset[int] = frozenset()
    _literal: frozenset[object] = frozenset()
    _reads: dict[int, list[Read]] = field(default_factory=dict)

    def write_out(
        self,
        gm: torch.fx.GraphModule,
        inputs: Sequence[object],
        reader: GuardReader,
        values: Values,
    ) -> tuple[torch.fx.GraphModule, list[object]]:
        """Write the graph out flat; for the backend of the trace.

        Returns:
            A graph of its own, since Dynamo goes on with the one that it gave; and the example inputs, with those of the
            layers that were not traced.

        Raises:
            Refused: it can't be shown to be the graph that a flat trace would have.
        """
        inside = [code for record in self.marks.recorded for code in record.code]
        code = list(dict.fromkeys(each for each in inside if each.co_filename != FILE))
        found = list(scopes(self.model, code))
        places = LayerPlaces(self.marks.groups, values)
        require_apart(self.marks.groups, places.owned(), found)
        self._require_unwritten(code)
        guards = [g for g in map(places.unmarked, reader.so_far()) if g is not None]
        places.note(guards)
        own = torch_compat.graph_module(gm, copy.deepcopy(gm.graph))
        own.meta = gm.meta
        flat = FlatGraph(own, list(inputs), self.marks, places)
        inside = {
            id(group): [each for each in guards if places.of(group, each.place)]
            for group in self.marks.groups
        }
        for mark in flat.calls:
            assert mark.alike is not None
            if id(mark.alike) not in self._reads:
                read = places.reads(mark.group, mark.alike, inside[id(mark.group)])
                self._reads[id(mark.alike)] = list(read)
        names = frozenset(each.name for found in self._reads.values() for each in found)
        slots = self._slots(names, code, found) if names else {}
        flat.write_out(slots, lambda _, alike: self._reads[id(alike)])
        self._called, self._literal = frozenset(flat.called), frozenset(names)
        return own, flat.inputs

    def _slots(
        self,
        names: frozenset[str],
        code: Iterable[types.CodeType],
        found: Iterable[tuple[object, types.CodeType]],
    ) -> dict[Slot, Origin]:
        groups = self.marks.groups
        kinds = {type(each) for group in groups for each in group.others[0].own()}
        forwards = _forwards(groups)
        slots: dict[Slot, Origin] = {}
        for name in sorted(names):
            known = slots_of(frozenset({name}), code, _Names(found), forwards, kinds)
            for slot in slots.keys() & known.keys():
                raise Refused(
                    f"argument {slot[1]} of {slot[0]} has several origins", frozenset({name})
                )
            slots |= known
        return slots

    def _require_unwritten(self, code: Iterable[types.CodeType]) -> None:
        """Raise if a layer's code writes what layers have otherwise: that it wrote nothing new is known of the first alone."""
        others = [alike for group in self.marks.groups for alike in group.others]
        names = {each.name for alike in others for each in alike.differing}
        for each in code:
            for step in dis.get_instructions(each) if names & set(each.co_names) else ():
                if step.opname in ("STORE_ATTR", "DELETE_ATTR") and step.argval in names:
                    raise Refused(
                        f"{each.co_qualname} writes {step.argval}", frozenset({step.argval})
                    )

    @property
    def served(self) -> bool:
        """Whether the graph has layers that the trace did not go through."""
        return bool(self._called)

    def text(self) -> str:
        """How many layers the trace did not go through."""
        layers = sum(len(list(group.layers())) for group in self.marks.groups)
        return (
            f"one trace served {len(self._called)} of {layers} repeated layers"
            if self._called
            else ""
        )

    # --- for the guards of the trace --------------------------------------------------------------------

    def without_marks(self, guards: Sequence[Guarded], values: Values) -> list[Guarded]:
        """The guards as a trace without marks has them."""
        self._places = LayerPlaces(self.marks.groups, values)
        found = map(self._places.unmarked, guards)
        return [each for each in found if each is not None]

    def complete(self, bins: Bins, guards: Sequence[Guarded]) -> None:
        """Say of all layers what the trace took for given of those that it went through.

        Raises:
            Refused: it does not hold of all.
        """
        assert self._places is not None
        self._places.note(guards)
        say_of_all(bins, self._places, self._called, self._literal)


class _Names:
    """What global names are to code."""

    def __init__(self, found: Iterable[tuple[object, types.CodeType]]) -> None:
        self._scopes = {code: scope for scope, code in found}

    def __call__(self, code: types.CodeType, name: str) -> object:
        scope = self._scopes[code]
        return scope[name] if name in scope else vars(builtins)[name]  # type: ignore[operator, index]


def _forwards(groups: Iterable[Group]) -> dict[types.CodeType, list[torch.nn.Module]]:
    """The modules whose ``forward`` a code object is."""
    found: dict[types.CodeType, list[torch.nn.Module]] = {}
    for group in groups:
        for module in group.first.modules():
            function = type(module).forward
            if isinstance(function, types.FunctionType):
                found.setdefault(function.__code__, []).append(module)
    return found
