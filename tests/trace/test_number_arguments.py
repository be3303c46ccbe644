"""Sizes that data decides, and arguments whose value the trace looks at: each piece is given what its code reads, and each call is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch

import piecework
from piecework.errors import CaptureError, InputError, PieceworkError

torch.library.custom_op(
    "numbers_test::twice", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
).register_fake(torch.empty_like)
twice = torch.ops.numbers_test.twice

KINDS = ["auto", "backed", "unbacked"]
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]


@pytest.fixture(autouse=True)
def _scalars() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        yield


def compiled(
    model: Callable[..., object], args: tuple[object, ...], backend: str, kind: str = "auto"
) -> piecework.StitchedModule:
    return piecework.compile(
        model,
        args,
        splitting_ops=["numbers_test::twice"],
        config=piecework.CompilationConfig(backend=backend, dynamic_shapes_config={"type": kind}),
    )


def reshaped_around(x: torch.Tensor) -> torch.Tensor:
    y = twice((x * 2).view(-1, 2, 4))
    return y.view(-1, 8) + 1


def half(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    return twice(x * 2).view(-1)[: int(n * 0.5)] + 1


def nonzero(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = (x[:, 0] > 0).nonzero().squeeze(1)
    torch._check(found.shape[0] <= x.shape[0])
    return twice(x[found]) + 1, found


def counted(x: torch.Tensor) -> torch.Tensor:
    k = (x[:, 0] > 0).sum().item()
    torch._check(k >= 0)
    torch._check(k <= x.shape[0])
    return (twice(x[:k]) + torch.zeros(k, 8)) * 2


def cut_in_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.shape[0]
    k = (x[:, 0] > 0).sum().item()
    torch._check(k >= 0)
    torch._check(k <= n)
    first, second = twice(x).split([k, n - k])
    return twice(first) + 1, twice(second) * 2


MODELS = (reshaped_around, half, nonzero, counted, cut_in_two)


@pytest.mark.sample(5)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["auto", "backed"])
@pytest.mark.parametrize("model", MODELS)
def test_computed_sizes_reach_every_piece(
    model: Callable[..., object], kind: str, backend: str
) -> None:
    stitched = compiled(model, (torch.randn(12, 8),), backend, kind)
    for rows in (12, 4, 7, 30, *([1] if kind == "auto" else [])):
        x = torch.randn(rows, 8)
        try:
            found = stitched(x)
        except InputError as error:  # one trace, and Inductor asked for something of the size
            assert kind == "backed" and rows != 12 and "the trace relied on" in str(error)
            continue
        torch.testing.assert_close(found, model(x))


def far_from_twenty(x: torch.Tensor) -> torch.Tensor:
    return twice(x) + 1 if abs(x.shape[0] - 20) > 2 else twice(x) - 1


def long_root(x: torch.Tensor) -> torch.Tensor:
    return twice(x) + 1 if math.sqrt(x.shape[0]) > 1.5 else twice(x) - 1


@pytest.mark.parametrize(("model", "refused"), [(far_from_twenty, 20), (long_root, 2)])
def test_a_broken_branch_is_refused_in_the_words_of_the_guard(
    model: Callable[..., torch.Tensor], refused: int
) -> None:
    stitched = compiled(model, (torch.randn(12, 8),), "eager", "backed")
    torch.testing.assert_close(stitched(torch.ones(9, 8)), model(torch.ones(9, 8)))
    with pytest.raises(InputError, match=r"break .*(abs|math\.sqrt)\("):
        stitched(torch.ones(refused, 8))


def narrowed(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    k = n.item()
    torch._check(k >= 0)
    torch._check(k <= x.shape[0])
    return twice(x.narrow(0, 0, k)) + 1


def doubled(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    k = n.item()
    torch._check(k == 2 * x.shape[0])
    return twice(x) + torch.ones(k, 1)[: x.shape[0]]


def branched(x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return twice(x) + 1 if n.item() > 3 else twice(x) - 1


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [narrowed, doubled, branched])
def test_the_value_of_a_number_is_right_or_refused(
    model: Callable[..., object], kind: str, backend: str
) -> None:
    try:
        stitched = compiled(
            model, (torch.randn(12, 8), torch.tensor(24 if model is doubled else 4)), backend, kind
        )
    except CaptureError as error:
        assert kind == "unbacked" and backend == "inductor", error
        assert "the trace asserts something of" in str(error)
        return
    served = 0
    for rows in (12, 8, 30, 5, 2):
        for number in (4, 3, 5, 1, 8, 16):
            x, n = torch.randn(rows, 8), torch.tensor(number)
            try:
                expected = model(x, n)
            except (
                RuntimeError
            ):  # torch says which; a stitched module too, or that the trace was for other numbers
                with pytest.raises(Exception):  # noqa: B017
                    stitched(x, n)
                continue
            try:
                found = stitched(x, n)
            except PieceworkError:
                continue
            served += 1
            torch.testing.assert_close(found, expected)
    assert served >= (1 if model is doubled else 3)


def test_a_branch_on_a_number_is_checked() -> None:
    x = torch.randn(12, 8)
    stitched = compiled(branched, (x, torch.tensor(4)), "eager", "backed")
    torch.testing.assert_close(stitched(x, torch.tensor(9)), branched(x, torch.tensor(9)))
    assert ".item()" in stitched.entry_source.code
    with pytest.raises(InputError, match="which the trace relied on"):
        stitched(x, torch.tensor(2))
