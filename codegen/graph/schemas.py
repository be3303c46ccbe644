"""What an operator declares. In: an operator of torch. Out: what its schema says of writes and results."""

from __future__ import annotations

import torch


def writes_to(argument: torch._C.Argument) -> bool:
    """Whether an operator's schema says that it writes to this argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def shows_nothing(target: object) -> bool:
    """Whether ``target`` is an operator whose schema names neither a result nor a write, so that what it is called for can't be told."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.returns and not any(map(writes_to, target._schema.arguments))
