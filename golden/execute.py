"""Says where the emitted function does something else than `torch.fx.Interpreter` of its graph, by running both.

Results are compared exactly (type, dtype, shape, strides, bits), and so are aliasing and every change made to arguments
and to the graph's own tensors. Other state of the graph's modules is not watched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Argument, Target

from piecework.codegen import compile_execution_fn
from piecework.codegen.graph.structure import attribute_of
from piecework.codegen.stitch.inline import is_plain
from piecework.golden.cases import LoadedCase

_SEED = 20
_PLAIN: dict[type, type] = {immutable_list: list, immutable_dict: dict}


class _Outcome(NamedTuple):
    """What one run left behind; ``aliases`` says of each tensor which earlier one shares its memory or is itself."""

    result: object
    arguments: tuple[object, ...]
    state: dict[str, torch.Tensor]
    aliases: dict[str, tuple[str, str, int]]


class Interpreter(torch.fx.Interpreter):
    """`torch.fx.Interpreter` all the way down: what FX writes as source for a called graph differs in places."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False

    def call_module(
        self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, object]
    ) -> object:
        return run_module(attribute_of(self.module, str(target)), *args, **kwargs)


def run_module(module: object, /, *args: object, **kwargs: object) -> object:
    """Call ``module``; a graph without hooks or an unusual signature is interpreted."""
    if not isinstance(module, torch.fx.GraphModule) or not is_plain(module):
        assert callable(module)
        return module(*args, **kwargs)
    placeholders = module.graph.find_nodes(op="placeholder")
    given = list(args)
    for node in placeholders[len(args) :]:
        if node.target in kwargs:
            given.append(kwargs.pop(str(node.target)))
        elif node.args:
            given.append(node.args[0])
    if kwargs or len(given) != len(placeholders):
        raise TypeError(f"a graph of {len(placeholders)} inputs is called with others")
    return Interpreter(module).run(*given)


def differences(loaded: LoadedCase) -> list[str]:
    """Run every input through both; an input that the interpreter itself cannot run is a difference too."""
    if not loaded.inputs:
        return ["inputs() gives nothing to run"]
    problems: list[str] = []
    sides = {
        "the interpreter": Interpreter(loaded.gm).run,
        "the emitted function": _emitted(loaded),
    }
    for number, arguments in enumerate(loaded.inputs):
        outcomes = []
        for side, function in sides.items():
            try:
                with loaded.context(number):
                    outcomes.append(_run(loaded.gm, function, arguments))
            except Exception as error:  # noqa: BLE001 - whatever an operator raises is the finding
                problems.append(f"inputs[{number}]: {side} fails: {_one_line(error)}")
                break
        else:
            problems += [f"inputs[{number}]: {text}" for text in _compare(*outcomes)]
    return problems


def call_differences(loaded: LoadedCase) -> list[str]:
    """Call the captured model with every input: each tensor that it returns must be one that the graph returns.

    Its entry may have chosen another way through, such as a replay with padding, so values may differ by rounding.
    """
    problems: list[str] = []
    for number, (arguments, call) in enumerate(zip(loaded.inputs, loaded.calls, strict=True)):
        try:
            with loaded.context(number):
                graph = _run(loaded.gm, Interpreter(loaded.gm).run, arguments)
            with loaded.context(number):
                result = call()
        except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
            problems.append(f"inputs[{number}]: the call fails: {_one_line(error)}")
            continue
        made = [tensor for _, tensor in _tensors(graph.result, "")]
        for name, tensor in _tensors(result, "result"):
            if not any(_close(tensor, each) for each in made):
                problems.append(f"inputs[{number}]: {name} is none of what the graph returns")
    return problems


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    same = left.shape == right.shape and left.dtype == right.dtype
    return same and torch.allclose(left, right, rtol=1e-5, atol=1e-5, equal_nan=True)


def _emitted(loaded: LoadedCase) -> Callable[..., object]:
    """The emitted function, called like the graph: with its bound placeholders in their places."""
    placeholders = [node.name for node in loaded.gm.graph.find_nodes(op="placeholder")]
    rows = dict(zip(loaded.bound, loaded.source.module.bound, strict=True))
    names = loaded.source.submod_names
    callables = {name: partial(run_module, attribute_of(loaded.gm, name)) for name in names}

    def call(*arguments: object) -> object:
        given = list(zip(placeholders, arguments, strict=False))
        bound = {rows[name].name: value for name, value in given if name in rows}
        function = compile_execution_fn(
            loaded.code, callables, names, loaded.source.consts, bound=bound  # type: ignore[arg-type]
        )
        passed = [value for name, value in given if name not in rows]
        return function(*passed, *arguments[len(given) :])

    return call


def _run(
    gm: torch.fx.GraphModule, function: Callable[..., object], arguments: Sequence[object]
) -> _Outcome:
    """Run on copies of the arguments, and put the graph's tensors back as they were."""
    state = dict(_tensors_of(gm))
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    copies = copy.deepcopy(tuple(arguments))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            result = function(*copies)
        after = {name: tensor.detach().clone() for name, tensor in state.items()}
        return _Outcome(result, copies, after, _aliases(result, copies, state))
    finally:
        with torch.no_grad():
            for name, tensor in state.items():
                if not _equal_bits(tensor, before[name]):
                    tensor.copy_(before[name])


def _tensors_of(gm: torch.fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers and plain tensors that the graph or a submodule reads."""
    yield from gm.named_parameters()
    yield from gm.named_buffers()
    for path, module in gm.named_modules():
        nodes = module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ()
        for node in nodes:
            value = attribute_of(module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(value, torch.Tensor):
                yield f"{path}.{node.target}" if path else str(node.target), value


def _compare(expected: _Outcome, actual: _Outcome) -> Iterator[str]:
    yield from _unequal(expected.result, actual.result, "result")
    yield from _unequal(expected.arguments, actual.arguments, "arguments afterwards")
    yield from _unequal(expected.state, actual.state, "the graph's tensors afterwards")
    for name, alias in expected.aliases.items():
        found = actual.aliases.get(name)
        if found is not None and found != alias:
            is_, should = (
                f"the memory of {storage} at {offset} (the object of {same})"
                for storage, same, offset in (found, alias)
            )
            yield f"{name} aliases {is_} and should alias {should}"


def _unequal(expected: object, actual: object, where: str) -> Iterator[str]:
    pairs = zip_longest(_leaves(expected, where), _leaves(actual, where))
    for (name, left), (_, right) in pairs:
        why = _why_unequal(left, right)
        if why:
            yield f"{name} {why}"
            if isinstance(left, _Container):
                return  # what is in it does not stand side by side


class _Container(NamedTuple):
    kind: type
    keys: tuple[object, ...]


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Every list, tuple and dict, by type and keys, then what is in it; FX's containers as those that they stand for."""
    kind = _PLAIN.get(type(value), type(value))
    if isinstance(value, (list, tuple)):
        yield name, _Container(kind, tuple(range(len(value))))
        for index, each in enumerate(value):
            yield from _leaves(each, f"{name}[{index}]")
    elif isinstance(value, dict):
        yield name, _Container(kind, tuple(value))
        for key, each in value.items():
            yield from _leaves(each, f"{name}[{key!a}]")
    else:
        yield name, value


def _tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    for at, each in _leaves(value, name):
        if isinstance(each, torch.Tensor):
            yield at, each


def _why_unequal(expected: object, actual: object) -> str:
    kinds = [
        each.kind if isinstance(each, _Container) else type(each) for each in (expected, actual)
    ]
    if kinds[0] is not kinds[1]:
        return f"is a {kinds[1].__qualname__} and should be a {kinds[0].__qualname__}"
    if isinstance(expected, _Container) and isinstance(actual, _Container):
        if expected.keys != actual.keys:
            return f"has the keys {list(actual.keys)!a} and should have {list(expected.keys)!a}"
        return ""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        for what in ("dtype", "device", "layout", "shape", "requires_grad"):
            left, right = getattr(expected, what), getattr(actual, what)
            if left != right:
                return f"has {what} {right} and should have {left}"
        if expected.layout == torch.strided and expected.stride() != actual.stride():
            return f"has strides {actual.stride()} and should have {expected.stride()}"
        return "" if _equal_bits(expected, actual) else "has other values"
    if isinstance(expected, float) and isinstance(actual, float):
        nan = math.isnan(expected) and math.isnan(actual)
        signs = math.copysign(1, expected) == math.copysign(1, actual)
        same = nan or (expected == actual and signs)
    else:
        same = expected is actual or bool(expected == actual)
    return "" if same else f"is {actual!a} and should be {expected!a}"


def _equal_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal, with NaN equal to itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = left.detach(), right.detach()
    if left.layout != torch.strided:
        return torch.equal(left.to_dense(), right.to_dense())
    if left.dtype.is_floating_point or left.dtype.is_complex:
        return bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
    return torch.equal(left, right)


def _aliases(
    result: object, arguments: object, state: dict[str, torch.Tensor]
) -> dict[str, tuple[str, str, int]]:
    """For each tensor: the first one that it shares memory with, the first one that it is, and its offset."""
    storages: dict[int, str] = {}
    objects: dict[int, str] = {}
    found: dict[str, tuple[str, str, int]] = {}
    groups = (("state", state), ("arguments", arguments), ("result", result))
    for name, tensor in [pair for group, value in groups for pair in _tensors(value, group)]:
        if tensor.layout == torch.strided:
            storage = storages.setdefault(tensor.untyped_storage()._cdata, name)
            same = objects.setdefault(id(tensor), name)
            found[name] = (storage, same, int(tensor.storage_offset()))
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
