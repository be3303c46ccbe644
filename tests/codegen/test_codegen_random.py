"""Random FX graphs: the emitted function does what the interpreter does, is proved, and is the same text every time."""

from __future__ import annotations

import os

import pytest
import torch.fx
from hypothesis import given, settings
from random_graphs import SETTINGS, programs, surprises

from piecework.codegen import LowerOptions, generate_source, verify
from piecework.codegen.plan.render import format_source

EXAMPLES = int(os.environ.get("PIECEWORK_RANDOM_GRAPHS", "200"))


def check(program: tuple[torch.fx.GraphModule, LowerOptions]) -> None:
    source = generate_source(*program)
    assert generate_source(*program).code == source.code == format_source(source.code)
    assert verify(source, program[0]) == source.proof
    assert not surprises(program[0], source), source.code


@given(programs())
@settings(max_examples=EXAMPLES, **SETTINGS)
def test_a_random_graph_is_emitted_as_the_interpreter_runs_it(
    program: tuple[torch.fx.GraphModule, LowerOptions],
) -> None:
    check(program)


@pytest.mark.nightly
@given(programs())
@settings(max_examples=50_000, **SETTINGS)
def test_many_random_graphs(program: tuple[torch.fx.GraphModule, LowerOptions]) -> None:
    check(program)
