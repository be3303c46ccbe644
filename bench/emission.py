"""Emission time against the number of nodes (B6).

Nothing is compiled or captured: only lowering, checking, rendering and proving of source is measured.

Run it with ``python -m piecework.bench.emission``.
"""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.fx

from piecework.bench.measure.line_up import command
from piecework.bench.measure.result import Result, Row, Target, machine
from piecework.codegen import LowerOptions, generate_source
from piecework.codegen.plan.render import format_source
from piecework.codegen.proof.prove import linkage_of, prove
from piecework.codegen.stitch.lower import lower
from piecework.codegen.stitch.source import collector_paused, stitched_text
from piecework.errors import PieceworkError

T = TypeVar("T")

NODES = (1_000, 10_000, 100_000)
LAYERS = 80
WEIGHTS = ("self_attn_qkv", "self_attn_o", "mlp_gate_up", "mlp_down", "input_norm", "post_norm")
# Black is timed up to here only: it takes over a millisecond a statement.
BLACK_NODES = 1_000


def flat_graph(nodes: int) -> torch.fx.GraphModule:
    """One function of ``nodes`` calls: operators, methods, slices, unpacked results."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    made = 0
    while made < nodes:
        y = graph.call_function(torch.nn.functional.linear, (x, weight))
        y = graph.call_function(torch.ops.aten.add.Tensor, (y, x), {"alpha": 2})
        parts = graph.call_method("chunk", (y, 2), {"dim": -1})
        parts.meta["example_value"] = (torch.empty(2, 4), torch.empty(2, 4))
        left = graph.call_function(operator.getitem, (parts, 0))
        right = graph.call_function(operator.getitem, (parts, 1))
        joined = graph.call_function(torch.cat, ([left, right],), {"dim": -1})
        kept = graph.call_function(operator.getitem, (joined, (slice(None), slice(0, 8))))
        x = graph.call_function(operator.add, (x, kept))
        made += 8
    graph.output((x,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def layered_graph(layers: int) -> tuple[torch.fx.GraphModule, LowerOptions]:
    """A stitching graph as a decoder of ``layers`` layers gives it."""
    root = torch.nn.Module()
    graph = torch.fx.Graph()
    x = graph.placeholder("l_input_ids_")
    submods, bound = [], {}
    for layer in range(layers):
        weights = []
        for name in WEIGHTS:
            target = f"l_self_modules_model_modules_layers_modules_{layer}_modules_{name}_parameters_weight_"
            weights.append(graph.placeholder(target))
            bound[weights[-1].name] = f"model.layers.{layer}.{name}.weight"
        submods.append(f"submod_{2 * layer}")
        root.add_module(submods[-1], _piece(len(weights)))
        root.add_module(f"submod_{2 * layer + 1}", _splitting(f"model.layers.{layer}.self_attn"))
        call = graph.call_module(submods[-1], (x, *weights))
        q, out, x = (graph.call_function(operator.getitem, (call, index)) for index in range(3))
        graph.call_module(f"submod_{2 * layer + 1}", (q, out))
    graph.output((x,))
    return torch.fx.GraphModule(root, graph), LowerOptions(submods=submods, bound=bound)


def _piece(weights: int) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x, *rest = (graph.placeholder(f"p{index}") for index in range(weights + 1))
    for weight in rest:
        x = graph.call_function(torch.nn.functional.linear, (x, weight))
    graph.output((x, graph.call_function(torch.empty_like, (x,)), x))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def _splitting(layer: str) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    q, out = graph.placeholder("q"), graph.placeholder("out")
    graph.call_function(print, (q, out, layer))
    graph.output(None)
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def phases(gm: torch.fx.GraphModule, options: LowerOptions, *, black: bool) -> dict[str, float]:
    """Processor seconds of each phase of one emission, and of the whole as it is called."""
    seconds: dict[str, float] = {}

    def time_of(name: str, call: Callable[[], T]) -> T:
        start = time.process_time()
        value = call()
        seconds[name] = time.process_time() - start
        return value

    source = time_of("emission", lambda: generate_source(gm, options))
    if source.proof is None or source.proof.events == 0:
        raise PieceworkError("the emitted source was not proved")
    with collector_paused():
        module, consts = time_of("lower", lambda: lower(gm, options))
        code = time_of("render", lambda: stitched_text(module))
        linked = linkage_of(module, options, consts)
        time_of("verify", lambda: prove(code, gm, linked))
    if code != source.code:
        raise PieceworkError("two emissions of one graph differ")
    if black and time_of("black, of the whole text", lambda: format_source(code)) != code:
        raise PieceworkError("the emitted source is not in black's format")
    return seconds


def best_phases(
    gm: torch.fx.GraphModule, options: LowerOptions, rounds: int, *, black: bool
) -> dict[str, float]:
    found = [phases(gm, options, black=black and number == 0) for number in range(rounds)]
    names = list(found[0])
    return {name: min(each[name] for each in found if name in each) for name in names}


def run(nodes: Sequence[int] = NODES, rounds: int = 3) -> Result:
    """Measure each size.

    Args:
        nodes: sizes of the flat graph.
        rounds: emissions of each size up to 10,000 nodes; the fastest counts.

    Raises:
        PieceworkError: a source was not proved, differs between two emissions, or is not in black's format.
    """
    rows: list[Row] = []
    totals: dict[int, float] = {}
    for count in nodes:
        times = rounds if count <= 10_000 else 1
        seconds = best_phases(flat_graph(count), LowerOptions(), times, black=count <= BLACK_NODES)
        totals[count] = seconds["emission"]
        rows += _rows({"graph": f"{count} nodes"}, seconds)
    gm, options = layered_graph(LAYERS)
    layered = best_phases(gm, options, rounds, black=True)
    rows += _rows({"graph": f"{LAYERS} layers"}, layered)
    targets = [Target("B6", f"seconds for {LAYERS} layers", 1.0, layered["emission"])]
    if 10_000 in totals:
        targets.append(Target("B6", "seconds for 10,000 nodes", 3.0, totals[10_000]))
    sizes = sorted(totals)
    for small, large in itertools.pairwise(sizes):
        growth = (totals[large] / large) / (totals[small] / small)
        text = f"time a node at {large} nodes, of that at {small}"
        targets.append(Target("B6", text, 1.5, growth))
    notes = (
        "seconds of one processor (emission is single-threaded), so that a busy machine does not blur them",
        "emission is what generate_source takes, with checks and proof; the phases are timed again on their own",
        "verify is the cost of the proof (row C11)",
    )
    title = "Emission against nodes"
    return Result(title, tuple(rows), tuple(targets), machine(), notes, unit="s")


def _rows(setting: dict[str, object], seconds: dict[str, float]) -> list[Row]:
    total = seconds["emission"]
    return [
        Row(setting, name, value, {"emission": value / total}) for name, value in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``emission.json`` and ``emission.png``; 1 if a target is missed."""
    return command(run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
