"""``piecework config``: in, a file and options; out, the configuration that they mean, its schema, or what is wrong with it.

It never compiles anything, and it changes no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from piecework.cli.console import commands, print_json
from piecework.cli.options import AsJson, Overrides, read_configuration
from piecework.errors import ConfigError
from piecework.runtime.batch.ranges import Range
from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.text import (
    field_rows,
    json_schema,
    markdown_table,
    merge,
    parse_overrides,
    read_data,
    to_data,
    to_json,
    to_overrides,
    to_toml,
)

config_app = commands("config", "Show, describe and check configurations.")

FileArgument = Annotated[
    Path | None, typer.Argument(help="A .json or .toml file of CompilationConfig fields.")
]
RuntimeOverrides = Annotated[
    list[str] | None,
    typer.Option("-R", metavar=".FIELD=VALUE", help="Set a RuntimeConfig field, and resolve."),
]


@config_app.command(epilog="Example: piecework config show piecework.toml -O.cudagraph_mode=FULL")
def show(
    file: FileArgument = None,
    overrides: Overrides = None,
    runtime: RuntimeOverrides = None,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Settle open fields for the default RuntimeConfig.")
    ] = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="toml, json or options (for a command line).")
    ] = "toml",
    as_json: AsJson = False,
) -> None:
    """Print the configuration that a file and options mean, its ranges and its hash."""
    if form not in ("toml", "json", "options"):
        raise ConfigError(f"no format {form!r}", where="--format", hint="toml, json or options")
    config = read_configuration(file, overrides)
    limits = RuntimeConfig.model_validate(parse_overrides(RuntimeConfig, runtime or (), flag="-R"))
    used = limits if resolve or runtime else None
    config = config.resolve(limits) if used else config
    if as_json:
        print_json(_report(config, used))
    elif form == "json":
        typer.echo(to_json(config, only_changed=changed))
    elif form == "options":
        typer.echo("\n".join(to_overrides(config)))
    else:
        typer.echo(_comments(config, used) + to_toml(config, only_changed=changed), nl=False)


@config_app.command(epilog="Example: piecework config schema --json > piecework.schema.json")
def schema(
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Describe RuntimeConfig instead.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Describe every field: default, meaning, and whether it is part of the cache key."""
    model = RuntimeConfig if runtime else CompilationConfig
    if as_json:
        print_json(json_schema(model))
    elif markdown:
        typer.echo(markdown_table(model), nl=False)
    else:
        for row in field_rows(model):
            meaning = row.description.replace("`", "")
            typer.echo(f"{row.name} (default {row.default}; in cache key: {row.role}): {meaning}")


@config_app.command(epilog="Example: piecework config check piecework.toml -R.max_num_seqs=64")
def check(
    file: FileArgument = None,
    overrides: Overrides = None,
    runtime: RuntimeOverrides = None,
    as_json: AsJson = False,
) -> None:
    """Check a configuration, also against run-time limits; exit code 1 if something is wrong."""
    limits_data = parse_overrides(RuntimeConfig, runtime or (), flag="-R")
    changes = parse_overrides(CompilationConfig, overrides or ())
    if file is None and not changes:
        hint = "name a file, or give -O.field=value"
        raise ConfigError("there is nothing to check", hint=hint)
    if file is not None and not file.is_file():
        hint = "`piecework config show -O.field=value > piecework.toml` makes one"
        raise ConfigError("there is no such file", where=str(file), hint=hint)
    try:
        below = read_data(file) if file is not None else {}
        config = CompilationConfig.model_validate(merge(below, changes))
        limits = RuntimeConfig.model_validate(limits_data)
        config.resolve(limits)
    except ConfigError as error:
        if as_json:
            print_json({"valid": False, "problems": _problems(error)})
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json({"valid": True, "problems": []})
    else:
        typer.echo("The configuration is valid.")


def _report(config: CompilationConfig, limits: RuntimeConfig | None) -> dict[str, Any]:
    report: dict[str, Any] = {"config": to_data(config)}
    if limits is not None:
        report["runtime"] = to_data(limits)
        report["ranges"] = [[each.start, each.end] for each in _entries(config, limits)]
        report["hash"] = config.compute_hash()
    return report


def _comments(config: CompilationConfig, limits: RuntimeConfig | None) -> str:
    """What a resolved configuration leads to, as comments above its TOML."""
    if limits is None:
        return ""
    ranges = " ".join(map(str, _entries(config, limits)))
    sizes = config.cudagraph_capture_sizes or ()
    return (
        f"# hash {config.compute_hash()}\n# compiled for {ranges}\n"
        f"# captured sizes: {' '.join(map(str, sizes)) or 'none'}\n"
    )


def _entries(config: CompilationConfig, limits: RuntimeConfig) -> tuple[Range, ...]:
    return config.range_table(limits.max_num_batched_tokens).entries


def _problems(error: ConfigError) -> list[dict[str, str]]:
    if error.problems:
        return [{"field": each.field, "message": each.message} for each in error.problems]
    return [{"field": error.where or "", "message": error.message}]
