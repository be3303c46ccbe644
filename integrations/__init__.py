"""Model libraries on top of the runtime. In: models of other libraries. Out: the same models, stitched.

Each integration is a module of its own and is imported only when it is used.
"""

from __future__ import annotations

from importlib import import_module

_INTEGRATIONS = ("transformers",)


def __getattr__(name: str) -> object:
    if name in _INTEGRATIONS:
        return import_module(f"piecework.integrations.{name}")
    raise AttributeError(f"module 'piecework.integrations' has no attribute {name!r}")
