"""Whatever the proof accepts of Python's grammar does what its graph does; the proof itself runs nothing."""

from __future__ import annotations

import importlib.util
import operator
import random
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.fx

from piecework.codegen import LowerOptions, StitchedSource, generate_source, verify
from piecework.errors import EmitError


def _beside(name: str) -> ModuleType:
    """Another file of this folder: tests are no package."""
    spec = importlib.util.spec_from_file_location(
        f"beside_{name}", Path(__file__).with_name(f"{name}.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FUZZ = _beside("codegen_fuzz")


class Opaque(torch.nn.Module):
    def forward(self, *args: object) -> object:
        raise AssertionError("the proof runs nothing")


def _inner(constant: float) -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (graph.call_function(torch.sin, (x,)), constant))
    graph.output(graph.call_method("clone", (y,)))
    return torch.fx.GraphModule({}, graph)


def _region() -> torch.fx.GraphModule:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(
        torch.amp.autocast_mode._enter_autocast, ("cpu", None, True, None)
    )
    y = graph.call_function(torch.matmul, (x, x))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    z = graph.call_function(torch.relu, (y,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output(z)
    return torch.fx.GraphModule({}, graph)


def sample() -> tuple[torch.fx.GraphModule, StitchedSource]:
    """A graph with one of everything: pieces, shared functions, regions, constants, containers, slices, a held weight."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    call = graph.call_module("piece_0", (x, weight))
    call.meta["example_value"] = (torch.empty(1), torch.empty(1))
    a = graph.call_function(operator.getitem, (call, 0))
    b = graph.call_function(operator.getitem, (call, 1))
    c = graph.call_module("first", (a,))
    d = graph.call_module("second", (b,))
    e = graph.call_module("region", (c,))
    f = graph.call_function(operator.add, (e, d))
    g = graph.call_function(torch.cat, ([f, c, -1.5],), {"dim": -1})
    h = graph.call_function(operator.getitem, (g, (slice(None, 2, None), Ellipsis)))
    i = graph.call_method("view", (h, -1, 2), {"dtype": torch.float16})
    j = graph.call_function(getattr, (i, "shape"))
    k = graph.call_module("piece_1", (j, {"key": i}, (None, True)))
    graph.output((k, [a, 2 + 1j], {"j": j}))
    parts = {
        "piece_0": Opaque(),
        "piece_1": Opaque(),
        "first": _inner(2.0),
        "second": _inner(3.0),
        "region": _region(),
    }
    gm = torch.fx.GraphModule(parts, graph)
    options = LowerOptions(bound={"weight": "weight"})
    return gm, generate_source(gm, options)


def behaviours(code: str, source: StitchedSource, runs: int = 12) -> list[list[object]]:
    """What running ``code`` does: undisturbed, and with each of its first calls failing."""
    found = []
    for fail_at in (None, *range(1, runs)):
        world = FUZZ.World(fail_at)
        FUZZ.run(code, world, len(source.submod_names), source.consts, ["weight"])
        found.append(world.log)
    return found


def fuzz(count: int, seed: int) -> dict[str, int]:
    """Try ``count`` mutants; each is refused with an `EmitError`, or does what the graph does."""
    gm, source = sample()
    expected = behaviours(source.code, source)
    assert expected[0][-5][0] != ("str", "'raises'"), expected[0]
    counts = {"not Python": 0, "refused": 0, "accepted": 0}
    chance = random.Random(seed)
    for text in islice(FUZZ.mutants(source.code, chance), count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            try:
                compile(text, "<mutant>", "exec")
            except (SyntaxError, ValueError):
                counts["not Python"] += 1
        with quiet() as disturbances:
            try:
                verify(source, gm, edited=text)
            except EmitError:
                counts["refused"] += 1
                continue
        assert not disturbances, (disturbances, text)
        counts["accepted"] += 1
        assert behaviours(text, source) == expected, text
    return counts


# --- nothing is executed while proving ---------------------------------------------------------------

_WATCHED: list[list[object]] = []


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _WATCHED and (
        event in ("import", "exec", "open") or event.startswith(("os.", "subprocess"))
    ):
        _WATCHED[-1].append((event, args))


@contextmanager
def quiet() -> Iterator[list[object]]:
    """Collect imports, executions of code objects and files that are opened in the block."""
    if not getattr(sys, "_piecework_audited", False):
        sys.addaudithook(_audit)
        sys._piecework_audited = True  # type: ignore[attr-defined]
    found: list[object] = []
    _WATCHED.append(found)
    try:
        yield found
    finally:
        _WATCHED.pop()


def test_accepted_mutants_do_what_the_graph_does() -> None:
    counts = fuzz(600, seed=11)
    assert counts["refused"] > 300 and counts["accepted"] > 10, counts


@pytest.mark.nightly
def test_accepted_mutants_do_what_the_graph_does_all_night() -> None:
    counts = fuzz(20_000, seed=random.randrange(2**32))
    print(counts)


ANNOTATED = (
    "def _h(a: globals().update(att=1)): return a",
    "def _h(*a: globals()): return a",
    "def _h(**a: globals()): return a",
    "def _h(a, *, __vllm_submods__: globals()): return a",
    "def _h(a) -> globals(): return a",
    "def _h(a=globals()): return a",
    "def _h(a=[]): return a",
    "@globals()\ndef _h(a): return a",
    "async def _h(a): return a",
    "def _h(a): yield a",
    "def _h(a, /): return a",
    "class _h: globals()",
    "class torch(metaclass=print): pass",
    "__builtins__ = math",
    "__builtins__ = torch",
    "__name__ = 'torch'",
    "__loader__ = None",
    "__vllm_consts__ = torch",
    "__vllm_submods__ = torch",
    "__annotations__ = torch",
    "__getattr__ = torch.sin",
    "def __getattr__(name): return name",
    "def __builtins__(name): return name",
    "weight = torch.sin",
    "def weight(x): return x",
    "torch = torch.ops",
    "x: print() = 1",
    "x: print()",
    "x = y = torch",
    "x, y = torch, torch",
    "x = (y := torch)",
    "x = [torch for torch in ()]",
    "x = lambda a=print(): a",
    "x = f'{print()}'",
    "x = ()",
    "x = __name__",
    "x = __import__",
    "x = __builtins__",
    "if print(): pass",
    "with torch.no_grad(): pass",
    "try: print()\nfinally: print()",
    "'doc'",
    "f'{print()}'",
    "global torch",
    "from os import *",
    "from __future__ import annotations",
    "import torch as math",
    "import antigravity",
    "import xml.sax.expatreader",
    "match torch:\n    case print(): pass",
    "del torch",
    "assert print()",
    "raise torch",
    "print()",
)


@pytest.mark.parametrize("text", ANNOTATED)
@pytest.mark.parametrize("place", ["first", "last"])
def test_what_module_level_may_not_hold(text: str, place: str) -> None:
    gm, source = sample()
    if place == "first":
        edited = source.code.replace("import torch\n", f"import torch\n{text}\n", 1)
    else:
        edited = f"{source.code}\n{text}\n"
    with quiet() as disturbances, pytest.raises(EmitError, match="line "):
        verify(source, gm, edited=edited)
    assert not disturbances


@pytest.mark.parametrize(
    "change",
    [
        ("def execution_fn(x,", "def execution_fn(x: print(),"),
        ("*, __vllm_submods__):", "*, __vllm_submods__: print()):"),
        ("*, __vllm_submods__):", "*, __vllm_submods__=print()):"),
        ("*, __vllm_submods__):", "*, __vllm_submods__) -> print():"),
        ("*, __vllm_submods__):", "*print, __vllm_submods__):"),
        ("*, __vllm_submods__):", "*, __vllm_submods__, more=1):"),
        ("def execution_fn(x,", "def execution_fn(x, /,"),
        ("def execution_fn(x,", "async def execution_fn(x,"),
        ("def execution_fn(x,", "@print\ndef execution_fn(x,"),
    ],
)
def test_what_a_signature_may_not_hold(change: tuple[str, str]) -> None:
    gm, source = sample()
    assert change[0] in source.code
    with pytest.raises(EmitError):
        verify(source, gm, edited=source.code.replace(*change))


# --- regions -----------------------------------------------------------------------------------------


def test_regions_are_closed_in_finally_whatever_fails() -> None:
    _, source = sample()
    assert source.code.count("finally:") == 2
    for log in behaviours(source.code, source, runs=25):
        names = [str(entry[1]) for entry in log if entry[0] == ("str", "'call'")]
        entered, left = (
            str(("object", id(f)))
            for f in (
                torch.amp.autocast_mode._enter_autocast,
                torch.amp.autocast_mode._exit_autocast,
            )
        )
        failed_entering = log[-5] == (("str", "'stopped'"),) and names[-1:] == [entered]
        assert names.count(entered) == names.count(left) + failed_entering
        grad = names.count(str(("object", id(torch._C._set_grad_enabled))))
        assert grad in (0, 2) or (grad == 1 and log[-5] == (("str", "'stopped'"),))


@pytest.mark.parametrize(
    "change",
    [
        ("        try:\n            relu = torch.relu(matmul)\n            del matmul\n        finally:\n            torch._C._set_grad_enabled(False)\n",
         "        relu = torch.relu(matmul)\n        torch._C._set_grad_enabled(False)\n"),
        ("        finally:\n            torch._C._set_grad_enabled(False)\n",
         "            torch._C._set_grad_enabled(False)\n        finally:\n            pass\n"),
        ("            torch._C._set_grad_enabled(False)\n", "            torch._C._set_grad_enabled(False)\n            print()\n"),
        ("        finally:\n            torch._C", "        except print():\n            pass\n        finally:\n            torch._C"),
        ("        finally:\n            torch._C", "        except ValueError:\n            pass\n        else:\n            pass\n        finally:\n            torch._C"),
        ("        torch._C._set_grad_enabled(True)\n", "        {torch._C._set_grad_enabled(True): 1}\n"),
        ("        torch._C._set_grad_enabled(True)\n", "        [torch._C._set_grad_enabled(True)]\n"),
        ("        torch._C._set_grad_enabled(True)\n", "        a, b = torch._C._set_grad_enabled(True)\n"),
        ("_exit_autocast(_enter_autocast)", "_exit_autocast(matmul)"),
        ("torch._C._set_grad_enabled(False)", "torch._C._set_grad_enabled(relu)"),
    ],
)  # fmt: skip
def test_regions_that_are_not_closed_are_refused(change: tuple[str, str]) -> None:
    gm, source = sample()
    assert change[0] in source.code, source.code
    with pytest.raises(EmitError):
        verify(source, gm, edited=source.code.replace(*change))


def test_no_hash_is_run_that_the_graph_does_not_run() -> None:
    gm, source = sample()
    edited = source.code.replace("    del view\n", "    found = {x: 1}\n    del view\n", 1)
    assert edited != source.code
    with pytest.raises(EmitError, match="runs its hash"):
        verify(source, gm, edited=edited)


# --- what names lead to ------------------------------------------------------------------------------


def test_paths_are_looked_up_without_running_code() -> None:
    ran: list[str] = []
    lazy = types.ModuleType("fuzz_lazy_module")
    lazy.__getattr__ = lambda name: ran.append(name)  # type: ignore[method-assign]

    class Owner:
        @property
        def value(self) -> object:
            ran.append("value")
            return torch.sin

    class Computed:
        def __get__(self, owner: object, kind: object = None) -> object:
            ran.append("get")
            return torch.sin

    lazy.owner, lazy.kind = Owner(), type("Kind", (), {"found": Computed()})  # type: ignore[attr-defined]
    sys.modules["fuzz_lazy_module"] = lazy
    try:
        gm, source = sample()
        for path in ("anything", "owner.value", "kind.found", "__class__.mro"):
            edited = source.code.replace(
                "import torch\n",
                f"import torch\nimport fuzz_lazy_module\n\nname = fuzz_lazy_module.{path}\n",
                1,
            )
            with pytest.raises(EmitError, match="only code can tell"):
                verify(source, gm, edited=edited)
    finally:
        del sys.modules["fuzz_lazy_module"]
    assert not ran


def test_what_is_not_imported_is_not_imported_by_the_proof() -> None:
    gm, source = sample()
    assert "antigravity" not in sys.modules
    with pytest.raises(EmitError, match="nothing has imported antigravity"):
        verify(source, gm, edited=f"import antigravity\n{source.code}")
    assert "antigravity" not in sys.modules


# --- deep texts --------------------------------------------------------------------------------------

DEEP = {
    "parentheses": "(" * 10_000 + "x" + ")" * 10_000,
    "brackets": "[" * 150 + "x" + "]" * 150,
    "sum": "+".join(["x"] * 10_000),
    "long sum": "+".join(["x"] * 400),
    "attributes": "x" + ".a" * 10_000,
    "calls": "x" + "()" * 10_000,
    "signs": "-" * 10_000 + "x",
    "subscripts": "x" + "[0]" * 10_000,
    "comparison": "<".join(["x"] * 10_000),
}


@pytest.mark.parametrize("text", DEEP.values(), ids=list(DEEP))
def test_deep_texts_are_refused_by_type(text: str) -> None:
    gm, source = sample()
    for edited in (
        source.code.replace("execution_fn(x", f"execution_fn(x={text}", 1),
        source.code.replace("return (", f"deep = {text}\n    return (", 1),
        f"{source.code}\ndeep = {text}\n",
        "if x:\n" + "".join(" " * i + "if x:\n" for i in range(1, 99)) + " " * 99 + "pass\n",
    ):
        assert edited != source.code
        with pytest.raises(EmitError):
            verify(source, gm, edited=edited)


def test_a_chain_of_functions_is_refused_by_type() -> None:
    gm, source = sample()
    chain = "".join(f"def _f{i}(x):\n    return _f{i + 1}(x)\n" for i in range(2000))
    edited = source.code.replace(
        "def execution_fn", f"{chain}def _f2000(x):\n    return x\n\n\ndef execution_fn"
    )
    edited = edited.replace("return (", "deep = _f0(x)\n    return (", 1)
    with pytest.raises(EmitError):
        verify(source, gm, edited=edited)
