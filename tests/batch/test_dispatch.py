"""Dispatch: keys per mode and LoRA case, preference, purity, and the table of what is covered."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime.batch.coverage import (
    Coverage,
    coverage,
    coverage_json,
    require_coverage,
)
from piecework.runtime.batch.descriptor import BatchDescriptor, BatchKind
from piecework.runtime.batch.dispatcher import CudagraphDispatcher, Reason, lora_cases
from piecework.runtime.batch.mode import CUDAGraphMode

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DECODE_ONLY, BOTH = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE
SIZES = (1, 2, 4, 8)


def dispatcher(mode, sizes=SIZES, max_num_seqs=8, **options):
    return CudagraphDispatcher(mode, sizes, max_num_seqs=max_num_seqs, **options)


# mode, tokens, uniform -> mode, descriptor, reason
TABLE = [
    (NONE, 3, False, NONE, BatchDescriptor(3), Reason.MODE),
    (NONE, 3, True, NONE, BatchDescriptor(3), Reason.MODE),
    (PIECEWISE, 3, False, PIECEWISE, BatchDescriptor(4), Reason.PADDED),
    (PIECEWISE, 3, True, PIECEWISE, BatchDescriptor(4), Reason.PADDED),
    (PIECEWISE, 8, False, PIECEWISE, BatchDescriptor(8), Reason.EXACT),
    (PIECEWISE, 9, False, NONE, BatchDescriptor(9), Reason.TOO_LARGE),
    (FULL, 3, False, FULL, BatchDescriptor(4, 4), Reason.PADDED),
    (FULL, 3, True, FULL, BatchDescriptor(4, 4), Reason.PADDED),
    (FULL, 9, True, NONE, BatchDescriptor(9), Reason.TOO_LARGE),
    (DECODE_ONLY, 3, True, FULL, BatchDescriptor(4, 4, True), Reason.PADDED),
    (DECODE_ONLY, 4, True, FULL, BatchDescriptor(4, 4, True), Reason.EXACT),
    (DECODE_ONLY, 3, False, NONE, BatchDescriptor(3), Reason.MODE),
    (DECODE_ONLY, 9, True, NONE, BatchDescriptor(9), Reason.TOO_LARGE),
    (BOTH, 3, True, FULL, BatchDescriptor(4, 4, True), Reason.PADDED),
    (BOTH, 3, False, PIECEWISE, BatchDescriptor(4), Reason.PADDED),
    (BOTH, 9, False, NONE, BatchDescriptor(9), Reason.TOO_LARGE),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r[0].name}-{r[1]}-{'u' if r[2] else 'm'}")
def test_modes(row):
    mode, tokens, uniform, expected_mode, expected_key, reason = row
    d = dispatcher(mode)
    assert d.dispatch(tokens, uniform) == (expected_mode, expected_key)
    found = d.explain(tokens, BatchKind(uniform))
    assert found.reason is reason
    assert found.padding == expected_key.num_tokens - tokens


# sizes, options → decode sizes that are captured; batches: what they run as
DECODES = [
    (SIZES, {"max_num_seqs": 3}, {1, 2}, [(3, True, PIECEWISE, BatchDescriptor(4))]),
    (
        (2, 3, 6, 9),
        {"uniform_decode_query_len": 3},
        {3, 6, 9},
        [
            (6, True, FULL, BatchDescriptor(6, 2, True)),
            (5, True, PIECEWISE, BatchDescriptor(6)),  # no whole number of requests of three
        ],
    ),
    (
        (1, 2, 4, 8, 16),
        {"max_num_seqs": 4, "uniform_decode_query_len": 3},
        {3, 6, 9},  # decode batches alone are rounded
        [
            (1, False, PIECEWISE, BatchDescriptor(1)),  # a step without a draft is not padded
            (12, True, PIECEWISE, BatchDescriptor(16)),
        ],
    ),
    # Of a sequence that is cut, each rank has its share.
    ((4, 8, 16), {"uniform_decode_query_len": 3, "decode_multiple_of": 2}, {6, 12}, []),
]


@pytest.mark.parametrize(("sizes", "options", "decode", "batches"), DECODES)
def test_sizes_of_decode_batches(sizes, options, decode, batches):
    d = dispatcher(BOTH, sizes, **options)
    query = options.get("uniform_decode_query_len", 1)
    assert d.cudagraph_keys[FULL] == {BatchDescriptor(n, n // query, True) for n in decode}
    assert {key.num_tokens for key in d.cudagraph_keys[PIECEWISE]} == set(sizes)
    for tokens, uniform, mode, key in batches:
        assert d.dispatch(tokens, uniform) == (mode, key)


def test_drafts_of_several_widths():
    d = dispatcher(BOTH, sizes=(4, 8, 12, 24), max_num_seqs=6, uniform_decode_query_len=[2, 4])
    assert d.uniform_decode_query_len == 4
    assert d.dispatch(8, True) == (FULL, BatchDescriptor(8, 2, True))
    assert d.dispatch(8, True, query_len=4) == (FULL, BatchDescriptor(8, 2, True))
    assert d.dispatch(8, True, query_len=2) == (FULL, BatchDescriptor(8, 4, True))
    assert d.dispatch(10, True, query_len=2) == (FULL, BatchDescriptor(12, 6, True))
    assert d.dispatch(24, True, query_len=2) == (PIECEWISE, BatchDescriptor(24))  # 12 requests
    assert d.dispatch(9, True, query_len=3) == (PIECEWISE, BatchDescriptor(12))  # no such width
    assert d.explain(8, BatchKind(True, query_len=2)).descriptor.num_reqs == 4
    kinds = {row.kind for row in coverage(d, 24)}
    assert kinds == {"mixed", "decode, 2 a request", "decode, 4 a request"}
    for wrong in ([], [0, 2], 0):
        with pytest.raises(ConfigError, match="tokens a request"):
            d.initialize_cudagraph_keys(BOTH, wrong)


def excluded(valid, invalid) -> frozenset[CUDAGraphMode]:
    """The modes that a batch can't run in, where these are all that it can and what it can't."""
    left_out = () if valid is None else set(CUDAGraphMode) - set(valid)
    return frozenset(left_out) | frozenset(invalid or ())


@pytest.mark.parametrize(
    ("valid", "invalid", "expected"),
    [
        (None, None, FULL),
        ({FULL, NONE}, None, FULL),
        ({PIECEWISE, NONE}, None, PIECEWISE),
        (None, {FULL}, PIECEWISE),
        (None, {FULL, PIECEWISE}, NONE),
        ([FULL, PIECEWISE, NONE], (FULL,), PIECEWISE),
        ({NONE}, None, NONE),
        ({FULL}, None, FULL),
    ],
)
def test_valid_and_invalid_modes(valid, invalid, expected):
    before = copy.deepcopy((valid, invalid))
    d = dispatcher(BOTH)
    found = d.explain(3, BatchKind(True, invalid_modes=excluded(valid, invalid)))
    assert found.mode is expected
    assert found.reason is (Reason.EXCLUDED if expected is NONE else Reason.PADDED)
    modes = {"valid_modes": valid, "invalid_modes": invalid}
    assert d.dispatch(3, True, **modes) == (found.mode, found.descriptor)
    assert (valid, invalid) == before


def test_leaving_none_out_is_an_error_when_nothing_fits():
    with pytest.raises(InputError, match="mode NONE is left out: larger than every captured size"):
        dispatcher(BOTH).dispatch(9, valid_modes={FULL, PIECEWISE})


# enabled, specialize, counts; has_lora, active -> captured pair or None
LORA = [
    (lora_cases(), False, 0, (False, 0)),
    (lora_cases(), True, 1, None),
    (lora_cases(True, True), False, 0, (False, 0)),
    (lora_cases(True, True), True, 3, (True, 0)),
    (lora_cases(True, False), False, 0, (True, 0)),
    (lora_cases(True, False), True, 1, (True, 0)),
    (lora_cases(True, True, (1, 4)), True, 1, (True, 1)),
    (lora_cases(True, True, (1, 4)), True, 2, (True, 4)),
    (lora_cases(True, True, (1, 4)), True, 5, None),
    (lora_cases(True, False, (1, 4)), False, 0, (True, 1)),
]


@pytest.mark.parametrize("row", LORA, ids=range(len(LORA)))
@pytest.mark.parametrize("mode", [PIECEWISE, FULL, BOTH])
def test_lora(row, mode):
    cases, has_lora, active, expected = row
    found = dispatcher(mode, lora=cases).explain(3, BatchKind(True, has_lora, active))
    if expected is None:
        assert found.mode is NONE
        assert found.reason is Reason.NO_LORA
        assert found.is_fallback
    else:
        assert found.mode is mode.decode_mode()
        key = found.descriptor
        assert (key.has_lora, key.num_active_loras) == expected


def test_what_is_captured_piecewise_first_largest_first():
    descs = dispatcher(BOTH, max_num_seqs=4).get_capture_descs()
    assert [(m.name, [k.num_tokens for k in keys]) for m, keys in descs] == [
        ("PIECEWISE", [8, 4, 2, 1]),
        ("FULL", [4, 2, 1]),
    ]
    assert dispatcher(NONE).get_capture_descs() == []
    assert dispatcher(PIECEWISE, sizes=()).get_capture_descs() == []


def test_extra_axes():
    d = dispatcher(PIECEWISE, sizes=(2,), axes={"image": (False, True)})
    assert len(d.cudagraph_keys[PIECEWISE]) == 2
    assert d.dispatch(1)[1] == BatchDescriptor(2, extra=(("image", False),))
    assert d.dispatch(1, axes={"image": True})[1] == BatchDescriptor(2, extra=(("image", True),))
    assert d.explain(1, BatchKind(axes=(("image", "both"),))).reason is Reason.AXIS
    with pytest.raises(InputError, match=r"no descriptor axis sound.*declared axes: image"):
        d.dispatch(1, axes={"sound": True})
    with pytest.raises(ConfigError, match="at least one value"):
        dispatcher(PIECEWISE, axes={"image": ()})


def test_a_key_that_was_given_up_is_never_dispatched_to():
    d = dispatcher(BOTH)
    d.give_up(FULL, BatchDescriptor(4, 4, True))
    assert d.dispatch(3, True) == (FULL, BatchDescriptor(8, 8, True))
    d.give_up(FULL, BatchDescriptor(8, 8, True))
    assert d.dispatch(3, True) == (PIECEWISE, BatchDescriptor(4))
    for size in SIZES:
        d.give_up(PIECEWISE, BatchDescriptor(size))
    found = d.explain(3, BatchKind(True))
    assert (found.mode, found.reason, found.is_fallback) == (NONE, Reason.NOT_CAPTURED, True)


def test_strict():
    d = dispatcher(BOTH, strict=True)
    assert d.dispatch(100) == (NONE, BatchDescriptor(100))
    with pytest.raises(StaticGraphError, match="silently run uncaptured: larger than every"):
        d.dispatch(100, True)
    d.give_up(PIECEWISE, BatchDescriptor(8))
    with pytest.raises(StaticGraphError, match=r"given up \(mixed batch, tokens=8\)"):
        d.dispatch(8)
    assert d.explain(8, strict=False).is_fallback
    assert d.dispatch(4, invalid_modes={PIECEWISE})[0] is NONE
    assert dispatcher(DECODE_ONLY, strict=True).dispatch(3)[0] is NONE


dispatchers = st.builds(
    dispatcher,
    st.sampled_from(list(CUDAGraphMode)),
    sizes=st.sets(st.integers(1, 40), max_size=8),
    max_num_seqs=st.integers(1, 40),
    uniform_decode_query_len=st.integers(1, 4),
    lora=st.sampled_from([lora_cases(), lora_cases(True), lora_cases(True, False, (1, 3))]),
    axes=st.sampled_from([None, {"image": (False, True)}]),
)


@settings(deadline=None, max_examples=200)
@given(
    dispatchers,
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
    st.integers(0, 4),
    st.sets(st.sampled_from([NONE, PIECEWISE, FULL])).map(lambda s: s | {NONE}),
    st.sets(st.sampled_from([PIECEWISE, FULL])),
    st.sets(st.integers(1, 40)),
)
def test_every_batch_gets_a_large_enough_captured_key_or_a_reason(
    d, tokens, uniform, has_lora, active, valid, invalid, dropped
):
    for mode, keys in d.cudagraph_keys.items():
        for key in list(keys):
            if key.num_tokens in dropped:
                d.give_up(mode, key)
    before = copy.deepcopy((d.cudagraph_keys, valid, invalid))
    kind = BatchKind(uniform, has_lora, active, invalid_modes=excluded(valid, invalid))
    found = d.explain(tokens, kind)
    again = d.dispatch(tokens, uniform, has_lora, active, valid_modes=valid, invalid_modes=invalid)
    assert again == (found.mode, found.descriptor)
    assert (d.cudagraph_keys, valid, invalid) == before
    if found.mode is NONE:
        assert found.descriptor.num_tokens == tokens
        assert found.padding == 0
        assert found.reason not in (Reason.EXACT, Reason.PADDED)
        return
    assert found.mode in valid - invalid
    assert found.descriptor in d.cudagraph_keys[found.mode]
    assert found.descriptor.num_tokens == tokens + found.padding >= tokens
    assert (found.reason is Reason.EXACT) == (found.padding == 0)
    # Nothing smaller would have done.
    same = [
        key.num_tokens
        for key in d.cudagraph_keys[found.mode]
        if (key.uniform, key.has_lora, key.extra)
        == (found.descriptor.uniform, found.descriptor.has_lora, found.descriptor.extra)
    ]
    assert found.descriptor.num_tokens == min(n for n in same if n >= tokens)


def test_coverage_table_and_json():
    d = dispatcher(BOTH, sizes=(1, 4), max_num_seqs=8)
    rows = coverage(d, 6)
    text = str(Coverage(rows))
    lines = [line for line in text.splitlines() if "decode" in line or "mixed" in line]
    assert len(lines) == len(rows) == 6
    assert "2-4" in lines[1]
    assert "≤ 2" in lines[1]
    assert "tokens=4 reqs=4 uniform" in lines[4]
    assert coverage_json(rows)[2] == {
        "kind": "mixed",
        "first": 5,
        "last": 6,
        "mode": "NONE",
        "graph": None,
        "padding": 0,
        "reason": "larger than every captured size",
        "fallback": False,
    }
    with pytest.raises(StaticGraphError, match="decode 5-6: larger than every captured size"):
        require_coverage(rows)
    require_coverage(coverage(dispatcher(BOTH), 9))


def test_an_exact_dispatcher_never_pads():
    d = dispatcher(PIECEWISE, sizes=(2, 4), exact=Reason.NOT_EXACT)
    assert d.explain(4).reason is Reason.EXACT
    found = d.explain(3)
    assert (found.mode, found.reason, found.is_fallback) == (NONE, Reason.NOT_EXACT, True)
    assert d.explain(5).reason is Reason.TOO_LARGE
    with pytest.raises(StaticGraphError, match="nothing is padded"):
        d.explain(3, strict=True)


@pytest.mark.parametrize("mode", [PIECEWISE, FULL, BOTH])
@pytest.mark.parametrize("factor", [1, 1.5, 2.0, None])
def test_no_batch_is_padded_by_more_than_the_factor(mode: CUDAGraphMode, factor: float) -> None:
    sizes = (1, 4, 16)
    d = dispatcher(mode, sizes=sizes, max_padding_factor=factor)
    for tokens in range(1, 18):
        found = d.explain(tokens, BatchKind())
        next_size = next((size for size in sizes if size >= tokens), None)
        if next_size is None:
            assert (found.mode, found.reason) == (NONE, Reason.TOO_LARGE)
        elif factor is None or next_size <= tokens * factor:
            assert found.descriptor.num_tokens == next_size and found.mode is not NONE
        else:
            assert (found.mode, found.reason) == (NONE, Reason.FACTOR)
            assert found.descriptor.num_tokens == tokens and not found.is_fallback


BOUNDED = {"max_query_len": [4, 1, 16], "num_ubatches": [1, 2]}


@pytest.mark.parametrize(
    ("asked", "captured"), [(1, 1), (2, 4), (4, 4), (5, 16), (16, 16), (None, 16), (17, None)]
)
def test_the_longest_query_is_a_bound_and_other_axes_are_values(asked, captured):
    axes = {"num_ubatches": 2} | ({} if asked is None else {"max_query_len": asked})
    found = dispatcher(PIECEWISE, axes=BOUNDED).explain(7, BatchKind(axes=tuple(axes.items())))
    assert dict(found.descriptor.extra) == {"max_query_len": captured or asked, "num_ubatches": 2}
    assert (found.mode is PIECEWISE) == (captured is not None) == (found.reason is Reason.PADDED)
    assert captured or found.reason is Reason.AXIS
