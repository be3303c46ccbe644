"""Refuses arguments that are, or share written memory with, tensors of the model.

Code that was traced may ask ``mask is self.mask``, and compiled pieces put off writes: what was
another tensor in the trace has to be another in each call.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, assert_never
from weakref import WeakKeyDictionary

import torch

from piecework.codegen.entry.plan import (
    Assumption,
    Items,
    Leaf,
    Node,
    TensorInput,
    Tree,
    UnusedTensor,
)
from piecework.codegen.graph.origin import value_of
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.pieces.program import Program
from piecework.runtime.trace.inputs import Argument, GraphInput
from piecework.runtime.trace.one_trace import ModelTrace
from piecework.runtime.trace.writes import mutations_in
from piecework.runtime.watch.weights import BoundWeights, Weight


@dataclass(frozen=True, slots=True)
class Written:
    """What a graph reads as tensors, and what of it compiled pieces write.

    Attributes:
        arguments, weights: what the graph reads, flattened arguments by number and weights by path.
        in_arguments, in_weights: those of them that are written.
    """

    arguments: tuple[int, ...]
    weights: tuple[str, ...]
    in_arguments: tuple[int, ...]
    in_weights: tuple[str, ...]

    @classmethod
    def by(cls, captured: ModelTrace, program: Program) -> Written:
        placeholders = program.split_gm.graph.find_nodes(op="placeholder")
        pairs = list(zip(placeholders, captured.inputs, strict=True))
        tensors = {n.name: each for n, each in pairs if isinstance(value_of(n), torch.Tensor)}
        writes = mutations_in(program.split_gm, list(program.backends), {n: n for n in tensors})
        written = {name: tensors[name] for name in dict.fromkeys(each.path for each in writes)}
        return cls(*_sorted(tensors), *_sorted(written))


def _sorted(inputs: dict[str, GraphInput]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    values = inputs.values()
    arguments = tuple(each.leaf for each in values if isinstance(each, Argument))
    return arguments, tuple(each.path for each in values if isinstance(each, Weight))


@dataclass(frozen=True, slots=True)
class Flat:
    """A leaf of a container that is flattened."""

    number: int


@dataclass(frozen=True, slots=True)
class GivenTensor:
    """A tensor argument, and the weights, by number, that it must not be, or not share memory with.

    Attributes:
        where: its parameter's number and the keys inside of that; `Flat` for a leaf of a container that is flattened.
        elsewhere: it must be none of the tensors, either, that the trace found in closures and classes.
    """

    label: str
    where: tuple[object, ...]
    others: tuple[int, ...]
    elsewhere: bool
    apart: tuple[int, ...]
    written: bool


class ArgumentMemory:
    """The check of one trace.

    Args:
        given: the tensor arguments that there is something to check of.
    """

    def __init__(self, given: Sequence[GivenTensor]) -> None:
        self._given = given
        self._spans: WeakKeyDictionary[BoundWeights, list[_Spans]] = WeakKeyDictionary()

    def refusal(self, weights: BoundWeights, values: Sequence[object]) -> InputError | None:
        """What is wrong about arguments, one value per parameter; None if nothing is."""
        found = self._spans.get(weights)
        if found is None:
            tensors = weights.tensors
            found = [_Spans([tensors[n] for n in each.apart]) for each in self._given]
            self._spans[weights] = found
        for each, spans in zip(self._given, found, strict=True):
            tensor = _value_at(each.where, values)
            assert isinstance(tensor, torch.Tensor)
            for number in each.others:
                if tensor is weights.tensors[number]:
                    return _one_object(each.label, weights.traced[number].path)
            if each.elsewhere:
                for path, now in weights.state.watched_now().items():
                    if tensor is now:
                        return _one_object(each.label, path)
            if each.apart and spans.reached_by(tensor):
                number = next(
                    n
                    for n in each.apart
                    if not torch_compat.memory_apart(weights.tensors[n], tensor)
                )
                return _shared(each, weights.traced[number].path)
        return None


def given_tensors(captured: ModelTrace, written: Written) -> tuple[GivenTensor, ...]:
    """The arguments of a trace that could be tensors of the model, or share memory with one in a wrong way."""
    given = _all_given(captured, written)
    return tuple(each for each in given if each.others or each.elsewhere or each.apart)


def _all_given(captured: ModelTrace, written: Written) -> Iterator[GivenTensor]:
    weights = captured.weights
    plain = [n for n, each in enumerate(weights.tensors) if each.layout is torch.strided]
    numbers = {weights.traced[n].path: n for n in plain}
    for number, parameter in enumerate(captured.parameters):
        for leaf, where in _leaves(parameter.node, (number,)):
            if not isinstance(leaf.assumption, (TensorInput, UnusedTensor)):
                continue
            others = [n for n in plain if _could_be(leaf.assumption, weights.tensors[n])]
            elsewhere = bool(weights.state.watched)
            if leaf.index in captured.weights_given:  # a fact says which one it has to be
                others, elsewhere = [], False
            is_written = leaf.index in written.in_arguments
            paths = written.weights if is_written else written.in_weights
            apart = [numbers[path] for path in paths if path in numbers]
            if leaf.index not in written.arguments:
                apart = []
            yield GivenTensor(leaf.label, where, tuple(others), elsewhere, tuple(apart), is_written)


def _leaves(node: Node, where: tuple[object, ...]) -> Iterator[tuple[Leaf, tuple[object, ...]]]:
    """The flattened arguments of a parameter, each with where a call has it."""
    match node:
        case Leaf():
            yield node, where
        case Items(keys=keys, children=children):
            for key, child in zip(keys, children, strict=True):
                yield from _leaves(child, (*where, key))
        case Tree(children=children):
            yield from ((leaf, (*where, Flat(n))) for n, leaf in enumerate(children))
        case _:
            assert_never(node)


def _value_at(where: Sequence[object], value: Any) -> object:
    for key in where:
        flat = isinstance(key, Flat)
        value = torch_compat.flatten_tree(value)[0][key.number] if flat else value[key]
    return value


def _could_be(assumption: Assumption, tensor: torch.Tensor) -> bool:
    """Whether a tensor of the model passes the checks of an argument."""
    match assumption:
        case TensorInput(dtype, device, sizes, kind=kind):
            rank = len(sizes)
            fits = type(tensor) is kind and all(
                now == size
                for now, size in zip(tensor.shape, sizes, strict=False)
                if isinstance(size, int)
            )
        case UnusedTensor(dtype, device, rank):
            fits = True
        case _:
            return False
    return fits and (tensor.dtype, tensor.device, tensor.dim()) == (dtype, device, rank)


def _one_object(label: str, path: str) -> InputError:
    error = InputError(
        f"argument {label} is the model's {path}, and was another tensor when the model was traced",
        hint=f"pass {label}.clone(), or trace with it",
    )
    error.places = frozenset()
    return error


def _shared(given: GivenTensor, path: str) -> InputError:
    target = given.label if given.written else path
    return InputError(
        f"argument {given.label} shares memory with the model's {path}, and the model writes to {target}; compiled pieces expect "
        "that it does not",
        hint=f"pass {given.label}.clone()",
    )


# --- memory ----------------------------------------------------------------------------------------


class _Spans:
    """The memory of some tensors, from the first to the last element of each."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        spans = sorted(torch_compat.memory_span(each) for each in tensors)
        self._starts = [start for start, _ in spans]
        self._ends = list(accumulate((end for _, end in spans), max))

    def reached_by(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` has memory in common with one of them."""
        start, end = torch_compat.memory_span(tensor)
        before = bisect_left(self._starts, end)
        return start < end and before > 0 and self._ends[before - 1] > start
