"""B1: what the stitching itself costs.

The pieces return their first argument, so all that is timed is the glue; no compiler and no tensor operation takes part.

Run it with ``python -m piecework.bench.stitching``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
import torch.fx

from piecework.bench.contenders import Piece, PieceModule, straight
from piecework.bench.measure.line_up import command
from piecework.bench.measure.result import Result, Row, Target, machine
from piecework.bench.measure.timing import Timing, measure, ratio
from piecework.codegen import LowerOptions, generate_source
from piecework.codegen.stitch.bind import compile_execution_fn
from piecework.errors import PieceworkError
from piecework.runtime.pieces.program import publish_submods

PIECES = (65, 161)
WEIGHTS = 8
TARGET = 1.05

Value = torch.Tensor
Call = Callable[[Value], object]


def _functions(pieces: int) -> list[Piece]:
    """One function object per piece: calls of a single shared one would be predicted too well."""
    parameters = ", ".join(["x", *(f"w{i}" for i in range(WEIGHTS))])
    functions = []
    for _ in range(pieces):
        scope: dict[str, Piece] = {}
        exec(f"def no_op({parameters}): return (x,)", scope)
        functions.append(scope["no_op"])
    return functions


def _stitching_graph(functions: Sequence[Piece]) -> torch.fx.GraphModule:
    """``x = submod_i(x, w0 … w7)[0]`` for each piece, weights as placeholders."""
    root = torch.nn.Module()
    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(len(functions) * WEIGHTS)]
    for index, function in enumerate(functions):
        root.add_module(f"submod_{index}", PieceModule(function))
        mine = weights[index * WEIGHTS : (index + 1) * WEIGHTS]
        call = graph.call_module(f"submod_{index}", (value, *mine))
        call.meta["example_value"] = (torch.empty(1),)  # as a traced graph has it: one output
        value = graph.call_function(operator.getitem, (call, 0))
    graph.output((value,))
    return torch.fx.GraphModule(root, graph)


# --- the contenders ---------------------------------------------------------------------------------


def _straight_lines(functions: Sequence[Piece], weights: Sequence[object]) -> dict[str, Call]:
    """The calls one after the other, as a person would write them, with names held in two ways.

    Locals are the faster names of CPython up to 256 of them and globals beyond; the limit is whichever is faster.
    """
    calls = []
    for index in range(len(functions)):
        mine = ", ".join(f"w{i}" for i in range(index * WEIGHTS, (index + 1) * WEIGHTS))
        calls.append(f"(x,) = piece_{index}(x, {mine})")
    names = [f"piece_{i}" for i in range(len(functions))] + [f"w{i}" for i in range(len(weights))]
    values: dict[str, object] = dict(zip(names, [*functions, *weights], strict=True))
    calls.append("return (x,)")
    kinds = {"globals": False, "locals": True}
    return {kind: straight("x", calls, values, held) for kind, held in kinds.items()}


def _emitted(
    split_gm: torch.fx.GraphModule,
    functions: Sequence[Piece],
    weights: Sequence[object],
    *,
    binds: bool,
) -> Call:
    """Generated stitching code; its weights are names of its module, as `piecework.compile` has
    it, or passed in every call, as the field does."""
    bound = {f"w{i}": f"w{i}" for i in range(len(weights) if binds else 0)}
    source = generate_source(split_gm, LowerOptions(bound=bound))
    names = source.submod_names
    callables = {name: functions[int(name.rpartition("_")[2])] for name in names}
    held = {row.name: weights[int(row.path[1:])] for row in source.module.bound}
    function = compile_execution_fn(source.code, callables, names, source.consts, bound=held)
    if not binds:
        return lambda x: function(x, *weights)
    publish_submods(function, [callables[name] for name in names])
    return function


# --- the run -----------------------------------------------------------------------------------------


def run(pieces: Sequence[int] = PIECES, *, rounds: int = 400) -> Result:
    """Compare the contenders at each number of pieces.

    Args:
        pieces: how many no-op pieces a forward has.
        rounds: how often the line-up is timed.

    Raises:
        PieceworkError: a contender does not return what the straight line returns.
    """
    rows: list[Row] = []
    targets: list[Target] = []
    for count in pieces:
        timings, straight = _measure(count, rounds)
        limit = timings["limit"]
        for name, timing in timings.items():
            note = f"bound as {straight}" if name == "limit" else ""
            ratios = {"limit": ratio(timing, limit)}
            rows.append(Row({"pieces": count}, name, timing.best, ratios, note))
        text = f"stitching of {count} no-op pieces over the straight line"
        targets.append(Target("B1", text, TARGET, ratio(timings["piecework"], limit)))
    notes = (
        f"{WEIGHTS} weights a piece; {rounds} interleaved rounds, garbage collection off; processor time of the thread",
    )
    return Result("The stitching alone", tuple(rows), tuple(targets), machine(), notes)


def _measure(pieces: int, rounds: int) -> tuple[dict[str, Timing], str]:
    functions = _functions(pieces)
    weights = [torch.empty(1) for _ in range(pieces * WEIGHTS)]
    split_gm = _stitching_graph(functions)
    interpreter = torch.fx.Interpreter(split_gm)
    straight = _straight_lines(functions, weights)
    calls: dict[str, Call] = {
        "interpreter": lambda x: interpreter.run(x, *weights),
        "graph module": lambda x: split_gm(x, *weights),
        "conventional": _emitted(split_gm, functions, weights, binds=False),
        "piecework": _emitted(split_gm, functions, weights, binds=True),
        **{f"limit ({name})": call for name, call in straight.items()},
    }
    x = torch.empty(1)
    for name, call in calls.items():
        returned = call(x)
        if not (isinstance(returned, tuple) and len(returned) == 1 and returned[0] is x):
            raise PieceworkError(f"contender {name} does not return what the straight line returns")
    timings = measure({name: (lambda c=call: c(x)) for name, call in calls.items()}, rounds=rounds)
    limits = {name: timings.pop(f"limit ({name})") for name in straight}
    best = min(limits, key=lambda name: ratio(limits[name], timings["piecework"]))
    return {**timings, "limit": limits[best]}, best


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``stitching.json`` and ``stitching.png``; 1 if a target is missed."""
    return command(run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
