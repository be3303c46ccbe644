"""``piecework verify`` and ``piecework golden diff`` on files of `torch.compiler.precompile`. In: paths. Out: text or JSON, and whether all is well."""

from __future__ import annotations

import json
from pathlib import Path

from rich.text import Text

from piecework.cli.console import console
from piecework.errors import ArtifactError, UsageError


def verify_file(path: Path, cache: Path | None, model: str | None, as_json: bool) -> bool:
    """Judge one file; whether nothing is wrong with it."""
    import torch

    from piecework.golden.precompiled.diff import changes
    from piecework.golden.precompiled.file import captured_now, judge, read_precompiled
    from piecework.integrations.loading import load_model
    from piecework.runtime.torch_compat import vector_bits

    found = read_precompiled(_text(path), str(path))
    kept = None if cache is None else _bytes(cache)
    loaded = None if model is None else load_model(model)
    module = None if loaded is None else loaded.module
    if module is not None and not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"{model} is no torch.nn.Module", hint="give the model that the file was made of"
        )
    result = judge(found, cache=kept, model=module, vector_bits=vector_bits())
    if loaded is not None and isinstance(module, torch.nn.Module) and not result.problems:
        now = captured_now(found, module, loaded.example_args, result)
        if now is not None:
            told = changes(found, now)
            result.problems.extend(f"stale: {each}" for each in told)
            if not told:
                result.facts.append("torch writes the same for the model now")
    if as_json:
        print(json.dumps(vars(result)))
    else:
        for title, lines in (
            ("", result.facts),
            ("WRONG ", result.problems),
            ("not told ", result.open),
        ):
            for line in lines:
                console().print(Text(f"{title}{line}"))
    return not result.problems


def diff_files(before: Path, after: Path, as_json: bool) -> bool | None:
    """Say what changed; whether the texts are the same, or None if these are no such files."""
    from piecework.golden.precompiled.diff import changes
    from piecework.golden.precompiled.file import is_precompiled, read_precompiled

    if not (before.is_file() and after.is_file()):
        return None
    texts = [_bytes(path).decode("utf-8", "replace") for path in (before, after)]
    if not all(map(is_precompiled, texts)):
        return None
    parsed = [
        read_precompiled(text, str(path)) for text, path in zip(texts, (before, after), strict=True)
    ]
    found, same = changes(*parsed), texts[0] == texts[1]
    if as_json:
        print(json.dumps({"same_text": same, "same_meaning": not found, "changes": found}))
    else:
        nothing = "the same text" if same else "the same meaning: comments or layout differ"
        for line in found or [nothing]:
            console().print(Text(line))
    return same


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"the file is no text: {error}", where=str(path)) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"can't be read: {error.strerror}", where=str(path)) from error
