"""Processes that run one model together: their ranks, and the store that they share."""

from typing import Any

import torch

#: Operators of torch that wait for other processes; others only look at what these gave.
_COLLECTIVES = ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "c10d")
_ALONE = ("wait_tensor",)


def own_rank() -> int | None:
    """This process's rank; None where it runs alone, or on a stand-in for other processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if distributed.get_backend() == "fake":
        return None
    return int(distributed.get_rank())


def shared_store() -> Any:
    """The store that the processes found each other by."""
    return torch.distributed.PrefixStore(
        "piecework", torch.distributed.distributed_c10d._get_default_store()
    )


def ranks_of_group(name: str) -> tuple[int, ...]:
    """The ranks of a process group; raises where there is none of that name."""
    group = torch.distributed.distributed_c10d._resolve_process_group(name)
    return tuple(torch.distributed.get_process_group_ranks(group))


def collective_of(target: object) -> torch._ops.OpOverload | None:
    """The operator of torch that ``target`` calls, if it waits for other processes."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        return None
    waits = target.namespace in _COLLECTIVES and target._opname not in _ALONE
    return target if waits else None
