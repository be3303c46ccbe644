"""Address safety: who owns what, the three policies, and everything that makes a replay read stale memory."""

from __future__ import annotations

import pytest
import torch

from piecework.errors import StaticGraphError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.batch.mode import CUDAGraphMode
from piecework.runtime.graphs.device.contract import view_of_storage
from piecework.runtime.graphs.memory.addresses import AddressBook, ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.memory.wrapper import CUDAGraphOptions, CUDAGraphWrapper

PIECEWISE = CUDAGraphMode.PIECEWISE
DESCRIPTOR = BatchDescriptor(4)


def captured(runnable, *args, graphs=None, policy="copy", given=(), **options):
    """What replays ``runnable`` as it was captured for ``args``, with nothing vouched for."""
    graphs = graphs or StaticGraphs("cpu", address_policy=policy)
    options = CUDAGraphOptions(**options)
    wrapper = CUDAGraphWrapper(runnable, None, PIECEWISE, options, graphs, "submod_2")

    def call(*args, **kwargs):
        with set_forward_context(cudagraph_runtime_mode=PIECEWISE, batch_descriptor=DESCRIPTOR):
            return wrapper(*args, **kwargs)

    with graphs.capturing():
        call(*args, **dict(given))
    return call


# --- who owns what ---------------------------------------------------------------------------------


def test_classes():
    book = AddressBook()
    weight, buffer, out, piece, fresh = (torch.ones(8) for _ in range(5))
    book.register_weights({"w": weight})
    book.register_persistent("ids", buffer)
    book.register_persistent("attn", out, ValueOrigin.OUT_BUFFER)
    book.register_captured("submod_0", [piece], DESCRIPTOR)
    table = [
        (weight, ValueOrigin.WEIGHT, "w"),
        (weight[2:], ValueOrigin.WEIGHT, "w"),
        (buffer.view(2, 4), ValueOrigin.PERSISTENT, "ids"),
        (out, ValueOrigin.OUT_BUFFER, "attn"),
        (piece[:3], ValueOrigin.CAPTURED, "submod_0"),
        (fresh, ValueOrigin.FRESH, None),
        (weight + 0, ValueOrigin.FRESH, None),
        (torch.eye(2).to_sparse(), ValueOrigin.FRESH, None),
    ]
    for tensor, origin, name in table:
        assert book.classify(tensor, DESCRIPTOR) is origin
        assert book.find(tensor, DESCRIPTOR)[1] == name
    # An output of one descriptor's capture is nobody's at another one's.
    assert book.classify(piece, BatchDescriptor(8)) is ValueOrigin.FRESH
    assert book.classify(piece) is ValueOrigin.FRESH
    book.forget_captured(DESCRIPTOR)
    assert book.classify(piece, DESCRIPTOR) is ValueOrigin.FRESH


def test_registered_memory_is_held():
    book = AddressBook()
    weight = torch.ones(8)
    address = weight.data_ptr()
    book.register_weights({"w": weight})
    del weight
    others = [torch.ones(8) for _ in range(50)]
    assert all(other.data_ptr() != address for other in others)
    assert all(book.classify(other) is ValueOrigin.FRESH for other in others)


def test_a_fresh_tensor_is_refused_where_the_policy_says_so():
    with pytest.raises(StaticGraphError, match=r"argument 0 \(fresh tensor\) enters .*out-buffer"):
        captured(lambda x: x + 1, torch.ones(2), policy="refuse")


# --- the first replay checks -----------------------------------------------------------------------


def vouched(*tensors):
    graphs = StaticGraphs("cpu", address_policy="refuse")
    for index, tensor in enumerate(tensors):
        graphs.addresses.register_persistent(f"buffer {index}", tensor)
    return graphs


X = torch.zeros(8)
AT_CAPTURE = (X, 4, 1, "a", None)
# What comes at the replay in another place than it was captured with, and what is said.
CHANGES: list[tuple[int, object, str | None]] = [
    (0, X[1:], r"was torch.float32 \[8\].* is torch.float32 \[7\]"),
    (0, X.view(2, 4), r"is torch.float32 \[2, 4\]"),
    (0, X.view(torch.int32), "is torch.int32"),
    (0, X[::2], r"with strides \[2\]"),
    (0, 3, "was a tensor, is a int"),
    (0, X.view(8), None),
    (1, 4, None),
    (1, 5, "argument 1 was .*, is"),
    (1, None, "argument 1 was .*, is"),
    (2, True, "argument 2 was .*, is"),
    (3, "".join("a"), None),
    (4, X, "argument 4 was None, is a tensor"),
]


@pytest.mark.parametrize(("number", "given", "message"), CHANGES)
def test_buffers_seen_differently_and_other_python_values_are_caught(number, given, message):
    call = captured(lambda x, *rest: x + 1, *AT_CAPTURE, graphs=vouched(X))
    args = [given if n == number else each for n, each in enumerate(AT_CAPTURE)]
    if message is None:
        assert call(*args).tolist() == [1.0] * 8
    else:
        with pytest.raises(StaticGraphError, match=message):
            call(*args)


def test_only_the_first_replay_checks_unless_told_otherwise():
    x, other = torch.zeros(2), torch.full((2,), 5.0)
    for always in (False, True):
        graphs = StaticGraphs("cpu", check_addresses=always)
        graphs.addresses.register_persistent("x", x)
        graphs.addresses.register_persistent("other", other)
        call = captured(lambda x: x + 1, x, graphs=graphs)
        call(x)
        if always:
            with pytest.raises(StaticGraphError, match="is at another address"):
                call(other)
        else:
            # As on CUDA: stale, not an error.
            assert call(other).tolist() == [1.0, 1.0]


# --- weights ---------------------------------------------------------------------------------------


def test_a_parameter_nobody_registered_is_a_weight():
    graphs = StaticGraphs("cpu", address_policy="refuse")
    weight = torch.nn.Parameter(torch.ones(2))
    call = captured(lambda w: w * 2, weight, graphs=graphs)
    with pytest.raises(StaticGraphError, match=r"weight 'parameter 0'.*is at another address"):
        call(torch.nn.Parameter(torch.ones(2)))


# --- what is staged --------------------------------------------------------------------------------


def moved(*tensors):
    """The same tensors over new memory, sharing and laid out as before."""
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().clone() for t in tensors}
    return tuple(view_of_storage(memory[t.untyped_storage().data_ptr()], like=t) for t in tensors)


BASE = torch.arange(24.0)
LAYOUTS = {
    "plain": (BASE.clone(),),
    "transposed": (BASE.view(4, 6).t(),),
    "offset": (BASE[5:9],),
    "strided": (BASE[1::3],),
    "aliasing": (BASE[2:10], BASE[6:14]),
    "same twice": (BASE[2:4], BASE[2:4]),
    "two dtypes": (BASE[:4], BASE.view(torch.int32)[2:6]),
    "scalar": (BASE[7],),
    "empty": (BASE[:0], BASE[:4]),
    "negated": (torch.complex(BASE[:4], BASE[4:8]).conj().imag,),
    "conjugate": (torch.complex(BASE[:4], BASE[4:8]).conj(),),
    "separate": (BASE[:4].clone(), BASE[4:8].clone()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_staged_inputs_are_seen_as_they_are(layout):
    def piece(*tensors):
        return [t * 2 for t in tensors], [t.stride() for t in tensors]

    tensors = LAYOUTS[layout]
    call = captured(piece, *tensors)
    for step in range(3):
        now = moved(*tensors)
        for storage in {t.untyped_storage() for t in now}:
            new = torch.arange(storage.nbytes() // 4).add(step).float()
            storage.copy_(new.untyped_storage())
        values, strides = call(*now)
        for value, tensor in zip(values, now, strict=True):
            assert torch.equal(value, tensor * 2)
        assert strides == [t.stride() for t in now]


def test_what_can_not_have_a_buffer_of_its_own_is_refused():
    base = torch.zeros(6)
    with pytest.raises(StaticGraphError, match="arguments 0 and 1 share memory that the piece"):
        captured(lambda a, b: a.add_(b), base[:4], base[2:], mutated_args=frozenset({0}))
    for overlapping in (BASE[3:4].expand(6), BASE.as_strided((5, 4), (2, 1), 3)):
        with pytest.raises(StaticGraphError, match="argument 0 is not dense memory"):
            captured(lambda x: x + 1, overlapping)


def test_a_staged_input_of_another_shape_is_caught_at_every_replay():
    call = captured(lambda x: x + 1, torch.zeros(4, 2))
    call(torch.zeros(4, 2))
    call(torch.zeros(4, 2))
    for wrong in (torch.zeros(1, 2), torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 4).t()):
        with pytest.raises(StaticGraphError, match=r"argument 0.*\[4, 2\]"):
            call(wrong)


def test_changes_of_a_staged_input_are_brought_back_where_declared():
    call = captured(lambda x: x.add_(1), torch.zeros(3), mutated_args=frozenset({0}))
    x = torch.full((3,), 5.0)
    call(x)
    assert x.tolist() == [6.0] * 3
    call = captured(lambda x: x.add_(1), torch.zeros(8)[::2], mutated_args=frozenset({0}))
    y = torch.full((8,), 5.0)
    call(y[::2])
    assert y.tolist() == [6.0, 5.0] * 4


def test_none_and_nested_arguments():
    x, y = torch.ones(2), torch.ones(2)

    def piece(pair, mask, *, extra):
        return pair["x"] + extra[0]

    call = captured(piece, {"x": x}, None, given={"extra": [y, 3]})
    with pytest.raises(StaticGraphError, match="argument 1 was None, is a tensor"):
        call({"x": x}, y, extra=[y, 3])
    assert call({"x": x * 4}, None, extra=[y * 2, 3]).tolist() == [6.0, 6.0]
