"""How the command line speaks. In: what a command has to say. Out: text, colour and progress on a terminal, plain lines elsewhere.

Errors of piecework become one message and exit code 2; other exceptions are defects and keep their traceback.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer
from rich.console import Console
from rich.status import Status
from rich.syntax import Syntax
from typer.core import TyperGroup

from piecework.errors import PieceworkError

DONE, DIFFERS, MISUSE = 0, 1, 2


def console(*, quiet: bool = False) -> Console:
    """A console on standard output, or one that prints nothing; it wraps nothing where the output is not a terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), quiet=quiet)


class Commands(TyperGroup):
    """Commands that print a `PieceworkError` and exit with code 2."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except PieceworkError as error:
            err = Console(stderr=True, highlight=False, soft_wrap=True)
            for note in getattr(error, "__notes__", ()):
                err.print(note, markup=False)
            err.print(f"{type(error).__name__}: {error}", style="red", markup=False)
            raise typer.Exit(MISUSE) from error


def commands(name: str, text: str | None = None) -> typer.Typer:
    """Commands under one name."""
    return typer.Typer(
        name=name,
        help=text,
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def print_json(data: object) -> None:
    """Print for a program."""
    print(json.dumps(data, indent=2))


def short_warnings() -> None:
    """Show what is warned of on the command's own behalf without the line of the script that called, which is no user's."""
    usual, script = warnings.formatwarning, getattr(sys.modules["__main__"], "__file__", None)

    def shown(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if filename == script:
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = shown


@contextmanager
def step(out: Console, text: str) -> Iterator[Status | None]:
    """Announce a step: a spinner on a terminal, one line elsewhere."""
    if out.is_terminal:
        with out.status(text) as spinner:
            yield spinner
    else:
        out.print(text, markup=False)
        yield None


@contextmanager
def compile_step(out: Console, text: str) -> Iterator[None]:
    """Announce a step that compiles: a spinner while the model is traced, then, on standard error, a bar of pieces as they are done."""
    with step(out, text) as spinner, nullcontext() if out.quiet else compile_progress(spinner):
        yield


@contextmanager
def compile_progress(spinner: Status | None = None) -> Iterator[None]:
    """Show a bar of compiled pieces on standard error if that is a terminal, and no ``spinner`` meanwhile; nothing elsewhere."""
    from piecework.runtime.observe.progress import CompileProgress, show_progress

    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield
        return

    class Alone(CompileProgress):
        def started(self, total: int, **fields: str) -> None:
            if spinner is not None:
                spinner.stop()
            super().started(total)

        def ended(self) -> None:
            super().ended()
            if spinner is not None:
                spinner.start()

    with show_progress(Alone(screen)):
        yield


def show_source(out: Console, code: str) -> None:
    """Print Python source, highlighted on a terminal."""
    if out.is_terminal:
        out.print(Syntax(code, "python", line_numbers=True, word_wrap=True))
    else:
        print(code)
