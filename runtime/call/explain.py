"""Says why a call was refused: runs the checks of its entry one by one, and names the input, what was expected and what came.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from piecework.codegen.entry.checks import Bind, Check, EntryTable, is_object
from piecework.codegen.entry.emit import entry_table
from piecework.codegen.entry.plan import EntryPlan, Symbol
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "if the model itself takes such a call, the example was special there (a size of 0 or 1, or "
    "equal to another) or the code fixes the size: mark the dimension with "
    "torch._dynamo.mark_dynamic and compile again, and it is served, or torch says what fixes it"
)
_AS_EXAMPLE = "pass what the example had there, or compile the model with an example like this call"
_SAME_ARGUMENTS = "pass the same arguments by position and by name, or compile the model with an example like this call"
_ANOTHER_VALUE = "compile the model again for another value"
_PLAIN = (torch.Tensor, torch.nn.Parameter)
Place = tuple[int, int | None]


def input_error(
    plan: EntryPlan, values: Sequence[object], otherwise: Callable[[], InputError | None]
) -> InputError:
    """The first assumption that ``values`` (one per parameter) break, as an error.

    Of one argument's: what no other trace can serve, else the first; an order in memory last, for it may follow from sizes.

    Args:
        otherwise: asked if no assumption of the plan is broken: values are what it says then.
    """
    call = _Call(plan, values)
    first: InputError | None = None
    order: InputError | None = None
    about: int | None = None
    for step in call.table.steps:
        if step.leaf != about and (first or order) is not None:
            break
        about = step.leaf
        if isinstance(step, Bind):
            exec(step.text, call.namespace)
            continue
        for check in step.checks:
            if eval(check.text, call.namespace):
                continue
            error = call.error(check)
            if error.places is None:
                return error
            if check.kind == "contiguous":
                order = error
                continue
            first = first or error
            if check.kind not in ("class", "grad"):
                return first  # what follows takes for granted what this one refuses
    return (
        first
        or order
        or otherwise()
        or InputError(
            "the arguments break what the trace assumed of them",
            hint="compare them with the example arguments, or compile the model again",
        )
    )


class _Call:
    """A refused call: its values under the names of the entry's checks, and what to say of each check."""

    def __init__(self, plan: EntryPlan, values: Sequence[object]) -> None:
        self.table: EntryTable = entry_table(plan)
        self.namespace: dict[str, Any] = {
            **{"torch": torch, "math": math, "arguments_as_traced": lambda *_: True},
            **{"flatten": torch_compat.flatten_tree, "memory_apart": torch_compat.memory_apart},
            **self.table.names.consts,
            **dict(zip(self.table.parameters, values, strict=True)),
        }

    def value(self, leaf: int) -> Any:
        return self.namespace[self.table.leaves[leaf]]

    def symbols(self) -> dict[str, int]:
        names = self.table.symbols.items()
        return {symbol: self.namespace[name] for symbol, name in names if name in self.namespace}

    def error(self, check: Check) -> InputError:
        """What to say of a check that a call fails."""
        label, expected = check.label, check.expected
        now = eval(check.name, self.namespace) if check.name else None
        place = (-1 if check.leaf is None else check.leaf, check.dim)
        match check.kind:
            # --- containers and Python values
            case "kind" | "int":
                wanted = "an int" if check.kind == "int" else f"a {_name(expected)}"
                message = f"argument {label} must be {wanted}, not a {_name(type(now))}"
                return InputError(message, hint=_AS_EXAMPLE)
            case "keys":
                has, had = f"{len(now)} items", f"{len(expected)} items"  # type: ignore[arg-type]
                if isinstance(now, dict):
                    has, had = _shown_keys(now), _shown_keys(expected)  # type: ignore[arg-type]
                message = f"argument {label} has {has}; the trace had {had}"
                return InputError(message, hint=_SAME_ARGUMENTS)
            case "structure":
                message = f"argument {label} has another structure than the one that was traced"
                return InputError(message, hint=_SAME_ARGUMENTS)
            case "value":
                integers = type(now) is int and type(expected) is int
                special = integers and (now in (0, 1) or expected in (0, 1))
                return _refusal(
                    f"argument {label} was {_shown(expected)} when the model was traced and is "
                    f"{_shown(now)} now",
                    _ANOTHER_VALUE,
                    {place} if special or is_object(expected) else None,
                )
            # --- one tensor
            case "class":
                return self._class(label, now, expected, place)
            case "dtype" | "layout" | "device" | "rank":
                now = now.dim() if check.kind == "rank" else getattr(now, check.kind)
                instead = {
                    "dtype": f"{label}.to({expected})",
                    "layout": f"{label}.to_dense()",
                    "device": f"{label}.to({str(expected)!r})",
                    "rank": f"{label} with {expected} dimensions",
                }[check.kind]
                return InputError(
                    f"argument {label} has {check.kind} {now}; the model was traced with {expected}",
                    hint=f"pass {instead}, or compile the model with an example like this call",
                )
            case "lazy":
                return InputError(
                    f"argument {label} is a lazily negated or conjugated view",
                    hint=f"pass {label}.resolve_neg() or {label}.resolve_conj()",
                )
            case "grad":
                grad = now.requires_grad
                return _refusal(
                    f"argument {label} has requires_grad={grad}; the model was traced with {expected}",
                    f"pass {label}.detach()" if grad else "compile the model again",
                    {place},
                )
            case "contiguous":
                return _refusal(
                    f"argument {label} must be contiguous, and has strides {now.stride()} for shape "
                    f"{tuple(now.shape)}",
                    f"pass {label}.contiguous()",
                    {place},
                )
            # --- numbers
            case "shape":
                assert isinstance(expected, tuple)
                dim = next(d for d, size in enumerate(expected) if now.shape[d] != size)
                what = f"has size {now.shape[dim]} in dimension {dim}"
                return self._number(label, what, (place[0], dim), expected[dim])
            case "size":
                what = f"has size {now} in dimension {check.dim}"
                return self._number(label, what, place, expected)
            case "stride":
                what = f"has stride {now} in dimension {check.dim}"
                return self._number(label, what, (place[0], None), expected)
            case "item" if not isinstance(expected, str):
                message = (
                    f"argument {label} was {expected} when the model was traced and is {now} now"
                )
                return _refusal(message, _ANOTHER_VALUE, {place})
            case "integer" | "item":
                return self._number(label, f"is {now}", place, expected)
            case "range":
                assert isinstance(expected, Symbol)
                return self._range(expected)
            case "relation":
                origin = self.table.origin.values()
                names = ", ".join(sorted({label for label, _ in origin}))
                return _refusal(
                    f"the sizes {_assigned(self.symbols())} of {names} break {expected}, which the "
                    "trace relied on",
                    "compile the model again with example arguments of such sizes",
                    {place for _, place in origin},
                )
            # --- several arguments
            case "same":
                return _refusal(
                    f"argument {label} was the same tensor as {expected} when the model was traced, "
                    "and is another now",
                    "trace with two tensors to be free to pass two",
                    frozenset(),
                )
            case "distinct":
                assert isinstance(expected, tuple)
                pairs = itertools.combinations(expected, 2)
                one, two = next((a, b) for a, b in pairs if self.value(a) is self.value(b))
                one, two = self.table.label(one), self.table.label(two)
                return _refusal(
                    f"arguments {one} and {two} are one tensor, and were two when the model was traced",
                    f"pass {two}.clone(), or trace with one tensor",
                    frozenset(),
                )
            case "apart":
                assert isinstance(expected, tuple)
                shares = (x for x in expected if not torch_compat.memory_apart(now, self.value(x)))
                other = self.table.label(next(shares))
                return InputError(
                    f"arguments {label} and {other} share memory, and the model writes to {label}; "
                    "compiled pieces expect arguments that don't",
                    hint=f"pass {other}.clone()",
                )
        raise AssertionError(check.kind)

    def _class(self, label: str, value: object, expected: object, place: Place) -> InputError:
        now = _name(type(value))
        if not isinstance(value, torch.Tensor):
            made = now in ("ndarray", "list", "int", "float", "bool")
            return InputError(
                f"argument {label} must be a tensor, not a {now}",
                hint=f"pass torch.as_tensor({label})" if made else _AS_EXAMPLE,
            )
        if type(value) not in _PLAIN:
            return InputError(
                f"argument {label} is a {now}, a tensor subclass; compiled pieces take plain tensors",
                hint=(
                    "something traces this call, as torch.export does: trace the model itself"
                    if torch_compat.is_fake(value)
                    else "convert it to a plain tensor, or call the model itself"
                ),
            )
        message = f"argument {label} is a {now}; the model was traced with a {_name(expected)}"
        return _refusal(message, None, {place})

    def _number(self, label: str, what: str, place: Place, expected: object) -> InputError:
        symbols, what = self.symbols(), f"argument {label} {what}"
        if not isinstance(expected, str):
            return _refusal(f"{what}, which the trace fixed to {expected}", _DYNAMIC, {place})
        if expected in symbols:
            there = " in the same dimension" if "dimension" in what else ""
            other = self.table.origin[expected][0]
            return _refusal(
                f"{what}; {other} has {symbols[expected]}{there}, and the trace took them as equal",
                "trace with different sizes to make them independent",
                {place},
            )
        message = f"{what}; the trace expects {expected} with {_assigned(symbols)}"
        return _refusal(message, _DYNAMIC, {place})

    def _range(self, symbol: Symbol) -> InputError:
        label, place = self.table.origin[symbol.name]
        value = self.symbols()[symbol.name]
        if symbol.low is not None and value < symbol.low:
            return _refusal(
                f"argument {label} has size {value} where the trace assumed at least {symbol.low}",
                "sizes 0 and 1 are special to tracing; mark the dimension with "
                "torch._dynamo.decorators.mark_unbacked and compile again to serve them too",
                {place},
            )
        return _refusal(
            f"argument {label} has size {value} where the trace assumed at most {symbol.high}",
            "compile the model again with a larger maximum",
            {place},
        )


def _name(kind: object) -> str:
    return str(getattr(kind, "__qualname__", kind))


def _refusal(message: str, hint: str | None, places: Collection[Place] | None) -> InputError:
    """An error that another trace may serve the call of, if ``places`` tells what it is about."""
    error = InputError(message, hint=hint)
    error.places = None if places is None else frozenset(places)
    return error


def _shown(value: object) -> str:
    """A value in one short line; of a tensor or array its kind."""
    if isinstance(getattr(value, "shape", None), tuple):
        return f"a {type(value).__qualname__} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    text = repr(value)
    return text if len(text) < 100 and "\n" not in text else f"a {type(value).__qualname__}"


def _shown_keys(keys: Collection[object]) -> str:
    return "the keys " + (", ".join(map(str, keys)) or "(none)")


def _assigned(symbols: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in symbols.items())
