"""What `piecework compile` leaves: a folder with a stitched module's source, graph and report.

A manifest is written last, so that a folder is whole or none. What was compiled lies in an artifact
in it, where it can be saved; else running it compiles again, and must give the same source.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from piecework.errors import ArtifactError, UsageError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule
from piecework.runtime.store.files import sha256, write_atomic

FORMAT = 1
MANIFEST, SOURCE, GRAPH, MODEL_CONFIG = "manifest.json", "stitched.py", "graph.py", "config.json"
ARTIFACT = "artifact"
"""Where ``StitchedModule.save`` writes, inside the folder."""
_AGAIN = "compile the model again, into a new folder"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a folder was made from; ``model`` is the MODEL argument, or the config file in the folder."""

    format: int
    model: str
    seed: int
    config: dict[str, object]
    torch: str
    source_sha256: str
    report: str

    def made_otherwise(self, config: CompilationConfig) -> bool:
        """Whether another configuration than ``config`` made what lies in the folder."""
        return json.loads(config.model_dump_json()) != self.config


def check_output(directory: Path) -> None:
    """Raise `UsageError` unless ``directory`` is empty and writable, or can be created."""
    if directory.is_dir() and any(directory.iterdir()):
        hint = "give a new folder, or remove it first"
        raise UsageError(f"folder {str(directory)!r} is not empty", hint=hint)
    if not directory.absolute().parent.is_dir():
        missing = repr(str(directory.absolute().parent))
        raise UsageError(f"there is no folder {missing} to write into", hint="make it first")
    require_writable(directory)


def require_writable(directory: Path) -> None:
    """Raise `UsageError` unless ``directory`` is, or can be made, a folder to write into."""
    places = (directory.absolute(), *directory.absolute().parents)
    there = next(each for each in places if each.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "it is not permitted" if there.is_dir() else f"{str(there)!r} is a file"
        raise UsageError(f"can't write folder {str(directory)!r}: {why}", hint="name another one")


def save(
    directory: Path,
    stitched: StitchedModule,
    *,
    model: str,
    seed: int,
    config: CompilationConfig,
    config_text: str | None = None,
) -> Manifest:
    """Write the folder; raises `UsageError` if it is not empty or can't be written."""
    check_output(directory)
    code = stitched.source.code
    manifest = Manifest(
        format=FORMAT,
        model=MODEL_CONFIG if config_text is not None else model,
        seed=seed,
        config=json.loads(config.model_dump_json()),
        torch=torch.__version__,
        source_sha256=sha256(code.encode()),
        report=str(stitched.report()),
    )
    files = {
        SOURCE: code,
        GRAPH: stitched.split_gm.print_readable(print_output=False),
        **({} if config_text is None else {MODEL_CONFIG: config_text}),
        MANIFEST: json.dumps(asdict(manifest), indent=2) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(directory / name, text.encode(), 0o644)
    except OSError as error:
        raise UsageError(f"can't write folder {str(directory)!r}: {error.strerror}") from error
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """A folder's manifest; `UsageError` for none, `ArtifactError` if it is damaged or not ours."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"{str(directory)!r} is not a folder made by piecework compile",
            hint=f"it has no {MANIFEST}; piecework compile MODEL -o DIR makes such a folder",
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        if manifest.format != FORMAT:
            raise ValueError(f"it has format {manifest.format!r}")
    except (OSError, ValueError, TypeError) as error:
        why = f"the manifest is damaged, or of another version: {error}"
        raise ArtifactError(why, where=path.name, hint=_AGAIN) from error
    return manifest


def read_source(directory: Path, manifest: Manifest, *, edited: bool = False) -> str:
    """The source in the folder; `ArtifactError` if it changed, unless it is said to be ``edited``."""
    path = directory / SOURCE
    try:
        code = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"can't read the source: {error}"
        raise ArtifactError(why, where=path.name, hint=_AGAIN) from error
    if not edited and sha256(code.encode()) != manifest.source_sha256:
        raise ArtifactError(
            "the source is not the one that was generated",
            where=path.name,
            hint="run it as edited with --edited, or compile the model again",
        )
    return code
