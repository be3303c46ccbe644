"""Symbolic sizes: their expressions as text, their ranges and guards, numbers for symbols."""

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch


def shape_env_of(values: Iterable[object]) -> Any:
    """The environment of the symbols in sizes and fake tensors; None where there is none."""
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None and mode.shape_env is not None:
            return mode.shape_env
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            symbolic = isinstance(size, (torch.SymInt, torch.SymFloat))
            env = getattr(size.node, "shape_env", None) if symbolic else None
            if env is not None:
                return env
    return None


def symbol_of(size: object) -> str | None:
    """The expression of a size that is still symbolic; None for a number, also a fixed one."""
    if not isinstance(size, torch.SymInt):
        return None
    expr = size.node.expr
    return None if expr.is_number else str(expr)


def example_of(size: object) -> int | None:
    """The number that the example had for a size; None if the trace was not told."""
    if not isinstance(size, torch.SymInt):
        return size if isinstance(size, int) else None
    return None if unbacked_symbols([size]) else number_at(size, symbol_hints(size))  # type: ignore[return-value]


def unbacked_symbols(values: Iterable[object]) -> frozenset[str]:
    """The symbols in sizes and fake tensors that no number of an example stands behind."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    found: set[str] = set()
    for value in values:
        if isinstance(value, (torch.Tensor, torch.SymInt)):
            found |= {str(symbol) for symbol in free_unbacked_symbols(value)}
    return frozenset(found)


def free_sizes(value: object) -> frozenset[object]:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    symbolic = (size.node.expr for size in sizes if isinstance(size, torch.SymInt))
    return frozenset().union(*(expr.free_symbols for expr in symbolic))


def settle_asserts(values: Iterable[object]) -> None:
    """Write sizes that were fixed since into what a trace asserts: nobody passes their symbols."""
    env = shape_env_of(values)
    deferred = getattr(env, "deferred_runtime_asserts", None) or {}
    for symbol, asserts in deferred.items():
        settled = [replace(each, expr=env.replace(each.expr)) for each in asserts]
        deferred[symbol] = [each for each in settled if each.expr != True]  # noqa: E712 - sympy's


def asserted_symbols(values: Iterable[object]) -> frozenset[object]:
    """Symbols with a number that Inductor's assertions on ``values``' unbacked symbols read."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    sizes = [v for v in values if isinstance(v, (torch.Tensor, torch.SymInt))]
    deferred = getattr(shape_env_of(sizes), "deferred_runtime_asserts", None) or {}
    asserted = [
        (unbacked, backed)
        for each in (each for assertions in deferred.values() for each in assertions)
        if (backed := each.expr.free_symbols - (unbacked := free_unbacked_symbols(each.expr)))
    ]
    bound = {s for size in sizes for s in free_unbacked_symbols(size)} if asserted else set()
    return frozenset().union(*(backed for unbacked, backed in asserted if unbacked <= bound))


def symbols_in(value: object) -> tuple[str, ...]:
    """The symbols in an integer, float or truth value of a trace; none in anything else."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ()
    found = getattr(value.node.expr, "free_symbols", ())
    return tuple(sorted(str(symbol) for symbol in found))


def number_at(value: object, sizes: Mapping[str, int]) -> bool | int | float | None:
    """The number that ``value`` is where symbols have ``sizes``; None if that does not follow."""
    if isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    expr: Any = value.node.expr
    found = expr.subs({each: sizes.get(str(each), each) for each in expr.free_symbols})
    if isinstance(value, torch.SymBool):
        return {"True": True, "False": False}.get(str(found))
    if not found.is_number:
        return None
    if isinstance(value, torch.SymFloat):
        return float(found)
    return int(found) if found.is_integer else None


def symbol_range(size: object) -> tuple[int | None, int | None]:
    """The smallest and largest value of a plain symbol; None where there is no bound."""
    if not isinstance(size, torch.SymInt):
        return None, None
    found = getattr(size.node.shape_env, "var_to_range", {}).get(size.node.expr)
    bounds = (None, None) if found is None else (found.lower, found.upper)
    # Those that stand for "unlimited" are infinities, or integers close to the largest that torch can hold.
    whole = (b if getattr(b, "is_Integer", type(b) is int) else None for b in bounds)
    return tuple(None if b is None or abs(int(b)) >= 2**62 else int(b) for b in whole)  # type: ignore[return-value]


def symbol_hints(size: object) -> dict[str, int]:
    """The symbols in a size and what the example inputs had for them; 2 where nothing is known."""
    if not isinstance(size, torch.SymInt):
        return {}
    known = size.node.shape_env.backed_var_to_val
    return {str(s): int(known.get(s, 2)) for s in size.node.expr.free_symbols}


def traced_size(size: object) -> object:
    if not isinstance(size, (torch.SymInt, torch.SymFloat)):
        return size
    expr = size.node.expr
    if not expr.is_number:
        return expr
    return int(expr) if isinstance(size, torch.SymInt) else float(expr)


def traced_item(fake: object) -> torch.SymInt | torch.SymFloat | None:
    """``item()`` of a traced argument, if it was looked at: torch guards a CPU number's symbol."""
    memo = getattr(fake, "item_memo", None)
    return memo if isinstance(memo, (torch.SymInt, torch.SymFloat)) else None


def with_symbol(value: object, symbol: str, size: int) -> object:
    """``value`` with ``symbol`` replaced by ``size``; strides and storage offset are kept."""
    if isinstance(value, torch.SymInt):
        return _size_with(value, symbol, size)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    sizes = [_size_with(each, symbol, size) for each in value.shape]
    strides = [_size_with(each, symbol, size) for each in value.stride()]
    offset = _size_with(value.storage_offset(), symbol, size)
    before = (*value.shape, *value.stride())
    if all(a is b for a, b in zip((*sizes, *strides), before, strict=True)):
        return value
    empty = any(type(each) is int and each == 0 for each in sizes)
    reach = 0 if empty else 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    fake_mode = getattr(value, "fake_mode", None)
    with contextlib.nullcontext() if fake_mode is None else fake_mode:
        storage = torch.empty(offset + reach, dtype=value.dtype, device=value.device)
        return storage.as_strided(sizes, strides, offset)


def _size_with(value: object, symbol: str, size: int) -> object:
    if not isinstance(value, torch.SymInt):
        return value
    expr = value.node.expr
    replaced = expr.subs({each: size for each in expr.free_symbols if str(each) == symbol})
    if replaced.is_number:
        return int(replaced)
    if replaced == expr:
        return value
    return value.node.shape_env.create_symintnode(replaced, hint=None)


def is_traced_contiguous(fake: torch.Tensor) -> bool:
    """Whether the recorded strides are those of a contiguous tensor for every size."""
    expected: object = 1
    for size, stride in reversed(list(zip(fake.shape, fake.stride(), strict=True))):
        if traced_size(stride) != expected and traced_size(size) != 1:
            return False
        expected = expected * traced_size(size)  # type: ignore[operator]
    return True


def guards_on(
    sizes: Sequence[object], known: Collection[str], ranged: Collection[str]
) -> tuple[object, ...]:
    """What a trace relied on or asserts of ``known`` symbols, beyond ranges of ``ranged`` ones."""
    env = shape_env_of(sizes)
    found: dict[object, None] = {}
    asserted = getattr(env, "deferred_runtime_asserts", {}).values()
    for guard in (*getattr(env, "guards", ()), *(each for every in asserted for each in every)):
        expr = env.simplify(guard.expr)
        symbols = {str(symbol) for symbol in expr.free_symbols}
        if not symbols or not symbols.issubset(known):
            continue
        if not (symbols.issubset(ranged) and _follows_from_ranges(env, expr)):
            found[expr] = None
    return tuple(found)


def _follows_from_ranges(env: object, expr: object) -> bool:
    from torch.utils._sympy.value_ranges import bound_sympy

    try:
        bounds = bound_sympy(expr, env.var_to_range)  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    return bool(bounds.is_singleton() and bounds.lower)
