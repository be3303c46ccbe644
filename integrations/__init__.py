"""Models of other libraries, stitched; each integration is imported only when it is used."""

from __future__ import annotations

from importlib import import_module

_INTEGRATIONS = ("transformers",)


def __getattr__(name: str) -> object:
    if name in _INTEGRATIONS:
        return import_module(f"piecework.integrations.{name}")
    raise AttributeError(f"module 'piecework.integrations' has no attribute {name!r}")
