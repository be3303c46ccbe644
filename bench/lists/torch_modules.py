"""torch's own list of modules.

The list is private to torch's tests and needs ``expecttest``; nothing else of torch's tests is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from piecework.bench.lists.sample import Row, Sample, resized, spread

SEED = 20


def torch_modules() -> list[Row]:
    """A row per module of ``module_db``.

    Raises:
        ImportError: ``expecttest`` is not installed.
    """
    from torch.testing._internal.common_modules import module_db

    return [Row("module_db", info.name, _samples_of(info), kind=_kind(info)) for info in module_db]


def _kind(info: Any) -> str:
    return str(info.module_cls.__module__).rpartition(".")[2]


def _samples_of(info: Any) -> Callable[[int], Sequence[Sample]]:
    def samples(limit: int) -> Sequence[Sample]:
        torch.manual_seed(SEED)
        found = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
        )
        usable = [
            _sample(info.module_cls, number, each)
            for number, each in enumerate(found)
            if each.forward_input is not None
        ]
        return spread(usable, limit)

    return samples


def _sample(cls: type[torch.nn.Module], number: int, given: Any) -> Sample:
    made = given.constructor_input
    torch.manual_seed(SEED + number)
    module = cls(*made.args, **made.kwargs).to(torch.float32).eval()
    call = copy.deepcopy((given.forward_input.args, given.forward_input.kwargs))
    if any(isinstance(each, torch.nn.UninitializedParameter) for each in module.parameters()):
        module(*copy.deepcopy(call[0]), **copy.deepcopy(call[1]))
    batch, at = resized(*call)
    others = [] if batch < 0 else [size for size in (1, 2, 5, 0) if size != batch]
    label = f"{number}: {given.desc}" if given.desc else str(number)
    return Sample(label, lambda: copy.deepcopy(module), at, batch, others)
