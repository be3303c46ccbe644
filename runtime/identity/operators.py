"""The identity of an operator. In: an operator of torch's registry. Out: plain data that says what code may depend on when it holds a call of it.

A compiled piece calls an operator that is not torch's by its name, so it stays right when the body changes. What is looked at while compiling
counts: the schema, the tags (they decide layouts and folding), the fake implementation, and the body where the compiler may run it. Nothing
is run here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from piecework.codegen.graph.schemas import overloads_of
from piecework.runtime import torch_compat

if TYPE_CHECKING:
    from piecework.runtime.identity.values import Reader

_HINT = "register it with torch.library.custom_op and register_fake, or with piecework.splitting_op"


def read_operator(reader: Reader, op: object) -> Any:
    """An operator as plain data.

    Raises:
        Unidentifiable: its body is compiled, or may be run, where it is used, and can't be found; or its fake can't.
    """
    if isinstance(op, HigherOrderOperator):
        if reader.libraries.library_of(type(op).__module__) is None:
            raise reader.unknown(f"higher-order operator {op.name()} has no stable form")
        return {"higher order": op.name()}
    if isinstance(op, OpOverloadPacket):
        return {"packet": [read_operator(reader, each) for each in overloads_of(op)]}
    assert isinstance(op, OpOverload)
    name = f"{op._schema.name}.{op._overloadname}"
    if torch_compat.is_torch_operator(op):
        return {"operator": name}
    return reader.once(op, "operator", lambda: [name, *_of_user(reader, op)])


def _of_user(reader: Reader, op: OpOverload) -> list[Any]:
    found = torch_compat.python_kernels(op)
    tags = sorted(str(each) for each in op.tags)
    facts = [str(op._schema), tags, torch_compat.kinds_of_kernels(op)]
    if op._schema.returns and found.fake is None:
        raise reader.unknown(f"the fake implementation of {op} can't be read", hint=_HINT)
    facts.append(reader.read(found.fake))
    if torch.Tag.pointwise in op.tags or not torch_compat.is_opaque_to_inductor(op):
        # It is decomposed, or a constant operand lets Inductor run it and keep the result.
        if not found.bodies:
            raise reader.unknown(f"the body of {op} can't be read", hint=_HINT)
        facts.append(reader.pairs(sorted(found.bodies.items())))
    return facts
