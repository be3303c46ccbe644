"""A graph's fake values again, in a shape environment of their own. In: fake values of a trace. Out: values that may be computed with, and that leave no guard, symbol or range in the trace.

Every symbol of the copy has a number behind it, so that operators can be run whose Python asks for sizes; whether one of them was
fixed on the way is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from piecework.runtime.torch_compat.tensors import storage_id
from piecework.runtime.torch_compat.trace.dynamo import quiet_trial
from piecework.runtime.torch_compat.trace.shapes import recorded_guards, symbol_hints

_TRIED = (5040, 2520, 1680, 840, 720, 360, 240, 120, 60, 24, 12, 9, 7, 6, 5, 4, 3, 2, 1)


def size_expr(size: object) -> Any:
    """A size as an expression of sympy."""
    import sympy

    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


class Refaked:
    """A fresh fake mode, and the values of a trace in it.

    Args:
        values: fake tensors and symbolic numbers of one trace.
        batch: the symbols of the batch size.
        apart: give these a number that differs from every fixed size, where the trace's guards allow it; else the example's.

    Attributes:
        mode: the fake mode.
    """

    def __init__(self, values: Sequence[object], batch: frozenset[str], *, apart: bool) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._env = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self.mode.cache_enabled = (
            False  # no other mode has these symbols: entries cost more than they save
        )
        self._symbols: dict[Any, Any] = {}  # sympy symbols, of the trace and ours
        self._memory: dict[int, int] = {}  # ours → the trace's, as a negative number
        sizes = [size for value in values for size in _sizes(value)]
        for symbol, number in _numbers(sizes, batch if apart else frozenset()).items():
            self._symbols[symbol] = self._new(str(symbol), number)

    def _new(self, name: str, number: int) -> Any:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        return self._env.create_symbol(
            number,
            ConstantSource(f"rows_{name}"),
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            positive=True if number >= 0 else None,
            do_not_specialize_zero_one=True,
        )

    def name_of(self, symbol: str) -> str | None:
        """What a symbol of the trace is called here; None if no value holds it."""
        return next((str(new) for old, new in self._symbols.items() if str(old) == symbol), None)

    def fixed(self, batch: frozenset[str]) -> bool:
        """Whether the batch size is not free any more: an operator asked for the number, or another size had to equal it."""
        ours = {new for old, new in self._symbols.items() if str(old) in batch}
        changed = {new: self._env.replace(new) for new in self._symbols.values()}
        return any(
            found != new and (new in ours or ours & found.free_symbols)
            for new, found in changed.items()
        )

    def value(self, value: object) -> object:
        """A fake tensor or symbolic number of the trace, here; `memory_of` knows which ones shared memory.

        Raises:
            TypeError: it is a tensor of another layout than strided, or a symbolic float.
        """
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            raise TypeError(f"a {type(value).__name__} is passed per call")
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout != torch.strided:
            raise TypeError(f"a tensor of layout {value.layout}")
        sizes = [self._size(each) for each in value.shape]
        strides = [self._size(each) for each in value.stride()]
        offset = self._size(value.storage_offset())
        reach = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        empty = any(type(each) is int and each == 0 for each in sizes)
        with self.mode:
            memory = torch.empty(
                offset + (0 if empty else reach), dtype=value.dtype, device=value.device
            )
            made = memory.as_strided(sizes, strides, offset)
        self._memory[storage_id(made)] = -storage_id(value)
        return made

    def memory_of(self, tensor: torch.Tensor) -> int:
        """A number that tensors share if they share memory, here or in the trace."""
        found = storage_id(tensor)
        return self._memory.get(found, found)

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that the graph holds, as a fake one."""
        from torch._subclasses.fake_tensor import FakeTensor

        if isinstance(tensor, FakeTensor):
            return self.value(tensor)  # type: ignore[return-value]
        return self.mode.from_tensor(tensor, static_shapes=True)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        for symbol in expr.free_symbols:
            if symbol not in self._symbols:
                self._symbols[symbol] = self._new(str(symbol), 3)
        expr = expr.xreplace(self._symbols)
        return int(expr) if expr.is_number else self._env.create_symintnode(expr, hint=None)

    @contextmanager
    def watching(self, run: Callable[..., object]) -> Iterator[None]:
        """While active, ``run(operator, args, kwargs, call)`` stands where each operator runs; ``call()`` runs it.

        Composite operators are taken apart first, and nothing is computed on data. Autocast and gradient mode are restored.
        """
        from torch._dispatch.python import enable_python_dispatcher
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                return run(func, args, kwargs or {}, lambda: func(*args, **(kwargs or {})))

        # What torch reports is caught and told elsewhere.
        with quiet_trial(), self.mode, torch.no_grad(), enable_python_dispatcher(), Watch():
            yield


def _sizes(value: object) -> list[object]:
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return [*value.shape, *value.stride(), value.storage_offset()]
    return [value]


def _numbers(sizes: Sequence[object], batch: frozenset[str]) -> dict[Any, int]:
    """A number for each symbol: the trace's own, or for the batch one that is no fixed size, if the guards hold for it."""
    found: dict[Any, int] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt):
            hints = symbol_hints(size)
            for symbol in size.node.expr.free_symbols:
                found.setdefault(symbol, hints[str(symbol)])
    tests = [
        test for _, _, test in recorded_guards([s for s in sizes if isinstance(s, torch.SymInt)])
    ]
    fixed = {size for size in sizes if type(size) is int}
    chosen = [symbol for symbol in found if str(symbol) in batch]
    for number in _TRIED:
        trial = {**found, **dict.fromkeys(chosen, number)}
        values = {str(symbol): value for symbol, value in trial.items()}
        apart = number not in fixed and number not in (
            value for symbol, value in found.items() if symbol not in chosen
        )
        if apart and all(test(values) is not False for test in tests):
            return trial
    return found
