"""Staging: any dynamic dimension, any dtype, declared padding, and errors that say the sizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ran import Ran

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs, make_copy_and_call

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.uint8]
DTYPES += [torch.float8_e5m2, torch.complex64, torch.float64]
# Triton's interpreter takes tensors on the CPU, in a process that was started with it.
INTERPRETED = "TRITON_INTERPRET" in os.environ


@st.composite
def cases(draw):
    """Declared inputs, and batches of them with the sizes that they are padded to."""
    maximum = draw(st.integers(1, 9))
    specs, examples = [], {}
    for index in range(draw(st.integers(1, 10 if INTERPRETED else 4))):
        shape = draw(st.lists(st.integers(int(INTERPRETED), 3), min_size=1, max_size=4))
        dtype = draw(st.sampled_from(DTYPES))
        pad = draw(st.sampled_from([0, 1] if dtype in (torch.bool, torch.uint8) else [0, -1, 7]))
        specs.append(
            InputSpec(f"input{index}", draw(st.integers(-len(shape), len(shape) - 1)), pad)
        )
        examples[f"input{index}"] = torch.zeros(shape, dtype=dtype)
    steps = []
    for _ in range(draw(st.integers(1, 2 if INTERPRETED else 8))):
        padded = draw(st.integers(1, maximum))
        sizes = st.integers(0, padded)
        one_size = draw(sizes if INTERPRETED else st.none() | sizes)
        tensors = []
        for spec, example in zip(specs, examples.values(), strict=True):
            shape = list(example.shape)
            shape[spec.dim] = draw(sizes) if one_size is None else one_size
            tensors.append((torch.rand(shape) * 9 + 1).to(example.dtype))
        steps.append((padded, tensors))
    return maximum, specs, examples, steps


def expected(tensor, spec, padded):
    shape = list(tensor.shape)
    shape[spec.dim] = padded
    out = torch.full(shape, spec.pad, dtype=tensor.dtype)
    out.narrow(spec.dim, 0, tensor.shape[spec.dim]).copy_(tensor)
    return out


def same_bytes(one, other):
    return torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (one, other)))


@settings(deadline=None, max_examples=25 if INTERPRETED else 200)
@given(cases(), st.booleans())
def test_staged_equals_padded_whatever_came_before(case, keeps_tails):
    maximum, specs, examples, steps = case
    kernel = "triton" if INTERPRETED else "grouped"
    told = {"kernel": kernel, "keeps_tails": keeps_tails}
    inputs = StaticInputs.allocate(examples, maximum, specs, **told)
    for buffer in inputs.buffers:
        buffer.fill_(1)
    for padded, tensors in steps:
        assert not INTERPRETED or inputs._launcher.fits(tensors)
        before = [buffer.clone().view(-1) for buffer in inputs.buffers]
        static = inputs.stage(tensors, padded)
        for spec, tensor, view, buffer, old in zip(
            specs, tensors, static, inputs.buffers, before, strict=True
        ):
            want = expected(tensor, spec, padded)
            assert same_bytes(view, want)
            assert view.stride() == want.stride()
            assert view.numel() == 0 or view.data_ptr() == buffer.data_ptr()
            beyond = slice(view.numel(), None)
            assert inputs.keeps_tails or same_bytes(buffer.view(-1)[beyond], old[beyond])
        # Equal content in another layout is staged alike.
        again = inputs.stage([t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors], padded)
        for one, other, spec, tensor in zip(again, static, specs, tensors, strict=True):
            assert one is other and same_bytes(one, expected(tensor, spec, padded))


def test_poison_pads_floats_with_nan():
    examples = {"x": torch.zeros(1), "ids": torch.zeros(1, dtype=torch.long)}
    inputs = StaticInputs.allocate(examples, 4, [InputSpec("ids", pad=3)], poison=True)
    x, ids = inputs.stage([torch.ones(2), torch.ones(2, dtype=torch.long)], 4)
    assert x.isnan().tolist() == [False, False, True, True]
    assert ids.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("tensor", "padded", "message"),
    [
        (
            torch.zeros(5, 2),
            4,
            r"has size 5 in dimension 0, more than the 4 .* holds 8\) \(input x\)",
        ),
        (
            torch.zeros(9, 2),
            9,
            "has size 9 in dimension 0|can't be padded to 9; its buffer holds 8",
        ),
        (torch.zeros(2, 2), 9, "can't be padded to 9; its buffer holds 8 in dimension 0"),
        (torch.zeros(2, 3), 4, r"has shape \[2, 3\], which does not fit its buffer \[8, 2\]"),
        (torch.zeros(2), 4, r"has shape \[2\], which does not fit"),
        (torch.zeros(()), 4, r"has shape \[\], which does not fit"),
        (torch.zeros(2, 2, dtype=torch.int32), 4, "is torch.int32, its buffer torch.float32"),
        (None, 4, "is NoneType, its buffer torch.float32"),
    ],
)
def test_what_does_not_fit(tensor, padded, message):
    inputs = StaticInputs.allocate({"x": torch.zeros(1, 2)}, 8)
    before = inputs.buffers[0].clone()
    with pytest.raises(InputError, match=message):
        inputs.stage([tensor], padded)
    assert torch.equal(inputs.buffers[0], before)


@pytest.mark.parametrize(
    ("spec", "example", "message"),
    [
        (InputSpec("y"), torch.zeros(1), "no input y.*inputs: x"),
        (InputSpec("x", 2), torch.zeros(1, 1), "dimension 2 of a tensor with 2 dimensions"),
        (InputSpec("x"), torch.zeros(()), "dimension 0 of a tensor with 0 dimensions"),
        (
            InputSpec("x", pad=-1),
            torch.zeros(1, dtype=torch.uint8),
            "-1 can't be held by torch.uint8",
        ),
        (InputSpec("x", pad=0.5), torch.zeros(1, dtype=torch.int64), "0.5 can't be held"),
        (
            InputSpec("x", pad=2**40),
            torch.zeros(1, dtype=torch.int32),
            "can't be held by torch.int32",
        ),
        (InputSpec("x", pad=2), torch.zeros(1, dtype=torch.bool), "2 can't be held by torch.bool"),
    ],
)
def test_wrong_declarations(spec, example, message):
    with pytest.raises(ConfigError, match=message):
        StaticInputs.allocate({"x": example}, 8, [spec])


# --- make_copy_and_call ----------------------------------------------------------------------------


def test_buffers_that_no_memory_holds():
    with pytest.raises(StaticGraphError, match="no memory for its static buffer") as raised:
        StaticInputs.allocate({"x": torch.zeros(1, 2**20)}, maximum=2**40)
    assert raised.value.where == "input x" and raised.value.hint == "capture smaller sizes"


def test_copy_and_call_passes_views_of_the_buffers():
    buffers = [torch.zeros(8), torch.zeros(2, 8)]
    seen = []
    call = make_copy_and_call(
        [0, 2], buffers, lambda *args: seen.append(args) or "out", dims=[0, 1]
    )
    assert call(torch.ones(3), "kept", torch.ones(2, 3)) == "out"
    a, kept, b = seen[0]
    assert (kept, a.shape, b.shape) == ("kept", (3,), (2, 3))
    assert a.data_ptr() == buffers[0].data_ptr()
    assert b.data_ptr() == buffers[1].data_ptr()
    assert b.tolist() == [[1.0] * 3] * 2


def test_copy_and_call_pads_and_tells_the_size():
    buffer = torch.zeros(8, dtype=torch.long)
    call = make_copy_and_call(
        [1],
        [buffer],
        lambda n, x: (n, x.tolist()),
        pads=[-1],
        padded_size=lambda n: 4,
        size_indices=[0],
    )
    assert call(3, torch.arange(3)) == (4, [0, 1, 2, -1])


def test_copy_and_call_errors():
    with pytest.raises(
        ConfigError, match="2 staged arguments, 1 buffers, 2 dimensions, 2 paddings"
    ):
        make_copy_and_call([0, 1], [torch.zeros(8)], print)
    with pytest.raises(InputError, match=r"have no common batch size: \{None\}"):
        make_copy_and_call([0], [torch.zeros(8)], print)("x")
    with pytest.raises(InputError, match=r"can't be padded to 9; its buffer holds 8.*argument 0"):
        make_copy_and_call([0], [torch.zeros(8)], print)(torch.zeros(9))


# --- tails that keep their padding ------------------------------------------------------------------


def launches_of(inputs: StaticInputs, count: int, padded: int) -> list[str]:
    tensors = [torch.ones(count, dtype=buffer.dtype) for buffer in inputs.buffers]
    with Ran() as ran:
        inputs.stage(tensors, padded)
    return [name for name, _ in ran.calls if name.startswith(("_foreach_copy", "copy", "fill"))]


def test_tails_are_filled_again_only_when_they_grow():
    examples = {"a": torch.zeros(1), "b": torch.zeros(1)}
    inputs = StaticInputs.allocate(examples, 16, keeps_tails=True)
    copy, fill = ["_foreach_copy_"], ["fill_", "fill_"]
    steps = [(3, 8, fill), (3, 8, []), (4, 8, []), (3, 8, fill), (8, 8, []), (7, 8, fill)]
    steps += [(7, 16, []), (9, 16, []), (2, 4, fill), (2, 16, []), (16, 16, []), (3, 4, fill)]
    for count, padded, filled in steps:
        assert launches_of(inputs, count, padded) == copy + filled, (count, padded)
    inputs.let_write()
    for _ in range(2):
        assert launches_of(inputs, 2, 16) == copy + fill


def test_copies_of_one_dtype_are_one_launch():
    examples = {f"{n}": torch.zeros(1, dtype=DTYPES[n % 2]) for n in range(8)}
    inputs = StaticInputs.allocate(examples, 8)
    assert launches_of(inputs, 8, 8) == ["_foreach_copy_"] * 2
    plain = StaticInputs.allocate(examples, 8, kernel="reference")
    assert launches_of(plain, 8, 8) == ["copy_"] * 8


@pytest.mark.parametrize("kernel", ["grouped", "reference"])
def test_copies_from_another_device_are_waited_for(kernel):
    """A caller may write its next batch to the same pinned memory at once."""
    examples = {"a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1, dtype=torch.long)}
    examples = {name: each.to("meta") for name, each in examples.items()}
    inputs = StaticInputs.allocate(examples, 8, kernel=kernel)
    for device, waits in (("meta", False), ("cpu", True), ("meta", False)):
        with Ran() as ran:
            inputs.stage([torch.ones(3, dtype=e.dtype, device=device) for e in inputs.buffers], 4)
        copies = [args for name, args in ran.calls if "copy_" in name]
        assert copies and all((args[2:] != (True,)) == waits for args in copies)


# --- the kernel ------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="is what this starts")
def test_the_kernel_stages_alike_in_tritons_interpreter():
    pytest.importorskip("triton")
    cases = f"{__file__}::{test_staged_equals_padded_whatever_came_before.__name__}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_tritons_own_launcher_takes_the_tensors():
    """Over a driver that does nothing; it is checked there what reaches the driver."""
    pytest.importorskip("triton")
    if not any(map(shutil.which, ("cc", "gcc"))):
        pytest.skip("needs a C compiler")
    done = subprocess.run(
        [sys.executable, "-m", "piecework.bench.gpu.launch", "--window", "0"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("one kernel") == 3


def test_what_the_kernel_can_not_take_goes_the_other_way():
    pytest.importorskip("triton")
    inputs = StaticInputs.allocate(
        {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}, 8, kernel="triton"
    )
    fits = inputs._launcher.fits
    dense = torch.zeros(4, 2)
    assert fits([dense, dense])
    assert not fits([dense, torch.zeros(2, 4).t()])
    staged = inputs.stage([dense + 1, dense[:3] + 1], 4)  # two sizes
    assert [each.sum(1).tolist() for each in staged] == [[2, 2, 2, 2], [2, 2, 2, 0]]
    wide = StaticInputs.allocate({"a": torch.zeros(1, dtype=torch.complex128)}, 8, kernel="triton")
    assert not wide._launcher.fits([torch.zeros(4, dtype=torch.complex128)])
    staged = wide.stage([torch.ones(2, dtype=torch.complex128)], 3)
    assert staged[0].tolist() == [1, 1, 0]


def test_inputs_that_are_written_to_are_filled_each_time():
    specs = [InputSpec("a", written=True), InputSpec("b")]
    examples = {"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.long)}
    inputs = StaticInputs.allocate(examples, 8, specs, keeps_tails=True)
    assert launches_of(inputs, 3, 8) == ["copy_", "copy_", "fill_", "fill_"]
    assert launches_of(inputs, 3, 8) == ["copy_", "copy_", "fill_"]


def test_plans_of_sizes_that_came_once_are_not_kept(monkeypatch) -> None:
    monkeypatch.setattr("piecework.runtime.graphs.stage.inputs._MOST_PLANS", 10)
    examples = {name: torch.zeros(1, dtype=torch.long) for name in "ab"}
    inputs = StaticInputs.allocate(examples, 16)
    captured_on = inputs.views(8)
    for tokens in range(1, 17):
        for requests in range(1, tokens + 1):
            a, b = torch.arange(tokens) + 5, torch.arange(requests) + 7
            static = inputs.stage([a, b], tokens)
            assert static[0].tolist() == a.tolist()
            assert static[1].tolist() == b.tolist() + [0] * (tokens - requests)
    assert len(inputs._plans) <= 10
    assert all(one is other for one, other in zip(captured_on, inputs.views(8), strict=True))
