"""Says why a call was refused: runs the checks of its entry one by one, and names the argument, what came and what was expected.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from piecework.codegen.entry.checks import Bind, Check, is_object
from piecework.codegen.entry.emit import entry_table
from piecework.codegen.entry.plan import EntryPlan
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "if the model itself takes such a call, the example was special there (a size of 0 or 1, or "
    "equal to another) or the code fixes the size: mark the dimension with "
    "torch._dynamo.mark_dynamic (mark_unbacked to serve 0 and 1 too) and compile again"
)
_AS_EXAMPLE = "pass what the example had there, or compile the model with an example like this call"
_SIZES = ("shape", "size", "stride", "item", "integer", "range", "relation")
#: What a trace of its own can serve.
_ANOTHER_TRACE = (*_SIZES, "grad", "contiguous", "same", "distinct")
#: How a value is looked at for a check of the kind; else it is shown itself.
_READ: dict[str, Callable[[Any], object]] = {
    **dict.fromkeys(("kind", "class", "int"), type),
    "keys": lambda value: tuple(value) if isinstance(value, dict) else tuple(range(len(value))),
    "rank": lambda value: value.dim(),
    "grad": lambda value: value.requires_grad,
    "dtype": lambda value: value.dtype,
    "device": lambda value: value.device,
    "layout": lambda value: value.layout,
}
_CALLED = {"kind": "type", "class": "type", "grad": "requires_grad", "item": "value"}


def input_error(
    plan: EntryPlan, values: Sequence[object], otherwise: Callable[[], InputError | None]
) -> InputError:
    """The first assumption that ``values`` (one per parameter) break, as an error.

    Args:
        otherwise: asked if no assumption of the plan is broken.
    """
    call = _Call(plan, values)
    for step in call.table.steps:
        if isinstance(step, Bind):
            exec(step.text, call.namespace)
            continue
        for check in step.checks:
            if not eval(check.text, call.namespace):
                return call.error(check)
    return otherwise() or InputError(
        "the arguments break what the trace assumed of them",
        hint="compare them with the example arguments, or compile the model again",
    )


class _Call:
    """A refused call: its values under the names of the entry's checks."""

    def __init__(self, plan: EntryPlan, values: Sequence[object]) -> None:
        self.table = entry_table(plan)
        self.namespace: dict[str, Any] = {
            **{"torch": torch, "math": math, "arguments_as_traced": lambda *_: True},
            **{"flatten": torch_compat.flatten_tree, "memory_apart": torch_compat.memory_apart},
            **self.table.names.consts,
            **dict(zip(self.table.parameters, values, strict=True)),
        }

    def error(self, check: Check) -> InputError:
        """What to say of a check that the call fails."""
        now = eval(check.name, self.namespace) if check.name else None
        kind, expected, dim = check.kind, check.expected, check.dim
        places = {(-1 if check.leaf is None else check.leaf, dim)}
        if kind == "shape":
            assert isinstance(expected, tuple) and check.leaf is not None
            dim = next(d for d, size in enumerate(expected) if now.shape[d] != size)
            kind, now, expected, places = "size", now.shape[dim], expected[dim], {(check.leaf, dim)}
        if kind == "class":
            expected = expected or torch.Tensor
        if kind == "range":
            bounds: Any = expected
            label, place = self.table.origin[bounds.name]
            size, places = self.namespace[self.table.symbols[bounds.name]], {place}
            low = bounds.low is not None and size < bounds.low
            assumed = f"at least {bounds.low}" if low else f"at most {bounds.high}"
            text = f"argument {label} has size {size} where the trace assumed {assumed}"
        elif kind == "relation":
            names = ", ".join(sorted({label for label, _ in self.table.origin.values()}))
            places = {place for _, place in self.table.origin.values()}
            text = f"the sizes {self._symbols()} of {names} break {expected}, which the trace relied on"
        elif kind in ("same", "distinct", "apart"):
            text, places = self._of_several(check, now), set()
        elif expected is None and kind != "value":
            text = f"argument {check.label} is not as traced, where {check.text}"
        else:
            read, shown = _READ.get(kind, lambda value: value), repr if kind == "value" else _shown
            there = "" if dim is None else f" in dimension {dim}"
            with_symbols = f" with {self._symbols()}" if dim is not None and expected else ""
            text = (
                f"argument {check.label} has {_CALLED.get(kind, kind)} {shown(read(now))}{there}; "
                f"the model was traced with {shown(expected)}{with_symbols * isinstance(expected, str)}"
            )
        error = InputError(text, hint=_DYNAMIC if check.kind in _SIZES else _AS_EXAMPLE)
        if kind in _ANOTHER_TRACE or _is_special(check, now):
            error.places = frozenset(places)
        return error

    def _of_several(self, check: Check, now: Any) -> str:
        """What to say of arguments that are one tensor, two, or share memory, and should not."""

        def value(leaf: int) -> Any:
            return self.namespace[self.table.leaves[leaf]]

        expected: Any = check.expected
        if check.kind == "same":
            return f"argument {check.label} was the same tensor as {expected} when the model was traced, and is another now"
        if check.kind == "distinct":
            pairs = itertools.combinations(expected, 2)
            one, two = next((a, b) for a, b in pairs if value(a) is value(b))
            return f"arguments {self.table.label(one)} and {self.table.label(two)} are one tensor, and were two when the model was traced"
        other = next(x for x in expected if not torch_compat.memory_apart(now, value(x)))
        return (
            f"arguments {check.label} and {self.table.label(other)} share memory, and the model writes to {check.label}; "
            "compiled pieces expect arguments that don't"
        )

    def _symbols(self) -> str:
        names = self.table.symbols.items()
        known = ((s, self.namespace[name]) for s, name in names if name in self.namespace)
        return ", ".join(f"{symbol}={size}" for symbol, size in known)


def _is_special(check: Check, now: object) -> bool:
    """Whether a trace of its own may serve a class or a fixed value: a parameter, the very object, 0 and 1."""
    if check.kind == "class":
        return type(now) in (torch.Tensor, torch.nn.Parameter)
    if check.kind != "value":
        return False
    integers = type(now) is int and type(check.expected) is int
    return is_object(check.expected) or (integers and bool({0, 1} & {now, check.expected}))


def _shown(value: object) -> str:
    """A value in one short line; of a tensor or array its kind."""
    if isinstance(value, (type, str, torch.device)):
        return str(getattr(value, "__qualname__", value))
    if not isinstance(value, torch.Size) and isinstance(getattr(value, "shape", None), tuple):
        return f"a {type(value).__qualname__} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    text = repr(value)
    return text if len(text) < 100 and "\n" not in text else f"a {type(value).__qualname__}"
