"""The command line. In: arguments. Out: text, JSON and an exit code: 0 done, 1 found a difference, 2 misuse.

Commands parse, call the library and print; heavy modules are imported when a command runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from piecework import __version__
from piecework.cli.bench import bench
from piecework.cli.bundles import compile_command, run, show, verify
from piecework.cli.cache import cache_app
from piecework.cli.capture import coverage
from piecework.cli.config import config_app
from piecework.cli.console import commands, short_warnings
from piecework.cli.demo import demo
from piecework.cli.golden import golden_app
from piecework.cli.serve import serve
from piecework.cli.trace import trace

app = commands("piecework")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"piecework {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """A stitching compiler and runtime for PyTorch inference."""


app.command(epilog="Example: piecework demo")(demo)
app.command("compile", epilog="Example: piecework compile config.json -o out")(compile_command)
app.command(epilog="Example: piecework show out")(show)
app.command(epilog="Example: piecework run out --tokens 16")(run)
app.command(epilog="Example: piecework verify out")(verify)
app.command(
    epilog="Example: piecework bench stitching --out figures",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(bench)
app.command(epilog="Example: piecework coverage out --sizes 1,2,4,8")(coverage)
app.command(epilog="Example: piecework trace config.json -o trace.json")(trace)
app.command(epilog="Example: piecework serve path/to/model --artifact model.artifact")(serve)
app.add_typer(golden_app)
app.add_typer(cache_app)
app.add_typer(config_app)


def main() -> None:
    """Entry point of the ``piecework`` script."""
    short_warnings()
    app()
