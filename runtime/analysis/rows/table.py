"""All rules. In: an ATen operator. Out: its rule, or None for one that is not known to keep rows apart.

It is an allow-list: what is not here mixes rows.
"""

from __future__ import annotations

from functools import cache

import torch

from piecework.runtime.analysis.rows import along, indexing, layers, pointwise, products, views
from piecework.runtime.analysis.rows.call import base_name
from piecework.runtime.analysis.rows.rule import Rule

RULES: dict[str, Rule] = {
    **pointwise.RULES,
    **views.RULES,
    **along.RULES,
    **products.RULES,
    **layers.RULES,
    **indexing.RULES,
}


def rule_for(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of one operator; torch's own tag says which are pointwise."""
    name = base_name(op)
    if op.namespace not in ("aten", "prims") or name in pointwise.NOT_POINTWISE:
        return None
    if _is_pointwise(op.namespace, name) if name not in RULES else torch.Tag.pointwise in op.tags:
        return pointwise.POINTWISE
    return RULES.get(name)


@cache
def _is_pointwise(namespace: str, name: str) -> bool:
    """Whether torch tags any overload: it forgets some, in-place ones above all."""
    packet = getattr(getattr(torch.ops, namespace), name, None)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return any(torch.Tag.pointwise in each.tags for each in overloads)


def is_random(op: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags
