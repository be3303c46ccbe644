"""Which vector instructions a CPU has is tested beside a trace: Inductor tests set after set for seven seconds, and takes the first that passes."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch

from piecework.runtime import torch_compat


@cache
def _tested(process: int) -> Future[bool]:
    """The test of a process: in one that was forked meanwhile, the thread of another does not go on."""
    pool = ThreadPoolExecutor(1, "piecework-vector-isa")
    found = pool.submit(torch_compat.vector_isa_test())
    pool.shutdown(wait=False)
    return found


def begin_test() -> None:
    """Test the strongest instructions in a thread, unless Inductor knows, or pieces may be for a GPU."""
    if _is_asked():
        _tested(os.getpid())


def await_test() -> None:
    """Have Inductor know them; where the test failed, it asks for the others itself, and says what is wrong."""
    if not _is_asked():
        return
    found = _tested(os.getpid())
    if found.exception() is None and found.result():
        torch_compat.take_vector_isa()


def _is_asked() -> bool:
    return not (torch.cuda.is_available() or torch_compat.vector_isa_is_known())
