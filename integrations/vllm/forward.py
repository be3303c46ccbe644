"""What vLLM calls in the place of a function that AOT compile made: sealed where it is kept, and past
Dynamo's code where that only fetches weights, a sixth of a decode step of a small model.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import hmac
import inspect
import os
import re
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx

from piecework.codegen.graph.origin import value_of
from piecework.errors import ArtifactError
from piecework.runtime import torch_compat
from piecework.runtime.store.files import signing_key
from piecework.runtime.torch_compat.dictionaries import dict_guard

_MARK = b"piecework"


def seal(file: str | os.PathLike[str]) -> None:
    """Add its digest, by the key if there is one, to the end of a file that vLLM wrote."""
    with open(file, "r+b") as kept:
        kept.write(_digest(kept.read()) + _MARK)


def require_sealed(file: str | os.PathLike[str]) -> None:
    """Raise `ArtifactError` unless the file is as `seal` left it."""
    data = Path(file).read_bytes()
    end = len(data) - len(_MARK) - hashlib.sha256().digest_size
    if end < 0 or not hmac.compare_digest(data[end:], _digest(data[:end]) + _MARK):
        raise ArtifactError(
            "it was changed, cut short, or written with another key", where=str(file)
        )


def _digest(data: bytes) -> bytes:
    key = signing_key()
    digest = hashlib.sha256(data) if key is None else hmac.new(key, data, hashlib.sha256)
    return digest.digest()


#: An argument of the model's forward, or one of its sizes.
Place = tuple[str, int | None]

_ARGUMENT = re.compile(r"L\['(\w+)'\]")
# Dynamo's code that does no more than this fetches what modules hold, calls the graph and packs its results.
_STEPS = re.compile(
    r"RESUME|NOP|CACHE|PRECALL|PUSH_NULL|CALL|COPY|SWAP|POP_TOP|COPY_FREE_VARS|BINARY_SUBSCR|BINARY_OP"
    r"|(LOAD|STORE|DELETE)_FAST\w*|LOAD_(CONST|SMALL_INT|GLOBAL|ATTR)|BUILD_(LIST|TUPLE)|LIST_EXTEND|RETURN_VALUE"
)
_ATTRIBUTES = frozenset(
    {
        *("_modules", "_parameters", "_buffers", "layer_name", "LayerName"),
        *("cpu_linear", "__closure__", "cell_contents", "handler_tensor"),
        *("call_size", "record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit"),
    }
)


def places(graph: torch.fx.GraphModule) -> tuple[Place | None, ...]:
    """Which argument, or size of one, each input of Dynamo's ``graph`` is; None for all others."""
    nodes = graph.graph.find_nodes(op="placeholder")
    sources = torch_compat.placeholder_sources(graph)
    sizes: dict[str, Place] = {}
    found: list[Place | None] = []
    for node, source in zip(nodes, sources, strict=True):
        match, value = _ARGUMENT.fullmatch(source), value_of(node)
        found.append(None if match is None or isinstance(value, torch.SymInt) else (match[1], None))
        if match is not None and isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                sizes.setdefault(str(size), (match[1], dim))
    return tuple(
        sizes.get(str(value_of(node))) if isinstance(value_of(node), torch.SymInt) else each
        for node, each in zip(nodes, found, strict=True)
    )


class Forward:
    """An AOT-compiled function, called past Dynamo's code until the model is written to."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._model: object = None
        self._run: Callable[..., object] = compiled
        self._unwritten: Callable[[], bool] = bool
        self._waited, self._patience = 0, 1
        self._problem = _problem(compiled.fn.__code__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __call__(self, model: object, *args: object, **kwargs: object) -> object:
        if self._unwritten() and model is self._model:
            return self._run(*args, **kwargs)
        self._unwritten, self._run, self._waited = bool, self._compiled, self._waited + 1
        if self._problem or self._waited < self._patience:
            return self._compiled(model, *args, **kwargs)
        self._waited, self._patience = 0, 2 * self._patience  # whoever writes often is left alone
        return self._learn(model, args, kwargs)

    def save_compiled_function(self, path: str) -> None:
        """Keep it, with a digest."""
        _drop_closure(self._compiled._artifacts)
        self._compiled.save_compiled_function(path)
        seal(path)

    def _learn(self, model: Any, args: Sequence[object], kwargs: dict[str, object]) -> object:
        """Call Dynamo's code, which shows what the graph gets and what becomes of its results."""
        unwritten = dict_guard(list(_dictionaries(model))) or bool
        unwritten()  # it notes the dictionaries in its first call
        served = self._compiled._artifacts.compiled_fn
        run, heard = served.run, []

        def hearing(*inputs: object) -> Any:
            heard.append((inputs, run(*inputs)))
            return heard[-1][1]

        served.run = hearing
        try:
            result = self._compiled(model, *args, **kwargs)
        finally:
            served.run = run
        try:
            ((inputs, outputs),) = heard
            at = [each is result for each in outputs].index(True)
            self._run = _straight(self._compiled.fn, served, inputs, at)
        except ValueError as error:
            self._problem = str(error)
        else:
            self._model, self._unwritten = model, unwritten
        return result


def _drop_closure(artifacts: Any) -> None:
    """Leave out what the traced function closes over: pickle may not find it by its name."""
    env = artifacts.runtime_env
    steps = dis.get_instructions(env.bytecode)
    if not any(step.opcode in dis.hasfree or step.opname == "MAKE_FUNCTION" for step in steps):
        empty = tuple(types.CellType(None) for _ in env.closure or ())
        artifacts.runtime_env = dataclasses.replace(env, closure=empty or None)


def _problem(code: Any) -> str:
    """What Dynamo's code does beside of fetching, calling and packing; "" if nothing."""
    for step in dis.get_instructions(code):
        if not _STEPS.fullmatch(step.opname):
            return f"it has {step.opname}"
        if step.opname == "LOAD_ATTR" and step.argval not in _ATTRIBUTES:
            return f"it reads {step.argval}"
    return ""


def _dictionaries(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Those that such code reads: modules', and of what their functions close over."""
    for module in model.modules():
        yield from (module.__dict__, module._modules, module._parameters, module._buffers)
        functions = [f for f in module.__dict__.values() if isinstance(f, types.FunctionType)]
        for cell in (cell for function in functions for cell in function.__closure__ or ()):
            yield from filter(None, [getattr(cell.cell_contents, "__dict__", None)])


def _straight(fn: Any, served: Any, inputs: Sequence[object], at: int) -> Callable[..., object]:
    """The model's forward by the stitched function, whose result ``at`` it is."""
    call, held, passed = served.call, [], []
    if call.program.range_table is not None:
        raise ValueError("pieces are compiled for several ranges")
    for i in call.others:
        place, value = served.places[i], inputs[i]
        if place is not None:
            passed.append(place[0] if place[1] is None else f"{place[0]}.size({place[1]})")
        elif served.paths[i] is not None or type(value).__name__ == "LayerName":
            passed.append(f"piecework_held[{len(held)}]")
            held.append(value)
        else:
            raise ValueError(f"it makes input {i}")
    names = list(inspect.signature(fn).parameters.values())[1:]
    bare = [each.replace(annotation=each.empty, default=each.empty) for each in names]
    takes = ", ".join(map(str, bare))
    space = {"piecework_run": call.bound_to(inputs), "piecework_held": tuple(held)}
    exec(f"def forward({takes}):\n    return piecework_run({', '.join(passed)})[{at}]", space)
    forward: Any = space["forward"]
    forward.__defaults__, forward.__kwdefaults__ = fn.__defaults__, fn.__kwdefaults__
    return forward
