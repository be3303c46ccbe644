"""Levers of the stitched function: off they change nothing, and where they don't hold, nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import Layers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import piecework
from piecework.errors import InputError

LEVERS = (
    *("bind_weights", "direct_splitting_ops", "direct_artifact_entry", "check_inputs"),
    "emit_del",
)


@piecework.splitting_op("levers::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    torch.add(left, right, alpha=scale, out=out)


@torch.library.custom_op("levers::custom_mix", mutates_args=("out",))
def custom_mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    torch.add(left, right, alpha=scale, out=out)


class Layer(nn.Module):
    def __init__(self, op: Callable[..., None]) -> None:
        super().__init__()
        self.op = op
        self.norm = nn.Parameter(torch.rand(8) + 0.5)
        self.enter = nn.Linear(8, 16)
        self.leave = nn.Linear(8, 8)
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.enter(x * self.norm + self.shift).chunk(2, -1)
        out = torch.empty_like(left)
        self.op(left, right, out, 0.5)
        return x + self.leave(out)


class Model(Layers):
    def __init__(self, op: Callable[..., None] = mix, layers: int = 2) -> None:
        torch.manual_seed(0)
        super().__init__(Layer(op) for _ in range(layers))


def stitch(
    model: Callable[..., object], backend: str = "eager", **levers: bool
) -> piecework.StitchedModule:
    config = piecework.CompilationConfig(backend=backend, stitching_config=levers)
    ops = ["levers::mix", "levers::custom_mix"]
    return piecework.compile(model, (torch.randn(4, 8),), splitting_ops=ops, config=config)


def check(model: nn.Module, stitched: Callable[..., object]) -> None:
    for rows in (2, 5):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(stitched(x), expected)


# --- levers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [*itertools.combinations(LEVERS, 1), LEVERS])
@pytest.mark.parametrize("op", [mix, custom_mix], ids=["splitting_op", "custom_op"])
def test_a_lever_off_changes_nothing(op: Callable[..., None], off: tuple[str, ...]) -> None:
    model = Model(op)
    stitched = stitch(model, **dict.fromkeys(off, False))
    with torch.no_grad():
        check(model, stitched)
    check(model, stitched)


@pytest.mark.inductor
@pytest.mark.parametrize("off", [(), ("direct_artifact_entry",), LEVERS])
def test_a_lever_off_changes_nothing_compiled(off: tuple[str, ...]) -> None:
    model = Model()
    check(model, stitch(model, "inductor", **dict.fromkeys(off, False)))


def test_each_lever_shows_in_the_source() -> None:
    everything, nothing = stitch(Model()), stitch(Model(), **dict.fromkeys(LEVERS, False))
    assert "def execution_fn(s0, x, *, __vllm_submods__)" in everything.source.code
    parameters = nothing.source.code.partition("def execution_fn(")[2].partition(")")[0]
    assert "layers_0_enter_weight" in parameters
    for made, there in ((everything, True), (nothing, False)):
        assert ("past the dispatcher" in made.source.code) == there
        assert ("explain_inputs" in made.entry_source.code) == there
        assert ("    del " in made.source.code) == there


@pytest.mark.parametrize("op", [mix, custom_mix], ids=["splitting_op", "custom_op"])
def test_the_raw_function_is_called(op: Callable[..., None]) -> None:
    """The dispatcher is not on the way: the emitted module holds the Python function itself."""
    stitched = stitch(Model(op))
    (implementation,) = stitched.program.direct_ops.implementations.values()
    expected = mix.implementation if op is mix else custom_mix._init_fn
    assert implementation is expected


# --- direct entry into compiled pieces -------------------------------------------------------------------


@pytest.mark.inductor
def test_pieces_are_entered_directly_only_where_nothing_is_left_out() -> None:
    def mutating(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        state.add_(1)
        out = torch.empty_like(x)
        mix(x * 2, x + state, out, 0.5)
        return out + 1

    example = (torch.randn(4, 8), torch.zeros(4, 8))
    stitched = piecework.compile(mutating, example, splitting_ops=["levers::mix"])
    backends = stitched.program.backends
    first, last = (backends[f"submod_{n}"].entries[None].compiled for n in (0, 2))
    assert first.direct is None and first.indirect_because
    assert last.direct is not None and not last.indirect_because
    state, expected = torch.zeros(5, 8), torch.zeros(5, 8)
    x = torch.randn(5, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(stitched(x, state), mutating(x, expected))
    torch.testing.assert_close(state, expected)


@pytest.mark.inductor
def test_a_direct_piece_returns_what_the_artifact_returns() -> None:
    stitched = stitch(Model(), "inductor")
    piece = stitched.program.backends["submod_0"].entries[None].compiled
    assert piece.direct is not None
    held = stitched.traces[0].entry.now.weights
    paths = [each.path.replace(".", "_") for each in held.traced]
    known = dict(zip(paths, held.tensors, strict=True)) | {"x": torch.randn(3, 8)}
    node = next(n for n in stitched.split_gm.graph.nodes if n.target == "submod_0")
    inputs = [known.get(arg.name, 3) for arg in node.args]
    with torch.no_grad():
        direct, public = piece.direct(*inputs), piece.runnable(*inputs)
    assert len(direct) == len(public)
    for left, right in zip(direct, public, strict=True):
        assert torch.equal(left, right)
        assert (left.shape, left.stride(), left.dtype) == (right.shape, right.stride(), right.dtype)


@pytest.mark.inductor
@pytest.mark.nightly
def test_cpp_wrappers_inside_the_pieces_are_entered_directly_too() -> None:
    model, config = Model(), {"inductor_compile_config": {"cpp_wrapper": True}}
    example = (torch.randn(4, 8),)
    stitched = piecework.compile(model, example, splitting_ops=["levers::mix"], config=config)
    for each in stitched.program.backends.values():
        assert each.entries[None].compiled.direct is not None
    with torch.no_grad():
        check(model, stitched)
    # Nothing in C++ looks at a dtype, so every call does, for every weight.
    model.layers[1].enter.weight.data = model.layers[1].enter.weight.data.double()
    with pytest.raises(InputError, match=r"layers.1.enter.weight has dtype torch.float64"):
        stitched(torch.randn(3, 8))


# --- when a condition does not hold ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def stitched(model: Model) -> piecework.StitchedModule:
    return stitch(model)


def test_grad_mode_is_turned_off_for_the_call(
    model: Model, stitched: Callable[..., torch.Tensor]
) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    result = stitched(x)
    assert torch.is_grad_enabled() and not result.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(result, model(x))
    with torch.inference_mode():
        inference = stitched(torch.ones(3, 8))
    torch.testing.assert_close(inference.clone(), stitched(torch.ones(3, 8)))


class Recording(TorchDispatchMode):
    seen: ClassVar[list[object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class RecordingFunctions(TorchFunctionMode):
    seen = Recording.seen
    __torch_function__ = Recording.__torch_dispatch__


@pytest.mark.parametrize("mode", [Recording, RecordingFunctions])
def test_a_mode_sees_the_operators(
    mode: type, model: Model, stitched: Callable[..., object]
) -> None:
    with torch.no_grad(), mode():
        check(model, stitched)
        mode.seen.clear()
        stitched(torch.randn(3, 8))
    assert mode.seen.count(torch.ops.levers.mix.default) == 2


class DoublesProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.addmm.default, nn.functional.linear)
        return result * 2 if func in products else result


class DoublesLinear(TorchFunctionMode):
    __torch_function__ = DoublesProducts.__torch_dispatch__


@pytest.mark.inductor
@pytest.mark.parametrize("mode", [DoublesProducts, DoublesLinear])
def test_a_mode_changes_what_runs_inside_compiled_pieces(mode: type, tmp_path: Path) -> None:
    model = Model()
    stitched = stitch(model, "inductor")
    stitched.save(tmp_path / "artifact")
    for each in (stitched, piecework.load(tmp_path / "artifact", model)):
        with mode():
            check(model, each)
        check(model, each)


@pytest.mark.inductor
def test_tensors_are_made_on_the_default_device_of_the_call() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + 1, torch.ones(2) * 2

    x = torch.randn(4, 8)
    stitched = stitch(model, "inductor")
    for name in ("meta", "cpu", None):
        torch.set_default_device(name)
        try:
            devices = [each.device for each in model(x)]
            assert [each.device for each in stitched(x)] == devices
        finally:
            torch.set_default_device(None)


def test_a_default_device_costs_no_shortcut(stitched: piecework.StitchedModule) -> None:
    torch.set_default_device("cpu")
    try:
        stitched(torch.randn(3, 8))
        assert "under a default device" in stitched.traces[0].entry.now.variants
        Recording.seen.clear()
        with Recording():
            stitched(torch.randn(3, 8))
        assert torch.ops.levers.mix.default in Recording.seen
    finally:
        torch.set_default_device(None)


def test_autocast_must_be_as_it_was(model: Model, stitched: Callable[..., object]) -> None:
    match = r"autocast is on for cpu \(torch.bfloat16\), and was not so"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(InputError, match=match):
        stitched(torch.randn(3, 8))


def test_autocast_in_the_trace_is_kept() -> None:
    model = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stitched = piecework.compile(model, (torch.randn(4, 8),), config={"backend": "eager"})
        x = torch.randn(3, 8)
        result = stitched(x)
        assert result.dtype is torch.bfloat16
        torch.testing.assert_close(result, model(x))


def test_a_function_transform_is_refused(stitched: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(3, 8)
    match = r"torch\.func transform, forward-mode differentiation .* is active"
    for transform in (torch.func.vmap(stitched), torch.func.grad(lambda x: stitched(x).sum())):
        with pytest.raises(InputError, match=match):
            transform(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(InputError, match=match):
        stitched(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    stitched(x)


# --- an operator overridden later ------------------------------------------------------------------------


def added(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    torch.add(left, right, out=out)


def other(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    torch.sub(left, right, out=out)


@pytest.mark.parametrize("register", [piecework.splitting_op, torch.library.custom_op])
def test_a_kernel_registered_later_is_used(register: Callable[..., Any]) -> None:
    name = f"levers::{register.__name__}"  # one of its own: overriding it disturbs nothing else
    op = register(name, mutates_args=("out",))(added)
    model, example = Model(op), (torch.randn(4, 8),)
    config = {"backend": "eager"}
    stitched = piecework.compile(model, example, splitting_ops=[name], config=config)
    assert stitched.program.direct_ops.implementations
    check(model, stitched)
    x = torch.randn(3, 8)
    before = stitched(x)
    op.register_kernel("cpu")(other)
    check(model, stitched)
    assert not torch.allclose(stitched(x), before)
