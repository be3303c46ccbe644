"""Compilers of pieces behind one interface. In: a configuration. Out: the compiler that its ``backend`` names."""

from __future__ import annotations

import importlib

from piecework.errors import ConfigError
from piecework.runtime.compilers.eager import EagerAdaptor
from piecework.runtime.compilers.inductor import InductorStandaloneAdaptor
from piecework.runtime.compilers.interface import CompiledPiece, CompilerInterface
from piecework.runtime.config import CompilationConfig

__all__ = [
    "CompiledPiece",
    "CompilerInterface",
    "EagerAdaptor",
    "InductorStandaloneAdaptor",
    "make_compiler",
]

_BUILT_IN = {"eager": EagerAdaptor, "inductor": InductorStandaloneAdaptor}


def make_compiler(config: CompilationConfig) -> CompilerInterface:
    """The compiler that ``config.backend`` names: ``inductor``, ``eager``, or ``module:Class`` / ``module.Class``.

    Raises:
        ConfigError: there is no such compiler, or it lacks a method of `CompilerInterface`.
    """
    built_in = _BUILT_IN.get(config.backend)
    if built_in is not None:
        return built_in()
    module_name, _, class_name = config.backend.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"no compiler {config.backend!a}: {error}", where="backend", hint=_CHOICES
        ) from error
    if found is None:
        raise ConfigError(f"no compiler {config.backend!a}", where="backend", hint=_CHOICES)
    compiler = found()
    missing = [m for m in ("compile", "compute_hash") if not callable(getattr(compiler, m, None))]
    if missing:
        raise ConfigError(
            f"compiler {config.backend!a} has no method {', '.join(missing)}", where="backend"
        )
    return compiler


_CHOICES = f"use {', '.join(sorted(_BUILT_IN))} or a qualified name such as mypackage.MyCompiler"
