"""Models named on the command line. In: a folder, a file such as ``config.json``, or ``module:factory``. Out: a `LoadedModel`, ready to be stitched.

It knows no kind of model: the integrations that there are say which of them a path is.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import piecework.integrations
from piecework.errors import UsageError
from piecework.integrations.named import require_model
from piecework.integrations.plain import from_factory
from piecework.integrations.protocol import Integration, LoadedModel


def integrations() -> Iterator[Integration]:
    """Every integration: packages beside this file, then those of other distributions."""
    for each in pkgutil.iter_modules(piecework.integrations.__path__):
        if each.ispkg:
            module = importlib.import_module(f"piecework.integrations.{each.name}.integration")
            yield module.INTEGRATION
    for point in entry_points(group="piecework.integrations"):
        yield point.load()


def load_model(spec: str, *, seed: int = 0) -> LoadedModel:
    """Load what ``spec`` names; nothing is downloaded.

    Args:
        spec: a local model folder (weights are loaded if there are any), a ``config.json`` (random weights), or ``module:factory``
            returning ``(module, example_inputs)``.
        seed: of random weights and of the example prompt.

    Raises:
        UsageError: there is no such thing, or it can't be loaded; says which.
    """
    require_model(spec)
    path = Path(spec)
    if not path.exists():
        return from_factory(spec, seed)
    for each in integrations():
        loaded = each.load(path, seed)
        if loaded is not None:
            return loaded
    raise UsageError(
        (
            f"folder {str(path)!r} has no config.json"
            if path.is_dir()
            else f"no model is described by {str(path)!r}"
        ),
        hint="give a folder that save_pretrained wrote, or module:factory for a model of your own",
    )
