"""Why a call was refused. In: the arguments of a call that broke an assumption. Out: an `InputError` that names the input, what was expected and what came.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import assert_never

import torch

from piecework.codegen.entry_plan import (
    EntryPlan,
    FixedValue,
    IntegerInput,
    Items,
    Leaf,
    Node,
    SameObject,
    Size,
    Symbol,
    TensorInput,
    Tree,
    UnusedTensor,
    WatchedObject,
)
from piecework.codegen.size_text import evaluate
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "the example may have been special (a size of 0 or 1, or equal to another), or the model's own code fixes the size, "
    "as math.log(x.shape[0]) does: mark the dimension with torch._dynamo.mark_dynamic and compile again, and it is served, "
    "or torch says what fixes it"
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
Place = tuple[int, int | None]


def input_error(plan: EntryPlan, values: Sequence[object], otherwise: str = "") -> InputError:
    """The first assumption that ``values`` (one per parameter) break, as an error.

    Args:
        otherwise: what is wrong if no assumption of the plan is broken.
    """
    return _Search(plan).run(values, otherwise)


class _Search:
    """Repeats the emitted checks one by one, and remembers where each symbol got its value."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        self.symbols: dict[str, int] = {}
        self.origin: dict[str, str] = {}
        self.places: dict[str, Place] = {}
        self.tensors: dict[str, object] = {}
        self.same: list[tuple[str, object, SameObject]] = []
        self.leaves: dict[int, tuple[str, object]] = {}
        self.later: list[tuple[str, str, Place, int]] = []

    def run(self, values: Sequence[object], otherwise: str) -> InputError:
        try:
            for parameter, value in zip(self.plan.parameters, values, strict=True):
                self._node(parameter.node, value)
            for symbol in self.plan.symbols:
                self._range(symbol)
            self._relations()
            self._identities()
            self._apart()
        except InputError as error:
            return error
        return InputError(
            otherwise or "the arguments break what the trace assumed of them",
            hint="compare them with the example arguments, or compile the model again",
        )

    # --- structure -------------------------------------------------------------------------------

    def _node(self, node: Node, value: object) -> None:
        match node:
            case Leaf(index, label, assumption):
                self._leaf(index, label, assumption, value)
                self.leaves[index] = (label, value)
            case Items():
                self._items(node, value)
            case Tree(label, structure, children):
                leaves, now = torch_compat.flatten_tree(value)
                if now != structure:
                    raise InputError(
                        f"argument {label} has another structure than the one that was traced",
                        hint="pass the same arguments by position and by name",
                    )
                for child, leaf in zip(children, leaves, strict=True):
                    self._node(child, leaf)
            case _:
                assert_never(node)

    def _items(self, node: Items, value: object) -> None:
        if type(value) is not node.kind:
            raise InputError(
                f"argument {node.label} must be a {node.kind.__name__}, not a {type(value).__qualname__}"
            )
        keys = tuple(value) if node.kind is dict else tuple(range(len(value)))  # type: ignore[arg-type]
        if set(keys) != set(node.keys):
            listed = _keys if node.kind is dict else _count
            raise InputError(
                f"argument {node.label} has {listed(keys)}; the trace had {listed(node.keys)}",
                hint="pass the same arguments by position and by name",
            )
        for key, child in zip(node.keys, node.children, strict=True):
            self._node(child, value[key])  # type: ignore[index]

    # --- leaves ----------------------------------------------------------------------------------

    def _leaf(self, index: int, label: str, assumption: object, value: object) -> None:
        match assumption:
            case TensorInput():
                self._tensor(index, label, assumption, value)
            case UnusedTensor(dtype, device, rank):
                self.tensors[label] = _kind(label, value, dtype, device, rank)
            case SameObject():
                self.same.append((label, value, assumption))
            case IntegerInput(symbol):
                if type(value) is not int:
                    raise InputError(
                        f"argument {label} must be an int, not a {type(value).__qualname__}"
                    )
                self._found(symbol, label, (index, None), value)
            case WatchedObject():
                pass
            case FixedValue(expected):
                if value is not expected and not _equal(value, expected):
                    integers = type(value) is int and type(expected) is int
                    special = integers and (value in (0, 1) or expected in (0, 1))
                    raise _refusal(
                        f"argument {label} was {_shown(expected)} when the model was traced and is {_shown(value)} now",
                        "compile the model again for another value",
                        {(index, None)} if special else None,
                    )

    def _tensor(self, index: int, label: str, expected: TensorInput, value: object) -> None:
        tensor = _kind(label, value, expected.dtype, expected.device, len(expected.sizes))
        self.tensors[label] = tensor
        _python_kind(index, label, expected, tensor)
        if tensor.is_neg() or tensor.is_conj():
            raise InputError(
                f"argument {label} is a lazily negated or conjugated view",
                hint=f"pass {label}.resolve_neg() or {label}.resolve_conj()",
            )
        for dim, (size, now) in enumerate(zip(expected.sizes, tensor.shape, strict=True)):
            self._size(f"size {now} in dimension {dim}", label, (index, dim), size, now)
        if expected.strides is None and not tensor.is_contiguous():
            raise _refusal(
                f"argument {label} must be contiguous, and has strides {tensor.stride()} for shape {tuple(tensor.shape)}",
                f"pass {label}.contiguous()",
                {(index, None)},
            )
        self._item(index, label, expected.item, tensor)
        for dim, stride in enumerate(expected.strides or ()):
            if stride is not None:
                now = tensor.stride(dim)
                self._size(f"stride {now} in dimension {dim}", label, (index, None), stride, now)

    def _item(
        self, index: int, label: str, expected: float | str | None, tensor: torch.Tensor
    ) -> None:
        if expected is None:
            return
        now = tensor.item()
        if not isinstance(expected, str):
            if now != expected:
                raise _refusal(
                    f"argument {label} was {expected} when the model was traced and is {now} now",
                    "compile the model again for another value",
                    {(index, None)},
                )
            return
        if expected.isidentifier() and expected not in self.symbols:
            self._found(expected, label, (index, None), now)  # type: ignore[arg-type]
        else:
            self.later.append((expected, f"argument {label} is {now}", (index, None), now))  # type: ignore[arg-type]

    def _size(self, what: str, label: str, place: Place, expected: Size, now: int) -> None:
        if isinstance(expected, int):
            if expected != now:
                raise _refusal(
                    f"argument {label} has {what}, which the trace fixed to {expected}",
                    _DYNAMIC,
                    {place},
                )
        elif expected.isidentifier():
            known = self.symbols.get(expected, now)
            if known != now:
                raise _refusal(
                    f"argument {label} has {what}; {self.origin[expected]} has {known} in the same dimension, and the "
                    f"trace took them as equal",
                    "trace with different sizes to make them independent",
                    {place},
                )
            self._found(expected, label, place, now)
        else:
            self.later.append((expected, f"argument {label} has {what}", place, now))

    def _found(self, symbol: str, label: str, place: Place, value: int) -> None:
        self.symbols.setdefault(symbol, value)
        self.origin.setdefault(symbol, label)
        self.places.setdefault(symbol, place)

    # --- symbols ---------------------------------------------------------------------------------

    def _range(self, symbol: Symbol) -> None:
        value = self.symbols.get(symbol.name)
        if value is None:
            return
        label = self.origin[symbol.name]
        place = {self.places[symbol.name]}
        if symbol.low is not None and value < symbol.low:
            raise _refusal(
                f"argument {label} has size {value} where the trace assumed at least {symbol.low}",
                "sizes 0 and 1 are special to tracing; mark the dimension with "
                "torch._dynamo.decorators.mark_unbacked and compile again to serve them too",
                place,
            )
        if symbol.high is not None and value > symbol.high:
            raise _refusal(
                f"argument {label} has size {value} where the trace assumed at most {symbol.high}",
                "compile the model again with a larger maximum",
                place,
            )

    def _relations(self) -> None:
        for text, what, place, now in self.later:
            if evaluate(text, self.symbols) != now:
                raise _refusal(
                    f"{what}; the trace expects {text} with {_assigned(self.symbols)}",
                    _DYNAMIC,
                    {place},
                )
        for guard in self.plan.guards:
            if not evaluate(guard, self.symbols):
                names = ", ".join(sorted(set(self.origin.values())))
                raise _refusal(
                    f"the sizes {_assigned(self.symbols)} of {names} break {guard}, which the trace relied on",
                    "compile the model again with example arguments of such sizes",
                    set(self.places.values()),
                )

    def _identities(self) -> None:
        for label, value, same in self.same:
            if value is not self.leaves[same.index][1]:
                raise _refusal(
                    f"argument {label} was the same tensor as {same.label} when the model was traced, and is another now",
                    "trace with two tensors to be free to pass two",
                    frozenset(),
                )
        names: dict[int, str] = {}
        for label, value in self.tensors.items():
            first = names.setdefault(id(value), label)
            if first != label:
                raise _refusal(
                    f"arguments {first} and {label} are one tensor, and were two when the model was traced",
                    f"pass {label}.clone(), or trace with one tensor",
                    frozenset(),
                )

    def _apart(self) -> None:
        for leaf, others in self.plan.apart:
            written, target = self.leaves[leaf]
            for other, value in (self.leaves[each] for each in others):
                if not torch_compat.memory_apart(target, value):  # type: ignore[arg-type]
                    raise InputError(
                        f"arguments {written} and {other} share memory, and the model writes to {written}; compiled pieces "
                        f"expect arguments that don't",
                        hint=f"pass {other}.clone()",
                    )


def _kind(
    label: str, value: object, dtype: torch.dtype, device: torch.device, rank: int
) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise InputError(f"argument {label} must be a tensor, not a {type(value).__qualname__}")
    if type(value) not in _PLAIN:
        raise InputError(
            f"argument {label} is a {type(value).__qualname__}, a tensor subclass; compiled pieces take plain tensors",
            hint="convert it to a plain tensor, or call the model itself",
        )
    for what, expected, actual in (
        ("dtype", dtype, value.dtype),
        ("layout", torch.strided, value.layout),
        ("device", device, value.device),
        ("rank", rank, value.dim()),
    ):
        if expected != actual and not (what == "device" and _same_device(device, value.device)):
            raise InputError(
                f"argument {label} has {what} {actual}; the model was traced with {expected}"
            )
    return value


def _refusal(message: str, hint: str | None, places: Collection[Place] | None) -> InputError:
    """An error that another trace may serve the call of, if ``places`` tells what it is about."""
    error = InputError(message, hint=hint)
    error.places = None if places is None else frozenset(places)
    return error


def _python_kind(index: int, label: str, expected: TensorInput, tensor: torch.Tensor) -> None:
    """What only the model's Python may have asked."""
    if type(tensor) is not expected.kind:
        raise _refusal(
            f"argument {label} is a {type(tensor).__qualname__}; the model was traced with a {expected.kind.__qualname__}",
            None,
            {(index, None)},
        )
    records = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    asked = expected.requires_grad is not None
    if asked and records and tensor.requires_grad != expected.requires_grad:
        raise _refusal(
            f"argument {label} has requires_grad={tensor.requires_grad}; the model was traced with "
            f"{expected.requires_grad}",
            f"pass {label}.detach()" if tensor.requires_grad else "compile the model again",
            {(index, None)},
        )


def _same_device(left: torch.device, right: torch.device) -> bool:
    return left.type == right.type and (left.index or 0) == (right.index or 0)


def _equal(value: object, expected: object) -> bool:
    if type(value) is not type(expected):
        return False
    # NaN is NaN, and 0.0 is not -0.0, to a model that was traced with it.
    return repr(value) == repr(expected) if type(value) is float else bool(value == expected)


def _shown(value: object) -> str:
    """A value in one short line; of a tensor or array its kind."""
    if isinstance(getattr(value, "shape", None), tuple):
        return f"a {type(value).__qualname__} of shape {tuple(value.shape)}"  # type: ignore[attr-defined]
    text = repr(value)
    return text if len(text) < 100 and "\n" not in text else f"a {type(value).__qualname__}"


def _keys(keys: Sequence[object]) -> str:
    return "the keys " + (", ".join(map(str, keys)) or "(none)")


def _count(keys: Sequence[object]) -> str:
    return f"{len(keys)} items"


def _assigned(symbols: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in symbols.items())
