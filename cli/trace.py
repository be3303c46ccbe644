"""``piecework trace``: in, a model or a compiled folder; out, a file for Perfetto or chrome://tracing in which pieces, replays, operators and layers have their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piecework.cli.bundles import reload_model, warm_or_compiled
from piecework.cli.capture import parse_sizes
from piecework.cli.console import compile_step, console, step
from piecework.cli.options import AsJson, Backend, ConfigFile, Overrides, configuration
from piecework.integrations.loading import require_model

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from piecework.runtime.stitched import StitchedModule


def trace(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder made by compile, or a model as compile takes it."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The trace; a name in .gz is compressed.")
    ],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate (causal LM).")] = 4,
    sizes: Annotated[str, typer.Option(help="Batch sizes to capture first, such as 1,2,4,8.")] = "",
    backend: Backend = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run MODEL once to warm up and once under torch's profiler, and write a trace that Perfetto opens.

    Pieces are named by the layers in them, operators between them by their layer, replays of static graphs by piece and graph. Open the
    file in https://ui.perfetto.dev or chrome://tracing; both read it in the browser.
    """
    require_model(model)
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle
    from piecework.runtime.observe.profile import require_writable, write_trace

    require_writable(output)
    chosen = parse_sizes(sizes)
    out = console(quiet=as_json)
    folder = Path(model)
    manifest = bundle.read_manifest(folder) if (folder / bundle.MANIFEST).is_file() else None
    base = manifest and manifest.config
    config = configuration(config_file, overrides, backend=backend, base=base)
    if manifest is None:
        with step(out, f"Loading {model}"):
            loaded = load_model(model, seed=seed)
        with compile_step(out, f"Compiling with {config.backend}"):
            stitched = loaded.stitch(config)
    else:
        loaded = reload_model(folder, manifest)
        stitched = warm_or_compiled(folder, manifest, loaded, config, out)
    if chosen:
        around = loaded.dry_context()
        pad = None if around is None else True
        with step(out, f"Capturing for {', '.join(map(str, chosen))}"):
            stitched.capture(chosen, progress=False, context_for=around, pad=pad)
    with step(out, "Warming up"):
        loaded.run(tokens, stitched)
    with step(out, "Tracing"):
        names = [each.named_pieces() for each in loaded.modules(stitched)]
        found = write_trace(output, lambda: loaded.run(tokens, stitched), names)
    named = _named(loaded.modules(stitched), found)
    if as_json:
        print(json.dumps({"trace": str(output), "ranges": named}))
        return
    for name, count in named.items():
        out.print(f"{count:6d}  {name}", markup=False)
    out.print(f"trace: {output}", markup=False)


def _named(modules: Sequence[StitchedModule], found: Counter[str]) -> dict[str, int]:
    """The ranges of ``found`` that are named after pieces, replays and operators of the model, in the order of their stages."""
    stages = dict.fromkeys(
        name for made in modules for each in made.traces for name in each.stages()
    )
    return {
        key: found[key]
        for stage in stages
        for key in found
        if key == stage or key.startswith(f"{stage} ")
    }
