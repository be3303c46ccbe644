"""What Dynamo reads and guards nothing for. In: traced code, and what lies at the places of its guards. Out: facts about functions, abstract classes, and objects that were made texts; the error for a class that says itself what its instances are.

Of a function it guards the code, and what code asks it for in vain or reads of its annotations it takes for constant; of an abstract class,
what it says of others; of an object, whatever its ``__repr__`` reads.
"""

from __future__ import annotations

import abc
import dis
import enum
import os
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator

import torch

from piecework.code_objects import with_inner_code
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.bind.asked import models_code
from piecework.runtime.bind.class_watch import function_of
from piecework.runtime.bind.facts import (
    CALLS,
    EVERY_NAME,
    MISSING,
    OF_FUNCTIONS,
    Fact,
    class_name,
    is_its_dictionary,
    is_users,
    is_value,
)
from piecework.runtime.torch_compat import Guarded, Place

_SIGNATURE = frozenset(("__defaults__", "__kwdefaults__"))
_ANNOTATIONS = frozenset(("annotation", "return_annotation", "get_annotations"))
_INSPECTS = {
    "signature": _SIGNATURE,
    "getfullargspec": _SIGNATURE,
    "getdoc": frozenset(("__doc__",)),
    "wraps": OF_FUNCTIONS,
}
_ASKS = frozenset(("getattr", "hasattr"))
_LISTS = frozenset(("vars", "dir", "__dict__"))
_PRINTS = ("str", "repr")
_JOINS = frozenset(("format", "join"))
_CHECKS = frozenset(("isinstance", "issubclass"))
# Of these older torch makes the text of a dict.
_NAMED_IN_TEXTS = () if torch_compat.GUARDS_CLASS_VALUES else (OrderedDict, defaultdict)
# Dynamo's own account of how an object is copied, and what can make it another.
_COPIES = "reduce_ex_user_defined_object"
_OF_COPIES = ("__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
_COPIED_BY_THEMSELVES = (OrderedDict, defaultdict, deque)
_CHECKED_BY = ("__instancecheck__", "__subclasscheck__")
# Whose answers are looked at here, or say no more than the bases of a class do.
_TRUSTED = ("abc", "builtins", "enum", "typing", "typing_extensions", "pydantic", "torch")
# Dynamo makes texts of these item by item, or they are others' to look at.
_TAKEN_APART = (
    *(list, tuple, dict, set, frozenset, types.FunctionType, types.MethodType, types.ModuleType),
    *(types.CodeType, types.CellType, types.MappingProxyType),
)
_TABLES = (*CALLS, "_parameters", "_buffers", "_modules", "__dict__")


class Unguarded:
    """What the code of one trace may have read.

    Args:
        code: what the trace went through.
        texts: texts that it read of objects, with which it may ask others.
        tried: names that it goes on without.
        values: what it looked at.
    """

    def __init__(
        self,
        code: Iterable[types.CodeType],
        texts: Iterable[str],
        tried: frozenset[str],
        values: Iterable[object],
    ) -> None:
        every = models_code(code)
        names = {name for each in every for name in each.co_names}
        asking = [each for each in every if not _ASKS.isdisjoint(each.co_names)]
        asked = {text for each in asking for text in _texts(each)}
        asked = asked.union(texts, tried) if asking else set(tried)
        if not (names | asked).isdisjoint(_LISTS) or any(map(_computes, asking)):
            asked.add(EVERY_NAME)
        read = set().union(*map(_not_of_classes, every))
        if not names.isdisjoint(_ANNOTATIONS):
            read.add("__annotations__")
        self._of_functions = frozenset(asked | (read & OF_FUNCTIONS))
        self._inspected = {
            name: frozenset().union(*(_given_to((name,), each) for each in every))
            for name in _INSPECTS
        }
        self._printed = frozenset().union(*(_given_to(_PRINTS, each) for each in every))
        self.of_modules = frozenset(
            text for each in every if "hasattr" in each.co_names for text in _texts(each)
        )
        self._kinds = frozenset(_class_names(values))
        every_text = frozenset().union(texts, *map(_texts, every))
        self._texts = frozenset(text for text in every_text if text.isidentifier())
        self._seen: set[int] = set()

    def facts(self, value: object, place: Place) -> Iterator[Fact]:
        """About what lies at a place."""
        if any(each.kind in ("key", "at") for each in place.path()):
            return  # an entry of a table, which is found by its number there
        if value is os.getenv:
            yield Fact.of(place, "environment", value, self._texts)
        elif type(value) is types.FunctionType:
            yield from self._function(value, place)
        elif isinstance(value, abc.ABCMeta):
            # With those of Python, libraries register classes of theirs as they are imported.
            about = self._kinds if _root(value) in sys.stdlib_module_names else None
            yield Fact.of(place, "registered", value, about)
        elif self._is_printed(value, place):
            yield Fact.of(place, "text", value)

    def of_method(self, owner: object, name: str, place: Place) -> Iterator[Fact]:
        """About the function that a class has under a name which code looked up in an object."""
        kind = Place(place, "type", None, f"type({place.name})")
        found = Place(kind, "attribute", name, f"{kind.name}.{name}")
        value = getattr(type(owner), name, MISSING)
        if type(value) is types.MethodType:
            value = value.__func__
            found = Place(found, "attribute", "__func__", f"{found.name}.__func__")
        if type(value) is types.FunctionType and function_of(value) is value:
            yield from self._function(value, found)

    def _function(self, function: types.FunctionType, place: Place) -> Iterator[Fact]:
        of_torch = (function.__module__ or "").partition(".")[0] == "torch"
        if of_torch or id(function) in self._seen:
            return
        self._seen.add(id(function))
        about = self._of_functions
        for name, given in self._inspected.items():
            if "" in given or function.__name__ in given:
                about |= _INSPECTS[name]
        yield Fact.of(place, "function", function, about)

    def _is_printed(self, value: object, place: Place) -> bool:
        """Whether code may have made a text of it, by a ``__repr__`` that nobody traced."""
        kind = type(value)
        if not self._printed or kind in _TAKEN_APART or isinstance(value, (torch.Tensor, type)):
            return False
        if is_value(value) or _root(kind) == "torch" or _of_every_module(place):
            return False
        if kind.__str__ is not object.__str__ or kind.__repr__ is object.__repr__:
            return False
        any_local = "" in self._printed and not isinstance(value, torch.nn.Module)
        return any_local or str(place.key) in self._printed


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _class_names(values: Iterable[object]) -> Iterator[str]:
    kinds = {value if isinstance(value, type) else type(value) for value in values}
    for each in {base for kind in (*kinds, *_OF_VALUES) for base in kind.__mro__}:
        yield class_name(each)


# Of what code makes by itself.
_OF_VALUES = (
    *(bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, range, slice),
    *(type(None), types.FunctionType, types.MethodType, types.BuiltinFunctionType, type),
    *(torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, torch.device),
)


def misanswered(guards: Iterable[Guarded], code: Iterable[types.CodeType]) -> CaptureError | None:
    """The error for what Dynamo answers by itself, and otherwise than Python would; None if code asks for no such thing."""
    known = [each for each in guards if each.known]
    return _own_check(known, code) or _bounded_text(known, code) or _own_copy(known, code)


def _bounded_text(guards: Iterable[Guarded], code: Iterable[types.CodeType]) -> CaptureError | None:
    if not any(_given_to(_PRINTS, each) for each in models_code(code)):
        return None
    for each in guards:
        lacks = ""
        if isinstance(each.value, deque) and each.value.maxlen is not None:
            lacks = "that of a deque would lack its maxlen"
        elif type(each.value) in _NAMED_IN_TEXTS and not _of_every_module(each.place):
            lacks = f"that of a {type(each.value).__name__} would be a dict's"
        if lacks:
            return CaptureError(
                f"forward makes a text, and {lacks}",
                where=each.place.name,
                hint="make a text of list(...) of it, or do that outside forward",
            )
    return None


def _of_every_module(place: Place) -> bool:
    """Whether it is one of the dictionaries that each module has, or that hold for all."""
    return place.key in _TABLES or str(place.key).startswith("_global_")


def _own_copy(guards: Iterable[Guarded], code: Iterable[types.CodeType]) -> CaptureError | None:
    """An object that copies otherwise than by its class and its dictionary, where the trace copied some object by these two."""
    if not any(each.co_name == _COPIES for each in code):
        return None
    for each in guards:
        kind = each.value if isinstance(each.value, type) else type(each.value)
        if not _of_every_module(each.place) and (
            kind in _COPIED_BY_THEMSELVES or not _copies_plainly(kind)
        ):
            return CaptureError(
                f"forward copies objects, and one of {kind.__qualname__}, which says itself what is copied, would be copied by its attributes alone if it is among them, which nobody can tell",
                where=each.place.name,
                hint="make the copy by the class or a method of the object's own, or outside forward; an encoder-decoder of transformers copies its config for a cache: use_cache=False, or stitch(model)",
            )
    return None


def _copies_plainly(kind: type) -> bool:
    """Whether an object of this class is all that its dictionary holds, or is none that anybody copies by taking it apart."""
    if not is_users(kind) or issubclass(kind, enum.Enum):
        return True
    return is_its_dictionary(kind) and all(
        getattr(kind, name, None) is getattr(object, name, None) for name in _OF_COPIES
    )


def _own_check(guards: Iterable[Guarded], code: Iterable[types.CodeType]) -> CaptureError | None:
    """A class whose own class says what its instances are."""
    if _CHECKS.isdisjoint(name for each in models_code(code) for name in each.co_names):
        return None
    for guard in guards:
        kind = guard.value
        for name in _CHECKED_BY if isinstance(kind, type) else ():
            owner = next(each for each in type(kind).__mro__ if name in vars(each))
            if _root(owner) not in _TRUSTED:
                return CaptureError(
                    f"forward names isinstance or issubclass, and {kind.__qualname__} answers by {owner.__qualname__}.{name}, which a trace does not see into",
                    where=kind.__qualname__,
                    hint="compare types, or decide that outside forward",
                )
    return None


def protocol_names(kinds: Iterable[object]) -> frozenset[str]:
    """What protocols among some classes ask of the objects that are compared with them."""
    found: set[str] = set()
    for kind in kinds:
        if isinstance(kind, type) and getattr(kind, "_is_protocol", False):
            for each in kind.__mro__:
                if getattr(each, "_is_protocol", False) and each.__module__ != "typing":
                    found.update(vars(each), vars(each).get("__annotations__", ()))
    return frozenset(name for name in found if not name.startswith(("__", "_abc_", "_is_")))


def refuse_function_names(code: Iterable[types.CodeType]) -> None:
    """Raise if code may ask a function for its qualified name: Dynamo answers with what describes the name, and not with the name.

    Raises:
        CaptureError: it may.
    """
    for each in models_code(code):
        if "__qualname__" in _not_of_classes(each):
            raise CaptureError(
                "forward names __qualname__, which Dynamo knows of classes and not of functions",
                where=f"{each.co_filename}:{each.co_firstlineno}",
                hint="use __name__, or type(value).__qualname__",
            )


def _texts(code: types.CodeType) -> set[str]:
    return {
        text for each in with_inner_code([code]) for text in each.co_consts if type(text) is str
    }


def _computes(code: types.CodeType) -> bool:
    """Whether code puts texts together, with which it may ask for something."""
    if not _JOINS.isdisjoint(code.co_names):
        return True
    return any(step.opname == "BUILD_STRING" for step in dis.get_instructions(code))


def _steps(code: types.CodeType) -> list[dis.Instruction]:
    return [each for each in dis.get_instructions(code) if each.opname not in _NOTHING]


_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME")
_NOTHING = ("CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "RESUME")


def _not_of_classes(code: types.CodeType) -> set[str]:
    """The attributes that code asks for, less those that are plainly asked of a class: ``type(x).__name__``, ``x.__class__.__name__``, ``cls.__name__``."""
    steps = _steps(code)
    found = _texts(code) if not _ASKS.isdisjoint(code.co_names) else set()
    for number, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            before = steps[max(0, number - 4) : number]
            if not _is_class(before):
                found.add(str(step.argval))
    return found


def _is_class(before: list[dis.Instruction]) -> bool:
    """Whether what these steps leave is plainly a class."""
    if not before:
        return False
    if before[-1].argval in ("__class__", "cls"):
        return True
    called = before[-1].opname.startswith("CALL")
    return called and any(each.argval == "type" for each in before)


def _given_to(functions: Iterable[str], code: types.CodeType) -> set[str]:
    """The last names of what code gives to functions that it calls by name; "" for what it has in a variable of its own."""
    found: set[str] = set()
    steps = _steps(code)
    for number, step in enumerate(steps):
        # The bit says that it is called; ``isinstance(x, str)`` names it as well.
        called = step.opname != "LOAD_GLOBAL" or (step.arg or 0) & 1
        if step.opname in _LOADS and called and step.argval in functions:
            found.add(_argument(steps[number + 1 :]))
    return found


def _argument(steps: list[dis.Instruction]) -> str:
    last = ""
    for step in steps:
        if step.argval == "type":  # ``str(type(x))``
            return "type"
        if step.opname.startswith("CALL"):
            return last
        last = str(step.argval) if step.opname in _LOADS else ""
    return last
