"""Models of other libraries, stitched; each integration is imported only when it is used."""

from __future__ import annotations

from importlib import import_module


def __getattr__(name: str) -> object:
    if name == "transformers":
        return import_module("piecework.integrations.transformers")
    raise AttributeError(f"module 'piecework.integrations' has no attribute {name!r}")
