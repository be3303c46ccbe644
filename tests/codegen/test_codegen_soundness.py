"""Whatever text the proof lets through does what its graph does: random mutants of random sources are refused, or run the same."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import torch.fx
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.codegen import LowerOptions, generate_source, verify
from piecework.errors import EmitError


def _beside(name: str) -> ModuleType:
    """Another test file of this folder: tests are no package."""
    spec = importlib.util.spec_from_file_location(
        f"beside_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GRAPHS = _beside("test_codegen_random")
MUTANTS = _beside("test_codegen_mutants")
COUNTS = {"refused": 0, "ran": 0}


@given(GRAPHS.programs(), st.randoms(use_true_random=False))
@settings(max_examples=80, **GRAPHS.SETTINGS)
def check_mutants(
    program: tuple[torch.fx.GraphModule, LowerOptions], chance: random.Random
) -> None:
    gm, options = program
    source = generate_source(gm, options)
    tree = ast.parse(source.code)
    texts = [
        ast.unparse(ast.fix_missing_locations(tree))
        for kind in MUTANTS.KINDS
        for _ in kind(tree)
        if chance.random() < 0.15
    ]
    chance.shuffle(texts)
    for text in texts[:8]:
        try:
            verify(source, gm, edited=text)
        except EmitError:
            COUNTS["refused"] += 1
            continue
        COUNTS["ran"] += 1
        case = dataclasses.replace(GRAPHS.loaded(gm, source, tuple(options.bound)), code=text)
        found = [each for each in GRAPHS.differences(case) if "interpreter fails" not in each]
        assert not found, f"{found}\n{text}\nwas made from\n{source.code}"


def test_a_proved_text_runs_as_the_graph() -> None:
    check_mutants()
    assert COUNTS["refused"] > 100 and COUNTS["ran"] > 0
