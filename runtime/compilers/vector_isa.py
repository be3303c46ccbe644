"""The CPU's vector instructions, found while the model is being traced. In: nothing. Out: what Inductor would have found later.

Before its first C++ kernel Inductor compiles and loads test programs, one to three for each instruction set that the CPU names:
several seconds of waiting for a compiler when its cache is empty. Here that happens in a thread, and the strongest set comes
first: where its programs can be built and loaded, the sets that it includes can be, and are not tried.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future

import torch

from piecework.runtime import torch_compat

_lock = threading.Lock()
_search: Future[None] | None = None


def takes_cpu_tensors(values: Iterable[object]) -> bool:
    """Whether code that takes ``values`` (tensors and numbers) runs on the CPU."""
    return any(isinstance(each, torch.Tensor) and each.device.type == "cpu" for each in values)


def start_search() -> None:
    """Begin to look, once a process; does nothing where Inductor knows already or is told by its configuration."""
    global _search
    with _lock:
        if _search is None and torch_compat.vector_isa_unknown():
            _search = Future()
            # A daemon, so that a process which ends early does not wait for it.
            inherited = contextvars.copy_context()
            threading.Thread(target=inherited.run, args=(_find, _search), daemon=True).start()


def _find(search: Future[None]) -> None:
    try:
        torch_compat.find_vector_isa()
    except Exception as error:  # noqa: BLE001 - raised again for whoever waits
        search.set_exception(error)
    else:
        search.set_result(None)


def await_search(values: Iterable[object]) -> None:
    """Wait until the set is known, if code for the CPU is about to be made.

    Args:
        values: the inputs of the code, tensors and numbers.

    Raises:
        Exception: whatever Inductor's search raised. A set that can't be built is no error, it is not used.
    """
    if takes_cpu_tensors(values):
        start_search()
        if _search is not None:
            _search.result()


def _forget() -> None:
    """In a forked process: the thread that looks is not there."""
    global _search, _lock
    _search, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
