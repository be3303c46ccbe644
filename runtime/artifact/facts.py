"""What a trace took for given, in another process. In: a `TracedState`. Out: the same facts by place and likeness; and, for another process's model, a `TracedState` once each of them holds.

An identity is established anew: what lies at a place now must be alike, and from then on it must stay the very object. Nothing is dropped: what can't be
told in another process is refused when it is saved.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from piecework.code_objects import HEAP_TYPE
from piecework.errors import ArtifactError
from piecework.runtime.artifact.likeness import (
    A_VALUE,
    Unlike,
    class_name,
    class_table,
    code_digest,
    digest,
    likeness,
)
from piecework.runtime.bind.asked import may_ask
from piecework.runtime.bind.class_watch import function_of
from piecework.runtime.bind.facts import MISSING, Fact, Values, expected, place_text, shown
from piecework.runtime.bind.guards import Bins
from piecework.runtime.bind.traced_state import TracedState
from piecework.runtime.torch_compat import Place

_OTHER = "compile the model again; with artifact=path this happens by itself"


@dataclass(frozen=True, slots=True)
class SavedFact:
    """A fact with the likeness of what it compares, and that for people.

    One about the model is kept without what it compares, which is looked up anew; arguments are not there when it is loaded.
    """

    fact: Fact
    like: str
    text: str


@dataclass(frozen=True, slots=True)
class SavedState:
    """A `TracedState` without objects of its process.

    Attributes:
        facts: about the model.
        argument_facts: about arguments, with what they compare.
        starts: global names that places begin at → ``(kind, name)`` of what is there.
        classes: class → the classes that its instances look in, in order.
        tables: class → what its names lead to.
        asked: names that traced code may look up; None: any.
        code: digests of the code that was traced.
        names, places, watched: as in `TracedState`.
        dtype: the default dtype.
    """

    facts: tuple[SavedFact, ...]
    argument_facts: tuple[SavedFact, ...]
    starts: Mapping[str, tuple[str, str]]
    classes: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, Mapping[str, str]]
    asked: frozenset[str] | None
    code: frozenset[str]
    names: Mapping[str, str]
    places: tuple[int, tuple[str, ...]]
    watched: tuple[Place, ...]
    dtype: torch.dtype


# --- saving ------------------------------------------------------------------------------------------


def saved_state(state: TracedState) -> SavedState:
    """``state`` for another process.

    Raises:
        ArtifactError: something holds no longer, or can be told in this process only.
    """
    changed = state.difference()
    if changed:
        raise ArtifactError(
            f"the model is not as it was traced: {changed}",
            hint="put it back, or compile the model again, and save then",
        )
    if state.global_hooks():
        raise ArtifactError(
            f"torch.nn.modules.module has {state.global_hooks()}, which belong to this process",
            hint="remove the hooks, compile the model again, and save then",
        )
    for each in state.bins.left:
        raise ArtifactError(
            f"the trace relies on {each.place.name} ({each.kind}), which only this process can compare",
            where=place_text(each.place) or "model",
            hint="keep what the model computes with in attributes that are numbers, strings or tensors",
        )
    facts = {_key(each): _saved(each) for each in state.bins.facts}
    kept = (replace(each, fact=replace(each.fact, expected=None)) for each in facts.values())
    asked = state.classes.asked
    return SavedState(
        facts=tuple(kept),
        argument_facts=tuple(map(_saved, state.bins.argument_facts)),
        starts={name: _start(name, each) for name, each in state.starts["global"].items()},
        classes=_orders(state.classes.classes),
        tables=_tables(state.classes.classes),
        asked=asked,
        code=frozenset(map(code_digest, state.code)),
        names=dict(state.names),
        places=state.places,
        watched=tuple(state.watched),
        dtype=torch.get_default_dtype(),
    )


def _key(fact: Fact) -> tuple[object, ...]:
    other = None if fact.other is None else fact.other.name
    return (
        fact.place.name,
        fact.kind,
        fact.about,
        other,
        fact.of_call,
        tuple((place.kind, repr(place.key)) for place in fact.place.path()),
    )


def _saved(fact: Fact) -> SavedFact:
    try:
        like = "" if fact.other is not None else likeness_of(fact.expected)
    except Unlike as error:
        raise ArtifactError(
            f"the trace took {place_text(fact.place) or 'the model'} for constant, and {error} can be told by identity alone",
            where=fact.kind,
            hint="keep what the model computes with in attributes that are numbers, strings, functions or tensors",
        ) from error
    return SavedFact(fact, like, shown(fact.expected))


def likeness_of(seen: object) -> str:
    """The likeness of what a fact compares, where values that are compared by identity may be inside.

    A class counts with its methods: code that was traced may have made an instance of it.
    """
    if type(seen).__name__ == "_Identity":
        return f"is {likeness_of(seen.value)}"  # type: ignore[attr-defined]
    if type(seen) is list:
        return f"list({', '.join(map(likeness_of, seen))})"
    if isinstance(seen, type) and seen.__flags__ & HEAP_TYPE and _is_users(seen):
        owners = [each for each in seen.__mro__ if each.__flags__ & HEAP_TYPE and _is_users(each)]
        tables = [f"{class_name(each)} {sorted(class_table(each).items())}" for each in owners]
        return f"{likeness(seen)} {digest(chr(10).join(tables))}"
    return likeness(seen)


def _is_users(kind: type) -> bool:
    """Whether a class is neither torch's, whose version is compared, nor Python's."""
    root = kind.__module__.partition(".")[0]
    return root not in ("torch", "builtins") and root not in sys.stdlib_module_names


def _start(name: str, value: object) -> tuple[str, str]:
    if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
        return "module", value.__name__
    if value is builtins.__dict__:
        return "builtins", ""
    named = type(value) is dict and value.keys() == _named_tuples("").keys()
    if named and value["_tuple_new"] is tuple.__new__:  # type: ignore[index]
        return "named tuple", str(value["__name__"])  # type: ignore[index]
    path = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
    try:
        if _object_at(path) is value:
            return "object", path
    except (ImportError, AttributeError, ValueError):
        pass
    raise ArtifactError(
        f"the trace begins at the global {name}, which another process could not find",
        where=f"a {class_name(type(value))}",
        hint="keep what the model computes with in the model, or in a module that can be imported",
    )


def _named_tuples(name: str) -> dict[str, object]:
    """The globals that ``collections.namedtuple`` makes for one function, which nobody else holds."""
    return {"_tuple_new": tuple.__new__, "__builtins__": {}, "__name__": name}


def _object_at(path: str) -> object:
    module, _, qualname = path.partition(":")
    value: object = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


def _orders(classes: Iterable[type]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for each in classes:
        if found.setdefault(class_name(each), _order(each)) != _order(each):
            raise _one_name(class_name(each))
    return found


def _one_name(name: str) -> ArtifactError:
    return ArtifactError(
        "two classes of the model have one name",
        where=name,
        hint="define them at the top of a module, under names of their own",
    )


def _order(kind: type) -> tuple[str, ...]:
    return tuple(class_name(each) for each in kind.__mro__ if each.__flags__ & HEAP_TYPE)


def _tables(classes: Iterable[type]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    owners = {each: None for kind in classes for each in kind.__mro__ if each.__flags__ & HEAP_TYPE}
    for each in owners:
        table, name = class_table(each), class_name(each)
        if found.setdefault(name, table) != table:
            raise _one_name(name)
    return found


# --- loading -----------------------------------------------------------------------------------------


def established(saved: SavedState, model: object) -> TracedState:
    """``saved`` for a model of this process.

    Raises:
        ArtifactError: what the trace relied on is not so here.
    """
    if torch.get_default_dtype() is not saved.dtype:
        raise ArtifactError(
            f"the default dtype is {torch.get_default_dtype()}; the model was traced with {saved.dtype}",
            hint=f"torch.set_default_dtype({saved.dtype}), or compile the model again",
        )
    starts: dict[str, Mapping[str, object]] = {
        "local": {"model": model},
        "global": {name: _started(*each) for name, each in saved.starts.items()},
    }
    for each in saved.facts:
        first = each.fact.place.path()[0]
        if first.kind == "import":
            _started("module", str(first.key))
    values = Values(starts)
    bins = Bins(
        facts=[_established(each, values) for each in saved.facts],
        argument_facts=[_of_argument(each) for each in saved.argument_facts],
    )
    state = TracedState(
        model, starts, bins, None, frozenset(), dict(saved.names), saved.places, (saved.asked,)
    )
    _require_same_classes(saved, state.classes.classes)
    hooks = state.global_hooks()
    if hooks:
        raise ArtifactError(
            f"torch.nn.modules.module has {hooks}, and the model was traced without",
            hint="remove the hooks, or compile the model again",
        )
    state.watch_code(_code_of(state.classes.classes, saved.code))
    state.watched.extend(saved.watched)
    return state


def _started(kind: str, name: str) -> object:
    try:
        if kind == "module":
            return importlib.import_module(name)
        if kind == "named tuple":
            return _named_tuples(name)
        return builtins.__dict__ if kind == "builtins" else _object_at(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"what the trace began at is not here: {error}", where=name, hint=_OTHER
        ) from error


def _established(saved: SavedFact, values: Values) -> Fact:
    fact = saved.fact
    where, now = _text(fact.place), values.at(fact.place)
    if fact.other is not None:
        if now is MISSING or not fact.holds(values):
            raise _changed(f"{where} and {_text(fact.other)} were one object")
        return fact
    if now is MISSING:
        raise _changed(f"{where} was {saved.text} and is not there")
    try:
        seen = expected(fact.kind, now, fact.about)
        alike = likeness_of(seen) == saved.like
    except (Unlike, AttributeError, TypeError):
        alike, seen = False, now
    if not alike:
        detail = f".{fact.about}" if isinstance(fact.about, str) else ""
        was, is_now = saved.text, shown(seen)
        raise _changed(f"{where}{detail} was {was} and is {is_now if is_now != was else 'another'}")
    return replace(fact, expected=seen)


def _of_argument(saved: SavedFact) -> Fact:
    """The fact, if the classes and functions in it are alike here."""
    fact = saved.fact
    if fact.other is None and likeness_of(fact.expected) != saved.like:
        raise _changed(f"argument {_text(fact.place)} was {saved.text}, which is another")
    return fact


def _text(place: Place) -> str:
    return place_text(place) or "the model"


def _changed(what: str) -> ArtifactError:
    return ArtifactError(
        f"the model is not the one that was saved: when it was traced, {what} now", hint=_OTHER
    )


def _require_same_classes(saved: SavedState, classes: Iterable[type]) -> None:
    now = {class_name(each): each for each in classes}
    for name, kind in now.items():
        if saved.classes.get(name) != _order(kind):
            raise ArtifactError(f"class {name} has other bases than when it was saved", hint=_OTHER)
    missing = saved.classes.keys() - now.keys()
    if missing:
        raise ArtifactError(f"the model holds no {min(missing)} any more", hint=_OTHER)
    for name, table in _tables(classes).items():
        before = saved.tables[name]
        for each in sorted(before.keys() | table.keys()):
            # Libraries add methods to torch.nn.Module as they are imported, which say nothing of a model that doesn't know them.
            known = each in before or may_ask(saved.asked, each)
            if known and before.get(each, A_VALUE) != table.get(each, A_VALUE):
                raise ArtifactError(
                    f"{name}.{each} has other code than when the model was saved",
                    where="the model's source changed",
                    hint=_OTHER,
                )


def _code_of(classes: Iterable[type], digests: frozenset[str]) -> frozenset[types.CodeType]:
    """The code of these classes that was traced: what it runs is watched from now on."""
    found: set[types.CodeType] = set()
    for owner in {each for kind in classes for each in kind.__mro__}:
        found |= {code for code in codes_of(owner) if code_digest(code) in digests}
    return frozenset(found)


def codes_of(owner: type) -> Iterator[types.CodeType]:
    """The code of the functions in a class's own body."""
    functions = map(function_of, owner.__dict__.values())
    return (each.__code__ for each in functions if each is not None)
