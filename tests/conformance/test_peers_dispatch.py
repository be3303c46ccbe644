"""Dispatch as peers have it: in, modes, sizes and batches of vLLM's tests by the name of the behaviour; out, which graph serves each."""

from __future__ import annotations

import pytest

from piecework.errors import ConfigError
from piecework.runtime import (
    BatchDescriptor,
    CompilationConfig,
    CudagraphDispatcher,
    CUDAGraphMode,
)
from piecework.runtime.batch.keys import LoraCases

NONE, PIECEWISE, FULL = CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL
DECODE, BOTH = CUDAGraphMode.FULL_DECODE_ONLY, CUDAGraphMode.FULL_AND_PIECEWISE


def two_sizes(mode: CUDAGraphMode, **options: object) -> CudagraphDispatcher:
    return CudagraphDispatcher(mode, [1, 8], max_num_seqs=8, **options)


def three_a_request(mode: CUDAGraphMode = BOTH, **options: object) -> CudagraphDispatcher:
    """Decode batches of three tokens a request, at most eight requests."""
    return CudagraphDispatcher(
        mode, [1, 2, 4, 8, 16, 24], max_num_seqs=8, uniform_decode_query_len=3, **options
    )


# --- modes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "pieces", "full"),
    [(FULL, 0, 2), (BOTH, 2, 2), (DECODE, 0, 2), (PIECEWISE, 2, 0), (NONE, 0, 0)],
)
def test_each_mode_has_its_keys(mode: CUDAGraphMode, pieces: int, full: int) -> None:
    keys = two_sizes(mode).cudagraph_keys
    assert (len(keys[PIECEWISE]), len(keys[FULL])) == (pieces, full)


@pytest.mark.parametrize(
    ("mode", "runs_as"), [(FULL, FULL), (BOTH, PIECEWISE), (PIECEWISE, PIECEWISE), (DECODE, NONE)]
)
def test_a_mixed_batch_of_a_captured_size(mode: CUDAGraphMode, runs_as: CUDAGraphMode) -> None:
    found, key = two_sizes(mode).dispatch(8, uniform_decode=False)
    assert found is runs_as
    assert (key.num_tokens, key.uniform) == (8, False)


@pytest.mark.parametrize(
    ("mode", "runs_as", "uniform"),
    [(FULL, FULL, False), (BOTH, FULL, True), (DECODE, FULL, True), (PIECEWISE, PIECEWISE, False)],
)
def test_a_decode_batch_of_a_captured_size(
    mode: CUDAGraphMode, runs_as: CUDAGraphMode, uniform: bool
) -> None:
    found, key = two_sizes(mode).dispatch(8, uniform_decode=True)
    assert found is runs_as
    assert (key.num_tokens, key.uniform) == (8, uniform)
    assert key.num_reqs == (None if runs_as is PIECEWISE else 8)


@pytest.mark.parametrize("mode", [FULL, BOTH, DECODE, PIECEWISE])
def test_a_batch_without_a_key_runs_uncaptured_as_itself(mode: CUDAGraphMode) -> None:
    assert two_sizes(mode).dispatch(15) == (NONE, BatchDescriptor(num_tokens=15))


@pytest.mark.parametrize(("mode", "runs_as"), [(FULL, NONE), (BOTH, PIECEWISE), (DECODE, NONE)])
def test_a_batch_that_no_full_graph_can_serve(mode: CUDAGraphMode, runs_as: CUDAGraphMode) -> None:
    """Cascade attention, for one: full graphs are left out, pieces serve it where they are captured."""
    for uniform in (False, True):
        assert two_sizes(mode).dispatch(8, uniform, invalid_modes={FULL})[0] is runs_as


def test_adapters_multiply_the_keys() -> None:
    cases = LoraCases(enabled=True, specialize=True, counts=(1, 2, 4, 5))
    d = two_sizes(PIECEWISE, lora=cases)
    assert len(d.cudagraph_keys[PIECEWISE]) == 2 * 5
    assert d.dispatch(8, has_lora=True, num_active_loras=3)[1].num_active_loras == 4
    assert not d.dispatch(8)[1].has_lora


@pytest.mark.parametrize(
    ("mode", "groups"),
    [
        (FULL, [FULL]),
        (PIECEWISE, [PIECEWISE]),
        (DECODE, [FULL]),
        (BOTH, [PIECEWISE, FULL]),
        (NONE, []),
    ],
)
def test_what_is_captured_is_grouped_by_mode_largest_first(
    mode: CUDAGraphMode, groups: list[CUDAGraphMode]
) -> None:
    found = CudagraphDispatcher(mode, [1, 4, 8, 16], max_num_seqs=16).get_capture_descs()
    assert [each for each, _ in found] == groups
    for _, keys in found:
        assert [key.num_tokens for key in keys] == [16, 8, 4, 1]
        assert len({key.uniform for key in keys}) == 1


@pytest.mark.parametrize(
    ("mode", "captures", "allowed"),
    [
        ("NONE", "NONE", True),
        ("NONE", "PIECEWISE", False),
        ("NONE", "FULL_AND_PIECEWISE", False),
        ("PIECEWORK_COMPILE", "FULL", True),
        ("PIECEWORK_COMPILE", "FULL_DECODE_ONLY", True),
        ("PIECEWORK_COMPILE", "NONE", True),
        ("PIECEWORK_COMPILE", "PIECEWISE", True),
        ("PIECEWORK_COMPILE", "FULL_AND_PIECEWISE", True),
    ],
)
def test_pieces_are_captured_only_where_pieces_are_compiled(
    mode: str, captures: str, allowed: bool
) -> None:
    if allowed:
        config = CompilationConfig(mode=mode, cudagraph_mode=captures)
        assert config.cudagraph_mode is CUDAGraphMode[captures]
    else:
        with pytest.raises(ConfigError, match=captures):
            CompilationConfig(mode=mode, cudagraph_mode=captures)


# --- speculative decoding ------------------------------------------------------------------------------


def test_a_decode_batch_is_padded_up_to_a_full_graph() -> None:
    mode, key = three_a_request().dispatch(12, uniform_decode=True)
    assert (mode, key.num_tokens, key.num_reqs, key.uniform) == (FULL, 18, 6, True)


def test_a_decode_batch_that_fits_exactly_is_not_padded() -> None:
    mode, key = three_a_request().dispatch(9, uniform_decode=True)
    assert (mode, key.num_tokens, key.num_reqs) == (FULL, 9, 3)


def test_a_mixed_batch_never_runs_in_a_decode_graph() -> None:
    mode, key = three_a_request().dispatch(12)
    assert (mode, key.num_tokens, key.uniform) == (PIECEWISE, 16, False)


def test_a_mixed_batch_of_a_size_that_only_decode_batches_have_gets_a_graph() -> None:
    d = three_a_request()
    sizes = {
        mode: {key.num_tokens for key in keys} for mode, keys in d.cudagraph_keys.items() if keys
    }
    only_decode = sizes[FULL] - sizes[PIECEWISE]
    assert only_decode
    for size in only_decode:
        mode, key = d.dispatch(size)
        assert mode is PIECEWISE and key.num_tokens >= size


def test_a_decode_batch_beyond_every_size_runs_uncaptured() -> None:
    assert three_a_request().dispatch(27, uniform_decode=True)[0] is NONE


def test_every_decode_graph_stays_reachable_where_drafts_share_a_token_count() -> None:
    d = CudagraphDispatcher(
        BOTH, [2, 4, 6, 8], max_num_seqs=8, uniform_decode_query_len=[1, 2, 3, 4]
    )
    keys = d.cudagraph_keys[FULL]
    assert len({key.num_tokens for key in keys}) < len(keys)  # several widths share a size
    for key in keys:
        width = key.num_tokens // key.num_reqs
        assert d.dispatch(key.num_tokens, True, query_len=width) == (FULL, key)


@pytest.mark.parametrize(("width", "sizes"), [(1, [1, 2, 4, 8]), (2, [2, 4, 8]), (8, [8, 16, 32])])
def test_sizes_that_the_width_divides_are_used_as_they_are(width: int, sizes: list[int]) -> None:
    d = CudagraphDispatcher(BOTH, sizes, max_num_seqs=8, uniform_decode_query_len=width)
    for requests in range(1, sizes[-1] // width + 1):
        mode, key = d.dispatch(requests * width, uniform_decode=True)
        expected = min(size for size in sizes if size >= requests * width)
        assert (mode, key.num_tokens, key.num_reqs) == (FULL, expected, expected // width)


def test_a_graph_that_was_not_captured_gives_way_to_the_next() -> None:
    d = three_a_request()
    mode, key = d.dispatch(9, uniform_decode=True)
    d.give_up(mode, key)
    assert d.dispatch(9, uniform_decode=True)[1].num_tokens == 18
    for each in list(d.cudagraph_keys[FULL]):
        d.give_up(FULL, each)
    assert d.dispatch(9, uniform_decode=True)[0] is PIECEWISE


def test_without_any_captured_graph_a_batch_runs_uncaptured_as_itself() -> None:
    d = three_a_request(FULL)
    for each in list(d.cudagraph_keys[FULL]):
        d.give_up(FULL, each)
    assert d.dispatch(12, uniform_decode=True) == (NONE, BatchDescriptor(12))


def test_a_graph_for_queries_up_to_a_bound_serves_shorter_ones_and_no_longer_one() -> None:
    d = CudagraphDispatcher(FULL, [8], max_num_seqs=4, axes={"max_query_len": (3,)})
    assert d.dispatch(6, axes={"max_query_len": 2})[0] is FULL
    assert d.dispatch(6, axes={"max_query_len": 3})[0] is FULL
    assert d.dispatch(6, axes={"max_query_len": 4})[0] is NONE


def test_another_mode_starts_the_keys_over() -> None:
    d = two_sizes(BOTH)
    d.initialize_cudagraph_keys(PIECEWISE)
    assert not d.cudagraph_keys[FULL]
    assert d.dispatch(8, uniform_decode=True)[0] is PIECEWISE


def test_no_adapter_graph_serves_a_batch_with_adapters_where_none_was_captured() -> None:
    assert two_sizes(FULL).dispatch(8, has_lora=True, num_active_loras=1)[0] is NONE
