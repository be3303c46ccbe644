"""The modules that Dynamo remembers having imported."""

from __future__ import annotations


def forget_imports() -> None:
    """Let Dynamo look modules up again, which it does once a process and name."""
    from torch._dynamo import symbolic_convert

    clear = getattr(getattr(symbolic_convert, "_import_module", None), "cache_clear", None)
    if clear is not None:
        clear()
