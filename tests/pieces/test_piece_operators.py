"""Operators that torch does not bring, in pieces that are kept: what of them is in the key, and what is never kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import piecework
from piecework.runtime.store.surroundings import operator_facts

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


def test_an_operator_that_is_called_by_name_counts_with_schema_and_results() -> None:
    target = getattr(torch.ops, NAMESPACE).opaque
    rows, reason = operator_facts(graph_of(target.default, result=torch.empty(2, 3)))
    assert reason == "" and f"{NAMESPACE}::opaque(Tensor x) -> Tensor" in rows
    transposed = torch.empty(3, 2).T  # another fake implementation: Inductor relies on the strides
    assert operator_facts(graph_of(target.default, result=transposed))[0] != rows
    assert operator_facts(graph_of(target, result=torch.empty(2, 3)))[0] == rows  # any overload


def test_what_is_compiled_with_its_body_is_not_kept(library: torch.library.Library) -> None:
    library.define("implicit(Tensor x) -> Tensor")
    library.impl("implicit", lambda x: x * 2, "CompositeImplicitAutograd")
    for name in ("implicit", "kernel"):
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        rows, reason = operator_facts(graph_of(op))
        assert rows == "" and name in reason and "body" in reason


def test_a_higher_order_operator_that_looks_things_up_is_not_kept() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation as looks

    assert "triton_kernel_wrapper_mutation" in operator_facts(graph_of(looks))[1]
    assert operator_facts(graph_of(torch.ops.higher_order.cond))[1] == ""


def like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def facts_of(
    library: torch.library.Library,
    name: str,
    fake: Callable[..., object] | None = None,
    tags: tuple[torch.Tag, ...] = (),
    meta: Callable[..., object] | None = None,
) -> tuple[str, str]:
    library.define(f"{name}(Tensor x) -> Tensor", tags=tags)
    library.impl(name, lambda x: x.clone(), "CPU")
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if meta is not None:
        library.impl(name, meta, "Meta")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    rows, reason = operator_facts(graph_of(op, result=torch.empty(2)))
    return rows.replace(name, "op"), reason


def test_tags_and_the_fake_body_are_an_operators_identity() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0] // 2)

    found, layouts = [], [torch.Tag.needs_fixed_stride_order, torch.Tag.flexible_layout]
    for fake, tags in ((like, ()), (like, ()), (halves, ()), *((like, (tag,)) for tag in layouts)):
        with torch.library._scoped_library(NAMESPACE, "FRAGMENT") as library:
            rows, reason = facts_of(library, "tagged", fake, tags)
            assert rows and not reason
            found.append(rows)
    assert found[0] == found[1] and len(set(found)) == 4


def test_an_operator_whose_fake_or_body_can_not_be_read_is_not_kept(
    library: torch.library.Library,
) -> None:
    lock = threading.Lock()

    def locked(x: torch.Tensor) -> torch.Tensor:
        with lock:
            return torch.empty_like(x)

    assert "fake implementation" in facts_of(library, "none", meta=like)[1]
    assert "lock" in facts_of(library, "locked", fake=locked)[1]
    # Inductor runs an operator that it may fold, where all its operands are constants.
    assert "body" in facts_of(library, "folded", fake=like, tags=(torch.Tag.pointwise,))[1]


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
