"""What a graph calls, and what the schemas of operators say of overloads, writes and results."""

from collections.abc import Iterator

import torch
import torch.fx


def every_node(graph: torch.nn.Module) -> Iterator[torch.fx.Node]:
    """The nodes of a graph and of the graphs in it."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from module.graph.nodes


def overloads_of(target: object) -> tuple[torch._ops.OpOverload, ...]:
    """The overloads of which a call of ``target`` runs one; none for what is no operator."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        names = target.overloads()  # type: ignore[no-untyped-call]
        return tuple(getattr(target, name) for name in names)
    return (target,) if isinstance(target, torch._ops.OpOverload) else ()


def writes_to(argument: torch._C.Argument) -> bool:
    """Whether an operator's schema says that it writes to this argument."""
    return argument.alias_info is not None and argument.alias_info.is_write


def shows_nothing(target: object) -> bool:
    """Whether ``target`` is an operator whose schema names neither a result nor a write."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.returns and not any(map(writes_to, target._schema.arguments))
