"""What Dynamo guarded: each guard with the look-ups to what it guards, and Dynamo's own check of those that are kept."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from piecework.code_objects import with_inner_code


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where something is: a look-up in what another place leads to.

    Attributes:
        base: the place that is looked into; None for the start.
        kind: ``"local"`` and ``"global"`` (starts: variables of the traced function), ``"import"`` (a module by name), ``"attribute"``,
            ``"root"`` (an object, which is the key), ``"item"``, ``"key"`` (the key of a dictionary at a position), ``"at"`` (its value there), ``"type"``, ``"class dict"``,
            ``"referent"`` (what a weak reference points to), or ``"unknown"``.
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

    @property
    def places(self) -> list[Place]:
        """The one or two places that it is about."""
        return [self.place] if self.other is None else [self.place, self.other]

    def without_value(self) -> Guarded:
        """The same, holding nothing of what was there."""
        return Guarded(self.place, self.kind, self.about, self.other, False, None)


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

    def place_of(self, node: torch.fx.Node) -> Place | None:
        """Where a graph's input comes from; None where torch doesn't say."""
        source = getattr(node.meta.get("grapharg"), "source", None)
        return None if source is None else self._place(source)

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
        if kind == "WeakRefCallSource":
            return Place(held, "referent", None, name)
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
    """Dynamo's guards of the trace of ``code`` that were wanted; None if this torch doesn't show them.

    What comes back has ``check(variables)`` and ``check_verbose(variables)``, and is held by nobody else once the code is gone.
    """
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    manager = getattr(entries[0], "guard_manager", None) if entries else None
    root = getattr(manager, "root", manager)
    return root if hasattr(root, "clone_manager") else None


def guards_where(root: Any, wanted: Callable[[str], bool]) -> Any:
    """Those of some guards that are on places of these names, each place with those on its way; None if there are none."""
    above = {root.get_source(), "G"}  # what holds the variables, and the globals
    return root.clone_manager(lambda at: (name := at.get_source()) in above or wanted(name))


def failing_guard(root: Any, values: Mapping[str, object]) -> str:
    """The text of the first of Dynamo's guards that does not hold; "" if all do."""
    info = root.check_verbose(dict(values))
    return "" if info.result else str((info.verbose_code_parts or ["a guard"])[0])


def traced_code() -> list[types.CodeType]:
    """The code that the trace that is running went through, once each."""
    context = torch._guards.TracingContext.try_get()
    return list(dict.fromkeys(getattr(context, "traced_code", None) or ()))


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


def traced_locals() -> dict[str, object]:
    """What Dynamo's names ``L['x']`` stand for in the trace whose backend is being called; {} where torch doesn't show it."""
    root = getattr(running_output(), "root_tx", None)
    return dict(getattr(root, "f_locals", None) or {})


def class_dict(kind: type) -> dict[str, object] | None:
    """The dictionary behind ``kind.__dict__``; None where it can't be reached."""
    import gc

    found = [each for each in gc.get_referents(kind.__dict__) if type(each) is dict]
    return found[0] if len(found) == 1 and found[0].keys() == kind.__dict__.keys() else None
