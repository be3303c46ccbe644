"""Operators that torch does not bring: what compiled code depends on of them."""

from __future__ import annotations

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import overloads_of
from piecework.errors import Unidentifiable
from piecework.runtime import torch_compat

_HINT = "register it with torch.library.custom_op and register_fake, or with piecework.splitting_op"


def operator_content(op: object, *, with_body: bool = True) -> list[object]:
    """What code that calls ``op`` may depend on.

    It calls the operator by its name, so it stays right when the body changes. What is looked at
    while compiling counts: the schema, the tags (they decide layouts and folding), the fake
    implementation, and the body where the compiler may run it.

    Args:
        with_body: count its body where the compiler may run or decompose it.

    Raises:
        Unidentifiable: its body or its fake implementation decides, and can't be found.
    """
    if isinstance(op, HigherOrderOperator):
        return ["higher order", op.name()]
    if isinstance(op, OpOverloadPacket):
        return [operator_content(each, with_body=with_body) for each in overloads_of(op)]
    if not isinstance(op, OpOverload):
        raise Unidentifiable(f"{op} has no stable form", where=str(op), hint=_HINT)
    name = f"{op._schema.name}.{op._overloadname}"
    if torch_compat.is_torch_operator(op):
        return [name]
    found = torch_compat.python_kernels(op)
    if op._schema.returns and found.fake is None:
        why = f"the fake implementation of {op} can't be read"
        raise Unidentifiable(why, where=str(op), hint=_HINT)
    tags = sorted(str(each) for each in op.tags)
    facts = [name, str(op._schema), tags, torch_compat.kinds_of_kernels(op), found.fake]
    if with_body and (torch.Tag.pointwise in op.tags or not torch_compat.is_opaque_to_inductor(op)):
        # It is decomposed, or a constant operand lets Inductor run it and keep the result.
        if not found.bodies:
            raise Unidentifiable(f"the body of {op} can't be read", where=str(op), hint=_HINT)
        facts.append(sorted(found.bodies.items()))
    return facts
