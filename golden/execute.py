"""Does the emitted function do what the graph does? In: a loaded case. Out: one sentence for each difference to `torch.fx.Interpreter`.

Results are compared exactly (type, dtype, shape, stride, bits), and so are aliasing and every change made to arguments and to the
graph's own tensors. Other state of the graph's modules is not watched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Argument, Target

from piecework.codegen import compile_execution_fn
from piecework.codegen.graph.structure import attribute_of
from piecework.codegen.stitch.inline import is_plain
from piecework.golden.cases import LoadedCase

_SEED = 20


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one run left behind; ``aliases`` says of each tensor which earlier one shares its memory or is itself."""

    result: object
    arguments: tuple[object, ...]
    state: dict[str, torch.Tensor]
    aliases: dict[str, tuple[str, str, int]]


class Interpreter(torch.fx.Interpreter):
    """`torch.fx.Interpreter` all the way down: graphs that are called are interpreted too.

    What FX writes as source for a called graph differs in places (``operator.setitem`` yields its first operand, ``operator.iadd`` of a
    number changes its operand), and some graphs it can't write at all.
    """

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
    problems: list[str] = []
    if not loaded.inputs:
        return ["inputs() gives nothing to run"]
    for number, arguments in enumerate(loaded.inputs):
        where = f"inputs[{number}]"
        try:
            with loaded.context(number):
                expected = _run(loaded.gm, Interpreter(loaded.gm).run, arguments)
        except Exception as error:  # noqa: BLE001 - whatever an operator raises is the finding
            problems.append(f"{where}: the interpreter fails: {_one_line(error)}")
            continue
        try:
            with loaded.context(number):
                actual = _run(loaded.gm, _emitted(loaded), arguments)
        except Exception as error:  # noqa: BLE001
            problems.append(f"{where}: the emitted function fails: {_one_line(error)}")
            continue
        problems += [f"{where}: {text}" for text in _compare(expected, actual)]
    return problems


def call_differences(loaded: LoadedCase) -> list[str]:
    """Call the captured model with every input: each tensor that it returns must be one that the graph returns.

    Its entry may have chosen another way through, such as the replay of a captured size with padding, so values may differ by rounding.
    """
    problems: list[str] = []
    for number, (arguments, call) in enumerate(zip(loaded.inputs, loaded.calls, strict=True)):
        where = f"inputs[{number}]"
        try:
            with loaded.context(number):
                graph = _run(loaded.gm, Interpreter(loaded.gm).run, arguments)
            with loaded.context(number):
                result = call()
        except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
            problems.append(f"{where}: the call fails: {_one_line(error)}")
            continue
        made = [tensor for _, tensor in _named(graph.result, "")]
        for name, tensor in _named(result, "result"):
            if not any(_close(tensor, each) for each in made):
                problems.append(f"{where}: {name} is none of what the graph returns")
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
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.find_nodes(op="get_attr"):
            value = attribute_of(module, str(node.target))
            if isinstance(value, torch.Tensor):
                yield f"{path}.{node.target}" if path else str(node.target), value


# --- comparison ------------------------------------------------------------------------------------


def _compare(expected: _Outcome, actual: _Outcome) -> Iterator[str]:
    yield from _unequal(expected.result, actual.result, "result")
    yield from _unequal(expected.arguments, actual.arguments, "arguments afterwards")
    yield from _unequal(expected.state, actual.state, "the graph's tensors afterwards")
    for name, alias in expected.aliases.items():
        found = actual.aliases.get(name)
        if found is not None and found != alias:
            yield f"{name} aliases {_alias_text(found)} and should alias {_alias_text(alias)}"


def _unequal(expected: object, actual: object, where: str) -> Iterator[str]:
    kind, kind_now = _kind(expected), _kind(actual)
    if kind is not kind_now:
        yield f"{where} is a {kind_now.__qualname__} and should be a {kind.__qualname__}"
    elif isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor)
        yield from _unequal_tensors(expected, actual, where)
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, (list, tuple))
        if len(expected) != len(actual):
            yield f"{where} has {len(actual)} elements and should have {len(expected)}"
            return
        for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
            yield from _unequal(left, right, f"{where}[{index}]")
    elif isinstance(expected, dict):
        assert isinstance(actual, dict)
        if list(expected) != list(actual):
            yield f"{where} has the keys {list(actual)!a} and should have {list(expected)!a}"
            return
        for key in expected:
            yield from _unequal(expected[key], actual[key], f"{where}[{key!a}]")
    elif not _same_value(expected, actual):
        yield f"{where} is {actual!a} and should be {expected!a}"


def _kind(value: object) -> type:
    """The type, with FX's immutable containers as the plain ones that they stand for."""
    if type(value) is immutable_list:
        return list
    return dict if type(value) is immutable_dict else type(value)


def _same_value(expected: object, actual: object) -> bool:
    if isinstance(expected, float) and isinstance(actual, float) and math.isnan(expected):
        return math.isnan(actual)
    if isinstance(expected, float) and isinstance(actual, float):
        return expected == actual and math.copysign(1, expected) == math.copysign(1, actual)
    return expected is actual or bool(expected == actual)


def _unequal_tensors(expected: torch.Tensor, actual: torch.Tensor, where: str) -> Iterator[str]:
    for what in ("dtype", "device", "layout", "shape", "requires_grad"):
        left, right = getattr(expected, what), getattr(actual, what)
        if left != right:
            yield f"{where} has {what} {right} and should have {left}"
            return
    if expected.layout == torch.strided and expected.stride() != actual.stride():
        yield f"{where} has strides {actual.stride()} and should have {expected.stride()}"
    elif not _equal_bits(expected, actual):
        yield f"{where} has other values"


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


# --- aliasing --------------------------------------------------------------------------------------


def _aliases(
    result: object, arguments: object, state: dict[str, torch.Tensor]
) -> dict[str, tuple[str, str, int]]:
    """For each tensor: the first one that it shares memory with, the first one that it is, and its offset."""
    storages: dict[int, str] = {}
    objects: dict[int, str] = {}
    found: dict[str, tuple[str, str, int]] = {}
    groups = (("state", state), ("arguments", arguments), ("result", result))
    for name, tensor in [pair for group, value in groups for pair in _named(value, group)]:
        if tensor.layout != torch.strided:
            continue
        storage = storages.setdefault(tensor.untyped_storage()._cdata, name)
        same = objects.setdefault(id(tensor), name)
        found[name] = (storage, same, int(tensor.storage_offset()))
    return found


def _named(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _named(each, f"{name}[{index}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _named(each, f"{name}[{key!a}]")


def _alias_text(alias: tuple[str, str, int]) -> str:
    storage, same, offset = alias
    return f"the memory of {storage} at {offset} (the object of {same})"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
