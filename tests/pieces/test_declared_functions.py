"""Operators of another library, called by the function that it says they run."""

import torch

from piecework import CompilationConfig
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.splitting_op import registry

LIBRARY = torch.library.Library("declared_functions", "DEF")
CALLS: list[str] = []


def mix(x: torch.Tensor, out: torch.Tensor) -> None:
    CALLS.append("by itself")
    out.copy_(x + 1)


def slot(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0)


LIBRARY.define("mix(Tensor x, Tensor(a!) out) -> ()")
LIBRARY.impl("mix", mix, "CPU")
LIBRARY.define("slot(Tensor x) -> Tensor")
LIBRARY.impl("slot", slot, "CPU")
LIBRARY._register_fake("slot", lambda x: x.new_empty(0))
registry.functions["declared_functions::mix"] = mix
registry.functions["declared_functions::slot"] = slot


def test_the_function_is_called_past_the_dispatcher():
    ops = ["declared_functions::mix", "declared_functions::slot"]
    backend = PieceworkBackend(CompilationConfig(backend="eager", splitting_ops=ops), "model")

    def model(x):
        x = x * 2
        out = torch.empty_like(x)
        torch.ops.declared_functions.slot(x)
        torch.ops.declared_functions.mix(x, out)
        return out * 3

    torch._dynamo.reset()
    x = torch.ones(3, 4)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), (x * 2 + 1) * 3)
    code = backend.program.source.code
    assert "    mix(" in code and "    torch.ops.declared_functions.mix(" not in code
    assert set(backend.program.direct_ops.implementations.values()) == {mix, slot}
    assert CALLS
