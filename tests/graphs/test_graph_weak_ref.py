"""Weak references: the same memory for every dtype and layout, and no ownership."""

from __future__ import annotations

import weakref

import pytest
import torch

from piecework.runtime.graphs.device.contract import weak_ref_tensor

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith(("torch.q", "torch.bits"))
    },
    key=str,
)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(device, dtype):
    raw = torch.arange(4 * 3 * 16, dtype=torch.uint8, device=device)
    tensor = raw.view(dtype) if dtype.itemsize else raw
    tensor = tensor[: 4 * 3].view(4, 3)[1:, ::2]
    weak = weak_ref_tensor(tensor)
    assert weak.data_ptr() == tensor.data_ptr()
    assert (weak.dtype, weak.shape, weak.stride(), weak.device) == (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.device,
    )
    raw.fill_(1)
    seen = torch.empty(0, dtype=torch.uint8, device=device).set_(weak.untyped_storage())
    assert torch.equal(seen, raw)


def test_it_does_not_own():
    class Token:
        pass

    token = Token()
    tensor = torch.frombuffer(bytearray(16), dtype=torch.float32)
    storage_gone = weakref.ref(token)
    tensor.untyped_storage().token = token
    del token
    weak = weak_ref_tensor(tensor)
    assert storage_gone() is not None
    del tensor
    assert weak.shape == (4,)
    assert storage_gone() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.conj(),
        lambda t: t.imag,
        lambda t: torch._neg_view(t),
        lambda t: t.conj().imag,
    ],
    ids=["conj", "imag", "neg", "conj-imag"],
)
def test_lazily_turned_views(make):
    tensor = make(torch.tensor([1 + 2j, 3 - 4j]))
    weak = weak_ref_tensor(tensor)
    assert torch.equal(weak, tensor)
    assert (weak.is_conj(), weak.is_neg()) == (tensor.is_conj(), tensor.is_neg())


def test_what_has_no_plain_memory_stays():
    sparse = torch.eye(2).to_sparse()
    meta = torch.empty(3, device="meta")
    assert weak_ref_tensor(sparse) is sparse
    assert weak_ref_tensor(meta) is meta
