"""Which values are written inline, what goes to the consts table, and what the table says of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque, namedtuple
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from piecework.codegen.graph.consts import ConstTable, describe, holds_node, to_text
from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.proof.graph_run import same_constant
from piecework.errors import UnsupportedNode

Pair = namedtuple("Pair", ["left", "right"])
GRAPH = torch.fx.Graph()
NODE = GRAPH.placeholder("x")


@dataclasses.dataclass
class Holder:
    inside: object


class Strange(tuple):
    __slots__ = ()


def convert(value: object) -> tuple[str, list[object]]:
    table = ConstTable()
    return to_text(value, lambda node: node.name, table, lambda: "here"), table.values


@pytest.mark.parametrize(
    "value",
    [
        *(2**5000, math.inf, math.nan, complex(0, math.nan), complex(-0.0, 1), complex(0.0, -1.0)),
        *(complex(1, -0.0), torch.float32, range(3), frozenset(), object(), int),
    ],
    ids=lambda value: type(value).__name__,
)
def test_constants(value: object) -> None:
    assert not is_inline_literal(value)
    expr, consts = convert([value, value])
    assert expr == "[__vllm_consts__[0], __vllm_consts__[0]]"
    assert consts[0] is value and len(consts) == 1


def test_equal_objects_are_two_constants_and_their_order_is_that_of_use() -> None:
    one, two = float("inf"), float("inf")
    expr, consts = convert((two, [one], two))
    assert consts[0] is two and consts[1] is one
    assert expr == "(__vllm_consts__[0], [__vllm_consts__[1]], __vllm_consts__[0])"


@pytest.mark.parametrize(
    "value",
    [
        *(NODE, [NODE], (1, [NODE]), {"k": NODE}, {"k": [(NODE,)]}, slice(NODE, None)),
        *(slice(None, (NODE,), None), Pair(1, [NODE])),
    ],
    ids=repr,
)
def test_nodes_are_found_in_every_container(value: object) -> None:
    assert holds_node(value)
    _, consts = convert(value)
    assert not any(isinstance(each, torch.fx.Node) or holds_node(each) for each in consts)


@pytest.mark.parametrize(
    "value",
    [
        *(Holder(NODE), Strange((NODE,)), {NODE}, functools.partial(print, NODE)),
        *([Holder([NODE])], deque([NODE]), {NODE: 1}, {(1, NODE): 1}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_node_where_fx_does_not_look_is_refused(value: object) -> None:
    with pytest.raises(
        UnsupportedNode, match=r"contains an FX node can't be written as source \(here\)"
    ):
        convert(value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda size: size,
        lambda size: [1, size],
        lambda size: Pair(1, size),
        lambda size: torch.Size([size]),
        lambda size: functools.partial(print, size),
        lambda size: Holder({"k": size}),
    ],
)
def test_a_size_of_the_trace_never_becomes_a_constant(wrap: Callable[[object], object]) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    size = mode.shape_env.create_unbacked_symint()
    with pytest.raises(UnsupportedNode, match=f"the size {size} of the trace is an argument"):
        convert(wrap(size))


def test_descriptions_have_no_addresses() -> None:
    def local() -> None: ...

    told = {
        torch.ones(2, 3): "tensor f32[2, 3]",
        torch.float16: "torch.float16",
        int: "class int",
    }
    assert {value: describe(value) for value in told} == told
    values = [
        *(local, lambda: 0, object(), torch.device("cpu"), torch.Size([1]), torch.nn.ReLU()),
        *(functools.partial(print), math.nan, complex(-0.0, 1), Pair(1, 2)),
    ]
    texts = [*map(describe, values), *told.values()]
    assert all("0x" not in text and "\n" not in text and text.isascii() for text in texts), texts


@pytest.mark.parametrize("kind", [float, complex, np.float64, np.complex128])
def test_numbers_are_the_same_by_their_bits(kind: type) -> None:
    assert same_constant(kind(1.5), kind(1.5))
    assert not same_constant(kind(0.0), kind(-0.0))
    assert not same_constant(kind(float("nan")), kind(float("nan")))
    assert not same_constant(kind(1), 1)
