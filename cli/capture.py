"""``piecework coverage``: in, a compiled folder and batch sizes; out, how every batch size runs, what calls ran as, and what the graphs take."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from piecework.cli.bundles import FolderArgument, reload_model, warm_or_compiled
from piecework.cli.console import console, step
from piecework.cli.options import AsJson, ConfigFile, DumpFolder, Overrides, configuration
from piecework.errors import UsageError


def coverage(
    directory: FolderArgument,
    sizes: Annotated[str, typer.Option(help="Batch sizes to capture, such as 1,2,4,8.")],
    maximum: Annotated[
        int | None, typer.Option("--max", min=1, help="Largest batch size to list.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Bytes that the graphs may take.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="What becomes of fresh tensors: copy, refuse or eager.")
    ] = "copy",
    mode: Annotated[
        str, typer.Option(help="What is captured: PIECEWISE, FULL, FULL_DECODE_ONLY, …")
    ] = "PIECEWISE",
    tokens: Annotated[
        int, typer.Option(min=0, help="Run the model too, for so many tokens, and count its calls.")
    ] = 0,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    dump: DumpFolder = None,
    as_json: AsJson = False,
) -> None:
    """Capture a folder's model for some batch sizes; list how each batch size runs and what the graphs take.

    With --tokens the model is then run as `piecework run` does, and its calls are counted by what served them, and why.
    """
    from piecework.runtime import bundle
    from piecework.runtime.batch.coverage import Coverage, coverage_json
    from piecework.runtime.batch.mode import CUDAGraphMode
    from piecework.runtime.graphs.memory.addresses import AddressPolicy
    from piecework.runtime.graphs.serve.report import calls_json, calls_text

    chosen = parse_sizes(sizes)
    if not chosen:
        raise UsageError(
            "there is no batch size to capture", where="--sizes", hint="write them like 1,2,4"
        )
    CUDAGraphMode.parse(mode)
    AddressPolicy.parse(policy)
    out = console(quiet=as_json)
    manifest = bundle.read_manifest(directory)
    config = configuration(config_file, overrides, dump=dump, base=manifest.config)
    loaded = reload_model(directory, manifest)
    context = loaded.dry_context()
    stitched = warm_or_compiled(directory, manifest, loaded, config, out)
    with step(out, "Capturing"):
        stitched.capture(
            chosen,
            mode=mode,
            memory_budget=budget,
            progress=False,
            address_policy=policy,
            context_for=context,
            pad=None if context is None else True,  # what is served by requests is padded
        )
    if tokens:
        with step(out, "Running"):
            loaded.run(tokens, stitched)
    rows, memory = stitched.coverage(maximum), stitched.memory_report()
    calls = stitched.call_report()
    if as_json:
        said = {"coverage": coverage_json(rows), "calls": calls_json(calls)}
        print(json.dumps({**said, "memory": memory.as_json()}))
        return
    out.print(str(Coverage(rows)), markup=False, highlight=False, soft_wrap=True)
    if tokens:
        out.print(calls_text(calls), markup=False, highlight=False, soft_wrap=True)
    out.print(str(memory), markup=False, highlight=False, soft_wrap=True)


def parse_sizes(text: str, option: str = "--sizes") -> list[int]:
    """The numbers of an option that takes batch sizes.

    Raises:
        UsageError: it is something else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(
            f"{text!r} is no list of batch sizes",
            where=option,
            hint="write positive whole numbers, like 1,2,4,8",
        )
    return [int(part) for part in parts]
