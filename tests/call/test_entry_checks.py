"""What the entry accepts and refuses: results, or errors that name input, expectation and actual."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable

import numpy as np
import pytest
import torch
from models import EAGER
from torch._subclasses.fake_tensor import FakeTensorMode

import piecework
from piecework.errors import InputError


def compiled(function: Callable[..., object], *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
    return piecework.compile(function, args, kwargs, splitting_ops=[], config=EAGER)


def error_of(call: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- how a call is written ------------------------------------------------------------------------


def scaled(x: torch.Tensor, y: torch.Tensor | None = None, /, scale: float = 2.0, *, flag: bool = True):  # type: ignore[no-untyped-def]
    out = x * scale
    return out if flag else -out


def test_arguments_go_by_position_or_name_and_defaults_hold() -> None:
    def function(x: torch.Tensor, scale: float = 2.0, *, shift: float = 1.0) -> torch.Tensor:
        return x * scale + shift

    stitched = compiled(function, torch.randn(4, 3))
    x = torch.randn(5, 3)
    expected = function(x)
    named = stitched(scale=2.0, x=x, shift=1.0)
    for result in (stitched(x), stitched(x=x), stitched(x, 2.0), named):
        torch.testing.assert_close(result, expected)


def test_the_entry_has_the_models_own_signature() -> None:
    stitched = compiled(scaled, torch.randn(4, 3))
    assert "def entry(x, y=None, /, scale=2.0, *, flag=True):" in stitched.entry_source.code
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        stitched(torch.randn(4, 3), nonsense=1)


def test_variadic_parameters() -> None:
    def function(*tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        return sum(tensors) + named["bias"]

    stitched = compiled(function, torch.randn(4, 3), torch.randn(4, 3), bias=torch.randn(4, 3))
    x = torch.randn(6, 3)
    torch.testing.assert_close(stitched(x, x, bias=x), 3 * x)
    said = "tensors has keys (0,); the model was traced with (0, 1)"
    assert said in error_of(stitched, x, bias=x)
    said = "named has keys (); the model was traced with ('bias',)"
    assert said in error_of(stitched, x, x)


# --- tensors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():  # type: ignore[no-untyped-def]
    """``x[a, 8]`` and ``y[a, b]``, rows equal in both."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(-1, keepdim=True) + y

    x, y = torch.randn(4, 8), torch.randn(4, 6)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(y, 0)
    torch._dynamo.mark_dynamic(y, 1)
    return compiled(function, x, y)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (torch.randn(5, 8).double(), torch.randn(5, 6), "argument x has dtype torch.float64; the model was traced with torch.float32"),
        (torch.randn(5, 8, device="meta"), torch.randn(5, 6), "argument x has device meta; the model was traced with cpu"),
        (torch.randn(5, 8, 1), torch.randn(5, 6), "argument x has rank 3; the model was traced with 2"),
        (torch.randn(5, 9), torch.randn(5, 6), "argument x has size 9 in dimension 1; the model was traced with 8"),
        (torch.randn(5, 8), torch.randn(6, 6), "argument y has size 6 in dimension 0; the model was traced with s0 with s0=5"),
        (torch.randn(8, 5).t(), torch.randn(5, 6), "argument x is not as traced, where x.is_contiguous()"),
        (torch.randn(1, 8), torch.randn(1, 6), "argument x has size 1 in dimension 0; the model was traced with"),
        ([1.0], torch.randn(5, 6), "argument x has type list; the model was traced with Tensor"),
        (torch.randn(5, 8), None, "argument y has type NoneType"),
        (torch.randn(5, 8).to_sparse(), torch.randn(5, 6), "argument x has layout torch.sparse_coo"),
        (torch._neg_view(torch.randn(5, 8)), torch.randn(5, 6), "argument x is not as traced, where not x.is_neg()"),
        (torch.randn(5, 8, dtype=torch.cfloat).conj().imag, torch.randn(5, 6), "argument x is not as traced"),
        (torch.randn(5, 8), torch.randn(1).expand(5, 6), "where y.is_contiguous()"),
        (torch.tensor(1.0), torch.randn(5, 6), "argument x has rank 0; the model was traced with 2"),
        (torch.randn(5, 8).to_sparse_csr(), torch.randn(5, 6), "argument x has layout torch.sparse_csr"),
        (torch.randn(5, 8).to_mkldnn(), torch.randn(5, 6), "argument x has layout torch._mkldnn"),
        (torch.randn(5, 8).numpy(), torch.randn(5, 6), "argument x has type ndarray"),
        (FakeTensorMode().from_tensor(torch.randn(5, 8)), torch.randn(5, 6), "argument x has type FakeTensor"),
    ],
)  # fmt: skip
def test_a_broken_assumption_is_named(pair, x: object, y: object, said: str) -> None:  # type: ignore[no-untyped-def]
    assert said in error_of(pair.entry, x, y)  # what the first trace says, before another is made


def test_a_kept_assumption_passes(pair) -> None:  # type: ignore[no-untyped-def]
    for rows, columns in ((2, 2), (5, 6), (64, 3)):
        x, y = torch.randn(rows, 8), torch.randn(rows, columns)
        torch.testing.assert_close(pair(x, y), x.sum(-1, keepdim=True) + y)
    x = torch.nn.Parameter(torch.randn(5, 8))
    assert not pair(x, torch.randn(5, 6)).requires_grad
    assert "has type Parameter" in error_of(pair.entry, x, torch.randn(5, 6))
    shifted = torch.randn(41)[1:].view(5, 8)  # at another address than the allocator's
    assert "memory_apart" not in pair.entry_source.code  # read only: may be one tensor
    for one in (torch.randn(8, 8), shifted):
        torch.testing.assert_close(pair(one, one), one.sum(-1, keepdim=True) + one)


def test_declared_maximum_is_kept() -> None:
    x = torch.randn(4, 3)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=16)
    stitched = compiled(lambda x: x + 1, x)
    stitched(torch.randn(16, 3))
    said = error_of(stitched, torch.randn(17, 3))
    assert "has size 17 in dimension 0; the model was traced with" in said
    assert len(stitched.traces) == 1


def test_a_relation_between_sizes_is_kept() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[0] // 2
        return x[:half] + x[half:]

    x = torch.randn(8, 3)
    torch._dynamo.mark_dynamic(x, 0)
    stitched = compiled(function, x)
    now = torch.randn(12, 3)
    torch.testing.assert_close(stitched(now), now[:6] + now[6:])
    assert "break" in error_of(stitched, torch.randn(7, 3))


def test_strides_of_a_transposed_example_are_kept() -> None:
    example = torch.randn(8, 4).t()
    torch._dynamo.mark_dynamic(example, 0)
    stitched = compiled(lambda x: x * 2, example)
    stitched(torch.randn(8, 6).t())
    assert "stride" in error_of(stitched.entry, torch.randn(6, 8))


def test_the_same_tensor_twice_must_stay_the_same() -> None:
    x = torch.randn(4, 3)
    stitched = compiled(lambda x, y: x + y, x, x)
    now = torch.randn(5, 3)
    torch.testing.assert_close(stitched(now, now), 2 * now)
    assert "the same tensor as" in error_of(stitched.entry, now, now.clone())
    torch.testing.assert_close(stitched(now, now + 1), 2 * now + 1)
    assert len(stitched.traces) == 2


def test_an_argument_that_is_not_read_is_still_a_tensor() -> None:
    stitched = compiled(lambda x, mask: x + 1, torch.randn(4, 3), torch.ones(4, dtype=torch.bool))
    stitched(torch.randn(5, 3), torch.ones(5, dtype=torch.bool))
    assert "argument mask has type NoneType" in error_of(stitched, torch.randn(5, 3), None)


# --- memory that arguments share ------------------------------------------------------------------


def advance(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A compiled piece may read ``x`` before or after it writes ``state``."""
    state.add_(1)
    return x * 2 + state


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_a_written_argument_shares_no_memory(backend: str) -> None:
    example = (torch.randn(4, 8), torch.randn(4, 8))
    stitched = piecework.compile(advance, example, config={"backend": backend})
    assert "memory_apart(state, x)" in stitched.entry_source.code
    both = torch.randn(10, 8)
    ours, theirs = both.clone(), both.clone()
    # By a trace of one tensor.
    torch.testing.assert_close(stitched(ours, ours), advance(theirs, theirs))
    torch.testing.assert_close(ours, theirs)
    for x, state in ((both[1:], both[:-1]), (both[:5], both[4:9])):
        assert "may share its memory" in error_of(stitched, x, state)
    for rows in (slice(0, 5), slice(5, 10), slice(0, 0)):  # side by side in one storage
        ours, theirs = both.clone(), both.clone()
        other = slice(10 - rows.stop, 10 - rows.start)
        result = stitched(ours[rows], ours[other])
        torch.testing.assert_close(result, advance(theirs[rows], theirs[other]))
        torch.testing.assert_close(ours, theirs)


# --- Python values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traced", "now"),
    [
        (True, False), (True, 1), (3, 4), (3, 3.0), (3, True), ("mean", "sum"), (None, 0), (None, torch.ones(3)),
        (torch.float32, torch.float64), (torch.float32, torch.ones(3)), (torch.float32, np.ones(3)), ("mean", np.ones(3)),
    ],
    ids=str,
)  # fmt: skip
def test_a_python_value_is_fixed(traced: object, now: object) -> None:
    stitched = compiled(lambda x, option: x + 1, torch.randn(4, 3), traced)
    stitched(torch.randn(5, 3), traced)
    if type(traced) is int and type(now) is int:
        return  # an integer that the graph does not read stays free
    said = error_of(stitched, torch.randn(5, 3), now)
    assert "option" in said
    assert f"{now!r}" in said or type(now).__name__ in said
    assert "\n" not in said


# --- containers and results -----------------------------------------------------------------------


Both = collections.namedtuple("Both", "first second")


@dataclasses.dataclass
class Output:
    last: torch.Tensor
    extra: dict[str, object]


torch.utils._pytree.register_dataclass(Output)


def test_nested_containers_are_unpacked_by_emitted_code() -> None:
    def function(batch: dict[str, object]) -> torch.Tensor:
        (a, b), c = batch["pair"], batch["rest"][0]  # type: ignore[index,misc]
        return a + b * c

    def example(rows: int) -> dict[str, object]:
        first, second, third = torch.randn(3, rows, 3)
        return {"pair": (first, second), "rest": [third]}

    stitched = compiled(function, example(4))
    batch = example(7)
    torch.testing.assert_close(stitched(batch), function(batch))
    reordered = {"rest": batch["rest"], "pair": batch["pair"]}
    torch.testing.assert_close(stitched(reordered), function(batch))
    assert "argument batch has keys ('pair',)" in error_of(stitched, {"pair": batch["pair"]})
    said = error_of(stitched, {**batch, "pair": list(batch["pair"])})  # type: ignore[call-overload]
    assert "has type list; the model was traced with tuple" in said


def test_other_containers_are_compared_by_structure() -> None:
    example = Both(torch.randn(4, 3), torch.randn(4, 3))
    stitched = compiled(lambda both: both.first + both.second, example)
    x = torch.randn(6, 3)
    torch.testing.assert_close(stitched(Both(x, x)), 2 * x)
    assert "argument both is not as traced" in error_of(stitched, (x, x))


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, x: y,
        lambda y, x: (y,),
        lambda y, x: [y, (x, None, 3)],
        lambda y, x: {"y": y, "nested": {"x": [x, "label"]}},
        lambda y, x: Both(y, x),
        lambda y, x: Output(y, {"x": x, "n": 1.5}),
        lambda y, x: (y, y),
    ],
)
def test_a_result_keeps_its_containers(pack: Callable[..., object]) -> None:
    def function(x: torch.Tensor) -> object:
        return pack(x + 1, x)

    stitched = compiled(function, torch.randn(4, 3))
    x = torch.randn(5, 3)
    actual, expected = stitched(x), function(x)
    assert type(actual) is type(expected)
    left, spec = torch.utils._pytree.tree_flatten(actual)
    right, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(left, right, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
            assert (a is x) == (b is x)
        else:
            assert a == b and type(a) is type(b)


# --- arguments and results that Python has and that are rare --------------------------------------


class Colour(enum.Enum):
    RED = 1


class Weighted(torch.nn.Module):
    """Its arguments are called as emitted code calls what it holds and builtins that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, weights, list, s0):  # type: ignore[no-untyped-def]
        return weights * self.scale + list[0] + s0, self.scale, list


def test_arguments_may_be_called_like_what_emitted_code_calls() -> None:
    model = Weighted()
    x = torch.randn(4, 3)
    stitched = compiled(model, x, [x + 1], x + 2)
    for rows in (4, 6):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(stitched(x, [x + 1], x + 2), model(x, [x + 1], x + 2))


def test_a_result_may_have_keys_that_no_literal_writes() -> None:
    x = torch.randn(4, 3)
    stitched = compiled(lambda x: {Colour.RED: x + 1, (1, 2): x, None: 3}, x)
    result = stitched(x)
    assert list(result) == [Colour.RED, (1, 2), None]
    torch.testing.assert_close(result[Colour.RED], x + 1)


@dataclasses.dataclass
class Held:
    x: torch.Tensor
    more: list[object]
    scale: float = 3.0


torch.utils._pytree.register_dataclass(Held)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda x: Held(x.double(), [{"k": x + 1}]), r"argument i\['h'\]\[0\]\.x has dtype"),
        (lambda x: Held(x, [{"k": x.double()}]), r"\]\.more\[0\]\['k'\] has dtype"),
        (lambda x: Held(x, [{"k": x + 1}], 4.0), r"i\['h'\]\[0\]\.scale has value 4"),
    ],
)
def test_what_an_object_holds_is_called_by_its_fields(make, said: str) -> None:  # type: ignore[no-untyped-def]
    def function(i: dict[str, list[Held]]) -> torch.Tensor:
        held = i["h"][0]
        return held.x + held.more[0]["k"] * held.scale  # type: ignore[index,operator]

    x = torch.randn(4, 3)
    stitched = compiled(function, {"h": [Held(x, [{"k": x + 1}])]})
    with pytest.raises(InputError, match=said):
        stitched({"h": [make(x)]})


def test_what_a_named_tuple_holds_is_called_by_its_names() -> None:
    x = torch.randn(4, 3)
    stitched = compiled(lambda i: i.first + i.second, Both(x, x + 1))
    assert "argument i.second has dtype" in error_of(stitched, Both(x, x.double()))
