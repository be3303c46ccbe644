"""Kernels of the user's own: traced into Triton's higher-order operators, emitted, and run on the CPU by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fx_graphs import problems
from torch.fx.experimental.proxy_tensor import make_fx

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from piecework.codegen import generate_source  # noqa: E402


@triton.jit
def scale_kernel(x_ptr, out_ptr, size, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=inside) * factor, mask=inside)


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel that fills a buffer, and the same one on its own input, which another call reads."""
    kernel = torch.library.wrap_triton(scale_kernel)
    out = torch.zeros_like(x)
    kernel[(3,)](x, out, x.numel(), 2.5, BLOCK=4)
    kernel[(2,)](out, out, 8, -1.0, BLOCK=4)
    return out + x, out


def run_by_the_interpreter() -> None:
    """Let the operators launch the interpreted kernel: there may be no device to compile for."""
    for index, kernel in kernel_side_table.id_to_kernel.items():
        if kernel is scale_kernel:
            kernel_side_table.id_to_kernel[index] = InterpretedFunction(scale_kernel.fn)
            kernel_side_table.kernel_to_id.pop(kernel)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (scaled, "triton_kernel_wrapper_mutation"),
        (torch.func.functionalize(scaled), "triton_kernel_wrapper_functional"),
    ],
    ids=["mutation", "functional"],
)
def test_a_users_kernel_runs_as_in_the_interpreter(
    function: Callable[..., object], operator: str
) -> None:
    gm = make_fx(function, tracing_mode="fake")(torch.zeros(10))
    run_by_the_interpreter()
    source = generate_source(gm)
    assert source.code.count(f"torch.ops.higher_order.{operator}(") == 2
    inputs = [(torch.arange(10.0),), (torch.randn(10),)]
    assert problems(gm, source, *inputs) == [], source.code
    expected = inputs[0][0] * 2.5 * torch.tensor([-1.0] * 8 + [1.0] * 2)
    assert torch.equal(torch.fx.Interpreter(gm).run(inputs[0][0])[1], expected)
