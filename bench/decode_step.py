"""B12: one whole decode step of transformers' Llama.

Every contender is given the model's greedy tokens, and must give its logits and choose the same, before anything is timed; all run on one thread without recording gradients.

Run it with ``python -m piecework.bench.decode_step``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import transformers

from piecework.bench.contenders import FlatGraph, op_texts, straight, straight_lines
from piecework.bench.measure.line_up import Report, command, one_thread
from piecework.bench.measure.result import Result, Row, Target, machine
from piecework.bench.measure.timing import measure, ratio
from piecework.errors import PieceworkError
from piecework.integrations.transformers import stitch, stitched_module
from piecework.integrations.transformers.request.attention import SPLITTING_OP

LAYERS = (16, 32)
BATCHES = (1, 4, 16)
KINDS = ("dynamic", "static")
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPT = 32
STEPS = 64
LENGTH = PROMPT + STEPS
OVER_LIMIT = 1.25
FASTER = 1.6
# Two logits of the model that are closer than this may change places by rounding.
TIE = 1e-3
WINDOW = 0.04
SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to decode."""

    # one more token of each sequence, [batch, 1], to logits, [batch, 1, vocabulary]
    step: Callable[[torch.Tensor], torch.Tensor]
    rewind: Callable[[], None]  # forget the last ``STEPS`` tokens

    def steps(self, ids: torch.Tensor) -> None:
        for _ in range(STEPS):
            self.step(ids)
        self.rewind()

    def greedy(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next ``STEPS`` tokens of each sequence, [batch, STEPS], and their logits."""
        tokens, logits = [], []
        for _ in range(STEPS):
            logits.append(self.step(ids)[:, -1:])
            ids = logits[-1].argmax(-1)
            tokens.append(ids)
        self.rewind()
        return torch.cat(tokens, 1), torch.cat(logits, 1)

    def follow(self, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The logits behind ``ids`` where these tokens come next, [batch, STEPS, vocabulary]."""
        given = torch.cat((ids, tokens[:, :-1]), 1).split(1, 1)
        logits = [self.step(each.contiguous())[:, -1:] for each in given]
        self.rewind()
        return torch.cat(logits, 1)


def build(layers: int) -> torch.nn.Module:
    """The model with seeded weights, large enough that its tokens differ, for inference."""
    config = transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator) * 0.2
        weight.copy_(torch.ones_like(weight) if "norm" in name else drawn)
    return model


def run(
    layers: Sequence[int] = LAYERS,
    batches: Sequence[int] = BATCHES,
    *,
    rounds: int = 200,
    stock: bool = True,
    seconds: float = SECONDS,
    report: Report = lambda text: None,
) -> Result:
    """Compare the contenders in every setting.

    Args:
        layers, batches: the settings.
        rounds: how often a line-up is timed, at most.
        stock: take part in ``torch.compile`` with a static cache too.
        seconds: how long a line-up is timed, at most.
        report: told what happens.

    Raises:
        PieceworkError: a contender gives other tokens than the model.
    """
    rows: list[Row] = []
    targets: list[Target] = []
    with one_thread():
        for depth in layers:
            eager = build(depth)
            stitched = stitch(copy.deepcopy(eager))
            report(f"{depth} layers: stitched")
            for batch in batches:
                line_up = contenders(eager, stitched, batch, stock)
                found = _measured(line_up, depth, batch, rounds, seconds)
                rows += found
                targets += _targets(found, depth, batch)
                report(f"{depth} layers, batch {batch}: measured")
    notes = (
        f"at most {rounds} interleaved rounds and {seconds:g} s per setting, one thread, no_grad",
        f"processor time of one of {STEPS} steps behind {PROMPT} tokens, with its share of going back to them",
    )
    title = "A decode step of transformers, from tokens to logits"
    return Result(title, tuple(rows), tuple(targets), machine(), notes)


def contenders(
    eager: torch.nn.Module, stitched: torch.nn.Module, batch: int, stock: bool
) -> dict[str, Contender]:
    """The ways to decode behind the same prompt, by name."""
    ids = prompt(batch)
    line_up = {}
    for kind in KINDS:
        line_up[f"eager, {kind}"] = with_cache(eager, eager, ids, kind)
        line_up[f"piecework, {kind}"] = with_cache(stitched, stitched, ids, kind)
        line_up[f"limit, {kind}"] = limit(eager, stitched, ids, kind)
    if stock:
        torch.compiler.reset()
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        line_up["stock, static"] = with_cache(eager, compiled, ids, "static")
    return line_up


def prompt(batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, SHAPE["vocab_size"], (batch, PROMPT), generator=generator)


def with_cache(
    prefill: torch.nn.Module, decode: Callable[..., object], ids: torch.Tensor, kind: str
) -> Contender:
    """A model that takes transformers' caches: ``prefill`` for the prompt, ``decode`` behind it."""
    config = prefill.config
    if kind == "dynamic":
        cache = transformers.DynamicCache(config=config)
    else:
        cache = transformers.StaticCache(config=config, max_cache_len=LENGTH)
    prefill(ids, past_key_values=cache)

    def rewind() -> None:
        if kind == "dynamic":
            cache.crop(-STEPS)
        else:
            for layer in cache.layers:
                layer.cumulative_length.fill_(PROMPT)

    return Contender(lambda new: decode(new, past_key_values=cache).logits, rewind)  # type: ignore[attr-defined]


def limit(
    eager: torch.nn.Module, stitched: torch.nn.Module, ids: torch.Tensor, kind: str
) -> Contender:
    """The innermost entries of the pieces, one write in place and one attention a layer, and the head, in a straight line.

    With a static cache attention reads the whole of it under a mask that is ready; else the rows that there are.
    """
    batch = ids.shape[0]
    past = PROMPT
    graph = FlatGraph(stitched_module(stitched), batch)
    counter: Iterator[int] = iter(range(eager.config.num_hidden_layers))
    size = {"b": batch, "d": eager.config.head_dim, "h": SHAPE["num_attention_heads"]}
    shared = SHAPE["num_key_value_heads"]
    each = size["h"] // shared

    def call(node: torch.fx.Node, text: dict[torch.fx.Node, str]) -> list[str]:
        i = next(counter)
        operands = op_texts(graph.split_gm, node, SPLITTING_OP, text)
        query, key, value, out, _layer, scaling = operands
        out_node = next(arg for arg, name in text.items() if name == out)
        text[out_node] = f"attended_{i}"
        keys, values = f"keys_{i}", f"values_{i}"
        if kind == "dynamic":
            keys, values = (f"{name}.as_strided(stored, rows)" for name in (keys, values))
        return [
            f"key_rows_{i}.index_copy_(0, at, {key})",
            f"value_rows_{i}.index_copy_(0, at, {value})",
            f"attended_{i} = attention({query}.as_strided(packed, heads), {keys}, {values}, mask, 0.0, False, scale={scaling})"
            ".view(flat)",
        ]

    examples = {"x": ids[:1, :batch], "p": ids[:1, :batch].clone()}
    lines, values = straight_lines(graph, examples, call)
    hidden = lines.pop().removeprefix("return ")
    cache = transformers.StaticCache(config=eager.config, max_cache_len=LENGTH)
    eager(ids, past_key_values=cache)
    for i, layer in enumerate(cache.layers):
        values |= {f"keys_{i}": layer.keys, f"values_{i}": layer.values}
        values |= {f"key_rows_{i}": layer.keys.transpose(0, 2)}
        values |= {f"value_rows_{i}": layer.values.transpose(0, 2)}
    stored = torch.arange(LENGTH) <= torch.arange(LENGTH).unsqueeze(1)
    values |= {
        "attention": torch.nn.functional.scaled_dot_product_attention,
        "linear": torch.nn.functional.linear,
        "head": eager.lm_head.weight,
        "full": torch.full,
        "masks": torch.zeros(stored.shape).masked_fill_(~stored, -torch.inf),
    }
    width = size["h"] * size["d"]
    before = [
        f"x = ids.view(1, {batch})",
        f"p = full((1, {batch}), past)",
        "at = full((1,), past)",
        f"s0 = {batch}",
        f"mask = {'None' if kind == 'dynamic' else f'masks[past].view(1, 1, 1, {LENGTH})'}",
        f"stored = ({batch}, {shared}, past + 1, {size['d']})",
        f"rows = {cache.layers[0].keys.stride()}",
        f"packed = ({batch}, {shared}, {each}, {size['d']})",
        f"heads = ({width}, {each * size['d']}, {size['d']}, 1)",
        f"flat = (1, {batch}, {size['h']}, {size['d']})",
    ]
    after = [f"return linear({hidden}.view({batch}, 1, {SHAPE['hidden_size']}), head)"]
    function = straight("ids, past", [*before, *lines, *after], values)

    def step(new: torch.Tensor) -> torch.Tensor:
        nonlocal past
        logits = function(new, past)
        past += 1
        return logits  # type: ignore[return-value]

    def rewind() -> None:
        nonlocal past
        past = PROMPT

    return Contender(step, rewind)


def _measured(
    line_up: dict[str, Contender], depth: int, batch: int, rounds: int, seconds: float
) -> list[Row]:
    first = prompt(batch)[:, -1:].contiguous()
    _require_same_tokens(line_up, first)
    timings = measure(
        {name: (lambda c=contender: c.steps(first)) for name, contender in line_up.items()},
        rounds=rounds,
        seconds=seconds,
        window=WINDOW,
    )
    setting: dict[str, object] = {"layers": depth, "batch": batch}
    rows = []
    for name, timing in timings.items():
        kind = name.rpartition(" ")[2]
        ratios = {"limit": ratio(timing, timings[f"limit, {kind}"])}
        if "stock, static" in timings:
            ratios["stock"] = ratio(timing, timings["stock, static"])
        rows.append(Row(setting, name, timing.best / STEPS, ratios))
    return rows


def _require_same_tokens(line_up: dict[str, Contender], first: torch.Tensor) -> None:
    tokens, expected = line_up["eager, dynamic"].greedy(first)
    if tokens.unique().numel() < 3:
        raise PieceworkError("the model says the same tokens always, so they prove nothing")
    best = expected.topk(2).values
    tied = best[..., 0] - best[..., 1] < TIE
    for name, contender in line_up.items():
        logits = contender.follow(first, tokens)
        other = (logits.argmax(-1) != tokens) & ~tied
        if other.any() or not torch.allclose(logits, expected, atol=TIE, rtol=TIE):
            raise PieceworkError(f"contender {name} gives other tokens than the model")


def _targets(rows: Sequence[Row], depth: int, batch: int) -> list[Target]:
    found = {row.contender: row.ratios for row in rows}
    targets = []
    for kind in KINDS:
        mine = found[f"piecework, {kind}"]
        where = f"{depth} layers, batch {batch}, {kind}"
        targets.append(Target("B12", f"{where}: over the limit", OVER_LIMIT, mine["limit"]))
        if "stock" in mine:
            text = f"{where}: faster than torch.compile with a static cache"
            targets.append(Target("B12", text, FASTER, 1 / mine["stock"], at_most=False))
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``decode_step.json`` and ``.png``; 1 if a target is missed."""
    return command(run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
