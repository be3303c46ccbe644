"""Finding the CPU's vector instructions beside the trace. In: a process with an empty Inductor cache. Out: what torch finds by itself, sooner."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from piecework.runtime.compilers import vector_isa
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.pieces.manager import CompilerManager


def in_a_new_process(folder: Path, text: str) -> str:
    """What ``text`` prints in a process with an Inductor cache of its own."""
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHOICE = """
from torch._inductor.cpu_vec_isa import pick_vec_isa, supported_vec_isa_list, x86_isa_checker
named = [i for i in supported_vec_isa_list if all(f in x86_isa_checker() for f in str(i).split())]
isa = pick_vec_isa()
print(isa, isa.build_arch_flags())
print(1 + named.index(isa) if isa in named else 1)
"""


@pytest.mark.inductor
@pytest.mark.nightly
def test_the_choice_is_torchs_own_and_no_set_below_it_is_tried(tmp_path: Path) -> None:
    begin = "import torch\nfrom piecework.runtime.compilers.vector_isa import await_search\n"
    mine, expected = in_a_new_process(
        tmp_path, begin + "await_search([torch.ones(1)])" + CHOICE
    ).splitlines()
    built = sum("Vectorized" in path.read_text() for path in tmp_path.rglob("*.cpp"))
    assert built <= int(expected)
    assert mine == in_a_new_process(tmp_path, CHOICE).splitlines()[0]


def test_it_is_sought_once_and_only_for_code_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_isa, "_search", None)
    calls: list[str] = []
    compat = vector_isa.torch_compat
    monkeypatch.setattr(compat, "vector_isa_unknown", lambda: True)
    monkeypatch.setattr(
        compat, "find_vector_isa", lambda: calls.append(threading.current_thread().name)
    )
    vector_isa.await_search([3, torch.empty(2, device="meta")])
    assert calls == []
    vector_isa.start_search()
    vector_isa.await_search([torch.ones(2)])
    vector_isa.await_search([torch.ones(2)])
    assert len(calls) == 1
    assert calls[0] != threading.current_thread().name


def test_an_error_of_the_search_reaches_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no space left")

    monkeypatch.setattr(vector_isa, "_search", None)
    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_unknown", lambda: True)
    monkeypatch.setattr(vector_isa.torch_compat, "find_vector_isa", fail)
    with pytest.raises(OSError, match="no space left"):
        vector_isa.await_search([torch.ones(2)])


def test_what_the_user_fixed_is_not_sought(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    with config.patch({"cpp.simdlen": 256}):
        assert not vector_isa.torch_compat.vector_isa_unknown()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert not vector_isa.torch_compat.vector_isa_unknown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_forked_process_does_not_wait_for_a_thread_it_has_not() -> None:
    from concurrent.futures import Future

    kept, vector_isa._search = vector_isa._search, Future()
    try:
        child = os.fork()
        if child == 0:
            os._exit(0 if vector_isa._search is None else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        vector_isa._search = kept


def test_nothing_is_begun_when_the_cache_may_have_it_all(
    own_compile_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CompilerManager(CompilationConfig())
    begun: list[object] = []
    monkeypatch.setattr(manager.compiler, "get_ready", begun.append)
    manager.get_ready(["cold"])
    (own_compile_cache / "0123abcd").mkdir(parents=True)
    manager.get_ready(["warm"])
    assert begun == [["cold"]]
