"""What torch runs in a block."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class Ran(TorchDispatchMode):
    """Keeps each operator that runs in the block, ``unless`` something holds: its name and arguments."""

    def __init__(self, unless: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.unless = unless
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.unless():
            self.calls.append((func._schema.name.removeprefix("aten::"), args))
        return func(*args, **(kwargs or {}))
