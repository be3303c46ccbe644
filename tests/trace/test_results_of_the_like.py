"""Results that the comparison with a model's Python makes from earlier ones, against torch's: for each operator of torch's own list, called twice with the like arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from piecework.runtime import torch_compat

pytest.importorskip("expecttest")  # torch's list needs it
from torch.testing._internal.common_methods_invocations import op_db

_SAMPLE = (
    "add", "cat", "chunk", "contiguous", "diagonal", "expand", "fft.ihfft", "linalg.qr", "matmul", "nn.functional.embedding", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.scaled_dot_product_attention", "permute", "resize_", "split", "squeeze", "std_mean", "svd", "t", "to",
    "topk", "transpose", "unfold", "view_as_complex", "where",
)  # fmt: skip
SAMPLES = 4


def label(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def tensors_in(tree: object) -> list[torch.Tensor]:
    return [each for each in pytree.tree_leaves(tree) if isinstance(each, torch.Tensor)]


def seen(inputs: object, outputs: object) -> list[object]:
    """What can be asked of results, and with which arguments and other results each shares memory."""
    every = [*tensors_in(inputs), *tensors_in(outputs)]
    where = [torch_compat.storage_id(each) for each in every]
    asked = [
        (e.shape, e.stride(), e.storage_offset(), e.dtype, e.device, e.requires_grad, e.is_conj())
        for e in every
    ]
    return [*asked, *(where.index(each) for each in where)]


def samples_of(op: Any) -> Iterator[tuple[object, object, object]]:
    kinds = (torch.float32, torch.complex64, torch.int64, torch.bool)
    dtype = next((each for each in kinds if op.supports_dtype(each, "cpu")), None)
    if dtype is None or op.name.startswith("jiterator"):
        pytest.skip("it does not run on the CPU")
    for sample in itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), SAMPLES):
        yield sample.input, sample.args, sample.kwargs


def twice(op: Any, reals: list[object], mode: Any) -> list[list[object]]:
    """What is seen of two calls of an operator under ``mode``, each with tensors of its own."""
    found = []
    with mode:
        for real in reals:
            given = pytree.tree_map_only(torch.Tensor, torch.ops.aten.alias.default, real)
            first, args, kwargs = given
            found.append(seen(given, op(first, *args, **kwargs)))
    return found


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, id=label(op), marks=[] if op.name in _SAMPLE else [pytest.mark.nightly])
        for op in op_db
    ],
)
def test_a_second_call_gives_the_like_of_the_first(op: Any) -> None:
    for tree in samples_of(op):
        if any(each.layout is not torch.strided for each in tensors_in(tree)):
            continue
        reals = [pytree.tree_map_only(torch.Tensor, torch.clone, tree) for _ in range(2)]
        try:
            with torch.no_grad():
                torchs = twice(op, reals, FakeTensorMode(allow_non_fake_inputs=True))
        except (DynamicOutputShapeException, RuntimeError, NotImplementedError, TypeError):
            continue
        with torch.no_grad(), FakeTensorMode() as fakes:
            ours = twice(op, reals, torch_compat.Computed(fakes, [], {}))
        assert ours == torchs
