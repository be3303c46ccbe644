"""Operators of a piece that torch does not bring. In: a piece. Out: what of them its compiled form depends on; or why it holds for this process alone."""

from __future__ import annotations

import torch
import torch.fx
from torch._ops import HigherOrderOperator

from piecework.codegen.graph.origin import value_of
from piecework.codegen.graph.schemas import every_node, overloads_of
from piecework.errors import Unidentifiable
from piecework.runtime import torch_compat
from piecework.runtime.store.digest import digest_of

# Higher-order operators that hold all they do as subgraphs and literals. Others look things up in tables of the process,
# as those for Triton kernels do.
SELF_CONTAINED = frozenset(
    {
        *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond"),
        *("flex_attention", "invoke_subgraph", "map_impl", "out_dtype", "scan", "while_loop"),
        *("wrap", "wrap_with_autocast", "wrap_with_set_grad_enabled"),
    }
)


def operator_facts(graph: torch.fx.GraphModule) -> tuple[str, str]:
    """What the compiled form of a piece depends on besides its structure.

    Returns:
        The content of each operator that is not torch's, with what its fake says of the results; and why the compiled form holds for
        this process only, "" if it does not.
    """
    lines: list[str] = []
    for node in every_node(graph):
        higher = node.target if isinstance(node.target, HigherOrderOperator) else None
        if higher is not None and higher.name() not in SELF_CONTAINED:
            return "", f"{higher.name()} may depend on this process"
        for op in overloads_of(node.target):
            if torch_compat.is_torch_operator(op):
                continue
            if not torch_compat.is_opaque_to_inductor(op):
                return "", f"{op} is compiled with its body"
            try:
                identity = digest_of(op, str(op))
            except Unidentifiable as error:
                return "", error.message
            lines.append(f"{op} {op._schema} {identity} -> {_results(node)}")
    return "\n".join(lines), ""


def _results(node: torch.fx.Node) -> str:
    value = value_of(node)
    many = value if isinstance(value, (tuple, list)) else [value]
    return ", ".join(map(_signature, many))


def _signature(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return str(value)
