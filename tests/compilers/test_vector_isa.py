"""Which vector instructions Inductor takes: those that it would find itself, in less time, tested beside a trace."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from processes import python

from piecework.runtime.compilers import inductor
from piecework.runtime.compilers.inductor import await_test, begin_test

BEGUN = "from piecework.runtime.compilers.inductor import begin_test, await_test\n"
PRINTED = "from torch._inductor.cpu_vec_isa import pick_vec_isa\nprint(pick_vec_isa())"
Test = Callable[[], object]


@pytest.fixture
def tested(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Test], list[str]]]:
    """Makes the CPU's test do what is given, where Inductor knows nothing; gives what was taken."""
    taken: list[str] = []
    compat = inductor.torch_compat
    inductor._isa_test.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compat, "vector_isa_is_known", lambda: False)
    monkeypatch.setattr(compat, "take_vector_isa", lambda: taken.append("all"))

    def run(test: Test) -> list[str]:
        monkeypatch.setattr(compat, "vector_isa_test", lambda: test)
        return taken

    yield run
    inductor._isa_test.cache_clear()


@pytest.mark.nightly
def test_inductor_takes_what_it_would_find_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)

    def printed(before: str, name: str) -> str:
        places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)}
        return python("-c", f"import torch\n{before}{PRINTED}", **places).stdout

    assert printed(f"{BEGUN}begin_test()\nawait_test()\n", "begun") == printed("", "alone")


@pytest.mark.parametrize("passes", [True, False])
def test_all_are_taken_where_the_strongest_pass_one_test(passes: bool, tested) -> None:
    tests: list[bool] = []
    taken = tested(lambda: tests.append(passes) or passes)
    begin_test()
    begin_test()
    await_test()
    assert tests == [passes] and taken == ["all"] * passes


@pytest.mark.parametrize("where", ["torch.cuda.is_available", "vector_isa_is_known"])
def test_nothing_is_tested_where_inductor_knows_or_pieces_may_be_for_a_gpu(
    where: str, monkeypatch: pytest.MonkeyPatch, tested
) -> None:
    taken = tested(lambda: True)
    place, _, name = where.rpartition(".")
    monkeypatch.setattr(torch.cuda if place else inductor.torch_compat, name, lambda: True)
    begin_test()
    await_test()
    assert not taken


def test_a_process_that_was_forked_meanwhile_tests_by_itself(
    monkeypatch: pytest.MonkeyPatch, tested
) -> None:
    never = threading.Event()
    tested(never.wait)
    begin_test()
    taken = tested(lambda: True)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    await_test()
    never.set()
    assert taken == ["all"]
