"""Compiled pieces on disk: a second process compiles nothing, and what does not matter does not miss."""

from __future__ import annotations

import importlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from processes import python

import piecework
from piecework.codegen.graph.structure import structure_of
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.manager import CompilerManager, Request
from piecework.runtime.store.cache import list_entries

MODEL = Path(__file__).with_name("piece_cache_model.py").read_text()


def run(folder: Path, cache: Path, **config: object) -> dict[str, object]:
    """Compile the model in a new process; the model's file lies in ``folder``."""
    folder.mkdir(exist_ok=True)
    script = folder / "model_of_the_cache_test.py"
    if not script.exists():
        script.write_text(MODEL)
    places = {"PIECEWORK_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(folder / "ind")}
    done = python(script, json.dumps(config), **places)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.inductor
@pytest.mark.nightly
def test_a_second_process_compiles_nothing_and_a_changed_source_file_does(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = run(tmp_path / "here", cache)
    assert (first["num_inductor_compiles"], first["num_compiled_artifacts_saved"]) == (3, 3)

    # Another process, another place for the source tree, and an empty Inductor cache.
    second = run(tmp_path / "there", cache)
    assert (second["num_inductor_compiles"], second["num_compiled_artifacts_loaded"]) == (0, 3)
    assert second["error"] < 1e-5 and second["code"] == first["code"]

    script = tmp_path / "there" / "model_of_the_cache_test.py"
    script.write_text(MODEL.replace("return x + self.leave(out)", "return x - self.leave(out)"))
    third = run(tmp_path / "there", cache)
    assert third["num_inductor_compiles"] == 3  # the traced source is part of the key
    assert third["error"] < 1e-5


def key(**fields: object) -> str:
    """The key under which a graph would be kept."""
    entry = opened(**fields).entry
    assert entry is not None
    return entry.identity.key


def opened(stack_trace: str = "", **fields: object) -> CompilerManager:
    manager = CompilerManager(CompilationConfig(**fields))
    gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
    for node in gm.graph.nodes:
        node.meta["example_value"] = torch.empty(4, 8)
        node.meta["stack_trace"] = stack_trace
    manager.initialize_cache(gm, [])
    return manager


def test_the_key_ignores_what_does_not_change_the_code() -> None:
    base = key()
    assert key(cudagraph_capture_sizes=[1, 2, 4], cudagraph_num_of_warmups=3) == base
    assert key(debug_dump_path="/tmp/anywhere") == base
    assert key(compile_sizes=[1, 8], compile_ranges_endpoints=[16]) == base
    assert key(inductor_compile_config={"max_autotune": True}) != base
    with inductor_patch("compile_threads", 3), inductor_patch("trace.enabled", True):
        assert key() == base
    with torch.inference_mode():  # which is left while a piece is compiled
        assert key() == base


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: set_by(torch.set_default_dtype, torch.float64, torch.float32),
    "deterministic": lambda: set_by(torch.use_deterministic_algorithms, True, False),
    "precision": lambda: set_by(torch.set_float32_matmul_precision, "medium", "highest"),
    "an option": lambda: inductor_patch("max_autotune", True),
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "attention kernels": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    "fusion pass": lambda: inductor_patch("_post_fusion_custom_pass", _global_pass),
    "a lowering": lambda: pytest.MonkeyPatch.context(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_ambient_is_in_the_key(name: str) -> None:
    lowerings = importlib.import_module("torch._inductor.lowering").lowerings
    base = key()
    with SETTINGS[name]() as patch:
        if name == "a lowering":  # the user's own, of an operator of torch
            patch.setitem(lowerings, torch.ops.aten.relu.default, _global_pass)
        changed = key()
        assert key() == changed != base
    assert key() == base


def inductor_patch(name: str, value: object) -> AbstractContextManager[None]:
    return importlib.import_module("torch._inductor.config").patch({name: value})


@pytest.mark.inductor
def test_autocast_around_a_model_is_not_the_model_without_it(own_compile_cache: Path) -> None:
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    for cast in (False, True, False, True):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.no_grad():
            found = piecework.compile(model, (x,))(x)
            assert found.dtype is (torch.bfloat16 if cast else torch.float32)
            torch.testing.assert_close(found, model(x))


@pytest.mark.inductor
def test_a_pass_without_a_stable_form_compiles_and_is_kept_nowhere(
    own_compile_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = threading.Lock()
    calls: list[int] = []

    def locked(graph: torch.fx.Graph) -> None:
        with lock:
            calls.append(1)

    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    for times in (1, 2):
        torch._dynamo.reset()
        config = CompilationConfig(inductor_passes={"post_grad_custom_post_pass": locked})
        with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_saved=0):
            torch.testing.assert_close(piecework.compile(model, (x,), config=config)(x), model(x))
        assert len(calls) == times  # Inductor's own caches did not answer either
    first = next(each for each in caplog.records if each.name.startswith("piecework"))
    assert "inductor_passes.post_grad_custom_post_pass" in first.getMessage()
    assert "uuid()" in first.getMessage()
    assert not list(own_compile_cache.rglob("*.bin"))


def _global_pass(graph: torch.fx.Graph) -> None:
    graph.lint()


@contextmanager
def set_by(setter: Callable[[object], None], value: object, before: object) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


@pytest.mark.parametrize("file", ["gone.py", "<nothing in linecache>"])
def test_a_source_that_can_not_be_read_switches_the_cache_off_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    """Its changes would go unseen; compiling goes on all the same."""
    name = file if file.startswith("<") else str(tmp_path / file)
    cache = opened(f'  File "{name}", line 3, in forward\n    return x + 1\n')
    assert cache.entry is None
    (record,) = (each for each in caplog.records if each.name.startswith("piecework"))
    assert name in record.getMessage() and "without it" in record.getMessage()


def test_a_source_file_that_is_read_is_in_the_key(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    trace = f'  File "{file}", line 3, in forward\n    return x + 1\n'

    def factors(text: str) -> object:
        file.write_text(text)
        return opened(trace).entry.directory

    assert factors("one") == factors("one") != factors("two")


@pytest.mark.inductor
def test_one_more_batch_size_compiles_that_size_only(own_compile_cache: Path) -> None:
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    for sizes, new in (((), 1), ((2,), 2), ((2, 3), 1)):  # [1, up] and "all" are told apart
        config = CompilationConfig(compile_sizes=list(sizes))
        with piecework.counters.expect(num_inductor_compiles=new):
            stitched = piecework.compile(model, (x,), config=config)
        for batch in (2, 3, 5):
            x = torch.randn(batch, 8)
            torch.testing.assert_close(stitched(x), model(x))


@pytest.mark.inductor
def test_a_damaged_artifact_is_compiled_again(own_compile_cache: Path) -> None:
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    piecework.compile(model, (x,))
    (artifact,) = own_compile_cache.rglob("*.bin")
    data = bytearray(artifact.read_bytes())
    data[len(data) // 2] ^= 0xFF
    artifact.write_bytes(bytes(data))
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_loaded=0):
        stitched = piecework.compile(model, (x,))
    torch.testing.assert_close(stitched(x), model(x))
    with piecework.counters.expect(num_inductor_compiles=0, num_compiled_artifacts_loaded=1):
        piecework.compile(model, (x,))


@pytest.mark.inductor
def test_the_cache_can_be_switched_off(own_compile_cache: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PIECEWORK_DISABLE_CACHE", "1")
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_saved=0):
        piecework.compile(torch.nn.Linear(8, 8), (torch.randn(4, 8),))
    assert not list(own_compile_cache.rglob("*.bin"))


@pytest.mark.inductor
def test_texts_lie_beside_the_artifacts(own_compile_cache: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = torch.cumsum(x.relu() + 1, 0)
            return x

    stitched = piecework.compile(Model(), (torch.randn(4, 8),), splitting_ops=[torch.cumsum])
    (text,) = own_compile_cache.rglob("stitched.py")
    assert text.read_text() == stitched.source.code
    assert (text.parent / "transformed_code.py").read_text() == stitched.entry_source.code
    graph = (text.parent / "computation_graph.py").read_text()
    assert "self.submod_4(" in graph and "# submod_2, submod_4\nclass submod_2(" in graph
    assert "class submod_4(" not in graph
    assert len(list(list_entries(own_compile_cache))) == 1
    shutil.rmtree(own_compile_cache)


class Reading(torch.nn.Module):
    """What engines' norms do: the tensor behind a parameter, and modes switched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.gelu(x) * self.weight.data


@pytest.mark.inductor
def test_a_piece_that_calls_functions_of_torchs_c_is_kept(
    own_compile_cache: Path, warned: list[str]
) -> None:
    with piecework.counters.expect(num_compiled_artifacts_saved=1):
        stitched = piecework.compile(Reading(), (torch.ones(4, 8),))
    assert any("get_data_attr" in str(each.target) for each in stitched.program.graph.graph.nodes)
    assert warned == []


def python_function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_a_piece_that_can_not_be_kept_is_said_once_with_its_reason(warned: list[str]) -> None:
    graph, cache = torch.fx.symbolic_trace(torch.nn.Identity()), opened()
    (given,) = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(given):
        graph.graph.call_function(python_function, (given,))
    for _ in range(2):
        assert not cache.is_kept(Request("submod_0", graph, structure_of(graph), None, None))
    (warning,) = warned
    assert "not kept in the compile cache: it calls the Python function" in warning
    assert "python_function" in warning
