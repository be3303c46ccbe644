"""What an entry checks, passes and returns: the emitted text and the explanation, held against what random plans mean (`entry_plans.Meaning`)."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from entry_plans import CPU, Meaning, Odd, broken, plans, values_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piecework.codegen.entry.emit import PROVIDED, generate_entry
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


def executed(plan: EntryPlan, **provided: object) -> dict[str, object]:
    """The module that is emitted for ``plan``; a broken check raises `Refused`."""

    def explain_inputs(*values: object) -> None:
        raise Refused

    source = generate_entry(plan)
    namespace = dict.fromkeys(PROVIDED, lambda *_: False) | {
        **source.consts,
        "explain_inputs": explain_inputs,
        "arguments_as_traced": lambda *_: True,
        "memory_apart": torch_compat.memory_apart,
        "flatten": torch_compat.flatten_tree,
        **provided,
    }
    exec(source.code, namespace)
    return namespace


def passes(plan: EntryPlan, values: list[object]) -> bool:
    try:
        executed(plan)["check_inputs"](*values)  # type: ignore[operator]
    except Refused:
        return False
    return True


@SLOW
@given(st.data())
def test_a_call_passes_if_and_only_if_it_is_what_the_plan_means(data: st.DataObject) -> None:
    plan = dataclasses.replace(data.draw(plans()), checks=True, watches_arguments=False)
    values = values_of(plan)
    for place, value in enumerate(values):
        if data.draw(st.booleans()):
            values[place] = data.draw(broken(value))
    meant = Meaning(plan, values).holds
    assert passes(plan, values) == meant
    assert (input_error(plan, values, lambda _: KEPT) is KEPT) == meant


@SLOW
@given(plans())
def test_a_call_that_is_what_the_plan_says_passes(plan: EntryPlan) -> None:
    plan = dataclasses.replace(plan, checks=True, apart=())
    values = values_of(plan)
    assert input_error(plan, values, lambda _: KEPT) is KEPT
    assert passes(plan, values)


def shown(value: object) -> object:
    """A value, so that two are equal if nothing can tell them apart."""
    if type(value) in (list, tuple):
        return type(value), [shown(each) for each in value]  # type: ignore[attr-defined]
    if type(value) is dict:
        return dict, [(shown(key), shown(each)) for key, each in value.items()]
    return (
        (type(value), repr(value))
        if isinstance(value, (int, float, complex, str, bytes))
        else id(value)
    )


@SLOW
@given(plans())
def test_an_entry_passes_and_returns_what_the_plan_means(plan: EntryPlan) -> None:
    plan = dataclasses.replace(plan, apart=())
    values, called, weights = values_of(plan), [], [object() for _ in range(4)]
    outputs = [object() for _ in plan.outputs]

    def execution_fn(*given: object, **more: object) -> list[object]:
        called.append((given, more))
        return outputs

    namespace = executed(
        plan,
        dynamo=SimpleNamespace(_stance=None),
        stance=None,
        bound=(execution_fn, lambda: True, lambda: weights, lambda: None),
        submods_for=lambda batch: ("submods", batch),
        same_kernels=lambda: True,
    )
    args: list[object] = []
    named: dict[str, object] = {}
    for parameter, value in zip(plan.parameters, values, strict=True):
        match parameter.kind:
            case "*":
                args += value  # type: ignore[arg-type]
            case "**":
                named |= value  # type: ignore[arg-type]
            case "k":
                named[parameter.name] = value
            case _:
                args.append(value)
    with torch.no_grad():
        returned = namespace["entry"](*args, **named)  # type: ignore[operator]
    meant = Meaning(plan, values)
    given = tuple(meant.passed(each, weights) for each in plan.passed)
    batch = plan.batch and ("submods", meant.passed(plan.batch, weights))
    more = {} if plan.batch is None else {"__vllm_submods__": batch}
    assert shown(called) == shown([(given, more)])
    assert shown(returned) == shown(meant.packed(plan.result, outputs, weights))


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
        refused = input_error(plan, wrong, lambda _: KEPT)
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
