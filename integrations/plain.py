"""Models that come from a factory. In: ``module:factory``, which returns ``(module, example_inputs)``. Out: a `LoadedModel` that is called once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from piecework.errors import UsageError
from piecework.integrations.protocol import Call, LoadedModel, Outcome, first_line
from piecework.runtime.compile import compile as compile_model
from piecework.runtime.compile import load
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.stitched import StitchedModule


class Plain:
    """An ``nn.Module`` or function with example calls; see `piecework.integrations.protocol.Integration`."""

    def load(self, path: Path, seed: int) -> None:
        return None  # no file says how to call such a model

    def stitch(self, loaded: LoadedModel, config: CompilationConfig) -> StitchedModule:
        return compile_model(
            loaded.module, loaded.example_args, loaded.example_kwargs, config=config
        )

    def save(self, loaded: LoadedModel, stitched: StitchedModule, artifact: Path) -> None:
        stitched.save(artifact)

    def modules(self, loaded: LoadedModel, stitched: StitchedModule) -> Sequence[StitchedModule]:
        return (stitched,)

    def warm(self, loaded: LoadedModel, artifact: Path) -> StitchedModule:
        return load(artifact, loaded.module)

    def run(
        self, loaded: LoadedModel, new_tokens: int, stitched: StitchedModule | None = None
    ) -> Outcome:
        model = stitched or loaded.module
        calls = ((loaded.example_args, loaded.example_kwargs), *loaded.more_calls)
        result = [model(*args, **kwargs) for args, kwargs in calls]
        values = tuple(x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
        return Outcome(None, values)

    def dry_context(self) -> None:
        return None


def loaded_from(
    model: torch.nn.Module, calls: Sequence[Call], integration: Plain, config_text: str
) -> LoadedModel:
    """A model that is traced with the first of ``calls``, whose tensors have a row of the batch in each row or do not go by it.

    Two tensors have equal first sizes there only if both have the batch's.
    """
    (args, kwargs), *more = calls
    rows = {k: v.size(0) for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.dim()}
    first = next(iter(rows.values()))
    return LoadedModel(
        type(model).__name__,
        model,
        args,
        integration,
        config_text,
        kwargs,
        more,
        {f"{name}.0": "batch" for name, size in list(rows.items())[1:] if size == first},
    )


def from_factory(spec: str, seed: int) -> LoadedModel:
    """What ``module:factory`` makes.

    Raises:
        UsageError: there is no such factory, or it returns something else.
    """
    module_name, _, factory_name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module is beside them
    torch.manual_seed(seed)
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        made = factory()
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
    return LoadedModel(type(module).__name__, module, args, Plain())


def _no_model(spec: str, module_name: str, error: BaseException) -> UsageError:
    """What is wrong with a factory: it is not there, or its code fails, which its own traceback tells."""
    inner = traceback.extract_tb(error.__traceback__)[1:]  # from where the user's code begins
    while inner and inner[0].filename.startswith(("<frozen importlib", importlib.__file__)):
        inner = inner[1:]
    missing = isinstance(error, ModuleNotFoundError) and error.name is not None
    if not inner and (missing or isinstance(error, (AttributeError, ValueError))):
        return UsageError(
            f"there is no factory {spec!r}: {first_line(error)}",
            hint="write module:function, of a module in the working directory or an installed one",
        )
    failure = UsageError(
        f"the factory {spec!r} fails with {type(error).__name__}: {first_line(error)}",
        where=(
            f"{os.path.basename(inner[-1].filename)}:{inner[-1].lineno}" if inner else module_name
        ),
    )
    shown = [*traceback.format_list(inner), *traceback.format_exception_only(error)]
    failure.add_note("".join(["Traceback (most recent call last):\n", *shown]).rstrip())
    return failure
