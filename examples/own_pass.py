"""A graph pass of one's own. In: the pieces of a small model. Out: x * sigmoid(x) replaced by an operator, for small batches only.

Run it with ``python -m piecework.examples.own_pass``.
"""

from __future__ import annotations

import torch
import torch.fx
from torch import nn

import piecework
from piecework.runtime import InductorPass, Range

aten = torch.ops.aten


@torch.library.custom_op("own_pass::gate", mutates_args=())
def gate(x: torch.Tensor) -> torch.Tensor:
    """Stands for a fast kernel that somebody has written by hand."""
    return torch.nn.functional.silu(x)


@gate.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class GatePass(InductorPass):
    """Replaces ``x * sigmoid(x)`` by `gate`; its settings and its source are part of every cache key.

    Args:
        largest: the largest batch that the kernel is good for.
    """

    def __init__(self, largest: int = 16) -> None:
        self.largest = largest

    def is_applicable_for_range(self, compile_range: Range | None) -> bool:
        return compile_range is not None and compile_range.end <= self.largest

    def __call__(self, graph: torch.fx.Graph) -> int:
        matches = 0
        for product in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            x, factor = product.args
            if (
                isinstance(factor, torch.fx.Node)
                and factor.target is aten.sigmoid.default
                and factor.args[0] is x
            ):
                with graph.inserting_before(product):
                    new = graph.call_function(torch.ops.own_pass.gate.default, (x,))
                new.meta.update(product.meta)
                product.replace_all_uses_with(new)
                graph.erase_node(product)
                matches += 1
        return matches


class Model(nn.Module):
    """A linear layer and a gate written out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y * torch.sigmoid(y)


def main() -> None:
    """Compile with the pass for batches up to 16, and without it for larger ones."""
    config = piecework.CompilationConfig(
        compile_ranges_endpoints=[16],
        # Code from a cache is not changed again; this makes the passes run, and be counted, each time.
        inductor_compile_config={"force_disable_caches": True},
        inductor_passes={"post_grad_custom_post_pass": GatePass(largest=16)},
        pass_config={"report_matches": True},
    )
    model = Model()
    stitched = piecework.compile(model, (torch.randn(4, 8),), config=config)
    for batch in (4, 64):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(stitched(x), model(x))
    print(stitched.report())


if __name__ == "__main__":
    main()
