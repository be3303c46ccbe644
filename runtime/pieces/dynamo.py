"""What Dynamo calls for a configuration, in each mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.groups import CompilationMode, RuntimeConfig
from piecework.runtime.config.qualified_name import import_qualified
from piecework.runtime.pieces.backend import PieceworkBackend
from piecework.runtime.splitting_op import registry


def backend_of(
    config: CompilationConfig,
    runtime: RuntimeConfig | None = None,
    *,
    prefix: str = "",
    is_encoder: bool = False,
) -> str | Callable[..., Any]:
    """The backend of ``config``; see ``CompilationConfig.init_backend``."""
    if config.mode is CompilationMode.NONE:
        raise ConfigError(
            "mode NONE compiles nothing, so it has no backend",
            where="mode",
            hint="choose PIECEWORK_COMPILE, or run the model as it is",
        )
    if config.mode is CompilationMode.PIECEWORK_COMPILE:
        if runtime is not None:
            config = config.resolve(runtime, registered_splitting_ops=registry.names())
        name = prefix or ("" if runtime is None else runtime.model_name)
        return PieceworkBackend(config, name, is_encoder, runtime_config=runtime)
    if config.backend in torch.compiler.list_backends(exclude_tags=()):
        return config.backend
    if config.backend.isidentifier():
        raise ConfigError(
            f"torch has no backend {config.backend!r}",
            where="backend",
            hint="use one of " + ", ".join(torch.compiler.list_backends()),
        )
    return import_qualified(config.backend, where="backend")
