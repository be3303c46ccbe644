"""Pieces by name in a profile. In: a stitched function's lists of pieces. Out: the same lists, each piece inside a named profiler range while asked for.

The emitted source is not changed, and nothing is paid outside the ``with`` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType

import torch

Piece = Callable[..., object]


@contextmanager
def named_pieces(
    function: FunctionType,
    submod_lists: Sequence[list[Piece]],
    labels: Sequence[str],
    operators: Mapping[str, str],
) -> Iterator[None]:
    """Wrap every piece and operator in ``torch.profiler.record_function`` for the block.

    Args:
        function: the stitching function, with its default ``__vllm_submods__``.
        submod_lists: the ``__vllm_submods__`` lists, one per batch range; changed in place and put back.
        labels: the range name of each entry.
        operators: name in the emitted module → range name, for operators that it calls directly.
    """
    defaults = function.__kwdefaults__ or {}
    kept = [list(submods) for submods in submod_lists]
    kept_default = defaults["__vllm_submods__"]
    try:
        for submods in submod_lists:
            submods[:] = [
                _named(piece, label) for piece, label in zip(submods, labels, strict=True)
            ]
        named = (_named(piece, label) for piece, label in zip(kept_default, labels, strict=True))
        defaults["__vllm_submods__"] = type(kept_default)(named)
        with named_globals(function.__globals__, operators):
            yield
    finally:
        for submods, before in zip(submod_lists, kept, strict=True):
            submods[:] = before
        defaults["__vllm_submods__"] = kept_default


@contextmanager
def named_globals(namespace: dict[str, object], labels: Mapping[str, str]) -> Iterator[None]:
    """Wrap what functions of an emitted module call, by its name there, in a range of that label for the block."""
    kept = {name: namespace[name] for name in labels}
    try:
        for name, label in labels.items():
            namespace[name] = _named(kept[name], label)  # type: ignore[arg-type]
        yield
    finally:
        namespace.update(kept)


def _named(function: Piece, label: str) -> Piece:
    def run(*args: object, **kwargs: object) -> object:
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return run
