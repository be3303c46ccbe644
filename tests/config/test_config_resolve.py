"""Resolution: what a configuration means in one program, as a new object, and the methods it is made of."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ConfigError
from piecework.runtime.batch.ranges import OPEN_END
from piecework.runtime.config.compilation import CompilationConfig, CUDAGraphMode, RuntimeConfig

SMALL = RuntimeConfig(max_num_batched_tokens=64, max_num_seqs=4)
ATTENTION = "demo::attention"


def pairs(ranges):
    return [(each.start, each.end) for each in ranges]


def test_resolve_settles_everything_and_leaves_the_original_alone():
    config = CompilationConfig(
        cudagraph_mode="PIECEWISE",
        compile_sizes=["cudagraph_capture_sizes", 12],
        compile_ranges_endpoints=[16, 64],
    )
    before = config.model_copy(deep=True)
    resolved = config.resolve(SMALL, registered_splitting_ops=["b::y", ATTENTION, "b::y"])
    assert config == before
    assert resolved.splitting_ops == ("b::y", ATTENTION)
    assert resolved.cudagraph_capture_sizes == (1, 2, 4, 8)
    assert resolved.max_cudagraph_capture_size == 8
    assert resolved.compile_sizes == (1, 2, 4, 8, 12)
    assert resolved.compile_ranges_endpoints == (16,)
    assert resolved.custom_ops == ("none",)
    assert pairs(resolved.get_compile_ranges(64)) == [(1, 16), (17, 64)]
    assert pairs(resolved.get_compile_ranges(64, is_encoder=True)) == [(1, 16), (17, OPEN_END)]


@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(CUDAGraphMode),
    registered=st.lists(st.sampled_from(["a::b", "c::d", "e::f"])),
    query_len=st.integers(1, 4),
    sizes=st.none() | st.sets(st.integers(1, 64), min_size=1, max_size=4),
    endpoints=st.sets(st.integers(1, 64), max_size=4),
)
def test_resolving_twice_changes_nothing(mode, registered, query_len, sizes, endpoints):
    runtime = SMALL.replace(uniform_decode_query_len=query_len)
    config = CompilationConfig(
        cudagraph_mode=mode, cudagraph_capture_sizes=sizes, compile_ranges_endpoints=endpoints
    )
    try:
        once = config.resolve(runtime, registered_splitting_ops=registered)
    except ConfigError as error:
        # The only thing that can be wrong here: no multiple of the query length is captured.
        assert [each.field for each in error.problems] == ["cudagraph_capture_sizes"]
        return
    assert once.resolve(runtime, registered_splitting_ops=registered) == once
    assert once.get_compile_ranges(64) == config.get_compile_ranges(64)


def test_problems_of_all_steps_are_one_error():
    config = CompilationConfig(
        cudagraph_mode="FULL",
        cudagraph_capture_sizes=[111],
        compile_sizes=[120],
        compile_ranges_endpoints=[99],
        splitting_ops=[ATTENTION],
        pass_config={"fuse_attn_quant": True},
    )
    with pytest.raises(ConfigError) as caught:
        config.resolve(SMALL, registered_splitting_ops=[ATTENTION], attention_ops=[ATTENTION])
    fields = "splitting_ops cudagraph_capture_sizes compile_sizes compile_ranges_endpoints"
    assert [each.field for each in caught.value.problems] == fields.split()


@pytest.mark.parametrize(
    ("before", "after"), [("PIECEWISE", "NONE"), ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY")]
)
def test_without_ops_to_cut_at_pieces_are_not_captured(before, after, caplog):
    config = CompilationConfig(cudagraph_mode=before)
    with caplog.at_level(logging.WARNING):
        resolved = config.resolve(SMALL, registered_splitting_ops=[])
    assert resolved.splitting_ops == ()
    assert resolved.cudagraph_mode is CUDAGraphMode[after]
    assert f"cudagraph_mode {before} becomes {after}" in caplog.text


@pytest.mark.parametrize("mode", range(4))
def test_splitting_modes_take_the_registered_ops_unless_told(mode):
    found = CompilationConfig(mode=mode).set_splitting_ops_for_v1(["a::b"]).splitting_ops
    assert found == (("a::b",) if mode in (0, 3) else ())
    told = CompilationConfig(mode=mode, splitting_ops=["c::d"])
    assert told.set_splitting_ops_for_v1(["a::b"]) == told


def test_attention_fusion_keeps_attention_inside():
    config = CompilationConfig(pass_config={"fuse_attn_quant": True})
    registered = [ATTENTION, "demo::all_reduce"]
    fused = config.set_splitting_ops_for_v1(registered, [ATTENTION])
    assert fused.splitting_ops == ("demo::all_reduce",)
    partition = config.replace(use_inductor_graph_partition=True)
    assert ATTENTION in partition.set_splitting_ops_for_v1(registered, [ATTENTION]).splitting_ops
    untouched = config.replace(splitting_ops=["demo::all_reduce"])
    assert untouched.set_splitting_ops_for_attn_fusion(registered, [ATTENTION]) == untouched


def test_splitting_ops_contain_attention():
    config = CompilationConfig(splitting_ops=["demo::attention", "demo::other.default"])
    for inside in ("demo::attention", "demo::attention.default", "demo::other.default"):
        assert config.splitting_ops_contain_attention([inside])
    for outside in (["demo::other"], ["demo::attention", "demo::mamba"], []):
        assert not config.splitting_ops_contain_attention(outside)
    with pytest.raises(ConfigError, match=r"resolve\(\)"):
        CompilationConfig().splitting_ops_contain_attention(["demo::attention"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"mode": 0}, False),
        ({"mode": 2}, False),
        ({"splitting_ops": ["other::op"]}, False),
        ({"use_inductor_graph_partition": True}, True),
        ({"use_inductor_graph_partition": True, "mode": 2}, True),
    ],
)
def test_is_attention_compiled_piecewise(fields, expected):
    config = CompilationConfig(**{"splitting_ops": [ATTENTION], **fields})
    assert config.is_attention_compiled_piecewise([ATTENTION]) is expected


def test_maximum_alone_truncates_the_default_sizes():
    config = CompilationConfig(cudagraph_mode="FULL", max_cudagraph_capture_size=20)
    sized = config.post_init_cudagraph_sizes(RuntimeConfig())
    assert sized.cudagraph_capture_sizes == (1, 2, 4, 8, 16, 20)
    padded = sized.bs_to_padded_graph_size
    assert (padded[3], padded[20], len(padded)) == (4, 20, 21)


def test_sizes_that_are_not_chosen_yet():
    config = CompilationConfig(compile_sizes=["cudagraph_capture_sizes"])
    for use in (
        lambda: config.bs_to_padded_graph_size,
        lambda: config.adjust_cudagraph_sizes_for_spec_decode(2),
        lambda: config.range_table(8),
        lambda: config.compute_hash(),
    ):
        with pytest.raises(ConfigError, match="resolve"):
            use()


def test_speculative_decoding_rounds_the_sizes():
    config = CompilationConfig(cudagraph_mode="FULL", cudagraph_capture_sizes=[1, 2, 4, 8, 24])
    adjusted = config.post_init_cudagraph_sizes(SMALL).adjust_cudagraph_sizes_for_spec_decode(3)
    assert adjusted.cudagraph_capture_sizes == (3, 6, 9, 24)
    assert adjusted.max_cudagraph_capture_size == 24
    with_sp = config.replace(pass_config={"enable_sp": True}).post_init_cudagraph_sizes(SMALL)
    with_both = with_sp.adjust_cudagraph_sizes_for_spec_decode(3, 2)
    assert with_both.cudagraph_capture_sizes == (6, 12, 24)


def test_a_query_length_that_no_size_holds_is_an_error():
    config = CompilationConfig(cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[2])
    config.resolve(SMALL.replace(uniform_decode_query_len=2))
    with pytest.raises(ConfigError, match=r"no capture size is a multiple of 3 \(query length 3"):
        config.resolve(SMALL.replace(uniform_decode_query_len=3, further_decode_query_lens=[2]))


def test_a_cut_sequence_keeps_the_sizes_that_all_ranks_share(caplog):
    runtime = RuntimeConfig(world_size=2, tensor_parallel_size=2)
    config = CompilationConfig(cudagraph_mode="FULL", pass_config={"enable_sp": True})
    with caplog.at_level(logging.WARNING):
        resolved = config.replace(cudagraph_capture_sizes=[1, 2, 4, 15]).resolve(runtime)
    assert resolved.cudagraph_capture_sizes == (2, 4) and resolved.max_cudagraph_capture_size == 4
    assert "1, 15 are dropped" in caplog.text
    assert resolved.resolve(runtime) == resolved
    assert all(n % 2 == 0 for n in config.resolve(runtime).cudagraph_capture_sizes)
    with pytest.raises(ConfigError, match="there is no size to capture"):
        config.replace(cudagraph_capture_sizes=[1, 3]).resolve(runtime)


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({}, "none"),
        ({"backend": "eager"}, "all"),
        ({"mode": 0}, "all"),
        ({"custom_ops": ["all"]}, "all"),
        ({"custom_ops": ["none"], "backend": "eager"}, "none"),
    ],
)
def test_custom_op_base(fields, base):
    config = CompilationConfig(**fields)
    assert config.custom_op_base() == base
    assert config.is_custom_op_enabled("silu") is (base == "all")
    resolved = config.resolve(SMALL)
    assert base in resolved.custom_ops and resolved.is_custom_op_enabled("silu") is (base == "all")


def test_custom_op_log_check_names_rules_without_effect(caplog):
    config = CompilationConfig(custom_ops=["none", "+silu", "+norm", "-rope"])
    with caplog.at_level(logging.DEBUG):
        assert config.custom_op_log_check(["silu"]) == ("+norm", "-rope")
    assert "'silu': True" in caplog.text and "+norm, -rope" in caplog.text
