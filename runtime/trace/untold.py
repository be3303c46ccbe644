"""What Dynamo takes for granted and guards nothing for. In: a trace that is running, its arguments and its result. Out: nothing, or the `CaptureError` that refuses them."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.code_objects import global_names, with_inner_code
from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.bind.asked import models_names
from piecework.runtime.bind.made_sets import goes_through_sets
from piecework.runtime.bind.reachable import modules_of
from piecework.runtime.bind.weights import Weight
from piecework.runtime.trace.inputs import Argument, GraphInput, Size
from piecework.runtime.trace.results import (
    Fixed,
    FromArgument,
    FromAttribute,
    FromGraph,
    FromWeight,
    ResultLeaf,
    opened,
    sizes_from_graph,
)

#: What of a tensor that records gradients a trace can't tell: it sees a leaf, whatever there is.
PLACE_IN_AUTOGRAD = ("is_leaf", "grad_fn", "retains_grad", "_grad_fn", "_backward_hooks")
_VIEWED = "_base"
_OFFSET = "storage_offset"
_DEPTH = 3
_REMEMBERS = type(functools.cache(len))
_CONTAINERS = (list, tuple, dict, set, frozenset)


def refuse_place_in_autograd(leaves: Sequence[object], names: Sequence[str]) -> None:
    """Raise if the code may ask how an argument came to record gradients.

    Of arguments that don't record any, all that can be asked is the same.
    """
    pairs = zip(leaves, names, strict=True)
    recording = [n for leaf, n in pairs if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    asked = torch_compat.trace_names(*PLACE_IN_AUTOGRAD) if recording else []
    if asked:
        raise CaptureError(
            f"forward names {', '.join(asked)}, and argument {recording[0]} records gradients",
            hint="a stitched model serves inference: pass it detached, or decide that outside forward",
        )


def refuse_views() -> None:
    """Raise if the code may ask whether a tensor is a view of another: a trace sees none of an argument's, whatever there is."""
    if _VIEWED in models_names(torch_compat.traced_code()):
        raise CaptureError(
            f"forward names {_VIEWED}, and a trace can't tell whether an argument is a view",
            hint="decide that outside forward",
        )


def refuse_offsets(leaves: Sequence[object], names: Sequence[str]) -> None:
    """Raise if the code may ask where in its memory an argument begins, and one begins behind the start: what it answers then is no size that a call is compared by."""
    views = [
        n
        for leaf, n in zip(leaves, names, strict=True)
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.storage_offset()
    ]
    if views and torch_compat.trace_names(_OFFSET):
        raise CaptureError(
            f"forward names {_OFFSET}, and argument {views[0]} is a view behind the start of its memory",
            hint="pass a clone, or decide that outside forward",
        )


def refuse_globals(
    model: Callable[..., object], leaves: Sequence[object], names: Sequence[str]
) -> None:
    """Raise if an argument is a tensor that the code also reaches by a global name.

    Dynamo takes the two for one then, and does not look whether they are in the next call.
    """
    given = {id(leaf): n for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    code = torch_compat.traced_code() if given else []
    for scope, each in scopes(model, code):
        named = set(each.co_names)
        for name in named & scope.keys():
            for tensor in _tensors_in(scope[name], named, _DEPTH):
                if id(tensor) in given and name in global_names(each):
                    raise CaptureError(
                        f"argument {names[given[id(tensor)]]} is a tensor that forward also reaches by the global name {name}",
                        hint="pass a clone: a trace can't tell when the two are one",
                    )


@dataclass(frozen=True, slots=True)
class OrderOfSets:
    """What a graph computes, to be compared with what Python computes: Dynamo goes through a set in the order in which things were put in, Python goes by their hashes.

    Attributes:
        known: the tensors that exist before a call.
        outputs: of the graph, with fake tensors.
        run: what each of them is computed from.
        numbers: for `torch_compat.computed`.
    """

    known: Sequence[torch.Tensor]
    outputs: Sequence[object]
    run: torch_compat.Computed
    numbers: dict[tuple[object, ...], int]

    @classmethod
    def of(
        cls, gm: torch.fx.GraphModule, inputs: Sequence[GraphInput], leaves: Sequence[object]
    ) -> OrderOfSets | None:
        """Of the trace that is running; None if its code goes through no sets that it makes.

        Args:
            inputs: the graph's.
            leaves: the flattened arguments.
        """
        if not goes_through_sets(torch_compat.traced_code()):
            return None
        given = [_given(each, leaves) for each in inputs]
        every = [each for each in (*leaves, *given) if isinstance(each, torch.Tensor)]
        numbers: dict[tuple[object, ...], int] = {}
        with _seen(), torch_compat.computed(every, numbers) as run:
            outputs = torch.fx.Interpreter(gm).run(*given)
        return cls(every, outputs, run, numbers)

    def require_pythons(
        self,
        call: Callable[[], object],
        spec: pytree.TreeSpec,
        results: Sequence[ResultLeaf],
        leaves: Sequence[object],
    ) -> None:
        """Raise if Python's order computes something else.

        Args:
            call: the model's call itself; it is run with fake tensors.
            spec: of the traced result.
            results: the leaves of it.
            leaves: the flattened arguments.

        Raises:
            CaptureError: it does, or it can't be seen whether it does.
        """
        with _seen(), _nothing_remembered(), torch_compat.computed(self.known, self.numbers) as run:
            found, own_spec = pytree.tree_flatten(opened(sizes_from_graph(call()))[0])
        mine = [self._of(each, leaves) for each in results]
        pythons = [run.of(each) if isinstance(each, torch.Tensor) else each for each in found]
        if (own_spec, pythons, run.writes()) != (spec, mine, self.run.writes()):
            raise CaptureError(
                "forward goes through a set whose order decides what it computes, and Dynamo's order is not Python's",
                hint="go through sorted(...) of it, or a list or a dict in its place",
            )

    def _of(self, leaf: ResultLeaf, leaves: Sequence[object]) -> object:
        match leaf:
            case FromGraph(index=index):
                value = self.outputs[index]
            case FromArgument(leaf=index):
                value = leaves[index]
            case FromWeight(tensor=tensor):
                value = tensor
            case FromAttribute(of=of, name=name):
                value = getattr(of.tensor if isinstance(of, FromWeight) else leaves[of.leaf], name)
            case Fixed(value=value):
                pass
        return self.run.of(value) if isinstance(value, torch.Tensor) else value


def _given(source: GraphInput, leaves: Sequence[object]) -> object:
    """What the graph is given by the example."""
    if isinstance(source, Weight):
        return source.tensor
    leaf = leaves[source.leaf]
    if isinstance(source, Argument):
        return leaf
    assert isinstance(leaf, torch.Tensor)
    if isinstance(source, Size):
        return leaf.shape[source.dim]
    return leaf.storage_offset() if source.dim is None else leaf.stride(source.dim)


@contextlib.contextmanager
def _seen() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CaptureError(
            f"forward makes a set, and whether the order in it matters can't be seen without data: {error}",
            hint="make the set outside forward, or a list or a dict in its place",
        ) from error


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    """Empty the caches of functions that remember more after the block than before: what they remember is fake."""
    caches = list(_remembering())
    before = [each.cache_info().misses for each in caches]
    try:
        yield
    finally:
        for each, misses in zip(caches, before, strict=True):
            if each.cache_info().misses != misses:
                each.cache_clear()


def _remembering() -> Iterator[Any]:
    """The functions that remember results, once each; those that the collector is not to look at are found in modules and their classes."""
    modules = [each for each in list(sys.modules.values()) if isinstance(each, types.ModuleType)]
    named = [value for each in modules for value in list(vars(each).values())]
    in_classes = [
        v for each in named if issubclass(type(each), type) for v in list(vars(each).values())
    ]
    every = [*gc.get_objects(), *named, *in_classes]
    yield from {id(each): each for each in every if type(each) is _REMEMBERS}.values()


def scopes(
    model: Callable[..., object], code: Iterable[types.CodeType]
) -> Iterator[tuple[Mapping[str, object], types.CodeType]]:
    """The global names of traced code: those of the module whose file it is from, and of the model's own functions."""
    by_file = {
        vars(each).get("__file__"): vars(each)
        for each in list(sys.modules.values())
        if isinstance(each, types.ModuleType)
    }
    functions = [model, *(type(m).forward for _, root in modules_of(model) for m in root.modules())]
    by_code = {
        function.__code__: function.__globals__
        for function in functions
        if isinstance(function, types.FunctionType)
    }
    for each in code:
        scope = by_code.get(each) or by_file.get(each.co_filename)
        if scope is not None:
            yield from ((scope, inner) for inner in with_inner_code([each]))


def _tensors_in(value: object, named: set[str], depth: int) -> Iterator[torch.Tensor]:
    """Tensors in plain containers, and those of a module's names that the code has."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and (isinstance(value, types.ModuleType) or type(value) in _CONTAINERS):
        if isinstance(value, types.ModuleType):
            inner = [vars(value)[name] for name in named & vars(value).keys()]
        else:
            inner = list(value.values() if isinstance(value, dict) else value)  # type: ignore[call-overload]
        for each in inner:
            yield from _tensors_in(each, named, depth - 1)
