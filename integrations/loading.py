"""Models named on the command line: by a folder, a ``config.json``, or ``module:factory``.

Integrations say which of them a path is. Nothing heavy is imported before a name was looked at.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from piecework.errors import UsageError

if TYPE_CHECKING:
    from piecework.integrations.protocol import LoadedModel


def require_model(spec: str) -> None:
    """Raise `UsageError` for a name that no model can have."""
    file, _, factory = spec.partition(":")
    if file.endswith(".py") or (factory and os.sep in file):
        module = file.removesuffix(".py").replace(os.sep, ".").strip(".")
        raise UsageError(
            f"{spec!r} names a file, and a factory is named by its module",
            hint=f"write {module}:{factory or 'factory'}, where factory() returns (module, example_inputs)",
        )
    if not Path(spec).exists() and (":" not in spec or any(s in spec for s in (os.sep, "\\"))):
        why = f"there is no model at {spec!r}"
        raise UsageError(why, hint="give a local model folder, a config.json, or module:factory")


def _integrations() -> Iterator[Callable[[Path, int], LoadedModel | None]]:
    """Every integration's ``load``, those of other distributions first."""
    import piecework.integrations

    for point in entry_points(group="piecework.integrations"):
        yield point.load()
    for each in pkgutil.iter_modules(piecework.integrations.__path__):
        if each.ispkg:
            yield importlib.import_module(f"piecework.integrations.{each.name}.integration").load


def load_model(spec: str, *, seed: int = 0) -> LoadedModel:
    """Load what ``spec`` names; nothing is downloaded."""
    require_model(spec)
    path = Path(spec)
    if not path.exists():
        return _from_factory(spec, seed)
    for load in _integrations():
        loaded = load(path, seed)
        if loaded is not None:
            return loaded
    what = f"folder {str(path)!r} has no config.json"
    raise UsageError(
        what if path.is_dir() else f"no model is described by {str(path)!r}",
        hint="give a folder that save_pretrained wrote, or module:factory for a model of your own",
    )


def _from_factory(spec: str, seed: int) -> LoadedModel:
    import torch

    from piecework.integrations.protocol import LoadedModel

    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module is beside them
    torch.manual_seed(seed)
    try:
        made = getattr(importlib.import_module(module_name), factory_name)()
    except (Exception, SystemExit) as error:
        raise _no_model(spec, module_name, error) from error
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        kind = f"{type(made).__name__} of {len(made)}" if isinstance(made, tuple) else None
        raise UsageError(
            f"factory {spec!r} must return (module, example_inputs); it returned a {kind or type(made).__name__}",
            hint="example_inputs is a tuple of positional arguments",
        )
    module, example = made
    args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    return LoadedModel(type(module).__name__, module, args)


def _no_model(spec: str, module_name: str, error: BaseException) -> UsageError:
    """What is wrong with a factory: it is not there, or its code fails."""
    from piecework.integrations.protocol import first_line

    inner = traceback.extract_tb(error.__traceback__)[1:]  # from where the user's code begins
    while inner and inner[0].filename.startswith(("<frozen importlib", importlib.__file__)):
        inner = inner[1:]
    if not inner and isinstance(error, (ModuleNotFoundError, AttributeError, ValueError)):
        return UsageError(
            f"there is no factory {spec!r}: {first_line(error)}",
            hint="write module:function, of a module in the working directory or an installed one",
        )
    where = f"{os.path.basename(inner[-1].filename)}:{inner[-1].lineno}" if inner else module_name
    failure = UsageError(
        f"the factory {spec!r} fails with {type(error).__name__}: {first_line(error)}", where=where
    )
    shown = [*traceback.format_list(inner), *traceback.format_exception_only(error)]
    failure.add_note("".join(["Traceback (most recent call last):\n", *shown]).rstrip())
    return failure
