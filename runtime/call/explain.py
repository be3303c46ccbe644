"""Why a call was refused. In: the arguments of a call that broke an assumption. Out: an `InputError` that names the input, what was expected and what came.

It runs only after an emitted check has failed, so it may take its time; it never lets a call pass. It reads the table that the
emitted checks are written from, `piecework.codegen.entry.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import assert_never

import torch

from piecework.codegen.entry import checks
from piecework.codegen.entry.plan import EntryPlan, Size
from piecework.codegen.plan.size_text import evaluate
from piecework.errors import InputError
from piecework.runtime import torch_compat

_DYNAMIC = (
    "the example may have been special (a size of 0 or 1, or equal to another), or the model's own code fixes the size, "
    "as math.log(x.shape[0]) does: mark the dimension with torch._dynamo.mark_dynamic and compile again, and it is served, "
    "or torch says what fixes it"
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

    Args:
        otherwise: asked if no assumption of the plan is broken: values are what it says then.
    """
    search = _Search(values)
    for _, steps in groupby(checks.entry_table(plan), key=_leaf_of):
        error = _gravest(search.refusals(steps))
        if error is not None:
            return error
    return otherwise() or InputError(
        "the arguments break what the trace assumed of them",
        hint="compare them with the example arguments, or compile the model again",
    )


def _leaf_of(step: checks.Step) -> int | None:
    """The argument that a step is about, if it is about one."""
    first = step.checks[0] if isinstance(step, checks.Require) else step
    return getattr(first, "leaf", None)


def _gravest(refusals: Iterable[tuple[checks.Check, InputError]]) -> InputError | None:
    """Of one argument's: what no other trace can serve, else the first; an order in memory last, for it may follow from sizes."""
    first: InputError | None = None
    order: InputError | None = None
    for check, error in refusals:
        if error.places is None:
            return error
        if isinstance(check, checks.Contiguous):
            order = error
            continue
        first = first or error
        if not isinstance(check, (checks.ClassIs, checks.GradIs)):
            break  # what follows takes for granted what this one refuses
    return first or order


class _Search:
    """Repeats the checks one by one, and remembers where each symbol got its value.

    Attributes:
        leaves: flattened argument → how errors call it, and its value.
        trees: what was flattened → its leaves and its structure.
        origin: symbol → the label of the argument that told it, and where in it.
    """

    def __init__(self, values: Sequence[object]) -> None:
        self.values = values
        self.leaves: dict[int, tuple[str, object]] = {}
        self.trees: dict[checks.Where, tuple[Sequence[object], object]] = {}
        self.symbols: dict[str, int] = {}
        self.origin: dict[str, tuple[str, Place]] = {}

    def refusals(self, steps: Iterable[checks.Step]) -> Iterator[tuple[checks.Check, InputError]]:
        """Each check that does not hold, with what to say about it."""
        for step in steps:
            if isinstance(step, checks.Require):
                for check in step.checks:
                    yield from ((check, error) for error in self._said_of(check))
            else:
                self._bind(step)

    # --- values ----------------------------------------------------------------------------------

    def _bind(self, step: checks.Binding) -> None:
        match step:
            case checks.TakeLeaf(leaf, label, where):
                self.leaves[leaf] = label, self._value(where)
            case checks.TakeTree(where):
                self.trees[where] = torch_compat.flatten_tree(self._value(where))
            case checks.TakeShape(leaf, symbols):
                for dim, symbol in enumerate(symbols):
                    if symbol is not None:
                        self._found(symbol, (leaf, dim), self._tensor(leaf).shape[dim])
            case checks.TakeItem(leaf, symbol):
                self._found(symbol, (leaf, None), self._tensor(leaf).item())
            case checks.TakeInteger(leaf, symbol):
                self._found(symbol, (leaf, None), self.leaves[leaf][1])
            case _:
                assert_never(step)

    def _found(self, symbol: str, place: Place, value: object) -> None:
        self.symbols[symbol] = value  # type: ignore[assignment]
        self.origin[symbol] = self.leaves[place[0]][0], place

    def _value(self, where: checks.Where) -> object:
        match where:
            case checks.Whole(parameter):
                return self.values[parameter]
            case checks.Part(of, key):
                return self._value(of)[key]  # type: ignore[index]
            case checks.Flat(of, number):
                return self.trees[of][0][number]
            case _:
                assert_never(where)

    def _tensor(self, leaf: int) -> torch.Tensor:
        tensor = self.leaves[leaf][1]
        assert isinstance(tensor, torch.Tensor)
        return tensor

    # --- what does not hold ----------------------------------------------------------------------

    def _said_of(self, check: checks.Check) -> Iterator[InputError]:
        match check:
            case checks.KindIs() | checks.KeysAre() | checks.StructureIs():
                yield from self._container(check, self._value(check.where))
            case checks.ClassIs(leaf, kind):
                yield from _class(leaf, *self.leaves[leaf], kind)
            case checks.DtypeIs() | checks.Strided() | checks.DeviceIs() | checks.RankIs():
                yield from _memory(check, *self.leaves[check.leaf])
            case checks.NotNegated() | checks.NotConjugated():
                yield from _lazy(check, *self.leaves[check.leaf])
            case checks.GradIs(leaf, requires_grad):
                yield from self._grad(leaf, requires_grad)
            case checks.Contiguous(leaf):
                yield from self._contiguous(leaf)
            case checks.ShapeIs(leaf, sizes):
                for dim, size in enumerate(sizes):
                    yield from self._size(leaf, dim, size)
            case checks.SizeIs(leaf, dim, size):
                yield from self._size(leaf, dim, size)
            case checks.StrideIs(leaf, dim, size):
                now = self._tensor(leaf).stride(dim)
                yield from self._number(
                    f"has stride {now} in dimension {dim}", (leaf, None), size, now
                )
            case checks.ItemIs(leaf, value):
                yield from self._item(leaf, value, self._tensor(leaf).item())
            case checks.IsInteger(leaf):
                label, given = self.leaves[leaf]
                if type(given) is not int:
                    now = type(given).__qualname__
                    message = f"argument {label} must be an int, not a {now}"
                    yield InputError(message, hint=_AS_EXAMPLE)
            case checks.IntegerIs(leaf, size):
                given = self.leaves[leaf][1]
                yield from self._number(f"is {given}", (leaf, None), size, given)  # type: ignore[arg-type]
            case checks.ValueIs():
                yield from _python_value(check, *self.leaves[check.leaf])
            case checks.InRange():
                yield from self._range(check)
            case checks.Relation(text):
                if not checks.holds(check, self.symbols):
                    yield self._relation(text)
            case checks.SameAs() | checks.Distinct():
                yield from self._identity(check)
            case checks.Apart(leaf, others):
                yield from self._apart(leaf, others)
            case checks.AsTraced():
                pass  # who compares them says what differs
            case _:
                assert_never(check)

    def _container(self, check: checks.ContainerCheck, value: object) -> Iterator[InputError]:
        match check:
            case checks.KindIs(_, label, kind):
                if type(value) is not kind:
                    now = type(value).__qualname__
                    message = f"argument {label} must be a {kind.__name__}, not a {now}"
                    yield InputError(message, hint=_AS_EXAMPLE)
            case checks.KeysAre(_, label, kind, keys):
                there = tuple(value) if kind is dict else tuple(range(len(value)))  # type: ignore[arg-type]
                if set(there) != set(keys):
                    listed = _keys if kind is dict else _count
                    message = f"argument {label} has {listed(there)}; the trace had {listed(keys)}"
                    yield InputError(message, hint=_SAME_ARGUMENTS)
            case checks.StructureIs(where, label, structure):
                if self.trees[where][1] != structure:
                    message = f"argument {label} has another structure than the one that was traced"
                    yield InputError(message, hint=_SAME_ARGUMENTS)
            case _:
                assert_never(check)

    def _grad(self, leaf: int, expected: bool) -> Iterator[InputError]:
        now = self._tensor(leaf).requires_grad
        label = self.leaves[leaf][0]
        if now != expected:
            yield _refusal(
                f"argument {label} has requires_grad={now}; the model was traced with {expected}",
                f"pass {label}.detach()" if now else "compile the model again",
                {(leaf, None)},
            )

    def _contiguous(self, leaf: int) -> Iterator[InputError]:
        tensor = self._tensor(leaf)
        label = self.leaves[leaf][0]
        if not tensor.is_contiguous():
            yield _refusal(
                f"argument {label} must be contiguous, and has strides {tensor.stride()} for shape {tuple(tensor.shape)}",
                f"pass {label}.contiguous()",
                {(leaf, None)},
            )

    # --- numbers ---------------------------------------------------------------------------------

    def _size(self, leaf: int, dim: int, expected: Size) -> Iterator[InputError]:
        now = self._tensor(leaf).shape[dim]
        yield from self._number(f"has size {now} in dimension {dim}", (leaf, dim), expected, now)

    def _item(self, leaf: int, expected: float | str, now: float) -> Iterator[InputError]:
        if isinstance(expected, str):
            yield from self._number(f"is {now}", (leaf, None), expected, now)
        elif now != expected:
            label = self.leaves[leaf][0]
            message = f"argument {label} was {expected} when the model was traced and is {now} now"
            yield _refusal(message, _ANOTHER_VALUE, {(leaf, None)})

    def _number(self, what: str, place: Place, expected: Size, now: float) -> Iterator[InputError]:
        value = expected if isinstance(expected, int) else evaluate(expected, self.symbols)
        what = f"argument {self.leaves[place[0]][0]} {what}"
        if value == now:
            return
        if isinstance(expected, int):
            yield _refusal(f"{what}, which the trace fixed to {expected}", _DYNAMIC, {place})
        elif expected in self.symbols:
            there = " in the same dimension" if "dimension" in what else ""
            yield _refusal(
                f"{what}; {self.origin[expected][0]} has {value}{there}, and the trace took them as equal",
                "trace with different sizes to make them independent",
                {place},
            )
        else:
            with_these = _assigned(self.symbols)
            yield _refusal(
                f"{what}; the trace expects {expected} with {with_these}", _DYNAMIC, {place}
            )

    def _range(self, check: checks.InRange) -> Iterator[InputError]:
        label, place = self.origin[check.symbol]
        value, low = self.symbols[check.symbol], check.low
        if checks.holds(check, self.symbols):
            return
        if low is not None and value < low:
            yield _refusal(
                f"argument {label} has size {value} where the trace assumed at least {low}",
                "sizes 0 and 1 are special to tracing; mark the dimension with "
                "torch._dynamo.decorators.mark_unbacked and compile again to serve them too",
                {place},
            )
        else:
            yield _refusal(
                f"argument {label} has size {value} where the trace assumed at most {check.high}",
                "compile the model again with a larger maximum",
                {place},
            )

    def _relation(self, text: str) -> InputError:
        names = ", ".join(sorted({label for label, _ in self.origin.values()}))
        return _refusal(
            f"the sizes {_assigned(self.symbols)} of {names} break {text}, which the trace relied on",
            "compile the model again with example arguments of such sizes",
            {place for _, place in self.origin.values()},
        )

    # --- several arguments -----------------------------------------------------------------------

    def _identity(self, check: checks.SameAs | checks.Distinct) -> Iterator[InputError]:
        if isinstance(check, checks.SameAs):
            label, value = self.leaves[check.leaf]
            if value is not self.leaves[check.other][1]:
                yield _refusal(
                    f"argument {label} was the same tensor as {check.other_label} when the model was traced, and is another now",
                    "trace with two tensors to be free to pass two",
                    frozenset(),
                )
            return
        names: dict[int, str] = {}
        for label, value in (self.leaves[leaf] for leaf in check.leaves):
            first = names.setdefault(id(value), label)
            if first != label:
                yield _refusal(
                    f"arguments {first} and {label} are one tensor, and were two when the model was traced",
                    f"pass {label}.clone(), or trace with one tensor",
                    frozenset(),
                )

    def _apart(self, leaf: int, others: Sequence[int]) -> Iterator[InputError]:
        written, target = self.leaves[leaf]
        for other, value in (self.leaves[each] for each in others):
            if not torch_compat.memory_apart(target, value):  # type: ignore[arg-type]
                yield InputError(
                    f"arguments {written} and {other} share memory, and the model writes to {written}; compiled pieces "
                    f"expect arguments that don't",
                    hint=f"pass {other}.clone()",
                )


# --- one argument ------------------------------------------------------------------------------------


def _class(leaf: int, label: str, value: object, kind: type | None) -> Iterator[InputError]:
    now = type(value).__qualname__
    if not isinstance(value, torch.Tensor):
        made = now in ("ndarray", "list", "int", "float", "bool")
        yield InputError(
            f"argument {label} must be a tensor, not a {now}",
            hint=f"pass torch.as_tensor({label})" if made else _AS_EXAMPLE,
        )
    elif type(value) not in _PLAIN:
        yield InputError(
            f"argument {label} is a {now}, a tensor subclass; compiled pieces take plain tensors",
            hint=(
                "something traces this call, as torch.export does: trace the model itself"
                if now == "FakeTensor"
                else "convert it to a plain tensor, or call the model itself"
            ),
        )
    elif kind is not None and type(value) is not kind:
        message = f"argument {label} is a {now}; the model was traced with a {kind.__qualname__}"
        yield _refusal(message, None, {(leaf, None)})


def _memory(
    check: checks.DtypeIs | checks.Strided | checks.DeviceIs | checks.RankIs,
    label: str,
    value: object,
) -> Iterator[InputError]:
    assert isinstance(value, torch.Tensor)
    now: object
    expected: object
    match check:
        case checks.DtypeIs(_, expected):
            what, now = "dtype", value.dtype
            instead = f"{label}.to({expected})"
        case checks.Strided():
            what, now, expected = "layout", value.layout, torch.strided
            instead = f"{label}.to_dense()"
        case checks.DeviceIs(_, device):
            same = _same_device(device, value.device)
            what, now, expected = "device", value.device, value.device if same else device
            instead = f"{label}.to({str(device)!r})"
        case checks.RankIs(_, expected):
            what, now = "rank", value.dim()
            instead = f"{label} with {expected} dimensions"
        case _:
            assert_never(check)
    if now != expected:
        yield InputError(
            f"argument {label} has {what} {now}; the model was traced with {expected}",
            hint=f"pass {instead}, or compile the model with an example like this call",
        )


def _lazy(
    check: checks.NotNegated | checks.NotConjugated, label: str, value: object
) -> Iterator[InputError]:
    assert isinstance(value, torch.Tensor)
    if value.is_neg() if isinstance(check, checks.NotNegated) else value.is_conj():
        yield InputError(
            f"argument {label} is a lazily negated or conjugated view",
            hint=f"pass {label}.resolve_neg() or {label}.resolve_conj()",
        )


def _python_value(check: checks.ValueIs, label: str, value: object) -> Iterator[InputError]:
    expected = check.value
    integers = type(value) is int and type(expected) is int
    special = check.is_object or (integers and (value in (0, 1) or expected in (0, 1)))
    if value is not expected and (check.is_object or not _equal(value, expected)):
        yield _refusal(
            f"argument {label} was {_shown(expected)} when the model was traced and is {_shown(value)} now",
            _ANOTHER_VALUE,
            {(check.leaf, None)} if special else None,
        )


def _refusal(message: str, hint: str | None, places: Collection[Place] | None) -> InputError:
    """An error that another trace may serve the call of, if ``places`` tells what it is about."""
    error = InputError(message, hint=hint)
    error.places = None if places is None else frozenset(places)
    return error


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
