"""Operators in torch's registry: whose one is, and which Python functions stand behind it."""

import inspect
import types
from collections.abc import Callable, Iterator, Sized

import torch
from torch._library.custom_ops import OPDEFS
from torch._library.simple_registry import singleton
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.code_objects import cells_of

_OF_TORCH = frozenset(
    {"aten", "prims", "prim", "inductor", "quantized", "_c10d_functional", "c10d_functional"}
)
# Of those, the ones to which torch itself adds nothing from Python.
_ONLY_CPP = frozenset({"aten", "prim", "quantized"})


#: The dispatcher's table of operator ``ns::op.overload``, as text to compare.
kernel_table = torch._C._dispatch_dump


def is_torch_operator(op: OpOverload) -> bool:
    """Whether torch brings ``op``; what a program adds to torch's namespaces is the program's."""
    if op.namespace not in _OF_TORCH:
        return False
    if op.namespace not in _ONLY_CPP:
        return True
    overload = "" if op._overloadname == "default" else f".{op._overloadname}"
    return f"{op._schema.name}{overload}" not in torch.library._defs


def fake_of(op: OpOverload) -> Callable[..., object] | None:
    """The function given to ``register_fake``, without torch's wrapper; None where unseen."""
    defined = OPDEFS.get(op._schema.name)
    kernel = getattr(singleton.find(op._schema.name).fake_impl, "kernel", None)
    fake = getattr(kernel, "func", None) if defined is None else defined._abstract_fn
    if isinstance(fake, types.FunctionType) and fake.__module__ == "torch.library":
        return cells_of(fake).get("func", fake)  # type: ignore[return-value]
    return fake


def registered_kernels() -> Sized:
    return torch.library._impls


def custom_op_kernel(name: str, device_type: str) -> Callable[..., object] | None:
    """What a ``custom_op`` runs for plain tensors on a device now; None for other operators."""
    definition = OPDEFS.get(name)
    if definition is None or not definition._backend_fns:
        return None
    kernels = definition._backend_fns
    key = device_type if device_type in kernels else None
    if key in definition._disabled_kernel:
        return definition._init_fn
    return kernels.get(key)


def custom_op_function(kernel: Callable[..., object]) -> Callable[..., object]:
    """The user's function inside a result of `custom_op_kernel`."""
    # The wrappers of ``register_kernel`` close over what they wrap as ``fn``.
    while isinstance(kernel, types.FunctionType) and kernel.__module__ in _WRAPPED_BY:
        inner = cells_of(kernel).get("fn")
        if not callable(inner):
            break
        kernel = inner
    return inspect.unwrap(kernel)


_WRAPPED_BY = (
    *("torch._library.custom_ops", "torch._compile"),
    *("torch._dynamo.eval_frame", "torch._dynamo.decorators"),
)


def shares_memory(args: tuple[object, ...], kwargs: dict[str, object], result: object) -> bool:
    """Whether a result lies in memory of an argument, or of another result."""
    results = result if isinstance(result, tuple) else (result,)
    return bool(torch._C._any_output_is_alias_to_input_or_output(args, kwargs, results))


Before = Callable[[OpOverload, tuple[object, ...], dict[str, object]], None]
After = Callable[[OpOverload, tuple[object, ...], object], None]
BodyOf = Callable[[OpOverload, tuple[object, ...]], "Callable[..., object] | None"]


class OperatorWatch(TorchDispatchMode):
    """Tells of every operator, and of those that a user's operator runs inside."""

    # Higher-order operators (flex attention) go through; what they run inside is not looked at.
    supports_higher_order_operators = True

    def __init__(self, before: Before, body_of: BodyOf, after: After) -> None:
        super().__init__()
        self._before, self._body_of, self._after = before, body_of, after

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            return func(*args, **kwargs)
        self._before(func, args, kwargs)
        body = None if func.namespace == "aten" else self._body_of(func, args)
        if body is None:
            result = func(*args, **kwargs)
        else:
            with self:
                result = body(*args, **kwargs)
        self._after(func, args, result)
        return result


def written_operands(
    op: OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
) -> Iterator[torch.Tensor]:
    """The tensors that a call of ``op`` writes to, by its schema."""
    for index, argument in enumerate(op._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        for each in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(each, torch.Tensor):
                yield each
