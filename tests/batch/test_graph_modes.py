"""Modes and descriptors, row by row."""

from __future__ import annotations

import dataclasses

import pytest

from piecework.errors import ConfigError
from piecework.runtime.batch.descriptor import BatchDescriptor
from piecework.runtime.batch.mode import CUDAGraphMode

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DECODE_ONLY, BOTH = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE

# mode: decode, mixed, max, separate, without piecewise, requires piecewise, has full
TABLE = [
    (NONE, NONE, NONE, NONE, False, NONE, False, False),
    (PIECEWISE, PIECEWISE, PIECEWISE, PIECEWISE, False, NONE, True, False),
    (FULL, FULL, FULL, FULL, False, FULL, False, True),
    (DECODE_ONLY, FULL, NONE, FULL, True, DECODE_ONLY, False, True),
    (BOTH, FULL, PIECEWISE, FULL, True, DECODE_ONLY, True, True),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].name)
def test_mode(row):
    mode, decode, mixed, most, separate, without, requires, full = row
    assert mode.decode_mode() is decode
    assert mode.mixed_mode() is mixed
    assert mode.max_cudagraph_mode() is most
    assert mode.separate_routine() is separate
    assert mode.without_piecewise() is without
    assert mode.requires_piecewise_compilation() is requires
    assert mode.has_mode(FULL) is full
    for single in (NONE, PIECEWISE, FULL):
        assert mode.has_mode(single) is (single in (decode, mixed))


@pytest.mark.parametrize("value", ["full_and_piecewise", "FULL_AND_PIECEWISE", BOTH])
def test_parse(value):
    assert CUDAGraphMode.parse(value) is BOTH


@pytest.mark.parametrize("value", ["PARTIAL", "", 3, -1, True, None, 1.0])
def test_a_bad_name_lists_the_names(value):
    with pytest.raises(ConfigError) as error:
        CUDAGraphMode.parse(value)
    for mode in CUDAGraphMode:
        assert mode.name in str(error.value)


def test_asking_for_a_pair_is_an_error():
    with pytest.raises(ConfigError, match="FULL_DECODE_ONLY is a pair"):
        BOTH.has_mode(DECODE_ONLY)


def test_descriptor_is_frozen_hashable_and_has_the_fields_defaults():
    descriptor = BatchDescriptor(8)
    assert (descriptor.num_reqs, descriptor.uniform, descriptor.has_lora) == (None, False, False)
    assert descriptor.num_active_loras == 0
    assert descriptor in {BatchDescriptor(8)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        descriptor.num_tokens = 4


def test_describe():
    full = BatchDescriptor(8, 4, True, True, 2, (("image", True),))
    assert full.describe() == "tokens=8 reqs=4 uniform loras=2 image=True"
    assert BatchDescriptor(1).describe() == "tokens=1"
