"""Binding emitted source: its function is called as the graph is, and shows its own lines in tracebacks and debuggers."""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import linecache
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.fx
from fx_graphs import callable_graph_of

from piecework.codegen import (
    LowerOptions,
    compile_execution_fn,
    generate_execution_code,
    generate_source,
)


def model() -> torch.fx.GraphModule:
    def build(g: torch.fx.Graph, x: torch.fx.Node, w: torch.fx.Node) -> object:
        y = g.call_module("first", (g.call_function(torch.matmul, (x, w)),))
        return (g.call_module("second", (y,)),)

    root = torch.nn.ModuleDict({"first": torch.nn.ReLU(), "second": torch.nn.Tanh()})
    return callable_graph_of(build, "x", "w", root=root)


def bound(gm: torch.fx.GraphModule, **others: object) -> Callable[..., object]:
    """The emitted function of ``gm``, with ``others`` in place of its submodules."""
    code, names, consts = generate_execution_code(gm)
    assert names == ["first", "second"] and consts == []
    submods = {name: getattr(gm, name) for name in names}
    return compile_execution_fn(code, submods | others, names, consts)  # type: ignore[arg-type]


def test_the_emitted_contract() -> None:
    gm = model()
    function = bound(gm)
    signature = inspect.signature(function)
    assert list(signature.parameters) == ["x", "w", "__vllm_submods__"]
    assert signature.parameters["__vllm_submods__"].kind is inspect.Parameter.KEYWORD_ONLY
    x, w = torch.randn(2, 3), torch.randn(3, 3)
    torch.testing.assert_close(function(x, w), gm(x, w), rtol=0, atol=0)


def test_another_list_can_be_passed_per_call() -> None:
    x, w = torch.randn(2, 3), torch.eye(3)
    seen = bound(model())(x, w, __vllm_submods__=[torch.neg, torch.abs])
    torch.testing.assert_close(seen, (x.abs(),))


def test_bound_weights_are_names_of_the_module() -> None:
    gm = model()
    source = generate_source(gm, LowerOptions(bound={"w": "layer.weight"}))
    assert "def execution_fn(x, *, __vllm_submods__):" in source.code
    assert "#   w:  = layer.weight" in source.code
    x, w = torch.randn(2, 3), torch.randn(3, 3)
    callables = {name: getattr(gm, name) for name in source.submod_names}
    function = compile_execution_fn(
        source.code, callables, source.submod_names, source.consts, bound={"w": w}
    )
    torch.testing.assert_close(function(x), gm(x, w), rtol=0, atol=0)


def failing(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("inside the piece")


def test_a_failure_shows_the_emitted_line() -> None:
    gm = model()
    with pytest.raises(ValueError, match="inside the piece") as caught:
        bound(gm, second=failing)(torch.randn(2, 3), torch.randn(3, 3))
    text = "".join(traceback.format_exception(caught.value))
    assert "second = __vllm_submods__[1](first)" in text and "<piecework:" in text
    frame = next(f for f in traceback.extract_tb(caught.tb) if f.filename.startswith("<piecework:"))
    source = generate_source(gm)
    assert source.code.splitlines()[frame.lineno - 1].strip() == frame.line


def test_lines_stay_as_long_as_any_function_made_from_the_text() -> None:
    one, two = bound(model()), bound(model())
    filename = one.__code__.co_filename  # type: ignore[attr-defined]
    linecache.checkcache()
    del two
    gc.collect()
    assert linecache.getline(filename, 1).startswith("# piecework stitching source")
    del one
    gc.collect()
    assert filename not in linecache.cache


def test_every_statement_has_a_line_and_its_origin() -> None:
    gm = model()
    for node in gm.graph.nodes:
        if node.op.startswith("call"):
            node.meta["stack_trace"] = f'  File "/private/{node.name}.py", line 7, in forward\n'
            node.meta["nn_module_stack"] = {
                "k": (f"L['self']._modules['layers']._modules['0'].{node.name}", object)
            }
            node.meta["example_value"] = torch.empty(2, 3)
    source = generate_source(gm)
    lines = source.code.splitlines()
    assert "    # layers.0.matmul  matmul.py:7  -> f32[2, 3]" in lines
    assert "/private" not in source.code
    at = next(i for i, line in enumerate(lines, 1) if "torch.matmul(" in line)
    assert source.lines[at].module == "layers.0.matmul" and source.lines[at].source == "matmul.py:7"


def test_the_text_is_the_same_in_every_process_and_under_every_hash_seed() -> None:
    program = (
        "import torch, torch.fx, operator\n"
        "from piecework.codegen import generate_execution_code\n"
        "g = torch.fx.Graph(); x = g.placeholder('x')\n"
        "y = g.call_function(torch.add, (x, {'a': 1.5}['a']), {'alpha': 2, 'out': None})\n"
        "z = g.call_method('to', (y, torch.float64, torch.device('cpu'), float('inf')))\n"
        "g.output({'k': z, 'f': [z, range(3), torch.strided]})\n"
        "print(generate_execution_code(torch.fx.GraphModule(torch.nn.Module(), g))[0])\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(program, {})
    environment = {"PYTHONHASHSEED": "4711", "PATH": ""}
    there = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert "def execution_fn(x" in here.getvalue()
    assert there.stdout == here.getvalue()
