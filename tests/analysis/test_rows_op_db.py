"""The rows analysis against torch's own list of operators: what it calls independent is held against a padded run, sample by sample."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from padded_runs import Case, disagreement, verdict_of
from torch.utils import _pytree as pytree

pytest.importorskip("expecttest")  # torch's list needs it
from torch.testing._internal.common_methods_invocations import op_db

# Their results are whatever memory holds.
_UNDEFINED = (
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
)
_DTYPES = (torch.float32, torch.int64, torch.bool)
# Families that are padded wrongly as soon as a dimension is mistaken for another.
_SAMPLE = (
    "addmm", "argmin", "baddbmm", "cat", "cdist", "chunk", "cumsum", "diff", "einsum", "expand", "flip", "gather", "index_add",
    "index_fill", "index_put", "index_select", "masked_fill", "matmul", "meshgrid", "mode", "narrow", "nn.functional.avg_pool1d",
    "nn.functional.batch_norm", "nn.functional.conv1d", "nn.functional.group_norm", "nn.functional.instance_norm",
    "nn.functional.layer_norm", "nn.functional.multi_head_attention_forward", "nn.functional.pad",
    "nn.functional.scaled_dot_product_attention", "nn.functional.softmin", "repeat", "reshape", "roll", "scatter_add",
    "select_scatter", "slice_scatter", "softmax", "sort", "split", "squeeze", "sum", "t", "topk", "transpose", "triu", "unfold",
    "unsqueeze", "var", "view", "vstack", "where",
)  # fmt: skip


def label(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def cases_of(op: Any, dtype: torch.dtype, limit: int | None) -> Iterator[Case]:
    """Samples with the batch in the first tensor, and in all tensors of its length; also in place."""
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=False))
    if limit is not None:
        random.Random(label(op)).shuffle(samples)
    for sample in samples[:limit]:
        tree = (sample.input, sample.args, sample.kwargs)
        leaves, spec = pytree.tree_flatten(tree)
        leaves = [each.detach() if isinstance(each, torch.Tensor) else each for each in leaves]
        tensors = [
            n for n, each in enumerate(leaves) if isinstance(each, torch.Tensor) and each.dim()
        ]
        if any(leaves[n].layout != torch.strided for n in tensors):
            continue
        first = next((n for n in tensors if leaves[n].shape[0] > 1), None)
        if first is None:
            continue
        rows = leaves[first].shape[0]
        same = tuple(n for n in tensors if leaves[n].shape[0] == rows)
        for function in (op.op, op.inplace_variant):
            if function is not None:
                for batched in dict.fromkeys(((first,), same)):
                    yield Case(_called(function, spec), tuple(leaves), batched)


def _called(function: Any, spec: Any) -> Any:
    def call(*leaves: Any) -> Any:
        given, args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        return function(given, *args, **kwargs)

    return call


def wrong(op: Any, limit: int | None) -> list[str]:
    """Samples that padding changes and that are said to be independent."""
    found = []
    for dtype in _DTYPES:
        if dtype not in op.supported_dtypes("cpu"):
            continue
        for case in cases_of(op, dtype, limit):
            try:
                said = disagreement(case, verdict_of(case))
            except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
                continue  # a batch of another size has no meaning there: eager itself refuses it
            if said is not None:
                shapes = [tuple(e.shape) if isinstance(e, torch.Tensor) else e for e in case.leaves]
                found.append(f"{label(op)} {dtype} batched {case.batched} of {shapes}: {said}")
    return found


@pytest.mark.parametrize("op", [op for op in op_db if op.name in _SAMPLE], ids=label)
def test_a_sample_of_operators_under_padding(op: Any) -> None:
    assert wrong(op, 1) == []


@pytest.mark.nightly
@pytest.mark.parametrize("op", [op for op in op_db if op.name not in _UNDEFINED], ids=label)
def test_every_operator_under_padding(op: Any) -> None:
    assert wrong(op, None) == []


def test_the_list_is_not_refused_as_a_whole() -> None:
    """An analysis that refuses everything is never wrong; these are served."""
    served = ("add", "nn.functional.linear", "nn.functional.layer_norm", "softmax", "cat", "matmul")
    for name in served:
        op = next(each for each in op_db if each.name == name)
        verdicts = [verdict_of(case) for case in cases_of(op, torch.float32, 4)]
        assert any(each.reason is None for each in verdicts), name
