"""torch's own list of modules.

The list is private to torch's tests and needs ``expecttest``; nothing else of torch's tests is used.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from piecework.bench.lists.sample import Row, Sample, resized

SEED = 20


def torch_modules() -> list[Row]:
    """A row per module of ``module_db``.

    Raises:
        ImportError: ``expecttest`` is not installed.
    """
    from torch.testing._internal.common_modules import module_db

    return [
        Row(
            "module_db",
            info.name,
            partial(_sample, info),
            str(info.module_cls.__module__).rpartition(".")[2],
        )
        for info in module_db
    ]


def _sample(info: Any) -> Sample:
    """The first of a module's samples that are called."""
    torch.manual_seed(SEED)
    found = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=False
    )
    number, given = next(
        (n, each) for n, each in enumerate(found) if each.forward_input is not None
    )
    made = given.constructor_input
    torch.manual_seed(SEED + number)
    module = info.module_cls(*made.args, **made.kwargs).to(torch.float32).eval()
    args, kwargs = copy.deepcopy((given.forward_input.args, given.forward_input.kwargs))
    if any(isinstance(each, torch.nn.UninitializedParameter) for each in module.parameters()):
        module(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    batch, at = resized(args, kwargs)
    others = [] if batch < 0 else [size for size in (1, 2, 5, 0) if size != batch]
    return Sample(lambda: copy.deepcopy(module), at, batch, others)
