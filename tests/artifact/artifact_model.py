"""A model in a file of its own, saved in one process and loaded in another. In: save or load, and folders. Out: one line of JSON, or of what went wrong."""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from torch import nn

import piecework


@piecework.splitting_op("artifact_model::mix", rows="independent")
def mix(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


@mix.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.scale = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + mix(self.norm(x))
        return x + self.down(torch.nn.functional.gelu(self.up(x))) * self.scale


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def refusal(stitched: piecework.StitchedModule, x: torch.Tensor, model: Model) -> str:
    """What a call says after the model was changed; it is changed back."""
    model.layers[1].scale = 3.0
    try:
        stitched(x)
    except piecework.PieceworkError as error:
        return str(error)
    finally:
        model.layers[1].scale = 0.5
    return ""


def main(what: str, artifact: str, weights: str) -> dict[str, object]:
    model = Model().eval()
    if what == "save":
        x = torch.randn(5, 16)
        stitched = piecework.compile(model, (x,), config={"compile_ranges_endpoints": [8]})
        stitched.save(artifact)
        given = [torch.randn(n, 16) for n in (1, 2, 5, 8, 9, 64)]
        torch.save((model.state_dict(), given, [stitched(each) for each in given]), weights)
        return {"pieces": len(stitched.pieces)}
    state, given, results = torch.load(weights)
    model.load_state_dict(state)
    stitched = piecework.load(artifact, model)
    equal = [torch.equal(stitched(x), y) for x, y in zip(given, results, strict=True)]
    first = {
        "dynamo": "torch._dynamo" in sys.modules,
        "refused": refusal(stitched, given[2], model),
    }
    end = time.monotonic() + 500
    while "GuardManagerType" not in vars(sys.modules.get("torch._dynamo.guards", object)):
        equal.append(torch.equal(stitched(given[2]), results[2]))
        assert time.monotonic() < end, "nobody imports what makes calls cheap"
    equal.append(torch.equal(stitched(given[2]), results[2]))
    found = {
        "equal": all(equal),
        "first": first,
        "refused": refusal(stitched, given[2], model),
        "counters": {k: v for k, v in piecework.counters.snapshot().items() if v},
        "inductor": [
            m
            for m in ("torch._inductor.compile_fx", "torch._inductor.codecache")
            if m in sys.modules
        ],
        "cached": os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]),
    }
    stitched.save(f"{artifact}_again")
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(*sys.argv[1:])))
