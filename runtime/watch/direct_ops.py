"""Splitting ops called past the dispatcher, and whether it would still call the same functions.

An operator whose function is not known, or not alone in what it does, is left to the dispatcher.
"""

import functools
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from piecework.errors import SplitError
from piecework.runtime import torch_compat
from piecework.runtime.splitting_op import qualified_name, registry

Implementation = Callable[..., object]
#: How an operator's function is found, for every call to ask again: dictionaries are asked themselves.
LookUp = tuple[Callable[..., Implementation | None], tuple[object, ...]]


@dataclass(slots=True)
class DirectOps:
    """The operators that stitched code calls by their own functions."""

    implementations: dict[object, Implementation] = field(default_factory=dict)
    calls: dict[object, str] = field(default_factory=dict)  # → the device type that it is for
    _rows: list[tuple[LookUp, Implementation]] = field(default_factory=list)
    _tables: dict[str, str] = field(default_factory=dict)
    _kernels: Sized = field(default_factory=torch_compat.registered_kernels)
    _count: int = 0

    @classmethod
    def of(
        cls,
        calls: Iterable[tuple[object, str | None]],
        apart: Callable[[object], bool] = lambda _: True,
    ) -> Self:
        """Look up each (operator, device type of its tensors); unknown ones are left out.

        ``apart``: whether what one returns must be memory of its own; then each call is looked at.
        """
        found = cls()
        for target, device in calls:
            if device is not None and target not in found.implementations:
                found._add(target, device, apart)
        found._count = len(found._kernels)
        return found

    def _add(self, target: object, device: str, apart: Callable[[object], bool]) -> None:
        look_up = _look_up(target, device)
        found = None if look_up is None else look_up[0](*look_up[1])
        if look_up is None or found is None:
            return
        self.calls[target] = device
        known = registry.find(target)
        alone = known is not None or found is registry.function_of(target)
        function = found if alone else torch_compat.custom_op_function(found)
        overload: Any = target if known is None else known.overload
        if isinstance(overload, torch._ops.OpOverloadPacket):
            overload = overload.default
        name, looks = overload.name(), bool(overload._schema.returns) and apart(target)
        self.implementations[target] = _with_own_results(function, name) if looks else function
        self._rows.append((look_up, found))
        self._tables[name] = torch_compat.kernel_table(name)

    def unchanged(self) -> bool:
        """Whether each function is still the one that the dispatcher would reach.

        A kernel put in another's place under its very key is noticed with the next new kernel.
        """
        for (look_up, args), found in self._rows:
            if look_up(*args) is not found:
                return False
        if len(self._kernels) == self._count:
            return True
        # Some kernel of some operator was registered or removed.
        if any(torch_compat.kernel_table(name) != table for name, table in self._tables.items()):
            return False
        self._count = len(self._kernels)
        return True


def _with_own_results(function: Implementation, name: str) -> Implementation:
    """The function, refused where it hands back what it was given: pieces take results for new."""

    @functools.wraps(function)
    def called(*args: object, **kwargs: object) -> object:
        result = function(*args, **kwargs)
        if torch_compat.shares_memory(args, kwargs, result):
            why = f"splitting op {name} returned an argument, a view of one, or one result twice, and the model writes to it"
            raise SplitError(why, hint="return a clone()")
        return result

    return called


def _look_up(target: object, device: str) -> LookUp | None:
    op = registry.find(target)
    if op is not None:
        return op.by_device.get, (device, op.implementation)
    if registry.function_of(target) is not None:
        return registry.functions.get, (qualified_name(target),)
    if isinstance(target, torch._ops.OpOverload):
        return torch_compat.custom_op_kernel, (target._schema.name, device)
    return None
