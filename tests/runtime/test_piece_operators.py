"""Operators that torch does not bring, in pieces that are kept: what of them is in the key, and what is never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import piecework
from piecework.runtime.piece_operators import operator_facts

NAMESPACE = "piece_operators_test"


@torch.library.custom_op(f"{NAMESPACE}::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.triton_op(f"{NAMESPACE}::kernel", mutates_args=())
def kernel(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
        yield library


def graph_of(target: object, *args: object, result: torch.Tensor | None = None):  # type: ignore[no-untyped-def]
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    call = graph.call_function(target, (x, *args))
    call.meta["example_value"] = result
    graph.output((call,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_operators_of_torch_need_no_facts() -> None:
    assert operator_facts(graph_of(torch.ops.aten.relu.default)) == ("", "")
    assert operator_facts(graph_of(torch.relu)) == ("", "")
    assert operator_facts(graph_of(torch.ops.aten.relu)) == ("", "")


def test_an_operator_that_is_called_by_name_counts_with_schema_and_results() -> None:
    target = getattr(torch.ops, NAMESPACE).opaque
    rows, reason = operator_facts(graph_of(target.default, result=torch.empty(2, 3)))
    assert reason == "" and f"{NAMESPACE}::opaque(Tensor x) -> Tensor" in rows
    transposed = torch.empty(3, 2).T  # another fake implementation: Inductor relies on the strides
    assert operator_facts(graph_of(target.default, result=transposed))[0] != rows
    assert operator_facts(graph_of(target, result=torch.empty(2, 3)))[0] == rows  # any overload


def test_an_operator_inside_a_subgraph_counts() -> None:
    inner = graph_of(getattr(torch.ops, NAMESPACE).opaque.default, result=torch.empty(2))
    outer = graph_of(torch.relu)
    outer.body = inner
    assert "opaque" in operator_facts(outer)[0]


def test_what_is_compiled_with_its_body_is_not_kept(library: torch.library.Library) -> None:
    library.define("implicit(Tensor x) -> Tensor")
    library.impl("implicit", lambda x: x * 2, "CompositeImplicitAutograd")
    for name in ("implicit", "kernel"):
        rows, reason = operator_facts(
            graph_of(getattr(getattr(torch.ops, NAMESPACE), name).default)
        )
        assert rows == "" and name in reason and "body" in reason


def test_a_higher_order_operator_that_looks_things_up_is_not_kept() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    assert (
        "triton_kernel_wrapper_mutation"
        in operator_facts(graph_of(triton_kernel_wrapper_mutation))[1]
    )
    assert operator_facts(graph_of(torch.ops.higher_order.cond))[1] == ""


@pytest.mark.inductor
def test_another_body_under_the_same_name_is_another_program() -> None:
    """Neither this cache nor Inductor's, which knows operators by name alone, gives out the other body's code."""
    x = torch.randn(4, 8)

    def compiled(body: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        torch._dynamo.reset()
        with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
            library.define("body(Tensor x) -> Tensor")
            library.impl("body", body, "CompositeImplicitAutograd")
            model = piecework.compile(lambda x: getattr(torch.ops, NAMESPACE).body(x) - 1, (x,))
            return model(x)

    torch.testing.assert_close(compiled(lambda x: x * 2), x * 2 - 1)
    torch.testing.assert_close(compiled(lambda x: x * 3), x * 3 - 1)
