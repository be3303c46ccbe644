"""What can't be emitted, split, bound or proved is a typed error that names the node and its source line, and says what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx
from fx_graphs import graph_of

from piecework.codegen import (
    StitchedSource,
    compile_execution_fn,
    generate_source,
    verify,
)
from piecework.codegen.plan.render import format_source
from piecework.errors import BindError, EmitError, UnsupportedNode

TRACE = '  File "/somewhere/else/model.py", line 41, in forward\n    return f(x)\n'


def traced(node: torch.fx.Node) -> torch.fx.Node:
    node.meta["stack_trace"] = TRACE
    return node


def nested(depth: int, leaf: object) -> object:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


def used_before(g: torch.fx.Graph, x: torch.fx.Node) -> torch.fx.Node:
    late = g.call_function(torch.cos, (x,))
    with g.inserting_before(late):
        early = g.call_function(torch.sin, (x,))
    early.args = (late,)
    return early


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            lambda g, x: g.create_node("get_attr", "gone.away"),
            r"get_attr reads 'gone.away'.*\(node %gone_away, model.py:41\)",
        ),
        (
            lambda g, x: g.create_node("call_module", "gone", (x,)),
            r"call_module of 'gone'.*\(node %gone, model.py:41\)",
        ),
        (
            lambda g, x: g.call_function(len, (nested(61, x),)),
            r"more than 60 levels deep.*model.py:41.*Hint: flatten",
        ),
        (used_before, r"used before it is defined \(node %"),
    ],
    ids=["a missing attribute", "a missing module", "nested too deep", "used before defined"],
)
def test_a_node_without_a_source_form(build: Callable[..., torch.fx.Node], why: str) -> None:
    with pytest.raises(UnsupportedNode, match=why):
        generate_source(graph_of(lambda g, x: traced(build(g, x))))


def test_an_argument_may_be_nested_as_deep_as_python_reads_it() -> None:
    gm = graph_of(lambda g, x: g.call_function(len, (nested(58, x),)))
    assert generate_source(gm).proof is not None


@pytest.mark.parametrize("names", [("*args", "y"), ("**kwargs", "y"), ("*args", "*more")])
def test_placeholders_in_an_order_that_python_does_not_have(names: tuple[str, ...]) -> None:
    with pytest.raises(EmitError):
        generate_source(graph_of(lambda g, *nodes: None, *names))


@pytest.mark.parametrize("args", [(), (1, 2, 3)])
def test_a_graph_that_is_called_with_other_arguments(args: tuple[object, ...]) -> None:
    root = torch.nn.ModuleDict({"inner": graph_of(lambda g, a, b: (a, b), "a", "b")})
    gm = graph_of(lambda g, x: g.call_module("inner", args), root=root)
    with pytest.raises(UnsupportedNode, match=r"'inner' takes 2 arguments and is called with"):
        generate_source(gm)


def test_a_graph_with_a_pytree_signature() -> None:
    class Other(torch.fx.graph.CodeGen):
        pass

    gm = graph_of(lambda g, x: x)
    gm.graph.set_codegen(Other())
    with pytest.raises(UnsupportedNode, match=r"pytree.*Hint: flatten"):
        generate_source(gm)


# --- binding -------------------------------------------------------------------------------------


LEAF = "def execution_fn(x, *, __vllm_submods__):\n    return __vllm_submods__[0](x)\n"
MISSING = "import nowhere_at_all\ndef execution_fn(*, __vllm_submods__):\n    return None\n"


@pytest.mark.parametrize(
    ("code", "submods", "error", "why"),
    [
        (LEAF, {}, BindError, r"submodule 'act' has no callable.*Hint: pass one callable for each"),
        (LEAF, {"act": 3}, BindError, "'act' has no callable"),
        ("def execution_fn(:", None, EmitError, r"does not compile(.|\n)*1 \| def execution_fn\(:"),
        ("x = 1", None, EmitError, "defines no function execution_fn"),
        (MISSING, None, BindError, r"a module that is not here.*nowhere_at_all.*Hint: install"),
    ],
)
def test_what_can_not_be_bound(
    code: str, submods: dict[str, object] | None, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        compile_execution_fn(code, submods or {}, [] if submods is None else ["act"])  # type: ignore[arg-type]


def test_text_that_is_not_python_is_shown_with_its_lines() -> None:
    with pytest.raises(EmitError, match=r"not Python(.|\n)*1 \| def"):
        format_source("def (:")


# --- proof ---------------------------------------------------------------------------------------


def sample() -> tuple[torch.fx.GraphModule, StitchedSource]:
    def build(g: torch.fx.Graph, x: torch.fx.Node) -> object:
        a = traced(g.call_function(torch.sin, (x,)))
        return g.call_function(torch.add, (a, x), {"alpha": 2})

    gm = graph_of(build)
    return gm, generate_source(gm)


ITSELF = (
    "import torch\ndef f(x):\n    return f(x)\n"
    "def execution_fn(x, *, __vllm_submods__):\n    return f(x)\n"
)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (
            *("torch.sin(x)", "torch.cos(x)"),
            r"differs from the graph: a call of something else \(line \d+: sin = torch.cos\(x\); node %sin, model.py:41\)",
        ),
        (
            *("alpha=2", "alpha=3"),
            r"another argument 'alpha' \(line \d+: add = torch.add\(sin, x, alpha=3\); node %add\)",
        ),
        ("execution_fn(x,", "execution_fn(x, y,", "takes 2 inputs and the graph 1"),
        ("execution_fn(x,", "execution_fn(x=None,", r"x differs in kind or default \(node %x\)"),
        ("return add", "return (add,)", "returns something else"),
        ("", "def (", "is not Python"),
        ("", "import torch", "defines no function execution_fn"),
        ("", ITSELF, "call each other, or are nested, too deeply"),
    ],
)
def test_a_text_that_differs_is_refused(before: str, after: str, why: str) -> None:
    gm, source = sample()
    assert before in source.code
    with pytest.raises(EmitError, match=why):
        verify(source, gm, edited=source.code.replace(before, after) if before else after)


def test_an_edit_that_changes_nothing_is_proved() -> None:
    """Comments, names, the moment of a ``del`` and the order of definition are the reader's to change."""
    gm, source = sample()
    edited = (
        source.code.replace("sin =", "sine =")
        .replace("(sin,", "(sine,")
        .replace("    del sin\n", "")
    )
    edited = edited.replace("def execution", "# my note\n\n\ndef execution")
    assert edited != source.code and "sine" in edited
    assert verify(source, gm, edited=edited).events == 2
    nested_call = "import torch\ndef execution_fn(x, *, __vllm_submods__):\n    return torch.add(torch.sin(x), x, alpha=2)\n"
    assert verify(source, gm, edited=nested_call).events == 2


@pytest.mark.parametrize(
    "text",
    [
        *("for i in x: pass", "if x: pass", "import os", "x += 1", "y: int = x", "return x"),
        *("y = lambda: x", "y = x if x else x", "y = [i for i in x]", "y = f'{x}'", "y = (z := x)"),
        *("y = 1 < x < 2", "y = x and x", "y = print(*x)", "y = print(**x)", "y = {**x}"),
        *("y = unknown", "y = __vllm_submods__[7](x)", "y = __vllm_consts__[7]", "del y"),
        *("y = x(1)", "y = 'x'(x)", "print(torch.sin(x))", "y = torch.no_such_function(x)"),
        *("a, b = (x,)", "a, a = torch.sin(x)", "x.y = x", "x[0] = x", "__builtins__ = x"),
        *("y = torch.sin.__globals__", "execution_fn()", "global torch", "torch = x"),
    ],
)  # fmt: skip
def test_text_outside_of_the_language_is_refused(text: str) -> None:
    gm, source = sample()
    edited = source.code.replace("    sin = torch", f"    {text}\n    sin = torch")
    with pytest.raises(EmitError, match="line "):
        verify(source, gm, edited=edited)


@pytest.mark.parametrize(
    "text",
    [
        *("import torch as t", "import no_such_module_anywhere", "from torch import sin"),
        *("print('hello')", "class A: pass", "alias = torch.sin(1)", "alias = []", "if True: pass"),
        *("@print\ndef f(x): return x", "def f(x: print()): return x", "def f(x) -> 1: return x"),
        *("def f(x, /): return x", "def f(x, *, y): return x", "def f(x=[]): return x"),
        *("def f(*x): return x", "__builtins__ = torch", "torch = print"),
    ],
)  # fmt: skip
def test_modules_outside_of_the_language_are_refused(text: str) -> None:
    gm, source = sample()
    edited = source.code.replace("\ndef execution", f"\n{text}\n\ndef execution")
    with pytest.raises(EmitError):
        verify(source, gm, edited=edited)


def test_the_graph_of_another_model_is_not_proved() -> None:
    other = graph_of(lambda g, x: g.call_function(torch.add, (g.call_function(torch.cos, (x,)), x)))
    with pytest.raises(EmitError, match=r"differs from the graph|text ends"):
        verify(sample()[1], other)
