"""Compiled pieces on disk: a second process compiles nothing, and what does not matter does not miss."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import piecework
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.cache import list_entries
from piecework.runtime.config import CompilationConfig

MODEL = """
import json, sys
import torch
import piecework

@piecework.splitting_op("piece_cache::mix", mutates_args=("out",))
def mix(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    out.copy_(left - right)

class Block(torch.nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index
        self.enter, self.leave = torch.nn.Linear(8, 16), torch.nn.Linear(8, 8)

    def forward(self, x):
        left, right = self.enter(x).chunk(2, -1)
        out = torch.empty_like(left)
        mix(left, right, out, f"layers.{self.index}")
        return x + self.leave(out)

torch.manual_seed(0)
model = torch.nn.Sequential(*(Block(i) for i in range(4)))
x = torch.randn(5, 8)
config = piecework.CompilationConfig(**json.loads(sys.argv[1]))
stitched = piecework.compile(model, (x,), config=config)
with torch.no_grad():
    error = (stitched(x) - model(x)).abs().max().item()
print(json.dumps({**piecework.counters.snapshot(), "error": error, "code": stitched.source.code}))
"""


def run(folder: Path, cache: Path, **config: object) -> dict[str, object]:
    """Compile the model in a new process; the model's file lies in ``folder``."""
    folder.mkdir(exist_ok=True)
    script = folder / "model_of_the_cache_test.py"
    if not script.exists():
        script.write_text(MODEL)
    environment = {
        **os.environ,
        "PIECEWORK_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(config)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.inductor
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


def test_the_key_ignores_what_does_not_change_the_code() -> None:
    def key(**fields: object) -> str:
        backend = PieceworkBackend(CompilationConfig(**fields))
        gm = torch.fx.symbolic_trace(lambda x: (x + 1,))
        for node in gm.graph.find_nodes(op="placeholder"):
            node.meta["example_value"] = torch.empty(4, 8)
        backend.compiler_manager.initialize_cache(gm, [])
        assert backend.compiler_manager.cache is not None
        directory = backend.compiler_manager.cache.entry.directory
        assert directory is not None
        return directory.parent.parent.name

    base = key()
    assert key(cudagraph_capture_sizes=[1, 2, 4]) == base
    assert key(cudagraph_num_of_warmups=3) == base
    assert key(debug_dump_path="/tmp/anywhere") == base
    assert key(inductor_compile_config={"max_autotune": True}) != base


@pytest.mark.inductor
def test_a_damaged_artifact_is_compiled_again_with_one_warning(
    own_compile_cache: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_saved=1):
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
def test_bytes_that_torch_refuses_are_set_aside(
    own_compile_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from piecework.runtime.compilers.inductor import InductorStandaloneAdaptor

    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    with monkeypatch.context() as patch:
        # Right checksum, wrong content: what a build with the same version but other sources would leave.
        patch.setattr(InductorStandaloneAdaptor, "to_bytes", lambda self, piece: b"not an artifact")
        piecework.compile(model, (x,))
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_loaded=0):
        stitched = piecework.compile(model, (x,))
    torch.testing.assert_close(stitched(x), model(x))


@pytest.mark.inductor
def test_the_cache_can_be_switched_off(
    own_compile_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECEWORK_DISABLE_CACHE", "1")
    with piecework.counters.expect(num_inductor_compiles=1, num_compiled_artifacts_saved=0):
        piecework.compile(torch.nn.Linear(8, 8), (torch.randn(4, 8),))
    assert not list(own_compile_cache.rglob("*.bin"))


@pytest.mark.inductor
def test_texts_lie_beside_the_artifacts(own_compile_cache: Path) -> None:
    stitched = piecework.compile(torch.nn.Linear(8, 8), (torch.randn(4, 8),))
    (text,) = own_compile_cache.rglob("stitched.py")
    assert text.read_text() == stitched.source.code
    assert (text.parent / "computation_graph.py").read_text()
    assert len(list(list_entries(own_compile_cache))) == 1
    shutil.rmtree(own_compile_cache)


@pytest.mark.nightly
def test_eight_processes_compile_each_piece_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: run(tmp_path / f"process_{i}", cache), range(8)))
    assert sum(int(str(each["num_inductor_compiles"])) for each in done) == 3
    assert all(float(str(each["error"])) < 1e-5 for each in done)
