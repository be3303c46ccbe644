"""No name, target, path, file, shape, banner or string of the input can change what the emitted module means."""

from __future__ import annotations

import ast

import torch
import torch.fx
from fx_graphs import graph_of, module_of, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.codegen import LowerOptions, compile_execution_fn, generate_source
from piecework.codegen.plan.render import format_source

CORPUS = [
    *("", " ", "'", '"', '"""', "\\", "\\'", "\n", "\x00", "\x0c", "\ud800", "é", "сору", "ｔｏｒｃｈ"),
    *("a\nimport os", "\r\nraise SystemExit", "\u2028raise SystemExit", "\u0085raise SystemExit"),
    *("{{ 7 * 7 }}", "{% raw %}", "{# comment #}", "}}", "%}", "*/", "-->", "#", "$(rm -rf)"),
    *("# fmt: off", "fmt: skip", "yapf: disable", "type: ignore", "-*- coding: utf-7 -*-"),
    *("__vllm_submods__", "__vllm_consts__", "__builtins__", "__import__", "execution_fn", "torch"),
    *("operator", "print", "None", "lambda", "async", "match", "_", "__", "class", "self"),
    *("a" * 500, "x y", "1x", "x); raise SystemExit(", "x, *, evil=1", "x: int = 1"),
    *("\u202egnirts", "coding=rot13"),
]  # fmt: skip


def returned(*args: object, **kwargs: object) -> tuple[object, ...]:
    return (*args, *kwargs.items())


def hostile_graph(texts: list[str]) -> tuple[torch.fx.GraphModule, LowerOptions]:
    """A graph with ``texts`` in every place where text can be."""
    graph = torch.fx.Graph()
    gm = module_of(graph)
    placeholders = [graph.placeholder(f"p{i}") for i in range(len(texts))]
    submod = graph_of(
        lambda g, a: (g.call_function(torch.sin, (a,)), g.call_function(torch.cos, (a,))), "a"
    )
    results: list[object] = []
    for i, text in enumerate(texts):
        placeholders[i].name = text
        node = graph.call_function(returned, (text, {text: [text]}, placeholders[i]), {text: text})
        node.name = text
        node.meta["stack_trace"] = f'  File "/a/{text}.py", line 3, in forward\n    {text}\n'
        node.meta["nn_module_stack"] = {text: (f"L['self'].{text}", text)}
        results.append(node)
        attribute = f"w{text}" if "." not in text else f"w{i}"
        gm.__dict__[attribute] = torch.ones(1)
        results.append(graph.create_node("get_attr", attribute))
        name = f"m{text}" if "." not in text else f"m{i}"
        gm._modules[name] = submod
        call = graph.create_node("call_module", name, (results[-1],))
        call.name = text
        results.append(call)
        method = graph.create_node("call_method", "sum", (placeholders[i],))
        method.name = f"{text}{text}"
        method.meta["example_value"] = torch.ones(1)
        results.append(method)
    graph.output({texts[0]: results})
    bound = {placeholders[0].name: f"path {texts[0]}"}
    return gm, LowerOptions(banner=tuple(texts), bound=bound)


def check(texts: list[str], *, formatted: bool = True) -> None:
    gm, options = hostile_graph(texts)
    source = generate_source(gm, options)  # proves the text equal to the graph
    assert source.code.isascii() or source.code.replace("…", "").isascii()
    tree = ast.parse(source.code)
    kinds = {type(stmt).__name__ for stmt in tree.body}
    assert kinds <= {"Import", "Assign", "FunctionDef"}
    assert not formatted or format_source(source.code) == source.code
    inputs = tuple(torch.full((2,), float(i)) for i in range(len(texts)))
    assert problems(gm, source, inputs) == []
    # Saved to a file, the first two lines may not declare an encoding.
    assert not any("coding" in line for line in source.code.splitlines()[:2])


def test_all_of_them_at_once() -> None:
    check(list(CORPUS))


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(CORPUS), min_size=1, max_size=3, unique=True)
)
@settings(max_examples=100, deadline=None)
def test_any_text_everywhere(texts: list[str]) -> None:
    check(texts, formatted=False)


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_a_string_arrives_as_it_is(text: str) -> None:
    bytes_of_it = text.encode("utf-8", "surrogatepass")
    source = generate_source(graph_of(lambda g, x: (text, [text, x], {text: bytes_of_it})))
    result = compile_execution_fn(source.code, {}, [], source.consts)(1)
    assert result == (text, [text, 1], {text: bytes_of_it})
