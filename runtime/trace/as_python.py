"""Whether a graph computes what the model's own Python computes. In: a trace that is running, and then its result. Out: nothing, or why the two are not known to be one.

Dynamo goes through a set in the order in which things were put in, Python goes by their hashes; and a trace that served layers by one of them
rests on what could be seen of the others. Both are compared with the model itself, run with fake tensors: operator by operator, and nothing is computed.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat
from piecework.runtime.bind.asked import asks_dynamo
from piecework.runtime.bind.facts import same
from piecework.runtime.bind.made_sets import goes_through_sets
from piecework.runtime.bind.weights import Weight
from piecework.runtime.regions.marks import Refused
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
from piecework.runtime.trace.untold import scopes

_REMEMBERS = type(functools.cache(len))
_MUCH = 20_000
_NOWHERE = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType)


@dataclass(frozen=True, slots=True)
class AsPython:
    """What a graph computes, to be compared with what Python computes.

    Attributes:
        refuse: makes the error, of why the two can't be compared; None if they can be, and are not one.
        known: the tensors that exist before a call.
        outputs: of the graph, with fake tensors.
        run: what each of them is computed from.
        numbers: for `torch_compat.computed`.
    """

    refuse: Callable[[Exception | None], Exception]
    known: Sequence[torch.Tensor]
    outputs: Sequence[object]
    run: torch_compat.Computed
    numbers: dict[tuple[object, ...], int]

    @classmethod
    def of(
        cls,
        gm: torch.fx.GraphModule,
        inputs: Sequence[GraphInput],
        leaves: Sequence[object],
        held: Iterable[torch.Tensor],
        layers_served: bool,
        model: Callable[..., object],
    ) -> AsPython | None:
        """Of the trace that is running; None if there is no need to compare.

        Args:
            inputs: the graph's.
            leaves: the flattened arguments.
            held: the model's tensors, whether the graph reads them or not.
            layers_served: layers were not traced because another one was.
            model: what is traced.
        """
        if layers_served:
            refuse = _refuse_layers
        elif goes_through_sets(torch_compat.traced_code()):
            refuse = _refuse_sets
        else:
            return None
        if asks_dynamo(scopes(model, torch_compat.traced_code())):
            raise refuse(CaptureError("it asks torch.compiler.is_dynamo_compiling"))
        given = [_given(each, leaves) for each in inputs]
        every = [each for each in (*leaves, *given, *held) if isinstance(each, torch.Tensor)]
        numbers: dict[tuple[object, ...], int] = {}
        with _seen(refuse), torch_compat.computed(every, numbers) as run:
            outputs = torch_compat.outputs_of(gm, given)
        return cls(refuse, every, outputs, run, numbers)

    def require(
        self,
        call: Callable[[], object],
        spec: pytree.TreeSpec,
        results: Sequence[ResultLeaf],
        leaves: Sequence[object],
    ) -> None:
        """Raise if Python computes something else.

        Args:
            call: the model's call itself; it is run with fake tensors.
            spec: of the traced result.
            results: the leaves of it.
            leaves: the flattened arguments.

        Raises:
            CaptureError: the order of a set decides what it computes.
            Refused: layers that one trace served compute something else; another trace may do.
        """
        fake = torch_compat.computed(self.known, self.numbers)
        with _seen(self.refuse), _nothing_remembered(), _nothing_drawn(), fake as run:
            found, own_spec = pytree.tree_flatten(opened(sizes_from_graph(call()))[0])
        done = [(each.writes(), each.effects()) for each in (run, self.run)]
        if (own_spec, done[0]) != (spec, done[1]):
            raise self.refuse(None)
        for value, leaf in zip(found, results, strict=True):
            if not _alike(_known(run, value), _known(self.run, self._value(leaf, leaves))):
                raise self.refuse(None)

    def _value(self, leaf: ResultLeaf, leaves: Sequence[object]) -> object:
        match leaf:
            case FromGraph(index=index):
                return self.outputs[index]
            case FromArgument(leaf=index):
                return leaves[index]
            case FromWeight(tensor=tensor):
                return tensor
            case FromAttribute(of=of, name=name):
                return getattr(of.tensor if isinstance(of, FromWeight) else leaves[of.leaf], name)
            case Fixed(value=value):
                return value


def _known(run: torch_compat.Computed, value: object) -> tuple[object, object]:
    """What is known of a result: a tensor's number is no other number."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor, run.of(value)
    return type(value), value


def _alike(one: tuple[object, object], other: tuple[object, object]) -> bool:
    return same(one, other) or (one[0] not in (float, complex) and one == other)


def _refuse_sets(why: Exception | None) -> CaptureError:
    if why is not None:
        return CaptureError(
            f"forward makes a set, and whether the order in it matters can't be seen without data: {_short(why)}",
            hint="make the set outside forward, or a list or a dict in its place",
        )
    return CaptureError(
        "forward goes through a set whose order decides what it computes, and Dynamo's order is not Python's",
        hint="go through sorted(...) of it, or a list or a dict in its place",
    )


def _refuse_layers(why: Exception | None) -> Refused:
    if why is not None:
        return Refused(f"what the layers compute can't be seen without data: {_short(why)}")
    return Refused("layers that look alike compute something else")


def _short(why: Exception) -> str:
    """What an error says, without where torch was."""
    return str(why).partition("\n")[0] or type(why).__name__


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
def _seen(refuse: Callable[[Exception | None], Exception]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise refuse(error) from error


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    """Empty the caches of functions that remember a fake tensor after the block; what they remember of a call that made none is what any call would leave."""
    caches = list(_remembering())
    before = [each.cache_info().misses for each in caches]
    try:
        yield
    finally:
        for each, misses in zip(caches, before, strict=True):
            if each.cache_info().misses != misses and _may_hold_fakes(each):
                each.cache_clear()


@contextlib.contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Put back what Python and numpy draw from, and the default dtype: what code sets and does not set back because it fails."""
    numpys = getattr(sys.modules.get("numpy"), "random", None)
    drawn, dtype = random.getstate(), torch.get_default_dtype()
    numpys_drawn = None if numpys is None else numpys.get_state()
    try:
        yield
    finally:
        random.setstate(drawn)
        torch.set_default_dtype(dtype)
        if numpys is not None:
            numpys.set_state(numpys_drawn)


def _may_hold_fakes(cache: Any) -> bool:
    """Whether what a function remembers leads to a fake tensor, or to more than can be looked at."""
    pending = [each for each in gc.get_referents(cache) if each is not cache.__wrapped__]
    seen: set[int] = set()
    while pending:
        each = pending.pop()
        if torch_compat.is_fake(each):
            return True
        if id(each) in seen or isinstance(each, _NOWHERE):
            continue
        seen.add(id(each))
        if len(seen) > _MUCH:
            return True
        if isinstance(each, types.FunctionType):
            pending += [each.__closure__, each.__defaults__, each.__kwdefaults__, each.__dict__]
        else:
            pending += gc.get_referents(each)
    return False


def _remembering() -> Iterator[Any]:
    """The functions that remember results, once each; those that the collector is not to look at are found in modules and their classes."""
    modules = [each for each in list(sys.modules.values()) if isinstance(each, types.ModuleType)]
    named = [value for each in modules for value in list(vars(each).values())]
    in_classes = [
        v for each in named if issubclass(type(each), type) for v in list(vars(each).values())
    ]
    every = [*gc.get_objects(), *named, *in_classes]
    yield from {id(each): each for each in every if type(each) is _REMEMBERS}.values()
