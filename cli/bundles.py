"""``piecework compile``, ``show`` and ``run``: in, a model or a folder; out, a folder, its contents, or a run of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piecework.cli.console import DIFFERS, compile_step, console, show_source, step
from piecework.cli.options import AsJson, Backend, ConfigFile, DumpFolder, Overrides, configuration
from piecework.errors import ArtifactError, EmitError, UsageError
from piecework.integrations.loading import require_model

if TYPE_CHECKING:
    from rich.console import Console

    from piecework.integrations.protocol import LoadedModel
    from piecework.runtime.bundle import Manifest
    from piecework.runtime.config.compilation import CompilationConfig
    from piecework.runtime.stitched import StitchedModule

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local Hugging Face folder, a config.json (random weights), or module:factory.",
    ),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by compile.")]


def compile_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new or empty folder.")],
    backend: Backend = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    dump: DumpFolder = None,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compile MODEL piecewise and write its source, graph, report and, where it can be saved, what was compiled to a folder."""
    require_model(model)
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle

    out = console(quiet=as_json)
    bundle.check_output(output)
    config = configuration(config_file, overrides, backend=backend, dump=dump)
    if dump is not None and output.absolute() in (dump.absolute(), *dump.absolute().parents):
        raise UsageError("--dump names the folder of -o", hint="name another one for the stages")
    with step(out, f"Loading {model}"):
        loaded = load_model(model, seed=seed)
    with compile_step(out, f"Compiling with {config.backend}"):
        stitched = loaded.stitch(config)
    manifest = bundle.save(
        output,
        stitched,
        model=model,
        seed=seed,
        config=config,
        config_text=loaded.config_text if not Path(model).is_dir() else None,
    )
    try:
        loaded.save(stitched, output / bundle.ARTIFACT)
    except ArtifactError as error:
        out.print(f"run will compile again: {error}", markup=False)
    if as_json:
        print(json.dumps(asdict(manifest)))
        return
    out.print(manifest.report, markup=False)
    out.print(f"source: {output / bundle.SOURCE}", markup=False)


def show(directory: FolderArgument, as_json: AsJson = False) -> None:
    """Show the source and the report in a folder; of a compile cache, such as an engine's, the source of each model in it."""
    from piecework.runtime import bundle

    out = console()
    cached = sorted(
        directory.rglob("rank_*_*/*/stitched.py"), key=lambda each: each.stat().st_mtime
    )
    if cached and as_json:
        print(json.dumps({str(path): path.read_text() for path in cached}))
        return
    for path in cached:
        show_source(out, path.read_text())
        out.print(f"source: {path}", markup=False)
    if cached:
        return
    manifest = bundle.read_manifest(directory)
    code = bundle.read_source(directory, manifest)
    if as_json:
        print(json.dumps({**asdict(manifest), "source": code}))
        return
    show_source(out, code)
    out.print(manifest.report, markup=False)
    out.print(f"model: {manifest.model}, torch {manifest.torch}", markup=False)


def run(
    directory: FolderArgument,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate (causal LM).")] = 32,
    edited: Annotated[
        bool, typer.Option("--edited", help="Run the folder's stitched.py as a person edited it.")
    ] = False,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    dump: DumpFolder = None,
    as_json: AsJson = False,
) -> None:
    """Load what was compiled, or compile the model again, check that its source is the one in the folder, run it and compare with eager.

    With --edited the folder's source runs in place of the generated one, once it keeps the contract; how it differs is
    said first. With other settings than the folder was made with (--config, -O, --dump) the model is compiled again. Exit code 1 if the
    source (without --edited) or the results differ.
    """
    from piecework.integrations.protocol import compare
    from piecework.runtime import bundle

    out = console(quiet=as_json)
    manifest = bundle.read_manifest(directory)
    code = bundle.read_source(directory, manifest, edited=edited)
    config = configuration(config_file, overrides, dump=dump, base=manifest.config)
    loaded = reload_model(directory, manifest)
    with step(out, "Running eagerly"):
        reference = loaded.run(tokens)
    stitched = warm_or_compiled(directory, manifest, loaded, config, out)
    generated = stitched.source.code
    changes = _use_edited(stitched, code) if edited else None
    if changes is not None:
        out.print(*changes["lines"], sep="\n", markup=False)
    with step(out, "Running"):
        ours = loaded.run(tokens, stitched)
    result = compare(reference, ours)
    report = {
        "same_source": generated == code,
        "edited": changes,
        "tokens": None if ours.tokens is None else ours.tokens.tolist(),
        "tokens_equal": None if ours.tokens is None else result.tokens_equal,
        "relative_difference": result.difference,
        "agree": result.agree,
    }
    if as_json:
        print(json.dumps(report))
    else:
        if not edited:
            otherwise = manifest.made_otherwise(config)
            why = ": the folder was made with other settings" if otherwise else ""
            same = report["same_source"]
            out.print(f"source {'as in the folder' if same else f'DIFFERENT{why}'}")
        if ours.tokens is not None:
            out.print(f"tokens: {' '.join(map(str, ours.tokens.tolist()))}")
        out.print(result.text(ours), markup=False)
    if not ((edited or report["same_source"]) and result.agree):
        raise typer.Exit(DIFFERS)


def verify(directory: FolderArgument, as_json: AsJson = False) -> None:
    """Capture a folder's model again, prove that the folder's source means its graph, and compare
    what the pieces compute with what the source says of them; nothing is compiled.

    Exit code 1 if something is wrong; the difference is named.
    """
    from piecework.codegen.stitch.source import verify as prove
    from piecework.golden.outline import read_tables
    from piecework.runtime import bundle
    from piecework.runtime.config.compilation import CompilationConfig
    from piecework.runtime.pieces.report import counted

    out = console(quiet=as_json)
    manifest = bundle.read_manifest(directory)
    code = bundle.read_source(directory, manifest, edited=True)
    config = CompilationConfig(**{**manifest.config, "backend": "eager"})
    loaded = reload_model(directory, manifest)
    with step(out, "Capturing"):
        stitched = loaded.stitch(config)
    try:
        proof = prove(stitched.source, stitched.split_gm, edited=code)
    except EmitError as error:
        report = {"proved": False, "difference": str(error)}
    else:
        report = {"proved": True, "events": proof.events, "statements": proof.statements}
    known, now = (read_tables(text.splitlines()).digests for text in (code, stitched.source.code))
    changed = [name for name in now if known.get(name, now[name]) != now[name]]
    report |= {"changed_pieces": changed, "unknown_pieces": [n for n in now if n not in known]}
    if as_json:
        print(json.dumps(report))
    else:
        if report["proved"]:
            calls = counted(proof.events, "call")
            out.print(f"proved: {calls} in {counted(proof.statements, 'statement')}")
        else:
            out.print(f"not proved: {report['difference']}", markup=False)
        if changed:
            out.print(f"the model computes something else now in {', '.join(changed)}")
        if report["unknown_pieces"]:
            out.print("what pieces computed can't be told: the source has no digests of them")
    if changed or not report["proved"]:
        raise typer.Exit(DIFFERS)


def reload_model(directory: Path, manifest: Manifest) -> LoadedModel:
    """The model that a folder was made from; a copied config is read from the folder."""
    from piecework.integrations.loading import load_model
    from piecework.runtime import bundle

    copied = manifest.model == bundle.MODEL_CONFIG
    return load_model(
        str(directory / manifest.model) if copied else manifest.model, seed=manifest.seed
    )


def warm_or_compiled(
    directory: Path,
    manifest: Manifest,
    loaded: LoadedModel,
    config: CompilationConfig,
    out: Console,
) -> StitchedModule:
    """The model stitched by the folder's artifact, or compiled again where there is none that fits or other settings are wanted, which is said."""
    from piecework.runtime import bundle

    if manifest.made_otherwise(config):
        why = "other settings"
    elif not (directory / bundle.ARTIFACT).is_file():
        why = "the folder has no artifact"
    else:
        try:
            return loaded.warm(directory / bundle.ARTIFACT)
        except ArtifactError as error:
            why = str(error)
    out.print(f"compiling again: {why}", markup=False)
    with compile_step(out, "Compiling"):
        return loaded.stitch(config)


def _use_edited(stitched: StitchedModule, code: str) -> dict[str, object]:
    """Put the edited text in place; returns how it differs from the generated one, as JSON and as lines."""
    from piecework.golden.review import difference

    generated = stitched.source.code
    edited = stitched.use_edited(code)
    meaning = "proved to mean the graph" if edited.proof else f"not the graph: {edited.difference}"
    changes = difference(generated, code, ("generated", "edited"), text=False)
    lines = [*(line.plain for line in changes), f"edited source: {meaning}"]
    return {"proved": edited.proof is not None, "difference": edited.difference, "lines": lines}
