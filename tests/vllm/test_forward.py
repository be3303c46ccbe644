"""What vLLM calls in the place of an AOT-compiled function: sealed where it is kept, right after each write into the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from piecework.errors import ArtifactError
from piecework.integrations.vllm import plugin
from piecework.integrations.vllm.forward import Forward, require_sealed, seal

CALLS: list[int] = []
LIBRARY = torch.library.Library("test_forward", "DEF")
LIBRARY.define("attend(Tensor x, Tensor(a!) out) -> ()")
LIBRARY.impl("attend", lambda x, out: (out.copy_(x.sin()), None)[1], "CPU")
LIBRARY._register_fake("attend", lambda x, out: None)
# It writes, and says that it doesn't: as vLLM's operator that updates the cache.
LIBRARY.define("note(Tensor x) -> Tensor")
LIBRARY.impl("note", lambda x: (CALLS.append(len(x)), x.new_empty(0))[1], "CPU")
LIBRARY._register_fake("note", lambda x: x.new_empty(0))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) * self.scale
        torch.ops.test_forward.note(x)
        torch.ops.test_forward.note(x)
        out = torch.empty_like(x)
        torch.ops.test_forward.attend(x, out)
        return x + out


def made(tmp_path, monkeypatch, kind: type, **options):
    """A model as an engine has it, in a cache of its own."""
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    plugin.register()
    ops = ["test_forward::note", "test_forward::attend"]
    config = VllmConfig(
        compilation_config=CompilationConfig(backend="piecework", splitting_ops=ops, **options),
        additional_config={"piecework": {"backend": "inductor"}},
    )
    torch.manual_seed(0)
    with set_current_vllm_config(config):
        compiled = support_torch_compile(dynamic_arg_dims={"x": 0})(kind)
        return compiled(vllm_config=config).eval().requires_grad_(False)


def model_class(**more) -> type:
    class Model(nn.Module):
        def __init__(self, *, vllm_config, prefix: str = "") -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.factor = torch.ones(8)

        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x * self.factor if more.get("factor") else x

    return Model


def decorated(forward: Callable[..., Any]) -> Callable[..., Any]:
    """As transformers' decoders are: pickle finds the decorated forward where the bare one says that it is."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    def __init__(self, *, vllm_config, prefix: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    @decorated
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Regions(Decorated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            with torch.amp.autocast("cpu", enabled=False):
                x = layer(x).tanh()
        return x


@pytest.fixture
def model(tmp_path, monkeypatch):
    return made(tmp_path, monkeypatch, model_class())


def same(model: nn.Module, x: torch.Tensor) -> None:
    torch.testing.assert_close(model(x), model.forward(x))


def straight(model: nn.Module) -> bool:
    return model.aot_compiled_fn._run is not model.aot_compiled_fn._compiled


@torch.inference_mode()
def test_a_write_into_the_model_is_seen(model):
    for rows in (4, 4, 7):
        same(model, torch.randn(rows, 8))
    assert isinstance(model.aot_compiled_fn, Forward) and straight(model)
    x = torch.randn(5, 8)
    model.layers[1].linear.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    same(model, x)
    model.layers[2].linear.weight.copy_(torch.randn(8, 8))
    same(model, x)
    model.layers[0].scale = torch.full((8,), 3.0)
    same(model, x)
    model.layers[0] = Layer().requires_grad_(False)
    same(model, x)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    for _ in range(40):
        same(model, x)
    assert model.aot_compiled_fn._unwritten()


@torch.inference_mode()
def test_calls_that_say_that_they_write_nothing_stay(model):
    for _ in range(3):
        CALLS.clear()
        model(torch.randn(4, 8))
        assert CALLS == [4] * 6


@torch.inference_mode()
def test_what_is_read_elsewhere_is_fetched_by_dynamos_code(tmp_path, monkeypatch):
    model = made(tmp_path, monkeypatch, model_class(factor=True))
    for value in (1.0, 2.0, 3.0):
        model.factor = torch.full((8,), value)
        same(model, torch.randn(4, 8))
    assert not straight(model)


@torch.inference_mode()
def test_it_is_kept_and_whole(model, tmp_path, monkeypatch):
    x = torch.randn(4, 8)
    expected = model(x)
    (kept,) = tmp_path.rglob("torch_aot_compile/*/*/model")
    require_sealed(kept)
    data = kept.read_bytes()
    again = made(tmp_path, monkeypatch, model_class())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)
    assert again.was_aot_compile_fn_loaded_from_disk
    for at in range(0, len(data), len(data) // 50):
        kept.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ArtifactError):
            require_sealed(kept)
    kept.write_bytes(data[: len(data) // 2])
    other = made(tmp_path, monkeypatch, model_class())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected)
    assert not other.was_aot_compile_fn_loaded_from_disk


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Decorated, Regions])
def test_such_models_are_kept(tmp_path, monkeypatch, kind):
    """As vLLM serves what it has no code of its own for, and Nemotron, which switches autocast off."""
    model, x = made(tmp_path, monkeypatch, kind), torch.randn(4, 8)
    expected = model(x)
    again = made(tmp_path, monkeypatch, kind)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), expected)
    assert again.was_aot_compile_fn_loaded_from_disk
    again.layers[1].linear.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    same(again, x)


def test_a_key_signs_it(tmp_path, monkeypatch):
    file, key = tmp_path / "model", tmp_path / "key"
    key.write_bytes(b"k" * 64)
    file.write_bytes(b"kept")
    seal(file)
    monkeypatch.setenv("PIECEWORK_CACHE_KEY_FILE", str(key))
    with pytest.raises(ArtifactError):
        require_sealed(file)
    file.write_bytes(b"kept")
    seal(file)
    require_sealed(file)
