"""Models with quantised weights: plain tensors by hand, a tensor subclass of our own, and torchao's; each as the model itself runs, captured too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import piecework
from piecework.errors import BindError, InputError

EAGER = piecework.CompilationConfig(backend="eager")
INDUCTOR = piecework.CompilationConfig()
SIZES = (1, 3, 4, 9)


@piecework.splitting_op("quantised::gate", mutates_args=("out",), rows="independent")
def gate(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.sigmoid() * x)


class Model(torch.nn.Module):
    """Four products with an operator between each two, so that each is a piece."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            gate(x, out := torch.empty_like(x))
            x = x + out
        return x


def check(model: torch.nn.Module, stitched: piecework.StitchedModule) -> None:
    for size in SIZES:
        x = torch.randn(size, 32)
        with torch.no_grad():
            torch.testing.assert_close(stitched(x), model(x))


def serve(model: torch.nn.Module, config: Any = EAGER) -> piecework.StitchedModule:
    """Stitched and captured, compared before and after."""
    stitched = piecework.compile(model.eval(), (torch.randn(4, 32),), config=config)
    check(model, stitched)
    stitched.capture([1, 4], progress=False)
    check(model, stitched)
    assert sorted(row.mode for row in stitched.call_report()) == ["NONE", *["PIECEWISE"] * 3]
    return stitched


# --- plain tensors -----------------------------------------------------------------------------------


class Int8Linear(torch.nn.Module):
    """A product with int8 weights and a scale for each row."""

    def __init__(self, linear: torch.nn.Linear, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.dynamic:
            return (x @ self.weight.to(x.dtype).t()) * self.scale + self.bias
        own = x.abs().amax(-1, keepdim=True) / 127
        rows = (x / own).round().to(torch.int8).to(torch.int32)
        product = (rows.unsqueeze(-2) * self.weight.to(torch.int32)).sum(-1)
        return product.to(x.dtype) * own * self.scale + self.bias


@pytest.mark.sample(3)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "config", [EAGER, pytest.param(INDUCTOR, marks=pytest.mark.inductor)], ids=["eager", "inductor"]
)
def test_int8_weights_as_plain_tensors(dynamic: bool, config: Any, tmp_path: Path) -> None:
    def build(seed: int) -> Model:
        model = Model(seed)
        for index, layer in enumerate(model.layers):
            model.layers[index] = Int8Linear(layer, dynamic)
        return model.eval()

    model = build(0)
    stitched = serve(model, config)
    stitched.refit(build(1).state_dict())
    check(build(1), stitched)
    assert len({each.key for each in stitched.pieces}) == 3  # first, middle, last
    stitched.save(tmp_path / "model")
    other = build(2)
    check(other, piecework.load(tmp_path / "model", other))


# --- a tensor subclass -------------------------------------------------------------------------------


class Scaled(torch.Tensor):
    """An int8 tensor that is seen as its values times a scale, shifted by ``shift``."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor, shift: float) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data: torch.Tensor, scale: torch.Tensor, shift: float) -> None:
        self.values, self.scale, self.shift = data, scale, shift

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, float]]:
        return ["values", "scale"], {"shift": self.shift}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, settings: Any, size: Any, stride: Any) -> Scaled:
        return cls(inner["values"], inner["scale"], settings["shift"])

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Scaled({self.shift})"  # torch logs it, and can't print fake values

    def plain(self) -> torch.Tensor:
        return self.values.to(self.scale.dtype) * self.scale + self.shift

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (old,) = args
            return cls(func(old.values), func(old.scale), old.shift)
        if func is torch.ops.aten.copy_.default and all(isinstance(each, cls) for each in args):
            for name in ("values", "scale"):
                getattr(args[0], name).copy_(getattr(args[1], name))
            return args[0]
        plain = [each.plain() if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


def scaled(linear: torch.nn.Linear, shift: float = 0.0) -> torch.nn.Parameter:
    weight = linear.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return torch.nn.Parameter(Scaled(values, scale, shift), requires_grad=False)


def of_subclass(seed: int = 0, shifts: tuple[float | None, ...] = (0.0,) * 4) -> Model:
    model = Model(seed).eval()
    for layer, shift in zip(model.layers, shifts, strict=True):
        if shift is not None:
            layer.weight = scaled(layer, shift)
    return model


@pytest.mark.inductor
def test_layers_whose_weights_are_made_otherwise_are_not_one_piece() -> None:
    model = of_subclass(shifts=(0.0, 0.0, 0.5, None))
    stitched = serve(model, INDUCTOR)
    assert len(stitched.pieces) == len({each.key for each in stitched.pieces}) == 5
    same = of_subclass(shifts=(0.5,) * 4)
    assert len({each.key for each in serve(same, INDUCTOR).pieces}) == 3


def test_weights_of_a_subclass_are_rebound_where_they_are_made_alike() -> None:
    model = of_subclass()
    stitched = serve(model)
    model.layers[1].weight = scaled(torch.nn.Linear(32, 32))
    with pytest.raises(InputError, match=r"layers.1.weight was replaced"):
        stitched(torch.randn(4, 32))
    stitched.rebind()
    check(model, stitched)
    held = model.layers[1].weight
    for new, said in (
        (scaled(torch.nn.Linear(32, 32), 0.5), "made as {'shift': 0.5}"),
        (torch.nn.Linear(32, 32).weight, "is a Parameter now; the trace had a Scaled"),
    ):
        model.layers[1].weight = new
        with pytest.raises(BindError) as caught:
            stitched.rebind()
        assert said in str(caught.value)
        with pytest.raises(InputError, match=r"layers.1.weight was replaced"):
            stitched(torch.randn(4, 32))
    model.layers[1].weight = held
    check(model, stitched)
    model.layers[2].bias = torch.nn.Parameter(torch.ones(32))  # not a quantised one
    stitched.rebind()
    check(model, stitched)


def test_what_is_set_inside_a_weight_is_noticed() -> None:
    model = of_subclass()
    stitched = serve(model)
    weight = model.layers[1].weight
    for name, new in (
        ("values", weight.values.clone().fill_(3)),
        ("scale", weight.scale * 2),
        ("scale", weight.scale.double()),
        ("shift", 0.5),
    ):
        old = getattr(weight, name)
        setattr(weight, name, new)
        with pytest.raises(InputError, match=rf"layers.1.weight.{name} was replaced|metadata"):
            stitched(torch.randn(4, 32))
        setattr(weight, name, old)
        check(model, stitched)
    with torch.no_grad():
        weight.scale.mul_(2)  # in place
    check(model, stitched)
    weight.scale.data = weight.scale.data.double()
    with pytest.raises(InputError, match=r"scale that has dtype torch.float64"):
        stitched(torch.randn(4, 32))


def test_a_refit_copies_only_between_weights_that_are_made_alike() -> None:
    model = of_subclass()
    stitched = serve(model)
    stitched.refit(of_subclass(1).state_dict())
    check(of_subclass(1), stitched)
    before = [each.clone() for each in (model.layers[0].bias, model.layers[1].weight.values)]
    state = of_subclass(2).state_dict()
    for new, said in (
        (scaled(torch.nn.Linear(32, 32), 0.5), "shift"),
        (torch.randn(32, 32), "new one None"),
        (
            Scaled(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32, 32), 0.0),
            r"\(32, 1\), the new one \(32, 32\)",
        ),
    ):
        with pytest.raises(BindError, match=said):
            stitched.refit({**state, "layers.3.weight": new})
    row = Scaled(torch.zeros(32, dtype=torch.int8), torch.ones(32), 0.0)
    with pytest.raises(BindError, match="shift"):
        stitched.refit({**state, "layers.3.bias": row})
    now = (model.layers[0].bias, model.layers[1].weight.values)
    assert all(map(torch.equal, before, now))


# --- torchao -----------------------------------------------------------------------------------------


@pytest.mark.inductor
@pytest.mark.parametrize(
    "name",
    ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"],
)
def test_weights_of_torchao(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def build(seed: int) -> Model:
        model = Model(seed).eval()
        quantization.quantize_(model, getattr(quantization, name)())
        return model

    model, x = build(0), torch.randn(4, 32)
    serve(model)
    stitched = serve(model, INDUCTOR)
    assert len({each.key for each in stitched.pieces}) == 3  # first, middle, last
    with torch.no_grad():
        torch.testing.assert_close(stitched(x), torch.compile(model)(x))
    stitched.refit(build(1).state_dict())
    check(build(1), stitched)
