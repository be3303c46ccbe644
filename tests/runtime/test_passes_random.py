"""Random programs with writes through views: after all passes they return, and leave in their inputs, what they did before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._functorch.aot_autograd import aot_function, make_boxed_func

from piecework.runtime.passes import (
    CleanUpPass,
    DefunctionalizationPass,
    NoOpEliminationPass,
    PostGradPassManager,
)

aten = torch.ops.aten
# Weighted towards what is dangerous: an old value, whole or in part, that is read after a write.
STEPS = [
    "fresh",
    "view",
    *["part"] * 2,
    *["clone"] * 3,
    *["read"] * 2,
    *["fill"] * 4,
    "pair",
    "both",
]


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    library = torch.library.Library("random_passes", "FRAGMENT")
    library.define("fill(Tensor x, Tensor(a!) out) -> ()")
    library.define("pair(Tensor x, Tensor(a!) left, Tensor(b!) right) -> Tensor")

    def fill(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(out * 0.5 + x.sum())

    def pair(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        result = left.sum() + right.sum() + x
        left.add_(1.5)
        right.mul_(0.5)
        return result

    library.impl("fill", fill, "CompositeExplicitAutograd")
    library.impl("pair", pair, "CompositeExplicitAutograd")
    torch.library.register_fake("random_passes::fill", lambda x, out: None, lib=library)
    torch.library.register_fake(
        "random_passes::pair", lambda x, left, right: torch.empty_like(x), lib=library
    )
    yield
    library._destroy()


steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 59), st.integers(0, 59), st.integers(0, 59)),
    min_size=4,
    max_size=16,
)


def program_of(chosen: list[tuple[str, int, int, int]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def program(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [*inputs, inputs[0] + 1]
        for step, a, b, c in chosen:
            # mostly among the latest values
            x, y, z = (values[-1 - i % min(len(values), 5)] for i in (a, b, c))
            if step == "fresh":
                values.append(torch.full_like(x, 2.0) + y.sum())
            elif step == "view":
                values.append(x.t().t())
            elif step == "part":
                values.append(x[: max(1, x.shape[0] - b % 2)])
            elif step == "clone":
                values.append(x.clone())
            elif step == "read":
                values.append(x * 2 + y.mean())
            elif step == "fill":
                torch.ops.random_passes.fill(x, y)
            elif step == "pair" and not _same_memory(y, z):
                values.append(torch.ops.random_passes.pair(x, y, z))
            elif step == "both":
                torch.ops.random_passes.fill(y, y)
        return tuple(each * 2 for each in values)

    return program


def _same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two values come from one buffer; what an operator does that writes both is its own affair."""
    return (left._base if left._base is not None else left) is (
        right._base if right._base is not None else right
    )


def functional(program: Callable[..., object], inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
    found: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        found.append(module)
        return make_boxed_func(module.forward)

    with torch.no_grad():
        compiled = aot_function(program, fw_compiler=keep, keep_inference_input_mutations=True)
        compiled(*(each.clone() for each in inputs))
    return found[0]


def run(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> tuple[object, object]:
    given_inputs = [each.clone() for each in inputs]
    return module(*given_inputs), given_inputs


def without_clones(chosen: list[tuple[str, int, int, int]]) -> torch.fx.GraphModule:
    """The functional program as Inductor's passes find it: a clone is its input, so old values stay in sight."""
    module = functional(program_of(chosen), INPUTS)
    for node in module.graph.find_nodes(op="call_function", target=aten.clone.default):
        if not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


INPUTS = [torch.arange(12.0).reshape(3, 4), torch.ones(3, 4), torch.full((3, 4), 0.25)]


def check(chosen: list[tuple[str, int, int, int]]) -> None:
    module = without_clones(chosen)
    before = run(module, INPUTS)
    PostGradPassManager([NoOpEliminationPass(), DefunctionalizationPass(), CleanUpPass()])(
        module.graph
    )
    module.recompile()
    torch.testing.assert_close(run(module, INPUTS), before)


# A view of a copy that was replaced by what it copied: it is recorded in the copy's memory, and reads the original's.
STALE_VIEW = [
    *[("fresh", 0, 0, 0)] * 3,
    ("clone", 3, 0, 0),
    ("fill", 0, 4, 0),
    ("view", 0, 0, 0),
    ("clone", 0, 0, 0),
    ("fill", 0, 1, 0),
]


@given(steps)
@example(STALE_VIEW)
@settings(deadline=None, max_examples=60)
def test_passes_keep_results_and_written_inputs(chosen: list[tuple[str, int, int, int]]) -> None:
    check(chosen)


@pytest.mark.nightly
@given(steps)
@settings(deadline=None, max_examples=3000)
def test_passes_keep_results_and_written_inputs_of_many(
    chosen: list[tuple[str, int, int, int]],
) -> None:
    check(chosen)


def test_the_programs_have_writes_of_both_kinds() -> None:
    """Some may be put in place, and some must not."""
    found = put = 0
    for seed in range(12):
        source = random.Random(seed)
        chosen = [
            (source.choice(STEPS), *(source.randrange(60) for _ in range(3)))
            for _ in range(source.randrange(4, 17))
        ]
        graph = without_clones(chosen).graph  # type: ignore[arg-type]
        found += sum("auto_functionalized" in str(node.target) for node in graph.nodes)
        put += DefunctionalizationPass()(graph)
    assert 5 <= put <= found - 5
