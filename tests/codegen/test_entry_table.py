"""What an entry checks, read twice. In: random plans, and calls that keep or break them. Out: the emitted test and the explanation agree on every call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from entry_plans import CPU, Odd, broken, plans, values_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen.entry.emit import EntrySource, generate_entry
from piecework.codegen.entry.plan import (
    EntryPlan,
    FixedValue,
    FromConst,
    FromLeaf,
    IntegerInput,
    Items,
    Leaf,
    Parameter,
    Symbol,
    TensorInput,
)
from piecework.errors import InputError
from piecework.runtime import torch_compat
from piecework.runtime.call.explain import input_error

KEPT = InputError("nothing is broken")
SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class Refused(Exception):
    """The emitted test did not hold."""


def check_of(source: EntrySource, *, watched: bool = True):  # type: ignore[no-untyped-def]
    """The emitted ``check_inputs``, which raises `Refused`."""

    def explain_inputs(*values: object) -> None:
        raise Refused

    namespace = {
        **source.consts,
        "explain_inputs": explain_inputs,
        "arguments_as_traced": lambda *values: watched,
        "memory_apart": torch_compat.memory_apart,
        "flatten": torch_compat.flatten_tree,
    }
    exec(source.code, namespace)
    return namespace["check_inputs"]


def passes(plan: EntryPlan, values: list[object]) -> bool:
    try:
        check_of(generate_entry(plan))(*values)
    except Refused:
        return False
    return True


@SLOW
@given(st.data())
def test_the_test_and_the_explanation_agree_on_every_call(data: st.DataObject) -> None:
    plan = dataclasses.replace(data.draw(plans()), checks=True, watches_arguments=False)
    values = values_of(plan)
    for place, value in enumerate(values):
        if data.draw(st.booleans()):
            values[place] = data.draw(broken(value))
    assert passes(plan, values) == (input_error(plan, values, lambda: KEPT) is KEPT)


@SLOW
@given(plans())
def test_a_call_that_is_what_the_plan_says_passes(plan: EntryPlan) -> None:
    plan = dataclasses.replace(plan, checks=True, apart=())
    values = values_of(plan)
    assert input_error(plan, values, lambda: KEPT) is KEPT
    assert passes(plan, values)


def _plan(*leaves: tuple[str, object], symbols: tuple[str, ...] = ()) -> EntryPlan:
    parameters = (
        Parameter(name, "", Leaf(index, name, assumption))  # type: ignore[arg-type]
        for index, (name, assumption) in enumerate(leaves)
    )
    known = tuple(Symbol(name) for name in symbols)
    return EntryPlan((), tuple(parameters), known, (), (), (), FromConst(None))


@pytest.mark.parametrize(("text", "kept"), [("n", 5), ("2 * n", 10)])
def test_an_integer_that_is_computed_of_a_size_is_compared_with_it(text: str, kept: int) -> None:
    x = TensorInput(torch.float32, CPU, ("n",))
    for order in (1, -1):
        names = [("x", x), ("k", IntegerInput(text))][::order]
        plan = _plan(*names, symbols=("n",))
        values = [torch.ones(5), kept][::order]
        if order == 1 or text != "n":
            assert passes(plan, values)  # type: ignore[arg-type]
        wrong = [torch.ones(5), kept + 1][::order]
        assert not passes(plan, wrong)  # type: ignore[arg-type]
        refused = input_error(plan, wrong, lambda: KEPT)
        assert refused is not KEPT
        assert refused.places


def test_a_parameter_may_be_called_like_a_builtin_that_a_check_needs() -> None:
    items = Items(list, "x", (0,), (Leaf(0, "x[0]", FixedValue("a")),))
    number = Parameter("list", "", Leaf(1, "list", FixedValue(1)))
    plan = EntryPlan((), (Parameter("x", "", items), number), (), (), (), (), FromLeaf(0))
    assert passes(plan, [["a"], 1])
    assert not passes(plan, [("a",), 1])


@pytest.mark.parametrize("value", [..., None, True, "it's", 0.0, float("nan"), Odd(), 1 + 2j])
def test_a_fixed_value_is_itself_and_no_other(value: object) -> None:
    plan = _plan(("x", FixedValue(value)))
    assert passes(plan, [value])
    assert not passes(plan, [Odd()])
