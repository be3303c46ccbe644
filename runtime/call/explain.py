"""Says why a call was refused: runs the checks of its entry one by one, and names the input, what was expected and what came.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

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
        return self._BY_KIND[check.kind](self, check)

    # --- containers ------------------------------------------------------------------------------

    def _kind(self, check: Check) -> InputError:
        now = type(eval(check.name, self.namespace)).__qualname__
        expected = check.expected.__name__  # type: ignore[attr-defined]
        return InputError(
            f"argument {check.label} must be a {expected}, not a {now}", hint=_AS_EXAMPLE
        )

    def _keys(self, check: Check) -> InputError:
        value, keys = eval(check.name, self.namespace), check.expected
        assert isinstance(keys, tuple)
        now, expected = f"{len(value)} items", f"{len(keys)} items"
        if isinstance(value, dict):
            now, expected = _shown_keys(value), _shown_keys(keys)
        message = f"argument {check.label} has {now}; the trace had {expected}"
        return InputError(message, hint=_SAME_ARGUMENTS)

    def _structure(self, check: Check) -> InputError:
        message = f"argument {check.label} has another structure than the one that was traced"
        return InputError(message, hint=_SAME_ARGUMENTS)

    # --- one tensor ------------------------------------------------------------------------------

    def _class(self, check: Check) -> InputError:
        value, label = self.namespace[check.name], check.label
        now = type(value).__qualname__
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
        expected = check.expected.__qualname__  # type: ignore[union-attr]
        message = f"argument {label} is a {now}; the model was traced with a {expected}"
        return _refusal(message, None, {_place(check)})

    def _memory(self, check: Check, now: object, instead: str) -> InputError:
        return InputError(
            f"argument {check.label} has {check.kind} {now}; the model was traced with {check.expected}",
            hint=f"pass {instead}, or compile the model with an example like this call",
        )

    def _dtype(self, check: Check) -> InputError:
        now = self.namespace[check.name].dtype
        return self._memory(check, now, f"{check.label}.to({check.expected})")

    def _layout(self, check: Check) -> InputError:
        return self._memory(check, self.namespace[check.name].layout, f"{check.label}.to_dense()")

    def _device(self, check: Check) -> InputError:
        now = self.namespace[check.name].device
        return self._memory(check, now, f"{check.label}.to({str(check.expected)!r})")

    def _rank(self, check: Check) -> InputError:
        now = self.namespace[check.name].dim()
        return self._memory(check, now, f"{check.label} with {check.expected} dimensions")

    def _lazy(self, check: Check) -> InputError:
        label = check.label
        return InputError(
            f"argument {label} is a lazily negated or conjugated view",
            hint=f"pass {label}.resolve_neg() or {label}.resolve_conj()",
        )

    def _grad(self, check: Check) -> InputError:
        now = self.namespace[check.name].requires_grad
        return _refusal(
            f"argument {check.label} has requires_grad={now}; the model was traced with {check.expected}",
            f"pass {check.label}.detach()" if now else "compile the model again",
            {_place(check)},
        )

    def _contiguous(self, check: Check) -> InputError:
        now = self.namespace[check.name]
        return _refusal(
            f"argument {check.label} must be contiguous, and has strides {now.stride()} for shape {tuple(now.shape)}",
            f"pass {check.label}.contiguous()",
            {_place(check)},
        )

    # --- numbers ---------------------------------------------------------------------------------

    def _shape(self, check: Check) -> InputError:
        now, expected = self.namespace[check.name].shape, check.expected
        assert isinstance(expected, tuple)
        dim = next(d for d, size in enumerate(expected) if now[d] != size)
        what = f"has size {now[dim]} in dimension {dim}"
        return self._number(check, what, (_place(check)[0], dim), expected[dim])

    def _size(self, check: Check) -> InputError:
        what = f"has size {self.namespace[check.name]} in dimension {check.dim}"
        return self._number(check, what, _place(check), check.expected)

    def _stride(self, check: Check) -> InputError:
        what = f"has stride {eval(check.name, self.namespace)} in dimension {check.dim}"
        return self._number(check, what, (_place(check)[0], None), check.expected)

    def _integer(self, check: Check) -> InputError:
        return self._number(
            check, f"is {self.namespace[check.name]}", _place(check), check.expected
        )

    def _item(self, check: Check) -> InputError:
        now = eval(check.name, self.namespace)
        if isinstance(check.expected, str):
            return self._number(check, f"is {now}", _place(check), check.expected)
        message = f"argument {check.label} was {check.expected} when the model was traced and is {now} now"
        return _refusal(message, _ANOTHER_VALUE, {_place(check)})

    def _number(self, check: Check, what: str, place: Place, expected: object) -> InputError:
        what = f"argument {check.label} {what}"
        if not isinstance(expected, str):
            return _refusal(f"{what}, which the trace fixed to {expected}", _DYNAMIC, {place})
        symbols = self.symbols()
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

    def _range(self, check: Check) -> InputError:
        symbol = check.expected
        assert isinstance(symbol, Symbol)
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

    def _relation(self, check: Check) -> InputError:
        origin = self.table.origin.values()
        names = ", ".join(sorted({label for label, _ in origin}))
        return _refusal(
            f"the sizes {_assigned(self.symbols())} of {names} break {check.expected}, which the trace relied on",
            "compile the model again with example arguments of such sizes",
            {place for _, place in origin},
        )

    # --- Python values ---------------------------------------------------------------------------

    def _int(self, check: Check) -> InputError:
        now = type(self.namespace[check.name]).__qualname__
        return InputError(f"argument {check.label} must be an int, not a {now}", hint=_AS_EXAMPLE)

    def _value(self, check: Check) -> InputError:
        value, expected = self.namespace[check.name], check.expected
        integers = type(value) is int and type(expected) is int
        special = is_object(expected) or (integers and (value in (0, 1) or expected in (0, 1)))
        return _refusal(
            f"argument {check.label} was {_shown(expected)} when the model was traced and is {_shown(value)} now",
            _ANOTHER_VALUE,
            {_place(check)} if special else None,
        )

    # --- several arguments -----------------------------------------------------------------------

    def _same(self, check: Check) -> InputError:
        return _refusal(
            f"argument {check.label} was the same tensor as {check.expected} when the model was traced, and is another now",
            "trace with two tensors to be free to pass two",
            frozenset(),
        )

    def _distinct(self, check: Check) -> InputError:
        assert isinstance(check.expected, tuple)
        first, label = next(_pairs(check.expected, self.value, lambda left, right: left is right))
        first, label = self.table.label(first), self.table.label(label)
        return _refusal(
            f"arguments {first} and {label} are one tensor, and were two when the model was traced",
            f"pass {label}.clone(), or trace with one tensor",
            frozenset(),
        )

    def _apart(self, check: Check) -> InputError:
        assert isinstance(check.expected, tuple)
        target = self.namespace[check.name]
        each = next(
            x for x in check.expected if not torch_compat.memory_apart(target, self.value(x))
        )
        other = self.table.label(each)
        return InputError(
            f"arguments {check.label} and {other} share memory, and the model writes to {check.label}; compiled pieces "
            f"expect arguments that don't",
            hint=f"pass {other}.clone()",
        )

    _BY_KIND: ClassVar[Mapping[str, Callable[[_Call, Check], InputError]]] = {
        "kind": _kind,
        "keys": _keys,
        "structure": _structure,
        "class": _class,
        "dtype": _dtype,
        "layout": _layout,
        "device": _device,
        "rank": _rank,
        "lazy": _lazy,
        "grad": _grad,
        "contiguous": _contiguous,
        "shape": _shape,
        "size": _size,
        "stride": _stride,
        "integer": _integer,
        "item": _item,
        "range": _range,
        "relation": _relation,
        "int": _int,
        "value": _value,
        "same": _same,
        "distinct": _distinct,
        "apart": _apart,
    }


def _place(check: Check) -> Place:
    assert check.leaf is not None
    return check.leaf, check.dim


def _pairs(
    leaves: Sequence[int], value: Callable[[int], object], alike: Callable[[object, object], bool]
) -> Iterator[tuple[Any, Any]]:
    for number, right in enumerate(leaves):
        yield from ((left, right) for left in leaves[:number] if alike(value(left), value(right)))


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
