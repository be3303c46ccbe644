"""What Dynamo guarded: each guard with the look-ups to it, and Dynamo's check of those kept."""

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from piecework.code_objects import with_inner_code

Place = tuple[tuple[str, object], ...]
"""Where something is: the look-ups that lead there, each a kind and a key.

It starts with ``"local"`` or ``"global"`` (a variable of the traced function), ``"import"`` (a module by name), ``"object"`` (``module:qualified.name``)
or ``"root"`` (a name and the object itself), and goes on with ``"attribute"``, ``"item"``, ``"key"`` (the key of a dictionary at a position), ``"at"`` (its value there), ``"member"`` (of a set, at a position),
``"type"``, ``"class dict"``, ``"static"`` (what a class and its bases hold under a name), ``"referent"`` (of a weak reference), or ``"unknown"``.
"""


@dataclass(frozen=True, slots=True)
class Guarded:
    """One guard."""

    place: Place  # what is guarded
    kind: str  # Dynamo's name of the kind of guard, such as ``"TYPE_MATCH"``
    # the attribute or key that the guard asks for; None where it asks for none
    about: object = None
    other: Place = ()  # the second place of a guard that two lead to one object
    name: str = ""  # what Dynamo calls the place

    @property
    def places(self) -> tuple[Place, ...]:
        """The one or two places that it is about."""
        return (self.place, self.other) if self.other else (self.place,)


class GuardReader:
    """Reads the guards of one trace; give `choose` to torch as ``options["guard_filter_fn"]``."""

    def __init__(self, wanted: Callable[[Sequence[Guarded]], Sequence[bool]]) -> None:
        self._wanted = wanted
        self._places: dict[object, Place] = {}
        self.names: dict[Place, str] = {}

    def choose(self, entries: Sequence[Any]) -> list[bool]:
        return list(self._wanted([self._guarded(entry) for entry in entries]))

    def place_of(self, node: torch.fx.Node) -> Place:
        """Where a graph's input comes from; () where torch doesn't say."""
        source = getattr(node.meta.get("grapharg"), "source", None)
        return () if source is None else self._place(source)

    def give_back(self) -> None:
        vars(self).clear()

    def _guarded(self, entry: Any) -> Guarded:
        guard = entry.orig_guard
        given = getattr(guard.create_fn, "keywords", {})
        about, other = given.get("attr", given.get("key")), given.get("source_b")
        source = guard.originating_source
        if entry.guard_type == "HASATTR" and about is None:  # older torch: the attribute's source
            while type(source).__name__ in _TRANSPARENT:
                source = source.base
            source, about = source.base, source.member
        two = () if other is None else self._place(other)
        return Guarded(self._place(source), entry.guard_type, about, two, source_name(source))

    def _place(self, source: Any) -> Place:
        found = self._places.get(source)
        if found is None:
            found = self._places[source] = self._made(source)
            self.names.setdefault(found, source_name(source))
        return found

    def _made(self, source: Any) -> Place:
        kind = type(source).__name__
        if kind in _STARTS:
            start, name = _STARTS[kind]
            return ((start, getattr(source, name)),)
        base = getattr(source, "base", None)
        if base is None:
            return (("unknown", source_name(source)),)
        held = self._place(base)
        if kind in _TRANSPARENT:
            return held
        if kind in _ATTRIBUTES:
            return (*held, ("attribute", getattr(source, "member", _ATTRIBUTES[kind])))
        if kind in _ITEMS and not getattr(source, "index_is_slice", False):
            index = source.index
            if type(index).__name__ == "ConstDictKeySource":
                return (*held, ("at", index.index))
            return (*held, ("item", index))
        if kind == "DefaultsSource":
            return (*held, ("attribute", source.field), ("item", source.idx_key))
        if kind == "ConstDictKeySource":
            return (*held, ("key", source.index))
        if kind == "NonSerializableSetGetItemSource":
            return (*held, ("member", source.index))
        return (*held, (_OTHERS.get(kind, "unknown"), None))


_STARTS = {
    "LocalSource": ("local", "local_name"),
    "GlobalSource": ("global", "global_name"),
    "ImportSource": ("import", "module_name"),
}
# Sources that say something of theirs, such as what kind of module it is, and lead to the same object.
_TRANSPARENT = {
    *("NNModuleSource", "UnspecializedNNModuleSource", "UnspecializedBuiltinNNModuleSource"),
    "SkipGuardSource",
}
_MEMBERS = ("AttrSource", "GenericAttrSource", "ParamBufferSource", "CellContentsSource")
_ATTRIBUTES = {
    **dict.fromkeys((*_MEMBERS, "UnspecializedParamBufferSource"), ""),
    "CodeSource": "__code__",
    "ClosureSource": "__closure__",
    "TypeMROSource": "__mro__",
}
_ITEMS = {"GetItemSource", "ListGetItemSource", "DictGetItemSource", "DictSubclassGetItemSource"}
_OTHERS = {"TypeSource": "type", "TypeDictSource": "class dict", "WeakRefCallSource": "referent"}


def source_name(source: Any) -> str:
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
    """Dynamo's guards of the trace of ``code``, lost with the code; None if it kept none."""
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(code)
    return entries[0].guard_manager.root if entries else None


def guards_where(root: Any, wanted: Callable[[str], bool]) -> Any:
    """Those guards that are on places of these names and on their way; None for none."""
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


def trace_has_name(*names: str) -> bool:
    """Whether traced code has one of ``names``, as a text too; True where torch hides the code."""
    call_of_a_module = torch.nn.Module._call_impl.__code__
    code = (each for each in traced_code() if each is not call_of_a_module)
    traced = [each for each in code if each.co_filename != torch.utils._pytree.__file__]
    every = ((*each.co_names, *each.co_consts) for each in with_inner_code(traced))
    return not traced or any(type(n) is str and n in names for found in every for n in found)


def ordered_places() -> frozenset[str] | None:
    """Dynamo's names of dictionaries whose order the trace depends on; None where unknown."""
    sources = getattr(running_output(), "guard_on_key_order", None)
    return None if sources is None else frozenset(map(source_name, sources))


def leave_guards_untimed() -> None:
    """Keep Dynamo from running the new guards, to time them for a log alone."""
    output = running_output()
    if hasattr(output, "skip_guards_check"):
        output.skip_guards_check = True


def running_output() -> Any:
    """Dynamo's record of the trace that is running; None where none is."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:  # of this thread
        return None


def traced_locals() -> dict[str, object]:
    """What names ``L['x']`` stand for in the trace whose backend runs; {} where unknown."""
    root = getattr(running_output(), "root_tx", None)
    return dict(getattr(root, "f_locals", None) or {})
