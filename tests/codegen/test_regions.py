"""State that a model sets for a while: seen by what runs inside, across cuts too, and as it was afterwards, whatever fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import piecework
from piecework.errors import SplitError

SEEN: list[tuple[object, ...]] = []
FAIL: list[str] = []


def state() -> tuple[object, ...]:
    """Everything that a region may set."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
    )


def _look(x: torch.Tensor) -> torch.Tensor:
    SEEN.append(state())
    if "outside" in FAIL:
        raise ValueError("failed outside")
    return x * 2


def _inner(x: torch.Tensor) -> torch.Tensor:
    if "inside" in FAIL:
        raise ValueError("failed inside")
    return x + 1


for name, body in {"look": _look, "inner": _inner}.items():
    made = torch.library.custom_op(f"regions_test::{name}", body, mutates_args=())
    made.register_fake(torch.empty_like)
look, inner = torch.ops.regions_test.look, torch.ops.regions_test.inner


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = state()
    FAIL.clear()
    SEEN.clear()
    yield
    assert state() == before


def inside(make: Callable[[], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def model(x: torch.Tensor) -> torch.Tensor:
        x = look(x)
        with make():  # type: ignore[attr-defined]
            y = inner(x @ x.t())
            y = look(y)
            y = inner(y @ y.t())
        return look(y)

    return model


def nested(x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = look(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = look(x @ x.t())
            with torch.no_grad():
                y = look(y)
            y = inner(look(y) @ x)
        y = look(y)
    with torch.no_grad():
        y = look(y)
    return y + 1


MODELS = {
    "autocast": inside(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "autocast off": inside(lambda: torch.autocast("cpu", enabled=False)),
    "enable_grad": inside(torch.enable_grad),
    "no_grad": inside(torch.no_grad),
    "set_grad_enabled": inside(lambda: torch.set_grad_enabled(True)),
    "inference_mode": inside(torch.inference_mode),
    "nested": nested,
}


def compiled(model: Callable[..., object], backend: str = "eager") -> piecework.StitchedModule:
    torch._dynamo.reset()
    config = piecework.CompilationConfig(backend=backend)
    cuts = ["regions_test::look"]
    return piecework.compile(model, (torch.randn(6, 8),), splitting_ops=cuts, config=config)


BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_region_is_seen_inside_and_gone_afterwards(name: str, backend: str) -> None:
    model = MODELS[name]
    stitched = compiled(model, backend)
    x = torch.randn(6, 8)
    for context in (nullcontext, torch.no_grad):
        SEEN.clear()
        with torch.no_grad():  # a stitched module records no gradients
            expected, seen = model(x), list(SEEN)
        SEEN.clear()
        with context():
            before = state()
            found = stitched(x)
            assert state() == before
        assert seen == SEEN
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_an_exception_leaves_nothing_set(name: str) -> None:
    stitched = compiled(MODELS[name])
    before = state()
    for where, context in product(("inside", "outside"), (nullcontext, torch.no_grad)):
        FAIL[:] = [where]
        with context(), pytest.raises(ValueError, match=f"failed {where}"):
            stitched(torch.randn(6, 8))
        assert state() == before


def test_the_emitted_text_closes_in_finally() -> None:
    source = compiled(MODELS["autocast"]).source
    assert "    finally:\n        torch.amp.autocast_mode._exit_autocast(" in source.code
    assert source.proof is not None


def leaves_grad(x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(True)
    return look(x) + 1


def leaves_dtype(x: torch.Tensor) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    return look(x) + 1


@pytest.mark.parametrize("model", [leaves_grad, leaves_dtype])
def test_what_is_never_set_back_is_refused(model: Callable[..., object]) -> None:
    with pytest.raises(SplitError, match="does not change it back"):
        compiled(model)


# --- levels of torch.func ------------------------------------------------------------------------


def mapped(x: torch.Tensor) -> torch.Tensor:
    return look(torch.vmap(lambda row: inner(row * 2).sin() * row.sum())(x)) + 1


def pushed_forward(x: torch.Tensor) -> torch.Tensor:
    value, tangent = torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))
    return look(tangent) + value


TRANSFORMS = {
    "vmap": mapped,
    "grad": lambda x: look(torch.func.grad(lambda t: (t.sin() * t).sum())(x)) + 1,
    "jvp": pushed_forward,
    "vmap of grad": lambda x: look(torch.vmap(torch.func.grad(lambda t: t.sin().sum()))(x)) + 1,
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_in_the_forward(name: str, backend: str) -> None:
    model = TRANSFORMS[name]
    stitched = compiled(model, backend)
    for rows in (6, 3, 2):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(stitched(x), model(x))


def test_an_exception_inside_a_transform_leaves_no_level() -> None:
    stitched = compiled(mapped)
    FAIL.append("inside")
    for _ in range(2):
        with pytest.raises(ValueError, match="failed inside"):
            stitched(torch.randn(6, 8))
        assert torch._C._functorch.maybe_current_level() is None
    FAIL.clear()
    x = torch.randn(6, 8)
    torch.testing.assert_close(stitched(x), mapped(x))


def cut_inside(x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(lambda row: look(row) * 2)(x)


def other_attention(x: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return look(x) + 1


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    y = look(x) + 1
    torch.set_default_dtype(torch.float32)
    return y


@pytest.mark.parametrize(
    ("model", "inside"),
    [(cut_inside, "_vmap_increment"), (other_attention, "_sdpa_kernel"), (other_dtype, "_dtype")],
)
def test_a_cut_inside_what_is_kept_whole_is_refused(
    model: Callable[[torch.Tensor], torch.Tensor], inside: str
) -> None:
    with pytest.raises(SplitError, match=f"is called inside .*{inside}") as caught:
        compiled(model)
    assert "call the operator outside of" in str(caught.value)


def test_what_is_kept_whole_is_served_where_no_cut_is_inside() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            y = inner(x)
        return look(y) + 1

    stitched = compiled(model)
    x = torch.randn(6, 8)
    torch.testing.assert_close(stitched(x), model(x))
