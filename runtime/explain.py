"""Why a call was refused. In: the arguments of a call that broke an assumption. Out: an `InputError` that names the input, what was expected and what came.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "the example may have been special (a size of 0 or 1, or equal to another), or the model's own code fixes the size, "
    "as math.log(x.shape[0]) does: mark the dimension with torch._dynamo.mark_dynamic and compile again, and it is served, "
    "or torch says what fixes it"
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def input_error(plan: EntryPlan, values: Sequence[object]) -> InputError:
    """The first assumption that ``values`` (one per parameter) break, as an error."""
    return _Search(plan).run(values)


class _Search:
    """Repeats the emitted checks one by one, and remembers where each symbol got its value."""

    def __init__(self, plan: EntryPlan) -> None:
        self.plan = plan
        self.symbols: dict[str, int] = {}
        self.origin: dict[str, str] = {}
        self.tensors: dict[str, object] = {}
        self.leaves: dict[int, tuple[str, object]] = {}
        self.later: list[tuple[str, str, int]] = []

    def run(self, values: Sequence[object]) -> InputError:
        try:
            for parameter, value in zip(self.plan.parameters, values, strict=True):
                self._node(parameter.node, value)
            for symbol in self.plan.symbols:
                self._range(symbol)
            self._relations()
            self._apart()
        except InputError as error:
            return error
        return InputError(
            "the arguments break what the trace assumed of them",
            hint="compare them with the example arguments, or compile the model again",
        )

    # --- structure -------------------------------------------------------------------------------

    def _node(self, node: Node, value: object) -> None:
        match node:
            case Leaf(index, label, assumption):
                self._leaf(label, assumption, value)
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

    def _leaf(self, label: str, assumption: object, value: object) -> None:
        match assumption:
            case TensorInput():
                self._tensor(label, assumption, value)
            case UnusedTensor(dtype, device, rank):
                _kind(label, value, dtype, device, rank)
            case SameObject(other):
                if value is not self.tensors.get(other):
                    raise InputError(
                        f"argument {label} was the same tensor as {other} when the model was traced, and is another now",
                        hint="trace with two tensors to be free to pass two",
                    )
            case IntegerInput(symbol):
                if type(value) is not int:
                    raise InputError(
                        f"argument {label} must be an int, not a {type(value).__qualname__}"
                    )
                self._found(symbol, label, value)
            case FixedValue(expected):
                if value is not expected and not _equal(value, expected):
                    raise InputError(
                        f"argument {label} was {_shown(expected)} when the model was traced and is {_shown(value)} now",
                        hint="compile the model again for another value",
                    )

    def _tensor(self, label: str, expected: TensorInput, value: object) -> None:
        tensor = _kind(label, value, expected.dtype, expected.device, len(expected.sizes))
        self.tensors[label] = tensor
        if tensor.is_neg() or tensor.is_conj():
            raise InputError(
                f"argument {label} is a lazily negated or conjugated view",
                hint=f"pass {label}.resolve_neg() or {label}.resolve_conj()",
            )
        for dim, (size, now) in enumerate(zip(expected.sizes, tensor.shape, strict=True)):
            self._size(f"size {now} in dimension {dim}", label, size, now)
        if expected.strides is None and not tensor.is_contiguous():
            raise InputError(
                f"argument {label} must be contiguous, and has strides {tensor.stride()} for shape {tuple(tensor.shape)}",
                hint=f"pass {label}.contiguous()",
            )
        for dim, stride in enumerate(expected.strides or ()):
            if stride is not None:
                now = tensor.stride(dim)
                self._size(f"stride {now} in dimension {dim}", label, stride, now)

    def _size(self, what: str, label: str, expected: Size, now: int) -> None:
        if isinstance(expected, int):
            if expected != now:
                raise InputError(
                    f"argument {label} has {what}, which the trace fixed to {expected}",
                    hint=_DYNAMIC,
                )
        elif expected.isidentifier():
            known = self.symbols.get(expected, now)
            if known != now:
                raise InputError(
                    f"argument {label} has {what}; {self.origin[expected]} has {known} in the same dimension, and the "
                    f"trace took them as equal",
                    hint="trace with different sizes to make them independent",
                )
            self._found(expected, label, now)
        else:
            self.later.append((expected, f"argument {label} has {what}", now))

    def _found(self, symbol: str, label: str, value: int) -> None:
        self.symbols.setdefault(symbol, value)
        self.origin.setdefault(symbol, label)

    # --- symbols ---------------------------------------------------------------------------------

    def _range(self, symbol: Symbol) -> None:
        value = self.symbols.get(symbol.name)
        if value is None:
            return
        label = self.origin[symbol.name]
        if symbol.low is not None and value < symbol.low:
            raise InputError(
                f"argument {label} has size {value} where the trace assumed at least {symbol.low}",
                hint="sizes 0 and 1 are special to tracing; mark the dimension with "
                "torch._dynamo.decorators.mark_unbacked and compile again to serve them too",
            )
        if symbol.high is not None and value > symbol.high:
            raise InputError(
                f"argument {label} has size {value} where the trace assumed at most {symbol.high}",
                hint="compile the model again with a larger maximum",
            )

    def _relations(self) -> None:
        for text, what, now in self.later:
            if evaluate(text, self.symbols) != now:
                raise InputError(
                    f"{what}; the trace expects {text} with {_assigned(self.symbols)}",
                    hint=_DYNAMIC,
                )
        for guard in self.plan.guards:
            if not evaluate(guard, self.symbols):
                names = ", ".join(sorted(set(self.origin.values())))
                raise InputError(
                    f"the sizes {_assigned(self.symbols)} of {names} break {guard}, which the trace relied on",
                    hint="compile the model again with example arguments of such sizes",
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


def evaluate(text: str, symbols: Mapping[str, int]) -> object:
    """An emitted expression over symbols; the text is piecework's own."""
    import math

    return eval(text, {"__builtins__": {}, "math": math, "max": max, "min": min}, dict(symbols))


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
