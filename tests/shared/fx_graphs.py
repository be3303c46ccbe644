"""FX graphs that tests write by hand or take from Dynamo, and the text emitted for one beside its interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.fx

from piecework.codegen import StitchedSource
from piecework.golden.cases import Case, LoadedCase
from piecework.golden.execute import differences


def module_of(graph: torch.fx.Graph, root: torch.nn.Module | None = None) -> torch.fx.GraphModule:
    """``graph`` over what ``root`` holds, not written as code: FX can interpret more than it can write."""
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    if root is not None:
        gm._modules.update(root._modules)  # the same one twice, too
        gm._parameters.update(root._parameters)
        vars(gm).update({k: v for k, v in vars(root).items() if not k.startswith("_")})
    gm._graph = graph
    return gm


def graph_of(
    build: Callable[..., object],
    *names: str | tuple[str, object],
    root: torch.nn.Module | None = None,
) -> torch.fx.GraphModule:
    """A graph with the placeholders ``names`` (with a default: a pair); ``build(graph, *placeholders)`` returns the output."""
    graph = torch.fx.Graph()
    nodes = []
    for each in names or ("x",):
        name, *default = (each,) if isinstance(each, str) else each
        nodes.append(graph.create_node("placeholder", name, tuple(default), name=name.strip("*")))
    graph.output(build(graph, *nodes))  # type: ignore[arg-type]
    return module_of(graph, root)


def callable_graph_of(
    build: Callable[..., object],
    *names: str | tuple[str, object],
    root: torch.nn.Module | None = None,
) -> torch.fx.GraphModule:
    """A graph that can be called, too."""
    gm = graph_of(build, *names, root=root)
    gm.recompile()
    return gm


def dynamo_graph_of(function: Callable[..., object], *inputs: object) -> torch.fx.GraphModule:
    """``function`` as Dynamo captures it for ``inputs``."""
    captured: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, _: Sequence[object]) -> torch.fx.GraphModule:
        captured.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return captured[0]


def problems(
    gm: torch.fx.GraphModule,
    source: StitchedSource,
    *inputs: tuple[object, ...],
    code: str | None = None,
) -> list[str]:
    """Where ``code`` (what was emitted, if there is none) does something else than ``gm`` interpreted."""
    bound = tuple(row.placeholder for row in source.module.bound)
    case = Case("a test's", Path("."))
    around = [nullcontext] * len(inputs)
    return differences(LoadedCase(case, gm, source, code or source.code, bound, inputs, around))
