"""The proof of an entry's text. In: random plans, their texts and mutants of those. Out: each text is proved, each mutant refused."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from entry_mutants import mutants
from entry_plans import plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen.entry.emit import PROVIDED, EntrySource, generate_entry
from piecework.codegen.entry.plan import EntryPlan
from piecework.codegen.entry.proof import prove_entry
from piecework.errors import EmitError

CASE = Path(__file__).parents[2] / "golden" / "cases" / "entry_kinds" / "graph.py"


def proves(code: str, plan: EntryPlan, source: EntrySource) -> bool:
    try:
        prove_entry(code, plan, PROVIDED, source.consts)
    except EmitError:
        return False
    return True


@pytest.fixture(scope="module")
def every_kind() -> EntryPlan:
    """The plan of the golden case."""
    spec = importlib.util.spec_from_file_location("entry_kinds", CASE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PLAN  # type: ignore[no-any-return]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_mutants_of_a_text_with_every_kind_are_refused(every_kind: EntryPlan, every: int) -> None:
    source = generate_entry(every_kind)
    edited = mutants(source.code, every=every)
    tried = [(what, proves(code, every_kind, source)) for what, code in edited]
    assert len(tried) > 1900 // every
    assert [what for what, proved in tried if proved] == []


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans(), st.integers(0, 49))
def test_random_plans_are_proved_and_their_mutants_refused(plan: EntryPlan, first: int) -> None:
    source = generate_entry(plan)
    assert proves(ast.unparse(ast.parse(source.code)), plan, source)  # the layout is nothing
    for what, code in mutants(source.code, every=50, first=first):
        assert not proves(code, plan, source), what
