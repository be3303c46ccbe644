"""An autocast region and a no-grad region: enter and leave stay where they were."""

import torch
import torch.fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    was = graph.call_function(torch.is_grad_enabled)
    graph.call_function(torch._C._set_grad_enabled, (False,))
    region = graph.call_function(_enter_autocast, ("cpu", torch.bfloat16, True, None))
    inside = graph.call_function(torch.matmul, (x, x))
    graph.call_function(_exit_autocast, (region,))
    graph.call_function(torch._C._set_grad_enabled, (was,))
    outside = graph.call_function(torch.matmul, (x, x))
    graph.output((inside, outside))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    return [(torch.randn(4, 4),)]
