"""Cold compile time against depth (B4).

Each figure is a process of its own with empty caches; importing torch is not counted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

import piecework
from piecework.bench.decoder import SMALL, Layer
from piecework.bench.measure.apart import apart
from piecework.bench.measure.line_up import command
from piecework.bench.measure.result import Result, Row, Target, machine

DEPTHS = (4, 8, 16, 32)
# With ``nested_compile_region`` on the layer, stock needs sizes that are numbers for models that look at more of them.
CONTENDERS = ("stock", "stock, marked layer", "piecework", "piecework, each layer traced")
_LAYERS = {"small": ("",), "llama": ("model.layers",)}


def build(depth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer(i, SMALL) for i in range(depth)))
    return model.eval().requires_grad_(False), torch.randn(6, SMALL.hidden)


def build_llama(depth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """transformers' Llama, hidden size 64, and token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **sizes, **heads))
    return model.eval().requires_grad_(False), torch.arange(12).reshape(2, 6)


def measure_here(model: str, contender: str, layers: str) -> dict[str, object]:
    """Compile once in this process; the caller gives it empty caches."""
    module, x = (build if model == "small" else build_llama)(int(layers))
    with torch.no_grad():
        expected = _tensor(module(x))
        start = time.perf_counter()
        if contender.startswith("stock"):
            result = _tensor(_stock(module, "marked" in contender)(x))
        else:
            config = piecework.CompilationConfig(
                repeated_layers=() if "each" in contender else _LAYERS[model]
            )
            result = _tensor(_stitched(model, module, x, config)(x))
        seconds = time.perf_counter() - start
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    return {"seconds": seconds, "compiles": piecework.counters.num_inductor_compiles}


def _tensor(result: object) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.logits  # type: ignore[attr-defined]


def _stock(model: torch.nn.Module, marked: bool) -> Callable[..., object]:
    """Stock ``torch.compile``, maybe with marked layers of static sizes."""
    if marked:
        layers = next(m for m in model.modules() if len(list(m.children())) > 3)
        kind = type(next(layers.children()))
        kind.forward = torch.compiler.nested_compile_region(kind.forward, max_reuse_entries=1000)  # type: ignore[method-assign]
    return torch.compile(model, fullgraph=True, dynamic=not marked)


def _stitched(
    name: str, model: torch.nn.Module, x: torch.Tensor, config: piecework.CompilationConfig
) -> Callable[..., object]:
    if name == "small":
        return piecework.compile(model, (x,), config=config)
    from piecework.integrations.transformers import stitch

    return stitch(model, config=config)


def run(layers: Sequence[int] = DEPTHS, model: Literal["small", "llama"] = "small") -> Result:
    rows: list[Row] = []
    seconds: dict[tuple[str, int], float] = {}
    compiles: dict[int, object] = {}
    for depth in layers:
        for contender in CONTENDERS:
            words = [model, contender, str(depth)]
            with tempfile.TemporaryDirectory(prefix="piecework-bench-") as folder:
                found = apart("piecework.bench.compile_time", words, Path(folder))
            seconds[contender, depth] = found["seconds"]
            if contender == "piecework":
                compiles[depth] = found["compiles"]
            note = "1 graph" if contender.startswith("stock") else f"{found['compiles']} compiles"
            ratio = seconds[contender, depth] / seconds["stock", depth]
            rows.append(
                Row({"layers": depth}, contender, seconds[contender, depth], {"stock": ratio}, note)
            )
    first, last = min(layers), max(layers)

    def growth(contender: str) -> float:
        return (seconds[contender, last] - seconds[contender, first]) / (last - first)

    different = len(set(map(str, compiles.values())))
    slope = growth("piecework") / growth("stock")
    flat = seconds["piecework", last] / seconds["piecework", first]
    targets = [
        Target("B4", "different compile counts over all depths", 1, different),
        Target("B4", f"growth per layer, of stock's ({first} to {last} layers)", 0.10, slope),
        Target("B4", f"{last} layers, of the time of {first}", 1.15, flat),
    ]
    for depth, bound in ((32, 0.5), (80, 0.28)):
        if depth in layers:
            of_stock = seconds["piecework", depth] / seconds["stock", depth]
            targets.append(Target("B4", f"{depth} layers, of stock's time", bound, of_stock))
    return Result(
        "Cold compile time against depth", tuple(rows), tuple(targets), machine(), unit="s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``compile_time.json`` and a plot; 1 if a target is missed."""
    return command(run, arguments, measure_here)


if __name__ == "__main__":
    raise SystemExit(main())
