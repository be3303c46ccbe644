"""``piecework compile``, ``show`` and ``run``: in, a model or a folder; out, a folder, its contents, or a run of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from piecework.cli.console import DIFFERS, console, show_source, step, typed_errors

if TYPE_CHECKING:
    from rich.console import Console

    from piecework.integrations.loading import LoadedModel
    from piecework.runtime.bundle import Manifest

T = TypeVar("T")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local Hugging Face folder, a config.json (random weights), or module:factory.",
    ),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by compile.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def compile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    backend: Annotated[str, typer.Option(help="Piece compiler: inductor or eager.")] = "inductor",
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL piecewise and write its source, graph and report to a folder."""
    with typed_errors():
        from piecework.integrations.loading import load_model
        from piecework.runtime import bundle
        from piecework.runtime.config import CompilationConfig

        out = console()
        bundle.check_output(output)
        config = CompilationConfig(backend=backend)
        loaded = _step(out, as_json, f"Loading {model}", lambda: load_model(model, seed=seed))
        stitched = _step(out, as_json, f"Compiling with {backend}", lambda: loaded.stitch(config))
        manifest = bundle.save(
            output,
            stitched,
            model=model,
            seed=seed,
            config=config,
            config_text=loaded.config_text if not Path(model).is_dir() else None,
        )
        if as_json:
            print(json.dumps(asdict(manifest)))
            return
        out.print(manifest.report, markup=False)
        out.print(f"source: {output / bundle.SOURCE}", markup=False)


def show(directory: FolderArgument, as_json: AsJson = False) -> None:
    """Show the source and the report in a folder."""
    with typed_errors():
        from piecework.runtime import bundle

        manifest = bundle.read_manifest(directory)
        code = bundle.read_source(directory, manifest)
        if as_json:
            print(json.dumps({**asdict(manifest), "source": code}))
            return
        out = console()
        show_source(out, code)
        out.print(manifest.report, markup=False)
        out.print(f"model: {manifest.model}, torch {manifest.torch}", markup=False)


def run(
    directory: FolderArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate (causal LM).")] = 32,
    as_json: AsJson = False,
) -> None:
    """Compile a folder's model again, check that its source is the one in the folder, run it and compare with eager.

    Exit code 1 if the source or the results differ.
    """
    with typed_errors():
        from piecework.integrations.comparing import compare, run_model
        from piecework.runtime import bundle
        from piecework.runtime.config import CompilationConfig

        out = console()
        manifest = bundle.read_manifest(directory)
        code = bundle.read_source(directory, manifest)
        config = CompilationConfig(**manifest.config)
        loaded = _reload(directory, manifest)
        reference = _step(out, as_json, "Running eagerly", lambda: run_model(loaded, tokens))
        stitched = _step(out, as_json, "Compiling", lambda: loaded.stitch(config))
        ours = _step(out, as_json, "Running", lambda: run_model(loaded, tokens, stitched))
        result = compare(reference, ours)
        report = {
            "same_source": stitched.source.code == code,
            "tokens": None if ours.tokens is None else ours.tokens.tolist(),
            "tokens_equal": result.tokens_equal,
            "relative_difference": result.difference,
            "agree": result.agree,
        }
        if as_json:
            print(json.dumps(report))
        else:
            for key, value in report.items():
                out.print(f"{key.replace('_', ' ')}: {value}", markup=False)
    if not (report["same_source"] and result.agree):
        raise typer.Exit(DIFFERS)


def _step(out: Console, quiet: bool, text: str, work: Callable[[], T]) -> T:
    if quiet:
        return work()
    with step(out, text):
        return work()


def _reload(directory: Path, manifest: Manifest) -> LoadedModel:
    """The model that a folder was made from; a copied config is read from the folder."""
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle

    copied = manifest.model == bundle.MODEL_CONFIG
    return load_model(
        str(directory / manifest.model) if copied else manifest.model, seed=manifest.seed
    )
