"""Says where the emitted function does something else than `torch.fx.Interpreter` of its graph, by running both.

Results are compared exactly (type, dtype, shape, strides, bits), and so are aliasing and every change made to arguments
and to the graph's own tensors. Other state of the graph's modules is not watched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

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


class Interpreter(torch.fx.Interpreter):
    """`torch.fx.Interpreter` all the way down."""

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
    """Run every input through both; one that the interpreter cannot run is a difference too."""
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
                with loaded.contexts[number]():
                    outcomes.append(_run(loaded.gm, function, arguments)[1])
            except Exception as error:  # noqa: BLE001 - whatever an operator raises is the finding
                problems.append(f"inputs[{number}]: {side} fails: {_one_line(error)}")
                break
        else:
            pairs = zip_longest(*outcomes, fillvalue=("", "nothing", "nothing"))
            unequal = next(((one, other) for one, other in pairs if one != other), None)
            if unequal is not None:
                (name, what, wanted), (_, _, found) = unequal
                problem = f"{name} has {what} {found} and should have {wanted}"
                problems.append(f"inputs[{number}]: {problem}")
    return problems


def call_differences(loaded: LoadedCase) -> list[str]:
    """Call the captured model with every input.

    Its entry may have chosen another way through, such as a replay with padding, so values may differ by rounding.
    """
    problems: list[str] = []
    for number, (arguments, call) in enumerate(zip(loaded.inputs, loaded.calls, strict=True)):
        try:
            with loaded.contexts[number]():
                graph, _ = _run(loaded.gm, Interpreter(loaded.gm).run, arguments)
            with loaded.contexts[number]():
                result = call()
        except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
            problems.append(f"inputs[{number}]: the call fails: {_one_line(error)}")
            continue
        made = [leaf for _, leaf in _leaves(graph, "") if isinstance(leaf, torch.Tensor)]
        for name, leaf in _leaves(result, "result"):
            if isinstance(leaf, torch.Tensor) and not any(_close(leaf, each) for each in made):
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


Fact = tuple[str, str, object]


def _run(
    gm: torch.fx.GraphModule, function: Callable[..., object], arguments: Sequence[object]
) -> tuple[object, list[Fact]]:
    """The result of a run on copies of the arguments, and all that can be seen of it."""
    state = dict(_tensors_of(gm))
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    copies = copy.deepcopy(tuple(arguments))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            result = function(*copies)
        memory: dict[object, str] = {}
        parts = {"the graph's": state, "an argument afterwards:": copies, "result": result}
        facts = [
            (name, *fact)
            for part, value in parts.items()
            for name, leaf in _leaves(value, part)
            for fact in _seen(leaf, name, memory)
        ]
        return result, facts
    finally:
        with torch.no_grad():
            for name, tensor in state.items():
                if _values(tensor) != _values(before[name]):
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


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Every list, tuple and dict, as its type and keys, then what is in it."""
    if isinstance(value, (list, tuple, dict)):
        keys = tuple(value) if isinstance(value, dict) else range(len(value))
        yield name, (_PLAIN.get(type(value), type(value)), tuple(keys))
        for key in keys:
            yield from _leaves(value[key], f"{name}[{key!a}]")  # type: ignore[call-overload]
    else:
        yield name, value


def _seen(leaf: object, name: str, memory: dict[object, str]) -> Iterator[tuple[str, object]]:
    """What can be seen of a value; of a tensor also the first one whose memory it shares."""
    yield "type", type(leaf)
    if not isinstance(leaf, torch.Tensor):
        yield "value", repr(leaf) if isinstance(leaf, float) else leaf  # NaN, and the sign of 0
        return
    for what in ("dtype", "device", "layout", "shape", "requires_grad"):
        yield what, getattr(leaf, what)
    if leaf.layout == torch.strided:
        yield "strides", leaf.stride()
        yield "offset", leaf.storage_offset()
        yield "the memory of", memory.setdefault(leaf.untyped_storage()._cdata, name)
        yield "the object of", memory.setdefault(("object", id(leaf)), name)
    yield "other values:", _values(leaf)


def _values(tensor: torch.Tensor) -> str:
    plain = tensor.detach()
    return repr((plain if plain.layout == torch.strided else plain.to_dense()).tolist())


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
