"""Arguments that nobody takes. In: every public function and method, found by looking. Out: a typed error that says what it takes, or where the argument goes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import piecework
from piecework import codegen
from piecework.errors import ConfigError, PieceworkError
from piecework.integrations import transformers
from piecework.runtime.splitting_op import SplittingOp

#: What comes out of piecework and is not made by who uses it.
RESULTS = {"OpReport", "Proof", "SplitItem", "StitchedSource"}
#: Classes whose objects users hold, though no public name is theirs.
HELD = (type(piecework.counters), SplittingOp)


TRACES = "piecework.runtime.traces"  # parts of a stitched module


def methods_of(kind: type) -> Iterator[tuple[str, Callable[..., object]]]:
    parts = [each for each in kind.__bases__ if each.__module__.startswith(f"{TRACES}.")]
    for name, each in {
        **{k: v for part in parts for k, v in vars(part).items()},
        **vars(kind),
    }.items():
        if inspect.isfunction(each) and (name == "__init__" or not name.startswith("_")):
            yield f"{kind.__name__}.{name}", each


def public() -> Iterator[tuple[str, Callable[..., object]]]:
    for package in (piecework, codegen, transformers):
        for name in package.__all__:
            each = getattr(package, name)
            if inspect.isfunction(each):
                yield f"{package.__name__}.{name}", each
            elif inspect.isclass(each) and name not in {*RESULTS, "PieceworkError"}:
                yield from methods_of(each)
    for kind in HELD:
        yield from methods_of(kind)


def takes_anything(function: Callable[..., object]) -> bool:
    kinds = {each.kind for each in inspect.signature(function).parameters.values()}
    return inspect.Parameter.VAR_KEYWORD in kinds


PUBLIC = dict(public())
PLAIN = sorted(name for name, each in PUBLIC.items() if not takes_anything(each))


@pytest.mark.parametrize("name", PLAIN)
def test_no_public_callable_leaves_an_unknown_argument_to_python(name: str) -> None:
    function = PUBLIC[name]
    own = [each for each in inspect.signature(function).parameters if each == "self"]
    with pytest.raises(ConfigError, match="unexpected keyword argument 'nonsense'") as caught:
        function(*[None] * len(own), nonsense=1)
    assert str(caught.value.hint).startswith("it takes ")
    assert len(PLAIN) > 60


def stitched() -> piecework.StitchedModule:
    return piecework.compile(
        nn.Linear(8, 8).eval(), (torch.randn(4, 8),), config={"backend": "eager"}
    )


def expect() -> None:
    with piecework.counters.expect(nonsense=1):
        pass


#: Those that take any name, and what each says of one that means nothing.
OF_OTHERS = {
    "CompilationCounter.expect": (expect, "no counter named nonsense"),
    "StitchedModule.capture": (
        lambda: stitched().capture([4], nonsense=1),
        "nonsense: is not a field of this configuration",
    ),
    "StitchedModule.measure": (
        lambda: stitched().measure([4], nonsense=1),
        "nonsense: is not a field of this configuration",
    ),
    "StitchedModule.prepare": (
        lambda: piecework.compile(nn.Linear(8, 8).eval()).prepare(torch.randn(4, 8), nonsense=1),
        "what the model's forward takes",
    ),
}
#: Those that hand everything to the model, which answers as it does when it is called.
OF_THE_MODEL = {f"StitchedModule.{name}" for name in ("forward", "accepts", "profile")}


def test_those_that_take_any_name_are_known() -> None:
    anything = {name for name in PUBLIC if takes_anything(PUBLIC[name])}
    assert anything == OF_OTHERS.keys() | OF_THE_MODEL


@pytest.mark.parametrize("name", OF_OTHERS)
def test_an_option_that_means_nothing_is_named(name: str) -> None:
    provoke, said = OF_OTHERS[name]
    with pytest.raises(PieceworkError) as caught:
        provoke()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: codegen.generate_source(None, option=None), "did you mean options?"),
        (lambda: piecework.verify("", None, edit=""), "did you mean edited?"),
        (lambda: codegen.LowerOptions(emit_dels=False), "did you mean emit_del?"),
        (lambda: piecework.split_graph(None, [], blockz="off"), "did you mean blocks?"),
        (lambda: piecework.compile_execution_fn("", {}, [], const=[]), "did you mean consts?"),
        (lambda: piecework.check_op("aten::sin", arg=()), "did you mean args?"),
        (lambda: piecework.splitting_op("a::b", mutate_args=()), "did you mean mutates_args?"),
        (lambda: stitched().dispatch(3, uniform=True), "did you mean uniform_decode?"),
        (lambda: stitched().dispatch(), "it takes num_tokens"),
        (lambda: stitched().shadow(evry=1), "did you mean every?"),
    ],
)
def test_the_hint_says_where_it_goes(call: Callable[[], object], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert hint in str(caught.value.hint)
