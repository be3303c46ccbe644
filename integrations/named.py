"""What a name of a model on the command line can be. Looked at before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from piecework.errors import UsageError


def is_factory(spec: str) -> bool:
    """Whether ``spec``, a path to nothing, is of the form ``module:factory``."""
    return ":" in spec and not any(sep in spec for sep in (os.sep, "\\"))


def require_model(spec: str) -> None:
    """Refuse a name that no model can have.

    Raises:
        UsageError: it is a file with a factory behind it, or a path to nothing.
    """
    file, _, factory = spec.partition(":")
    if file.endswith(".py") or (factory and os.sep in file):
        module = file.removesuffix(".py").replace(os.sep, ".").strip(".")
        raise UsageError(
            f"{spec!r} names a file, and a factory is named by its module",
            hint=f"write {module}:{factory or 'factory'}, where factory() returns (module, example_inputs)",
        )
    if not Path(spec).exists() and not is_factory(spec):
        raise UsageError(
            f"there is no model at {spec!r}",
            hint="give a local model folder, a config.json, or module:factory",
        )
