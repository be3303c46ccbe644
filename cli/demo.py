"""``piecework demo``: in, nothing; out, a transformer compiled piecewise, its source shown, and its tokens compared with eager ones."""

from __future__ import annotations

import statistics
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from piecework.cli.console import DIFFERS, compile_step, console, show_source, step
from piecework.cli.options import Backend, ConfigFile, DumpFolder, Overrides, configuration

if TYPE_CHECKING:
    from piecework.bench.measure.timing import Timing


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the source; must be new.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="How many tokens to generate.")] = 32,
    host_time: Annotated[
        bool | None,
        typer.Option(
            help="Compare the host time of a call with torch.compile's and eager's too; half a minute. The default is to do so with Inductor."
        ),
    ] = None,
    backend: Backend = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    dump: DumpFolder = None,
) -> None:
    """Compile an 8-layer Llama-shaped model (random weights), show how the emitted source begins, generate, and compare with eager.

    Exit code 1 if tokens differ or logits differ by more than 1e-4 relative.
    """
    from piecework.integrations.loading import load_model
    from piecework.integrations.protocol import compare
    from piecework.runtime import bundle

    out = console()
    config = configuration(config_file, overrides, backend=backend, dump=dump)
    if output is not None:
        bundle.check_output(output)
    spec = str(resources.files("piecework.examples") / "llama_demo.json")
    with step(out, "Building an 8-layer Llama with seeded random weights"):
        model = load_model(spec)
    with step(out, f"Generating {tokens} tokens eagerly"):
        eager = model.run(tokens)
    with compile_step(out, f"Capturing, splitting and compiling with {config.backend}"):
        stitched = model.stitch(config)
    with step(out, f"Generating {tokens} tokens with the stitched model"):
        ours = model.run(tokens, stitched)
    show_source(out, _beginning(stitched.source.code))
    out.print(str(stitched.report()), markup=False)
    if output is not None:
        text = model.config_text
        bundle.save(output, stitched, model=spec, seed=0, config=config, config_text=text)
        out.print(f"source: {output / bundle.SOURCE}", markup=False)
    result = compare(eager, ours)
    out.print(f"tokens: {' '.join(map(str, ours.tokens.tolist()))}", markup=False)
    out.print(result.text(ours), markup=False)
    if config.backend == "inductor" if host_time is None else host_time:
        from piecework.bench.host_overhead import side_by_side

        with step(out, "Compiling 16 layers with torch.compile and with piecework, to time them"):
            timings = side_by_side(tuple(_CALLED), 16, 4, "custom_op", rounds=200, seconds=5)
        _show_host_times(out, timings)
    if not result.agree:
        raise typer.Exit(DIFFERS)


def _beginning(code: str) -> str:
    """The emitted source up to its third piece: the layers that follow look as the second does."""
    lines = code.splitlines()
    end = next((n for n, line in enumerate(lines) if "__vllm_submods__[2](" in line), len(lines))
    while lines[end - 1].lstrip().startswith("#"):  # what stands above the piece
        end -= 1
    more = len(lines) - end
    return "\n".join([*lines[:end], f"    # … {more} more lines; piecework demo -o DIR writes all"])


_CALLED = {"eager": "eager", "stock": "torch.compile", "piecework": "piecework", "limit": "by hand"}


def _show_host_times(out: Console, timings: dict[str, Timing]) -> None:
    from piecework.bench.measure.timing import quotients

    out.print(
        "one call of 16 layers of width 64, batch 4, one thread: host time,"
        f" the median of {len(timings['eager'].rounds)} interleaved rounds (where half of them lie)",
        markup=False,
    )
    times = {name: statistics.quantiles(timing.rounds.values()) for name, timing in timings.items()}
    longest = max(median for _, median, _ in times.values())
    for name, (low, median, high) in times.items():
        bar = "█" * max(1, round(40 * median / longest))
        line = f"{_CALLED[name]:>13} {median * 1e6:6.0f} µs ({low * 1e6:.0f} to {high * 1e6:.0f}) {bar}"
        out.print(line, markup=False, highlight=False)
    low, median, high = statistics.quantiles(quotients(timings["stock"], timings["piecework"]))
    out.print(
        f"torch.compile took {median:.2f} times as long as piecework (half of the rounds: {low:.2f} to {high:.2f});"
        ' "by hand" is the same kernels called in a straight line, without a check',
        markup=False,
    )
