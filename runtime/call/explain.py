"""Says why a call was refused: which argument, what came and what was expected.

It runs the checks of an entry one by one, after one has failed, and never lets a call pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from piecework.codegen.entry.checks import Check, EntryTable, is_object
from piecework.codegen.entry.emit import entry_table
from piecework.codegen.entry.plan import EntryPlan, NotHeld
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "if the model itself takes such a call, the example was special there (a size of 0 or 1, or "
    "equal to another) or the code fixes the size: mark the dimension with "
    "torch._dynamo.mark_dynamic (mark_unbacked to serve 0 and 1 too) and compile again"
)
_AS_EXAMPLE = "pass what the example had there, or compile the model with an example like this call"
_SIZES = ("shape", "size", "stride", "item", "integer", "range", "relation")
#: What another trace can serve.
_ANOTHER_TRACE = (*_SIZES, "requires_grad", "contiguous", "same", "distinct", "held")
_CALLED = {"class": "type", "item": "value", "range": "size", "shape": "size"}


def input_error(
    plan: EntryPlan,
    values: Sequence[object],
    otherwise: Callable[[Sequence[object]], InputError | None] | None,
    **held: object,
) -> InputError:
    """The first assumption that ``values`` (one per parameter) break, as an error."""
    table = entry_table(plan)
    namespace: dict[str, Any] = {
        **{"torch": torch, "math": math, "arguments_as_traced": lambda *_: True},
        **{"flatten": torch_compat.flatten_tree, "memory_apart": torch_compat.memory_apart},
        **{"memory_outside": torch_compat.memory_outside, **held},
        **table.names.consts,
        **dict(zip(table.parameters, values, strict=True)),
    }
    for step in table.steps:
        if isinstance(step, str):
            exec(step, namespace)
            continue
        for check in step.checks:
            if not eval(check.text, namespace):
                return _error(table, namespace, step.about, check)
    return (otherwise and otherwise(values)) or InputError(
        "the arguments break what the trace assumed of them",
        hint="compare them with the example arguments, or compile the model again",
    )


def _error(table: EntryTable, namespace: dict[str, Any], about: str, check: Check) -> InputError:
    """What to say of a check that a call fails, and what another trace would have to serve."""
    kind, label, expected, dim = check.kind, check.label, check.expected, check.dim
    now = eval(check.read, namespace) if check.read else None
    hint = _DYNAMIC if kind in _SIZES else _AS_EXAMPLE
    if kind == "shape":
        assert isinstance(expected, tuple)
        dim = next(d for d, size in enumerate(expected) if now[d] != size)
        now, expected = now[dim], expected[dim]
    places = {(check.leaf, dim)}
    known = ((s, namespace[name]) for s, name in table.symbols.items() if name in namespace)
    symbols = ", ".join(f"{symbol}={size}" for symbol, size in known)
    if kind == "relation":
        places = {(leaf, each) for (leaf, _), each in table.origin.values()}
        names = ", ".join(sorted({name for (_, name), _ in table.origin.values()}))
        text = f"the sizes {symbols} of {names} break {expected}, which the trace relied on"
    elif kind in ("same", "distinct", "apart"):
        places = set()
        text = f"the arguments break what the trace relied on: {about}; {check.text}"
    elif kind == "held":
        places, hint = set(), f"pass {label}.clone(), or trace with it"
        text = f"argument {label} is the model's {expected}, and was another tensor in the trace"
    elif isinstance(expected, NotHeld):
        hint, held = f"pass {label}.clone(), or trace with it", namespace["held_tensors"]
        shared = (n for n in expected.apart if not torch_compat.memory_apart(now, held[n]))
        with_model = f"shares memory with the model's {table.plan.held[next(shared)]}"
        text = f"argument {label} {with_model}, and the model writes to one of them"
    elif not check.read:
        text = f"argument {label} is not as traced, where {check.text}"
    else:
        shown = repr if kind == "value" else _shown
        there = "" if dim is None else f" in dimension {dim}"
        more = f" with {symbols}" if kind in _SIZES and isinstance(expected, str) else ""
        came = f"{_CALLED.get(kind, kind)} {shown(now)}{there}"
        text = f"argument {label} has {came}; the model was traced with {shown(expected)}{more}"
    error = InputError(text, hint=hint)
    if kind in _ANOTHER_TRACE or _is_special(check, now):
        error.places = frozenset(places)
    return error


def _is_special(check: Check, now: object) -> bool:
    """Whether a trace of its own may serve it: a parameter, the very object, 0 and 1."""
    if check.kind == "class":
        return now in (torch.Tensor, torch.nn.Parameter)
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
