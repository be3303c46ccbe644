"""Which vector instructions Inductor takes: those that it would find itself, in less time, tested beside a trace."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from piecework.runtime.compilers import inductor as vector_isa

BEGUN = "from piecework.runtime.compilers.inductor import begin_test, await_test\n"
TOLD = "from torch._inductor.cpu_vec_isa import pick_vec_isa\nprint(pick_vec_isa())"


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inductor knows nothing; gives what was done."""
    done: list[str] = []
    vector_isa._isa_test.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_is_known", lambda: False)
    monkeypatch.setattr(
        vector_isa.torch_compat, "take_vector_isa", lambda: done.append("all are taken")
    )
    yield done
    vector_isa._isa_test.cache_clear()


def told(before: str, folder: object) -> str:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{before}{TOLD}"],
        **{"capture_output": True, "text": True, "check": True, "env": environment},
    )
    return done.stdout


@pytest.mark.nightly
def test_inductor_takes_what_it_would_find_itself(tmp_path) -> None:
    found = told(f"{BEGUN}begin_test()\nawait_test()\n", tmp_path / "begun")
    assert found == told("", tmp_path / "alone")


@pytest.mark.parametrize("passes", [True, False])
def test_all_are_taken_where_the_strongest_pass(
    passes: bool, unknown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tests: list[bool] = []

    def test() -> bool:
        tests.append(passes)
        return passes

    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_test", lambda: test)
    vector_isa.begin_test()
    vector_isa.begin_test()
    vector_isa.await_test()
    assert tests == [passes]
    assert unknown == ["all are taken"] * passes


def test_nothing_is_tested_where_inductor_knows_or_pieces_may_be_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unasked() -> object:
        raise AssertionError("it was tested")

    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_test", unasked)
    with monkeypatch.context() as here:
        here.setattr(vector_isa.torch_compat, "vector_isa_is_known", lambda: True)
        vector_isa.begin_test()
        vector_isa.await_test()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vector_isa.begin_test()
    vector_isa.await_test()


def test_a_process_that_was_forked_meanwhile_tests_by_itself(
    unknown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_test", lambda: never.wait)
    vector_isa.begin_test()
    monkeypatch.setattr(vector_isa.torch_compat, "vector_isa_test", lambda: lambda: True)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    vector_isa.await_test()
    never.set()
    assert unknown == ["all are taken"]
