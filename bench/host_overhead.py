"""B2 and B3: what lies between the kernels of a whole forward.

Every contender's result is compared with the model's before anything is timed; all run on one thread without recording gradients.

Run it with ``python -m piecework.bench.host_overhead``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

import piecework
from piecework.bench.contenders import (
    Call,
    FlatGraph,
    conventional,
    dynamic,
    limit,
    traced_once,
)
from piecework.bench.measure.line_up import Report, command, one_thread
from piecework.bench.measure.llama_shaped import (
    OPERATOR_NAMES,
    attention_body,
    build,
    registered,
    token_ids,
)
from piecework.bench.measure.result import Result, Row, Target, machine
from piecework.bench.measure.timing import Timing, measure, ratio
from piecework.errors import PieceworkError
from piecework.runtime.config.compilation import CompilationConfig

LAYERS = (4, 16, 32)
BATCHES = (1, 4, 64)
B2 = 1.05
B3 = {"custom_op": 1.65, "light": 1.08}
B3_CPP = 1.2
CPP = "piecework, cpp_wrapper"
WINDOW = 0.002
#: For one line-up; all of them, with their compilation, are done in ten minutes on two cores.
SECONDS = 8.0


def run(
    layers: Sequence[int] = LAYERS,
    batches: Sequence[int] = BATCHES,
    registrations: Sequence[str] = tuple(OPERATOR_NAMES),
    *,
    rounds: int = 300,
    stock: bool = True,
    seconds: float = SECONDS,
    report: Report = lambda text: None,
) -> Result:
    """Compare the contenders in every setting.

    Args:
        layers, batches, registrations: the settings.
        rounds: how often a line-up is timed, at most.
        stock: take part in ``torch.compile`` too.
        seconds: how long a line-up is timed, at most.
        report: told what happens.

    Raises:
        PieceworkError: a contender returns something else than the model.
    """
    rows: list[Row] = []
    targets: list[Target] = []
    effort = {"rounds": rounds, "seconds": seconds}
    with one_thread():
        for registration in registrations:
            for depth in layers:
                found = _depth(depth, batches, registration, effort, stock, report)
                rows += found
                targets += _targets(found, registration, depth)
    notes = (
        f"at most {rounds} interleaved rounds and {seconds:g} s per setting, one thread, no_grad",
        "processor time, µs of the fastest round, ratios of the fastest tenth",
    )
    headline = next((row.setting for row in rows if row.setting == _HEADLINE), None)
    return Result("Host overhead", tuple(rows), tuple(targets), machine(), notes, headline=headline)


def side_by_side(
    names: Sequence[str], depth: int, batch: int, registration: str, **effort: float
) -> dict[str, Timing]:
    """What some contenders take in one setting, by name, in so many ``rounds`` or ``seconds``.

    Raises:
        PieceworkError: a contender returns something else than the model.
    """
    with one_thread():
        torch.compiler.reset()
        calls = calls_for(depth, registration, stock="stock" in names)
        return _timings({name: calls[name] for name in names}, batch, effort)


_HEADLINE: dict[str, object] = {"op": "custom_op", "layers": 32, "batch": 4}


def _depth(
    depth: int,
    batches: Sequence[int],
    registration: str,
    effort: Mapping[str, float],
    stock: bool,
    report: Report,
) -> list[Row]:
    rows: list[Row] = []
    # A trace takes sizes of 2 and more as one case; batch 1 needs one that assumes nothing of the batch.
    for unbacked in (False, True):
        mine = [batch for batch in batches if (batch == 1) == unbacked]
        if not mine:
            continue
        torch.compiler.reset()
        start = time.perf_counter()
        calls = calls_for(depth, registration, unbacked, stock)
        if stock and (depth, registration, unbacked) == (32, "light", False):
            cpp = CompilationConfig(inductor_compile_config={"cpp_wrapper": True})
            calls[CPP] = calls_for(depth, registration, False, False, cpp)["piecework"]
        report(
            f"{registration}, {depth} layers{', any batch' if unbacked else ''}: compiled in {time.perf_counter() - start:.0f} s"
        )
        for batch in mine:
            rows += _measure(calls, depth, batch, registration, effort)
            report(f"{registration}, {depth} layers, batch {batch}: measured")
    return rows


def calls_for(
    depth: int,
    registration: str,
    unbacked: bool = False,
    stock: bool = False,
    config: CompilationConfig | None = None,
) -> dict[str, Call]:
    """The contenders of one setting by name, compiled; the conventional one at default settings only.

    Args:
        unbacked: trace without assuming that the batch is not 1.
        stock: take part in ``torch.compile`` too, which takes longest.
    """
    model, example = build(depth, registered(registration)), token_ids(4)
    operator = OPERATOR_NAMES[registration]
    given = (dynamic(example.clone(), unbacked=unbacked),)
    stitched = piecework.compile(model, given, splitting_ops=[operator], config=config)
    graph = FlatGraph(stitched, len(example))
    interpreter = torch.fx.Interpreter(graph.split_gm)
    calls: dict[str, Call] = {
        "eager": model,
        "interpreter": lambda x: interpreter.run(*graph.inputs(x))[0],
        "graph module": lambda x: graph.split_gm(*graph.inputs(x))[0],
    }
    if stock:
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        calls["stock"] = traced_once(compiled, example, unbacked)
    if config is None:
        calls["conventional"] = conventional(model, example, operator, unbacked=unbacked)
    calls["piecework"] = stitched  # type: ignore[assignment]
    calls["limit"] = limit(graph, operator, attention_body)
    return calls


def _measure(
    calls: dict[str, Call], depth: int, batch: int, registration: str, effort: Mapping[str, float]
) -> list[Row]:
    setting: dict[str, object] = {"op": registration, "layers": depth, "batch": batch}
    timings = _timings(calls, batch, effort)
    rows = []
    for name, timing in timings.items():
        ratios = {"limit": ratio(timing, timings["limit"])}
        if "stock" in timings:
            ratios["stock"] = ratio(timing, timings["stock"])
        rows.append(Row(setting, name, timing.best, ratios))
    return rows


def _timings(calls: dict[str, Call], batch: int, effort: Mapping[str, float]) -> dict[str, Timing]:
    ids = token_ids(batch)
    expected = calls["eager"](ids)
    for name, call in calls.items():
        actual = call(ids)
        if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-4):
            worst = (actual - expected).abs().max().item()
            raise PieceworkError(f"contender {name} differs from the model by {worst:g}")
    return measure(
        {name: (lambda c=call: c(ids)) for name, call in calls.items()},
        window=WINDOW,
        **effort,
    )


def _targets(rows: Sequence[Row], registration: str, depth: int) -> list[Target]:
    found = {row.contender: row for row in rows if row.setting["batch"] == 4 and depth in (16, 32)}
    targets = []
    if "piecework" in found:
        over = found["piecework"].ratios["limit"]
        targets.append(Target("B2", f"{registration}, {depth} layers: over the limit", B2, over))
    if depth == 32 and "stock" in found:
        faster = 1 / found["piecework"].ratios["stock"]
        text = f"{registration}, {depth} layers: faster than torch.compile"
        targets.append(Target("B3", text, B3[registration], faster, at_most=False))
    if depth == 32 and CPP in found:
        faster = 1 / found[CPP].ratios["stock"]
        text = f"{registration}, {depth} layers, cpp_wrapper: faster than torch.compile"
        targets.append(Target("B3", text, B3_CPP, faster, at_most=False))
    return targets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, and write ``host_overhead.json`` and ``.png``; 1 if a target is missed."""
    return command(run, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
