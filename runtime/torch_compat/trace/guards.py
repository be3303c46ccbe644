"""What Dynamo guarded. In: the trace that is running. Out: each guard with the look-ups to what it guards, and Dynamo's own check of those that the caller wants kept.

It says what a guard is about, and never what that means for a captured graph.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piecework.code_objects import with_inner_code
from piecework.runtime.torch_compat.dictionaries import Owner, guards_ready


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where something is: a look-up in what another place leads to.

    Attributes:
        base: the place that is looked into; None for the start.
        kind: ``"local"`` and ``"global"`` (starts: variables of the traced function), ``"import"`` (a module by name), ``"attribute"``,
            ``"item"``, ``"key"`` (the key of a dictionary at a position), ``"at"`` (its value there), ``"type"``, ``"class dict"``, or
            ``"unknown"``.
        key: a name, an index or a key.
        name: what Dynamo calls it.
    """

    base: Place | None
    kind: str
    key: object
    name: str

    def path(self) -> list[Place]:
        """The places on the way, the start first."""
        found: list[Place] = []
        place: Place | None = self
        while place is not None:
            found.append(place)
            place = place.base
        return found[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Guarded:
    """One guard.

    Attributes:
        place: what is guarded.
        kind: Dynamo's name of the kind of guard, such as ``"TYPE_MATCH"``.
        about: the attribute or key that the guard asks for; None where it asks for none.
        other: the second place of a guard of two.
        known: whether ``value`` is what was there.
        value: what was there.
    """

    place: Place
    kind: str
    about: object
    other: Place | None
    known: bool
    value: object


class GuardReader:
    """Reads the guards of one trace; give `choose` to ``torch.compile`` as ``options["guard_filter_fn"]``.

    Args:
        wanted: called once with all guards; says for each whether Dynamo's own check must have it.
    """

    def __init__(self, wanted: Callable[[Sequence[Guarded]], Sequence[bool]]) -> None:
        self._wanted = wanted
        self._places: dict[object, Place] = {}

    def choose(self, entries: Sequence[Any]) -> list[bool]:
        return list(self._wanted([self._guarded(entry) for entry in entries]))

    def so_far(self) -> list[Guarded]:
        """What the trace that is running has guarded by now; what was there is not told."""
        context = getattr(torch._guards.TracingContext.try_get(), "guards_context", None)
        found = []
        for guard in getattr(context, "dynamo_guards", None) or ():
            about = types.SimpleNamespace(
                orig_guard=guard, guard_type=guard.create_fn_name(), has_value=False, value=None
            )
            found.append(self._guarded(about))
        return found

    def give_back(self) -> None:
        """Forget everything: torch keeps the function that it was given."""
        vars(self).clear()

    def _guarded(self, entry: Any) -> Guarded:
        guard = entry.orig_guard
        given = getattr(guard.create_fn, "keywords", {})
        about = given.get("attr", given.get("key"))
        other = given.get("source_b")
        source, known = guard.originating_source, entry.has_value
        # Older torch guards the attribute's own source.
        if entry.guard_type == "HASATTR" and about is None:
            while type(source).__name__ in _TRANSPARENT:
                source = source.base
            source, about, known = source.base, source.member, False
        kind = entry.guard_type
        if given.get("invert"):  # older torch has one kind for both
            kind = kind.replace("_CONTAINS", "_NOT_CONTAINS")
        return Guarded(
            self._place(source),
            kind,
            about,
            None if other is None else self._place(other),
            known,
            entry.value if known else None,
        )

    def _place(self, source: Any) -> Place:
        found = self._places.get(source)
        if found is None:
            found = self._places[source] = self._made(source)
        return found

    def _made(self, source: Any) -> Place:
        kind = type(source).__name__
        name = source_name(source)
        start = _STARTS.get(kind)
        if start is not None:
            return Place(None, start[0], getattr(source, start[1]), name)
        base = getattr(source, "base", None)
        if base is None:
            return Place(None, "unknown", None, name)
        held = self._place(base)
        if kind in _TRANSPARENT:
            return held
        if kind in _ATTRIBUTES:
            return Place(held, "attribute", getattr(source, "member", _ATTRIBUTES[kind]), name)
        if kind in _ITEMS and not getattr(source, "index_is_slice", False):
            index = source.index
            if type(index).__name__ == "ConstDictKeySource":
                return Place(held, "at", index.index, name)
            return Place(held, "item", index, name)
        if kind == "DefaultsSource":
            values = Place(held, "attribute", source.field, f"{held.name}.{source.field}")
            return Place(values, "item", source.idx_key, name)
        if kind == "ConstDictKeySource":
            return Place(held, "key", source.index, name)
        if kind == "TypeSource":
            return Place(held, "type", None, name)
        if kind == "TypeDictSource":
            return Place(held, "class dict", None, name)
        return Place(held, "unknown", None, name)


_STARTS = {
    "LocalSource": ("local", "local_name"),
    "GlobalSource": ("global", "global_name"),
    "ImportSource": ("import", "module_name"),
}
# Sources that say something of theirs, such as what kind of module it is, and lead to the same object.
_TRANSPARENT = {
    "NNModuleSource",
    "UnspecializedNNModuleSource",
    "UnspecializedBuiltinNNModuleSource",
    "SkipGuardSource",
}
_ATTRIBUTES = {
    "AttrSource": "",
    "GenericAttrSource": "",
    "ParamBufferSource": "",
    "UnspecializedParamBufferSource": "",
    "CellContentsSource": "",
    "CodeSource": "__code__",
    "ClosureSource": "__closure__",
    "TypeMROSource": "__mro__",
}
_ITEMS = {"GetItemSource", "ListGetItemSource", "DictGetItemSource", "DictSubclassGetItemSource"}


def source_name(source: Any) -> str:
    """Dynamo's name of a source."""
    return str(getattr(source, "name", ""))


#: Whether Dynamo guards the plain values that it reads of a class itself (``Settings.rate``). Seen to be so in 2.13, and not in 2.11.
GUARDS_CLASS_VALUES = torch.__version__ >= "2.13"


def guard_settings() -> Mapping[str, object]:
    """Settings of Dynamo that let it leave nothing unguarded that it can guard."""
    return {
        "guard_nn_modules": True,
        "skip_nnmodule_hook_guards": False,
        "skip_guards_on_constant_func_defaults": False,
        "skip_fsdp_guards": False,
        "skip_tensor_guards_with_matching_dict_tags": False,
        "assume_dunder_attributes_remain_unchanged": False,
        "use_recursive_dict_tags_for_guards": False,
        "_unsafe_skip_fsdp_module_guards": False,
        "caching_precompile": False,  # it drops guards that compare identities
    }


def kept_guards(code: types.CodeType) -> Any:
    """Dynamo's check of the guards that were wanted in the trace of ``code``; None if there is none.

    What comes back has ``check(locals)`` and ``check_verbose(locals)``.
    """
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return getattr(entries[0], "guard_manager", None) if entries else None


def failing_guard(manager: Any, values: Mapping[str, object]) -> str:
    """The text of the first of Dynamo's guards that does not hold; "" if all do."""
    info = manager.check_verbose(dict(values))
    return "" if info.result else str((info.verbose_code_parts or ["a guard"])[0])


def traced_code() -> list[types.CodeType]:
    """The code that the trace that is running went through, once each."""
    return list(dict.fromkeys(traced_calls()))


def traced_calls() -> list[types.CodeType]:
    """The code of each call that the trace that is running went through, in order."""
    return list(getattr(torch._guards.TracingContext.try_get(), "traced_code", None) or ())


_CALL_OF_A_MODULE = torch.nn.Module._call_impl.__code__


def trace_names(*names: str) -> list[str]:
    """Those of ``names`` that code which the running trace went through has, by themselves or as texts; all where torch doesn't say.

    The call of a module counts for nothing: it asks its results for gradients' functions to hang hooks on them.
    """
    traced = [each for each in traced_code() if each is not _CALL_OF_A_MODULE]
    if not traced:
        return list(names)
    found: set[object] = set()
    for code in with_inner_code(traced):
        found |= {*code.co_names, *(each for each in code.co_consts if type(each) is str)}
    return [name for name in names if name in found]


def ordered_places() -> frozenset[str] | None:
    """Dynamo's names of the dictionaries whose order the trace that is running depends on; None where torch doesn't say."""
    sources = getattr(running_output(), "guard_on_key_order", None)
    if sources is None:
        return None
    return frozenset(source_name(source) for source in sources)


def leave_guards_untimed() -> None:
    """Keep Dynamo from running the guards of the trace that is running when it has made them.

    It would see whether they hold, which is looked at in each call, and how long they take with the processor's caches emptied: for a log
    alone, it writes 32 MB each time.
    """
    output = running_output()
    if hasattr(output, "skip_guards_check"):
        output.skip_guards_check = True


def running_output() -> Any:
    """Dynamo's record of the trace that is running; None where torch doesn't show it."""
    from torch._dynamo import symbolic_convert

    current = getattr(symbolic_convert.InstructionTranslator, "current_tx", None)
    try:
        return current().output  # type: ignore[misc]
    except (AttributeError, TypeError):
        return None


def class_dict(kind: type) -> dict[str, object] | None:
    """The dictionary behind ``kind.__dict__``; None where it can't be reached."""
    import gc

    found = [each for each in gc.get_referents(kind.__dict__) if type(each) is dict]
    return found[0] if len(found) == 1 and found[0].keys() == kind.__dict__.keys() else None


def identity_guard(
    classes: Iterable[object], attributes: Iterable[tuple[object, str, object]]
) -> Callable[[], bool]:
    """A function that is true while each object has the class that it has now, and each attribute is the same object.

    Args:
        classes: objects whose class is compared.
        attributes: owner, name, and what is there; all are kept alive. They must not be computed at each access.
    """
    kinds = list({id(each): each for each in classes}.values())
    rows = list(attributes)
    if not (kinds or rows):
        return _true
    if guards_ready() and _has_identity_guards():
        return _identity_guard(kinds, rows)
    expected = [type(each) for each in kinds]
    return lambda: [*map(type, kinds)] == expected and all(
        getattr(owner, name, _true) is value for owner, name, value in rows
    )


def _identity_guard(
    kinds: Sequence[object], rows: Sequence[tuple[object, str, object]]
) -> Callable[[], bool]:
    from torch._dynamo.guards import GuardManagerType

    owner = Owner([*kinds, *(row[0] for row in rows)])
    start = [owner, [type(each) for each in kinds], [row[2] for row in rows]]
    root = torch._C._dynamo.guards.RootGuardManager()
    _, managers = owner.managers(root)
    for each, at_object in zip(kinds, managers[: len(kinds)], strict=True):
        at_object.add_type_match_guard(id(type(each)), [""], None)
    kind = GuardManagerType.GUARD_MANAGER
    for (_, name, value), at_object in zip(rows, managers[len(kinds) :], strict=True):
        at_value = at_object.getattr_manager(name, "", value, kind)
        at_value.add_id_match_guard(id(value), [""], None)
    return functools.partial(root.check, start)


@functools.cache
def _has_identity_guards() -> bool:
    """Whether the guards exist and do what is wanted of them, tried on objects of our own."""

    class One:
        x = 1

    class Two(One):
        x = 2

    first, second = One(), One()
    second.y = first  # type: ignore[attr-defined]
    try:
        same = _identity_guard([first], [(second, "y", first)])
        if not (same() and same()):
            return False
        first.__class__ = Two
        if same():
            return False
        first.__class__ = One
        second.y = None  # type: ignore[attr-defined]
        if same():
            return False
        del second.y  # type: ignore[attr-defined]
        return not same()
    except (AttributeError, ImportError, TypeError, RuntimeError):
        return False


def _true() -> bool:
    return True
