"""A graph of Dynamo's by the user's names, its weights bound until a call brings other ones."""

import re
from collections.abc import Callable, Sequence
from operator import is_, itemgetter

import torch
from torch.fx import GraphModule

from piecework.codegen.graph.origin import value_of
from piecework.runtime import torch_compat
from piecework.runtime.pieces.program import Program, publish_submods
from piecework.runtime.trace.inputs import Argument, rename

_TABLE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_CELL = re.compile(r"\.__closure__\[\d+\]\.cell_contents")
_ROOT = re.compile(r"L\['([^']+)'\](?P<rest>.*)", re.DOTALL)


def name_inputs(graph: GraphModule) -> tuple[str | None, ...]:
    """Name the inputs of Dynamo's ``graph`` as the user's code does."""
    nodes = graph.graph.find_nodes(op="placeholder")
    found = [_ROOT.fullmatch(source) for source in torch_compat.placeholder_sources(graph)]
    modules = {each[1] for each in found if each and _TABLE.match(each["rest"])}
    names, paths, sizes = [], [], 0
    for node, each in zip(nodes, found, strict=True):
        value = value_of(node)
        is_weight = False
        if isinstance(value, torch.SymInt):
            name, sizes = f"s{sizes}", sizes + 1
        elif each is None:
            name = node.name
        else:
            path = _TABLE.sub(r".\1", each["rest"]).lstrip(".")
            short = _CELL.sub("", path)
            path = path if short in names else short
            is_weight = (
                each[1] in modules
                and isinstance(value, torch.Tensor)
                and not any(isinstance(size, torch.SymInt) for size in value.shape)
            )
            name = path if each[1] in modules else re.sub(r"\W+", "_", f"{each[1]}{each['rest']}")
        names.append(name)
        paths.append(name if is_weight else None)
    rename(graph, [Argument(0, name) for name in names])
    return tuple(paths)


def modules_traced(graph: GraphModule) -> list[torch.nn.Module]:
    """The modules that a graph's inputs hang on; to be asked while Dynamo's trace is open."""
    found = {m[1] for s in torch_compat.placeholder_sources(graph) if (m := _ROOT.fullmatch(s))}
    held = (torch_compat.traced_locals().get(name) for name in sorted(found))
    return [each for each in held if isinstance(each, torch.nn.Module)]


def bound_names(graph: GraphModule, paths: Sequence[str | None]) -> dict[str, str]:
    """Input → path of the weights of ``graph``, as `PieceworkBackend.prepare` takes them."""
    nodes = graph.graph.find_nodes(op="placeholder")
    return {n.name: path for n, path in zip(nodes, paths, strict=True) if path is not None}


class BoundCall:
    """The stitched function of a program, as Dynamo calls it: with all inputs of the graph."""

    def __init__(
        self,
        program: Program,
        paths: Sequence[str | None],
        submod_lists: Sequence[Sequence[Callable[..., object]]] | None = None,
    ) -> None:
        self.program = program
        self.paths = tuple(paths)
        self._lists = [tuple(each) for each in submod_lists or program.submod_lists]
        rows = program.source.module.bound
        held = [self.paths.index(row.path) for row in rows]
        self._names = [row.name for row in rows]
        self._weights_of = _picked(held)
        self.others = [i for i in range(len(paths)) if i not in set(held)]  # no weights
        self._others_of = _picked(self.others)
        self._bound: tuple[tuple[object, ...], Callable[..., object]] | None = None

    def __call__(self, *args: object) -> object:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(*args)
        if not self.program.direct_ops.unchanged():  # an operator was given another kernel
            return self.program.split_gm(*args)
        run, others = self.bound_to(args), self._others_of(args)
        table = self.program.range_table
        if table is None:
            return run(*others)
        return run(
            *others, __vllm_submods__=self._lists[table.index(self.program.batch.size(args))]
        )

    def bound_to(self, args: Sequence[object]) -> Callable[..., object]:
        """The function with the weights of ``args``; it takes those of the inputs that are none."""
        weights, bound = self._weights_of(args), self._bound
        if bound is None or not all(map(is_, weights, bound[0])):
            function = self.program.bind(dict(zip(self._names, weights, strict=True)))
            publish_submods(function, self._lists[-1])
            self._bound = bound = weights, function
        return bound[1]

    def release(self) -> None:
        """Let go of the weights; the next call binds those that it is given."""
        self._bound = None


def _picked(indices: Sequence[int]) -> Callable[[Sequence[object]], tuple[object, ...]]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: tuple(values[i] for i in indices)
