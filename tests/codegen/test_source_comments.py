"""Comments of emitted source. In: models whose arguments are called like sizes, and long ones; out, one name for one size, lines that fit, and the user's own line."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from fx_graphs import graph_of
from models import EAGER, mix
from torch import nn

import piecework
from piecework.codegen import LowerOptions, generate_source
from piecework.codegen.graph.origin import source_code


class Clashing(nn.Module):
    """Arguments, a parameter and a buffer with the names that sizes would have."""

    def __init__(self) -> None:
        super().__init__()
        self.s1 = nn.Parameter(torch.ones(4))
        self.register_buffer("s3", torch.ones(4))

    def forward(self, s2: torch.Tensor, s0: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        y = s2 * self.s1 + s0 * self.s3
        out = torch.empty_like(y)
        mix(y, out)
        return out + other.sum() * other.shape[0] / other.shape[1]


def legend_of(code: str) -> dict[str, str]:
    """Size → where it is read, from the comment below the signature."""
    text = re.sub(r"\n    #   ", " ", code)
    (found,) = re.findall(r"# sizes: (.*)", text)
    return dict(each.split(" = ") for each in found.split(", "))


def test_a_size_has_no_name_of_an_argument_a_parameter_or_a_buffer() -> None:
    model = Clashing()
    args = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 3)
    stitched = piecework.compile(model, args, config=EAGER)
    (signature,) = re.findall(r"def execution_fn\(([^*]*), \*", stitched.source.code)
    names = signature.split(", ")
    assert {"s2", "s0", "other"} < set(names)  # the user's own names
    legend = legend_of(stitched.source.code)
    assert set(legend.values()) == {"s2.shape[0]", "other.shape[0]", "other.shape[1]"}
    assert set(legend) <= set(names) and not set(legend) & {"s2", "s0", "s1", "s3", "other"}
    for rows, more in ((6, (9, 3)), (3, (2, 5))):
        given = torch.randn(rows, 4), torch.randn(rows, 4), torch.randn(*more)
        torch.testing.assert_close(stitched(*given), model(*given))


def many_outputs(count: int) -> torch.fx.GraphModule:
    """A stitching graph whose piece returns ``count`` tensors."""

    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        parts = [g.call_function(torch.neg, (x,)) for _ in range(count)]
        for part in parts:
            part.meta["example_value"] = torch.empty(3, 4)
            part.meta["nn_module_stack"] = {"k": ("L['self'].layers[0].attention", nn.Module)}
        return tuple(parts)

    root = nn.ModuleDict({"submod_0": graph_of(build)})
    return graph_of(lambda g, x: g.call_module("submod_0", (x,)), root=root)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 40])
def test_shapes_are_on_as_many_lines_as_they_take(count: int) -> None:
    code = generate_source(many_outputs(count), LowerOptions(submods=["submod_0"])).code
    assert max(map(len, code.splitlines())) <= 100
    said = [line.strip("# ") for line in code.splitlines() if line.startswith("    #")]
    assert "layers.0.attention" in said[0]
    assert sum(line.count("f32[3, 4]") for line in said) == count
    assert all(line.startswith("->") for line in said[1:2])
    assert all(line.startswith("f32[3, 4]") for line in said[2:])


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("attention(query, key, out)", "attention(query, key, out)"),
        ("return x + out", "return x + out"),
        ("attention(", ""),  # it goes on below
        ("if x.sum():", ""),
        ("note('für')", ""),
        ("", ""),
    ],
)
def test_the_users_line_is_shown_where_it_is_whole(line: str, shown: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["stack_trace"] = textwrap.dedent(f"""
        File "/home/user/model.py", line 3, in outer
          outer()
        File "/home/user/model.py", line 10, in forward
          {line}
        """)
    assert source_code(node) == shown


def test_the_users_line_stands_above_an_operator_that_runs_live() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(x + 1)
            mix(x * 2, out)
            return out

    code = piecework.compile(Model(), (torch.randn(3, 4),), config=EAGER).source.code
    assert re.search(r"# test_source_comments\.py:\d+  mix\(x \* 2, out\)\n    mix\(", code)


@pytest.mark.filterwarnings("ignore:splitting ops that are named")
@pytest.mark.parametrize("cut", [[], [nn.functional.relu]])
def test_no_comment_names_a_line_of_piecework_itself(cut: list[object]) -> None:
    """A layer of torch's own that the example calls straight has no line of the user's."""
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))):
        stitched = piecework.compile(model, (torch.randn(3, 4),), config=EAGER, splitting_ops=cut)
        assert ".py" not in stitched.source.code
