"""Operators in torch's registry: whose one is, and which Python functions stand behind it."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton
from torch._ops import OpOverload

from piecework.code_objects import cells_of
from piecework.runtime.torch_compat.code.kernels import custom_op_function

_OF_TORCH = frozenset(
    {"aten", "prims", "prim", "inductor", "quantized", "_c10d_functional", "c10d_functional"}
)
# Of those, the ones to which torch itself adds nothing from Python.
_ONLY_CPP = frozenset({"aten", "prim", "quantized"})
_KEYS = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
    "CompositeImplicitAutograd",
    "Meta",
)


@dataclass(frozen=True, slots=True)
class PythonKernels:
    """The Python functions of an operator: its fake implementation (None if there is none to be seen), and its bodies by device."""

    fake: Callable[..., object] | None = None
    bodies: dict[str, Callable[..., object]] = field(default_factory=dict)


def is_torch_operator(op: OpOverload) -> bool:
    """Whether torch itself brings ``op``; one that a program adds to torch's namespaces is the program's."""
    if op.namespace not in _OF_TORCH:
        return False
    if op.namespace not in _ONLY_CPP:
        return True
    overload = "" if op._overloadname == "default" else f".{op._overloadname}"
    return f"{op._schema.name}{overload}" not in torch.library._defs


def kinds_of_kernels(op: OpOverload) -> list[str]:
    """The dispatch keys, of those that decide how ``op`` is traced, that have a kernel."""
    name = op.name()
    return [key for key in _KEYS if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)]


def python_kernels(op: OpOverload) -> PythonKernels:
    """The functions given to ``torch.library.custom_op`` and ``register_fake``; those given to ``Library.impl`` can't be found."""
    defined = OPDEFS.get(op._schema.name)
    if defined is not None:
        bodies = {str(k): custom_op_function(v) for k, v in defined._backend_fns.items()}
        bodies["as defined"] = defined._init_fn
        return PythonKernels(_unwrapped(defined._abstract_fn), bodies)
    return PythonKernels(_unwrapped(_registered_fake(op)))


def _registered_fake(op: OpOverload) -> Callable[..., object] | None:
    kernel = getattr(singleton.find(op._schema.name).fake_impl, "kernel", None)
    return getattr(kernel, "func", None)


def _unwrapped(fake: Callable[..., object] | None) -> Callable[..., object] | None:
    """The function that was registered, inside torch's own wrapper, which remembers whether it was called."""
    if isinstance(fake, types.FunctionType) and fake.__module__ == "torch.library":
        return cells_of(fake).get("func", fake)  # type: ignore[return-value]
    return fake


def shares_memory(args: tuple[object, ...], kwargs: dict[str, object], result: object) -> bool:
    """Whether what an operator returned lies in memory of its arguments, or of another of its results; lists are looked into, tuples in arguments too."""
    results = result if isinstance(result, tuple) else (result,)
    return bool(torch._C._any_output_is_alias_to_input_or_output(args, kwargs, results))
