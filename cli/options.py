"""Options that say how a model is compiled. In: a file, ``-O`` options, a folder for dumps. Out: the `CompilationConfig` that they mean.

Everything is checked before any work starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from piecework.runtime.config.compilation import CompilationConfig

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A .json or .toml file of CompilationConfig fields."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-O",
        metavar=".FIELD=VALUE",
        help="Set a field: -O.mode=0, -O3, -O.stitching_config.emit_del=false.",
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(help="Piece compiler: inductor, eager or module:Class.", show_default="inductor"),
]
DumpFolder = Annotated[
    Path | None,
    typer.Option(
        "--dump", metavar="DIR", help="Write every stage of the compilation there, with an index."
    ),
]


def configuration(
    file: Path | None,
    overrides: Sequence[str] | None,
    *,
    backend: str | None = None,
    dump: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> CompilationConfig:
    """The configuration of a command, whose compiler is known to exist.

    Args:
        base: fields that stand below all others.

    Raises:
        ConfigError: a field is wrong, the file can't be read, or there is no such compiler.
        UsageError: ``dump`` can't be written to.
    """
    from piecework.runtime.bundle import require_writable
    from piecework.runtime.compilers import make_compiler

    if dump is not None:
        require_writable(dump)
    config = read_configuration(file, overrides, base)
    changes = {"backend": backend, "debug_dump_path": dump}
    config = config.replace(**{name: value for name, value in changes.items() if value is not None})
    make_compiler(config)
    return config


def read_configuration(
    file: Path | None, overrides: Sequence[str] | None, base: Mapping[str, Any] | None = None
) -> CompilationConfig:
    """``base``, with the fields of ``file`` over it, and ``-O`` options over both."""
    from piecework.runtime.config.compilation import CompilationConfig
    from piecework.runtime.config.text import merge, parse_overrides, read_data

    fields: Mapping[str, Any] = dict(base or {})
    if file is not None:
        fields = merge(fields, read_data(file))
    above = parse_overrides(CompilationConfig, overrides or ())
    return CompilationConfig.model_validate(merge(fields, above))
