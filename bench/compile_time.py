"""Cold compile time against depth (B4).

Each figure is a process of its own with empty caches; importing torch is not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import piecework
from piecework.bench.measure.apart import apart
from piecework.bench.measure.line_up import options_of
from piecework.bench.measure.result import Result, Row, Target, machine

DEPTHS = (4, 8, 16, 32)
# With ``nested_compile_region`` on the layer, stock needs sizes that are numbers for models that look at more of them.
CONTENDERS = ("stock", "stock, marked layer", "piecework", "piecework, each layer traced")
MODELS = ("small", "llama")


@piecework.splitting_op("bench_compile::attention", mutates_args=("out",))
def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, layer: str
) -> None:
    out.copy_(torch.softmax(query @ key.mT, -1) @ value)


class Layer(torch.nn.Module):
    """One transformer layer, hidden size 64, with attention behind the op."""

    def __init__(self, index: int, hidden: int = 64) -> None:
        super().__init__()
        self.name = f"layers.{index}"
        self.before, self.after = torch.nn.RMSNorm(hidden), torch.nn.RMSNorm(hidden)
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.project = torch.nn.Linear(hidden, hidden, bias=False)
        self.gate = torch.nn.Linear(hidden, 2 * hidden, bias=False)
        self.up = torch.nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = torch.nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.before(x)).chunk(3, -1)
        out = torch.empty_like(query)
        attention(query, key, value, out, self.name)
        x = x + self.project(out)
        y = self.after(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


_LAYERS = {"small": ("",), "llama": ("model.layers",)}


def build(depth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Layer(i) for i in range(depth))).eval().requires_grad_(False)
    return model, torch.randn(6, 64)


def build_llama(depth: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """transformers' Llama, hidden size 64, and token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **sizes, **heads))
    return model.eval().requires_grad_(False), torch.arange(12).reshape(2, 6)


def measure_here(name: str, contender: str, depth: int) -> dict[str, object]:
    """Compile once in this process; the caller gives it empty caches."""
    model, x = build(depth) if name == "small" else build_llama(depth)
    with torch.no_grad():
        expected = _tensor(model(x))
        start = time.perf_counter()
        if contender.startswith("stock"):
            result = _tensor(_stock(model, "marked" in contender)(x))
        else:
            config = piecework.CompilationConfig(
                repeated_layers=() if "each" in contender else _LAYERS[name]
            )
            result = _tensor(_stitched(name, model, x, config)(x))
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


def measure(name: str, contender: str, depth: int) -> dict[str, object]:
    """One cold compile in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="piecework-bench-") as folder:
        module = "piecework.bench.compile_time"
        found: dict[str, object] = apart(module, [name, contender, str(depth)], Path(folder))
    return found


def run(depths: Sequence[int] = DEPTHS, name: str = "small") -> Result:
    rows: list[Row] = []
    seconds: dict[tuple[str, int], float] = {}
    compiles: dict[int, object] = {}
    for depth in depths:
        for contender in CONTENDERS:
            found = measure(name, contender, depth)
            seconds[contender, depth] = float(str(found["seconds"]))
            if contender == "piecework":
                compiles[depth] = found["compiles"]
            note = "1 graph" if contender.startswith("stock") else f"{found['compiles']} compiles"
            ratio = seconds[contender, depth] / seconds["stock", depth]
            rows.append(
                Row({"layers": depth}, contender, seconds[contender, depth], {"stock": ratio}, note)
            )
    first, last = min(depths), max(depths)

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
        if depth in depths:
            of_stock = seconds["piecework", depth] / seconds["stock", depth]
            targets.append(Target("B4", f"{depth} layers, of stock's time", bound, of_stock))
    return Result(
        "Cold compile time against depth", tuple(rows), tuple(targets), machine(), unit="s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``compile_time.json`` and a plot; 1 if a target is missed."""
    parser = options_of("compile_time", __doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=list(DEPTHS))
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument(
        "--one", nargs=3, metavar=("MODEL", "CONTENDER", "LAYERS"), help="measure in this process"
    )
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure_here(*options.one[:2], int(options.one[2]))))
        return 0
    result = run(options.layers, options.model)
    return result.finish(options.out, "compile_time")


if __name__ == "__main__":
    sys.exit(main())
