"""Strings, attribute names and comments that try to break out of their quotes; nothing here may run."""

import torch
import torch.fx

STRINGS = (
    "'); raise SystemExit('",
    '"""\nraise SystemExit\n"""',
    "{{ consts }} {% raw %} {# gone #}",
    "\\",
    "# type: ignore",
    "\r\nraise SystemExit",
    "\u2028import os\u2029",
    "\u0441opy \u202e gnirts",
    "\x00\x1b[31m",
)


def same(*args: str, **kwargs: str) -> tuple[str, ...]:
    return (*args, *kwargs.values())


def build() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["stack_trace"] = '  File "evil\'\n\x1b.py", line 7, in forward\n    raise SystemExit'
    weight = graph.create_node("get_attr", "weight\nraise SystemExit #")
    strings = graph.call_function(same, STRINGS, {text: text for text in STRINGS})
    strings.meta["nn_module_stack"] = {"0": ("L['self'].layers.0\nraise SystemExit", object)}
    strings.meta["stack_trace"] = '  File "/home/of/someone/mo#del\r.py", line 41, in forward\n'
    y = graph.call_function(torch.add, (x, weight))
    graph.output((y, strings))
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    setattr(gm, "weight\nraise SystemExit #", torch.ones(2))
    gm._graph = graph  # FX can interpret such names, but not write them
    return gm


def inputs() -> list[tuple[object, ...]]:
    return [(torch.ones(2),)]
