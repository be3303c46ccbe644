"""A machine whose matrix products round by their shape, as other CPUs do: a pytest plugin (``-p other_kernels``).

Each product is off by a unit in the last place or none, as its shape says, so that a comparison bit for bit
of runs at different shapes fails on every machine.
"""

from __future__ import annotations

import zlib

import torch

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_FLOATS = (torch.float32, torch.float64)


def _nudged(result: torch.Tensor, *operands: object) -> torch.Tensor:
    if result.dtype not in _FLOATS:
        return result
    shapes = repr([tuple(each.shape) for each in operands if isinstance(each, torch.Tensor)])
    steps = zlib.crc32(shapes.encode()) % 3 - 1
    return result.mul_(1 + steps * torch.finfo(result.dtype).eps)


def pytest_configure() -> None:
    """Puts the nudged products in the place of the CPU's own, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")
    for name in _PRODUCTS:
        for overload in (name, f"{name}.out"):
            kernel = torch.library.get_kernel(f"aten::{overload}", "CPU")

            def nudged(keys, *args, kernel=kernel, **kwargs):  # type: ignore[no-untyped-def]
                return _nudged(kernel.call_boxed(keys, *args, **kwargs), *args)

            library.impl(overload, nudged, "CPU", with_keyset=True, allow_override=True)
    torch._other_kernels = library  # kept alive
