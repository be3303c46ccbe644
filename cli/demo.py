"""``piecework demo``: in, nothing; out, a transformer compiled piecewise, its source shown, and its tokens compared with eager ones."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from piecework.cli.console import DIFFERS, compile_step, console, show_source, step, typed_errors
from piecework.cli.options import Backend, ConfigFile, DumpFolder, Overrides, configuration


def demo(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the source; must be new.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="How many tokens to generate.")] = 32,
    host_time: Annotated[
        bool | None,
        typer.Option(
            help="Compare the host time of a call with torch.compile's and eager's too; half a minute. The default is to do so with Inductor.",
        ),
    ] = None,
    backend: Backend = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    dump: DumpFolder = None,
) -> None:
    """Compile an 8-layer Llama-shaped model (random weights), show the emitted source, generate, and compare with eager.

    Exit code 1 if tokens differ or logits differ by more than 1e-4 relative.
    """
    from piecework.integrations.comparing import compare
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle

    out = console()
    with typed_errors():
        config = configuration(config_file, overrides, backend=backend, dump=dump)
        if output is not None:
            bundle.check_output(output)
        spec = str(resources.files("piecework.examples") / "llama_demo.json")
        with step(out, "Building an 8-layer Llama with seeded random weights"):
            model = load_model(spec)
        with step(out, f"Generating {tokens} tokens eagerly"):
            model.run(2)  # the first call of anything is slow
            eager = model.run(tokens)
        with compile_step(out, f"Capturing, splitting and compiling with {config.backend}"):
            stitched = model.stitch(config)
        with step(out, f"Generating {tokens} tokens with the stitched model"):
            model.run(2, stitched)
            ours = model.run(tokens, stitched)
        show_source(out, stitched.source.code)
        out.print(str(stitched.report()), markup=False)
        if output is not None:
            text = model.config_text
            bundle.save(output, stitched, model=spec, seed=0, config=config, config_text=text)
            out.print(f"source: {output / bundle.SOURCE}", markup=False)
        result = compare(eager, ours)
        out.print(f"tokens: {' '.join(map(str, ours.tokens.tolist()))}", markup=False)
        out.print(result.text(ours), markup=False)
        out.print(
            f"{tokens} tokens: eager {eager.seconds:.2f} s, stitched {ours.seconds:.2f} s",
            markup=False,
        )
        if config.backend == "inductor" if host_time is None else host_time:
            with step(
                out, "Compiling 16 layers with torch.compile and with piecework, to time them"
            ):
                rows = _host_times()
            _show_host_times(out, rows)
    if not result.agree:
        raise typer.Exit(DIFFERS)


_CALLED = {
    "eager": "eager",
    "stock": "torch.compile",
    "piecework": "piecework",
    "limit": "by hand",
}


def _host_times() -> dict[str, float]:
    """µs of a call of a model that computes next to nothing, by who runs it; results are compared first."""
    from piecework.bench.host_overhead import run

    result = run([16], [4], ["custom_op"], rounds=100, seconds=5, levers=False)
    found = {row.contender: row.seconds * 1e6 for row in result.rows}
    return {label: found[name] for name, label in _CALLED.items()}


def _show_host_times(out: Console, times: dict[str, float]) -> None:
    out.print("one call of 16 layers of width 64, batch 4, one thread, host time:")
    longest = max(times.values())
    for name, time in times.items():
        bar = "█" * max(1, round(40 * time / longest))
        out.print(f"{name:>13} {time:6.0f} µs {bar}", markup=False, highlight=False)
    faster = times["torch.compile"] / times["piecework"]
    out.print(
        f'piecework is {faster:.2f} times as fast as torch.compile; "by hand" is the same kernels called in a straight line, without a check'
    )
