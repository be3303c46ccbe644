"""Random programs with writes through views: after all passes they return, and leave in their inputs, what they did before."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from piecework.runtime import torch_compat
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
    *["reshapes", "slices", "split", "twice"] * 2,
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
            elif step == "reshapes":
                flat = x.reshape(-1).reshape(1, -1)
                values.append(
                    flat.reshape(-1, 2) if x.numel() % 2 == 0 and c % 2 else flat.view(-1)
                )
            elif step == "slices" and x.dim():
                dim = b % x.dim()
                before = (slice(None),) * dim
                values.append(
                    x[(*before, slice(b % 3, 5))][(*before, slice(c % 2, -1 if c % 3 else 3))]
                )
            elif step == "split" and x.dim() and x.shape[0] > 1:
                at = 1 + b % (x.shape[0] - 1)
                values += [*x.split([at, x.shape[0] - at]), x[:at], x[at:]][c % 3 :]
            elif step == "twice" and x.dim():
                values += [x[1:], x[1:]]
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


# A reshape that copies is traced as a clone and this, which takes the clone's order in memory for granted.
_NEEDS_COPY = (aten._unsafe_view.default,)


def without_clones(chosen: list[tuple[str, int, int, int]]) -> torch.fx.GraphModule:
    """The functional program as Inductor's passes find it: a clone is its input, so old values stay in sight."""
    module = functional(program_of(chosen), INPUTS)
    for node in module.graph.find_nodes(op="call_function", target=aten.clone.default):
        if not any(user.op == "output" or user.target in _NEEDS_COPY for user in node.users):
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
    torch.testing.assert_close(run(module, INPUTS), before, equal_nan=True)  # a mean of no rows


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
@settings(deadline=None, max_examples=15)
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


# --- chains of views, for sizes that the trace was not made with ----------------------------------------

links = st.tuples(
    st.sampled_from(["reshape", "view", "slice", "end", "split", "chunk", "transpose", "clone"]),
    st.integers(-9, 9),
    st.none() | st.integers(-9, 9),
    st.integers(1, 3),
)


def chain(chosen: list[tuple[str, int, int | None, int]]) -> Callable[..., object]:
    def program(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        base = x * 2
        value, found = base, []
        for link, start, end, step in chosen:
            if link == "reshape":
                value = value.reshape([(-1,), (-1, 1, 1), (1, -1)][start % 3])
            elif link == "view" and value.is_contiguous():
                value = value.view(-1, *value.shape[1:])
            elif link == "slice":
                value = value[start:end:step]
            elif link == "end":
                value = value[: y.shape[0]]
            elif link == "split" and value.dim() > 1:
                parts = value.split(step, dim=-1)
                value = parts[start % len(parts)]
            elif link == "chunk" and value.dim() > 1:
                left, right = value[..., :1], value[..., 1:]
                value = right if start % 2 and right.shape[-1] else left
            elif link == "transpose" and value.dim() > 1:
                value = value.transpose(0, -1)
            elif link == "clone":
                value = value.clone()
            found.append(value)
        base.add_(1)  # seen through every view of it, and through no copy
        return (*(each + 1 for each in found), found[-1], base)

    return program


@given(st.lists(links, min_size=2, max_size=8))
@settings(deadline=None, max_examples=15)
def test_chains_of_views_keep_their_meaning_for_other_sizes(chosen) -> None:  # type: ignore[no-untyped-def]
    check_chain(chosen)


@pytest.mark.nightly
@given(st.lists(links, min_size=2, max_size=10))
@settings(deadline=None, max_examples=3000)
def test_many_chains_of_views_keep_their_meaning_for_other_sizes(chosen) -> None:  # type: ignore[no-untyped-def]
    check_chain(chosen)


def check_chain(chosen: list[tuple[str, int, int | None, int]]) -> None:
    def inputs(rows: int, others: int) -> list[torch.Tensor]:
        return [torch.arange(rows * 4.0).reshape(rows, 4), torch.ones(others, 2)]

    for mode in ("real", "symbolic"):
        try:
            module = make_fx(chain(chosen), tracing_mode=mode)(*inputs(7, 3))
        except (RuntimeError, IndexError, ValueError):
            return  # a chain that no tensor of this size has
        sizes = [(7, 3)] if mode == "real" else [(7, 3), (8, 3), (9, 5), (6, 2), (12, 4)]
        sizes = [each for each in sizes if _holds(module, inputs(*each))]
        assert sizes
        before = [module(*inputs(*each)) for each in sizes]
        NoOpEliminationPass()(module.graph)
        module.graph.lint()
        module.recompile()
        after = [module(*inputs(*each)) for each in sizes]
        for one, other in zip(before, after, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
            assert list(map(_steps, one)) == list(map(_steps, other))


def _steps(tensor: torch.Tensor) -> list[int]:
    """The strides that reach anything."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and tensor.numel()]


def _holds(module: torch.fx.GraphModule, given_inputs: list[torch.Tensor]) -> bool:
    """Whether what the trace assumed of its sizes is true of these."""
    values: dict[str, int] = {}
    traced = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    pairs = [
        pair
        for fake, each in zip(traced, given_inputs, strict=True)
        for pair in zip(fake.shape, each.shape, strict=True)
    ]
    for size, actual in pairs:
        symbol = torch_compat.symbol_of(size)
        if symbol is not None and values.setdefault(symbol, actual) != actual:
            return False
    if any(torch_compat.size_value(size, values) not in (None, n) for size, n in pairs):
        return False
    guards = torch_compat.recorded_guards([size for size, _ in pairs])
    return all(test(values) is not False for _, _, test in guards)
