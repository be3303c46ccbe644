"""Where a number or text of a layer goes. In: the code that a trace went through, and an attribute's name. Out: the operators' arguments that it is handed to; or why it may go elsewhere.

Layers hand their name or index to an operator. The graph has it as a literal, and that of another layer is known without a trace if it
goes nowhere else. The byte code shows that: each place that loads an attribute of this name must hand it straight to a call of an
operator. What is not understood is refused.
"""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from piecework.code_objects import with_inner_code
from piecework.runtime.bind.asked import is_torchs
from piecework.runtime.regions.marks import Refused
from piecework.runtime.splitting_op import SplittingOp

Resolve = Callable[[types.CodeType, str], object]
#: An argument of an operator: the operator's name and the argument's.
Slot = tuple[str, str]
#: A file, and the first and last line of a call in it.
Lines = tuple[str, int, int]


@dataclass(slots=True)
class Origin:
    """Where an argument of an operator comes from.

    Attributes:
        name: the attribute that is handed to it.
        index: of the argument in the operator's schema.
        lines: the calls that do.
    """

    name: str
    index: int
    lines: set[Lines] = field(default_factory=set)

    def made_at(self, file: str, line: int) -> bool:
        """Whether one of the calls stands there."""
        return any(each[0] == file and each[1] <= line <= each[2] for each in self.lines)


@dataclass(frozen=True, slots=True)
class _Expr:
    """What is known of a value on the stack: ``global``, ``local``, ``const``, ``attr``, ``tuple``, ``map``, ``loaded``, ``null``, ``?``."""

    kind: str
    base: _Expr | None = None
    key: Any = None
    items: tuple[_Expr, ...] = ()

    def holds_loaded(self) -> bool:
        return self.kind == "loaded" or any(each.holds_loaded() for each in self.items)


_UNKNOWN, _NULL = _Expr("?"), _Expr("null")
_NOTHING = {
    *("RESUME", "NOP", "CACHE", "PRECALL", "EXTENDED_ARG", "COPY_FREE_VARS", "MAKE_CELL"),
    *("NOT_TAKEN", "SETUP_ANNOTATIONS"),
}
# Instructions that take so many values and leave one of which nothing is known.
_TAKES = {
    **dict.fromkeys(("BINARY_OP", "BINARY_SUBSCR", "COMPARE_OP", "IS_OP", "CONTAINS_OP"), 2),
    "BINARY_SLICE": 3,
    **dict.fromkeys(("UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "GET_ITER", "TO_BOOL"), 1),
}
_OF_GLOBALS = {
    "LOAD_NAME",
    "STORE_NAME",
    "DELETE_NAME",
    "DELETE_GLOBAL",
    "IMPORT_NAME",
    "IMPORT_FROM",
}
_COMPUTES = {"vars", "dir", "eval", "exec", "__dict__", "__getattribute__", "attrgetter", "locals"}
# What calls an operator from lines of its own, if at all.
_WITH_LINES = (types.FunctionType, types.BuiltinFunctionType, torch.nn.Module, type)
_LOOK_UPS = ("__getattribute__", "__getattr__")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of an operator, or of what may be one.

    Attributes:
        operator: its name; None where it is not known.
        handed: the arguments that get attributes.
        count: of positional arguments; None where that is not known.
        named: its keywords; None where they are not known.
        at: where it stands.
    """

    operator: str | None
    handed: frozenset[str]
    count: int | None
    named: frozenset[str] | None
    at: Lines

    def may_give(self, slot: Slot, origin: Origin) -> bool:
        """Whether it may give an argument something else, on a line that hands it an attribute."""
        file, first, last = self.at
        here = any(f == file and a <= last and first <= b for f, a, b in origin.lines)
        if not here or self.operator not in (None, slot[0]) or slot[1] in self.handed:
            return False
        by_name = self.named is None or slot[1] in self.named
        return by_name or self.count is None or self.count > origin.index


def slots_of(
    names: frozenset[str],
    code: Iterable[types.CodeType],
    resolve: Resolve,
    owners: Mapping[types.CodeType, list[torch.nn.Module]],
    kinds: Iterable[type],
) -> dict[Slot, Origin]:
    """Which operators' arguments get attributes of these names, by which name, and where.

    Args:
        names: attributes.
        code: all code that the trace went through.
        resolve: what a global name is to code; raises `LookupError` if that is not known.
        owners: the modules whose ``forward`` a code object is.
        kinds: the classes of what is in the layers.

    Raises:
        Refused: an attribute of a name may go elsewhere.
    """
    found: dict[Slot, Origin] = {}
    look_ups = (getattr(kind, name, None) for kind in kinds for name in _LOOK_UPS)
    own = {getattr(each, "__code__", None) for each in look_ups}
    for each in with_inner_code(code):
        texts = {text for text in each.co_consts if type(text) is str}
        if names & texts or _matches(each, names):
            raise Refused(f"{each.co_qualname} may ask for {min(names)} by its name", names)
        used = set(each.co_names)
        # How objects of other classes find their attributes says nothing of the layers'.
        free = _is_fixed(each) or (each.co_name in _LOOK_UPS and each not in own)
        if not free and used & _COMPUTES:
            raise Refused(
                f"{each.co_qualname} looks attributes up by names that it computes", names
            )
        if names & used or ("getattr" in used and not free):
            for slot, origin in _Reader(names, each, resolve, owners.get(each, [])).read().items():
                known = found.setdefault(slot, Origin(origin.name, origin.index))
                if known.name != origin.name:
                    raise _several(slot, names)
                known.lines |= origin.lines
    _require_alone(names, found, code, resolve, owners)
    return found


def _require_alone(
    names: frozenset[str],
    found: Mapping[Slot, Origin],
    code: Iterable[types.CodeType],
    resolve: Resolve,
    owners: Mapping[types.CodeType, list[torch.nn.Module]],
) -> None:
    """Raise if an operator may get another value for the same argument on a line that hands it an attribute: the graph tells calls apart by their lines."""
    files = {file for origin in found.values() for file, _, _ in origin.lines}
    for each in with_inner_code(code):
        if each.co_filename not in files:
            continue
        reader = _Reader(names, each, resolve, owners.get(each, []))
        reader.read()
        for call in reader.calls:
            for slot, origin in found.items():
                if call.may_give(slot, origin):
                    raise _several(slot, names)


def _several(slot: Slot, names: frozenset[str]) -> Refused:
    return Refused(f"argument {slot[1]} of {slot[0]} has several origins", names)


def _matches(code: types.CodeType, names: frozenset[str]) -> bool:
    """Whether a pattern may ask for an attribute."""
    groups = (each for each in code.co_consts if type(each) is tuple)
    return any(names & {x for x in each if type(x) is str} for each in groups) and any(
        each.opname == "MATCH_CLASS" for each in dis.get_instructions(code)
    )


def _is_fixed(code: types.CodeType) -> bool:
    """Whether code is torch's own, and not what stands in a trace for a function written in C."""
    return is_torchs(code) and "polyfills" not in code.co_filename


@dataclass(slots=True)
class _Reader:
    names: frozenset[str]
    code: types.CodeType
    resolve: Resolve
    owners: list[torch.nn.Module]
    found: dict[Slot, Origin] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    _at: Lines = ("", 0, 0)
    _stack: list[_Expr] = field(default_factory=list)
    _keywords: tuple[str, ...] = ()

    def read(self) -> dict[Slot, Origin]:
        """Go through the code. ``calls`` then lists those of operators, and of what may be one."""
        for instruction in dis.get_instructions(self.code):
            if instruction.positions is not None and instruction.positions.lineno is not None:
                first = instruction.positions.lineno
                self._at = self.code.co_filename, first, instruction.positions.end_lineno or first
            if instruction.is_jump_target:
                self._forget("where code joins")
            self._step(instruction)
        return self.found

    def _step(self, step: dis.Instruction) -> None:
        name, arg, value = step.opname, step.arg or 0, step.argval
        if name in _NOTHING:
            return
        if name == "KW_NAMES":
            # The names themselves are a constant of the code.
            self._keywords = self.code.co_consts[arg]
        elif name == "PUSH_NULL":
            self._push(_NULL)
        elif name in ("LOAD_CONST", "LOAD_SMALL_INT"):
            self._push(_Expr("const", key=value))
        elif name.startswith("LOAD_FAST"):
            for local in value if isinstance(value, tuple) else (value,):
                self._push(_Expr("local", key=local))
        elif name == "LOAD_GLOBAL":
            if arg & 1:
                self._push(_NULL)
            self._push(_Expr("global", key=value))
        elif name == "LOAD_DEREF":
            self._push(_UNKNOWN)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            method = name == "LOAD_METHOD" or (bool(arg & 1) and _METHOD_FORM)
            self._attribute(str(value), method)
        elif name in ("BUILD_TUPLE", "BUILD_LIST"):
            items = self._pop(arg)
            self._push(_Expr("tuple" if name == "BUILD_TUPLE" else "?", items=tuple(items)))
        elif name == "COPY":
            under = self._pop(arg)
            if under[0].holds_loaded():
                raise self._elsewhere("kept in a variable")
            self._stack += [*under, under[0]]
        elif name == "SWAP":
            under = self._pop(arg)
            self._stack += [under[-1], *under[1:-1], under[0]]
        elif name == "BUILD_MAP":
            pairs = self._pop(2 * arg)
            self._push(_Expr("map", key=_keys(pairs[::2]), items=tuple(pairs[1::2])))
        elif name == "BUILD_CONST_KEY_MAP":
            (keys,) = self._pop(1)
            self._push(_Expr("map", key=keys.key, items=tuple(self._pop(arg))))
        elif name in ("DICT_MERGE", "DICT_UPDATE"):
            self._take(1, "merged into a dictionary")
        elif name == "CALL":
            self._call(self._pop(arg), self._keywords)
        elif name == "CALL_KW":
            (keys,) = self._pop(1)
            self._call(self._pop(arg), keys.key or ())
        elif name == "CALL_FUNCTION_EX":
            self._call_spread(arg)
        elif name in ("POP_TOP", "STORE_FAST", "STORE_GLOBAL", "STORE_DEREF", "RETURN_VALUE"):
            self._take(1, "kept in a variable")
        elif name == "STORE_FAST_LOAD_FAST":  # two steps in one, from Python 3.13 on
            self._take(1, "kept in a variable")
            self._push(_Expr("local", key=value[1]))
        elif name == "STORE_FAST_STORE_FAST":
            self._take(2, "kept in a variable")
        elif name == "BUILD_SLICE":
            self._take(arg, "computed with")
            self._push(_UNKNOWN)
        elif name in _TAKES:
            self._take(_TAKES[name], "computed with")
            self._push(_UNKNOWN)
        elif step.opcode in dis.hasname and value in self.names and name not in _OF_GLOBALS:
            raise self._elsewhere(f"at {name}")
        else:
            self._forget(f"at {name}")

    def _push(self, value: _Expr) -> None:
        self._stack.append(value)

    def _pop(self, count: int) -> list[_Expr]:
        """The uppermost values, the lowest first; below what is known, nothing is."""
        have = self._stack[len(self._stack) - min(count, len(self._stack)) :]
        del self._stack[len(self._stack) - len(have) :]
        return [_UNKNOWN] * (count - len(have)) + have

    def _take(self, count: int, how: str) -> None:
        if any(each.holds_loaded() for each in self._pop(count)):
            raise self._elsewhere(how)

    def _forget(self, how: str) -> None:
        if any(each.holds_loaded() for each in self._stack):
            raise self._elsewhere(how)
        self._stack.clear()

    def _elsewhere(self, how: str) -> Refused:
        text = ", ".join(sorted(self.names))
        return Refused(
            f"{self.code.co_qualname} does more with {text} than hand it to an operator ({how})",
            self.names,
        )

    def _attribute(self, name: str, method: bool) -> None:
        (base,) = self._pop(1)
        if base.holds_loaded() or (method and name in self.names):
            raise self._elsewhere("an attribute of it is read")
        loaded = name in self.names
        made = _Expr("loaded", key=name) if loaded else _Expr("attr", base, name)
        self._push(made)
        if method:
            self._push(_NULL)

    def _call(self, args: list[_Expr], keywords: tuple[str, ...]) -> None:
        self._keywords = ()
        callee = next((each for each in self._pop(2) if each is not _NULL), _UNKNOWN)
        plain = len(args) - len(keywords)
        named = dict(zip(keywords, args[plain:], strict=True))
        self._called(callee, args[:plain], named)
        self._push(_UNKNOWN)

    def _call_spread(self, flags: int) -> None:
        named: dict[str, _Expr] = {}
        if flags & 1 or _ALWAYS_KEYWORDS:
            (given,) = self._pop(1)
            if given.kind == "map" and given.key is not None:
                named = dict(zip(given.key, given.items, strict=True))
            elif given.holds_loaded():
                raise self._elsewhere("in a dictionary of arguments")
        (args,) = self._pop(1)
        if args.holds_loaded() and args.kind != "tuple":
            raise self._elsewhere("in a list of arguments")
        callee = next((each for each in self._pop(2) if each is not _NULL), _UNKNOWN)
        self._called(callee, list(args.items), named, spread=True)
        self._push(_UNKNOWN)

    def _called(
        self, callee: _Expr, args: list[_Expr], named: Mapping[str, _Expr], spread: bool = False
    ) -> None:
        looks_up = callee == _Expr("global", key="getattr") and not _is_fixed(self.code)
        if looks_up and (len(args) < 2 or args[1].kind != "const"):
            raise Refused(
                f"{self.code.co_qualname} looks attributes up by names that it computes", self.names
            )
        op = _operator(self._object(callee))
        handed: set[str] = set()
        given = [(index, each) for index, each in enumerate(args)]
        for key, each in [*given, *named.items()]:
            if each.kind == "loaded":
                if op is None:
                    raise self._elsewhere("it is an argument of a call that is no operator's")
                schema = op._schema
                all_names = [argument.name for argument in schema.arguments]
                argument = all_names[key] if isinstance(key, int) else str(key)
                made = Origin(each.key, all_names.index(argument))
                origin = self.found.setdefault((schema.name, argument), made)
                if origin.name != each.key:
                    raise self._elsewhere("one argument has several origins")
                origin.lines.add(self._at)
                handed.add(argument)
            elif each.holds_loaded():
                raise self._elsewhere("inside of an argument")
        called = self._object(callee)
        if op is not None or not isinstance(called, _WITH_LINES):
            keywords = None if spread and not named else frozenset(named)
            count = None if spread or (called is not None and op is None) else len(args)
            made_by = None if op is None else op._schema.name
            self.calls.append(_Call(made_by, frozenset(handed), count, keywords, self._at))

    def _object(self, expr: _Expr) -> object:
        """What an expression is while the trace runs; None if that is not known."""
        try:
            if expr.kind == "global":
                return self.resolve(self.code, expr.key)
            if expr.kind == "attr" and expr.base is not None:
                if expr.base == _Expr("local", key=self.code.co_varnames[0]):
                    found = [getattr(each, expr.key) for each in self.owners]
                    return found[0] if found and all(x is found[0] for x in found) else None
                base = self._object(expr.base)
                if isinstance(base, (types.ModuleType, OpOverloadPacket, torch._ops._OpNamespace)):
                    return getattr(base, expr.key)
        except (LookupError, AttributeError):
            pass
        return None


def _keys(keys: list[_Expr]) -> tuple[str, ...] | None:
    return tuple(each.key for each in keys) if all(each.kind == "const" for each in keys) else None


def _operator(value: object) -> OpOverload | None:
    if isinstance(value, SplittingOp):
        return value.overload
    if isinstance(value, OpOverloadPacket):
        return value.default if value.overloads() == ["default"] else None
    if isinstance(value, torch.library.CustomOpDef):
        return value._opoverload
    return value if isinstance(value, OpOverload) else None


#: Whether loads of attributes come in a form for methods, and calls with spread arguments always have keywords.
_METHOD_FORM, _ALWAYS_KEYWORDS = sys.version_info >= (3, 12), sys.version_info >= (3, 14)
