"""Values that have no literal: they go to the consts table, each object once."""

import enum

import torch
import torch.fx


class Color(enum.IntEnum):
    RED = 1


class Mode(str, enum.Enum):
    FAST = "fast"


def describe_all(*args: object) -> list[str]:
    return [f"{type(arg).__name__}" for arg in args]


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    device = torch.device("cpu")
    typed = graph.call_method("to", (x, device, torch.bfloat16))
    back = graph.call_method("to", (typed,), {"device": device, "dtype": torch.float32})
    full = graph.call_function(
        torch.full, (torch.Size([2, 3]), float("inf")), {"dtype": torch.float64, "device": device}
    )
    names = graph.call_function(describe_all, (Color.RED, Mode.FAST, range(3), torch.Size([1])))
    graph.output((back, full, names))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def inputs() -> list[tuple[object, ...]]:
    return [(torch.arange(4.0),)]
