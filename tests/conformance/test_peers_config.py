"""Configuration, sizes and ranges as peers have them: in, fields and limits of the program; out, what is captured and compiled, or an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import piecework
from piecework import counters
from piecework.codegen import split_graph
from piecework.errors import ConfigError
from piecework.runtime import CompilationConfig, Range, RuntimeConfig

OPS = ("demo::attention", "demo::all_reduce")


def sizes(seqs: int, tokens: int = 32768, **fields: object) -> tuple[int, ...]:
    """The capture sizes of a program with these limits."""
    runtime = {
        name: fields.pop(name) for name in list(fields) if name in RuntimeConfig.model_fields
    }
    config = CompilationConfig(cudagraph_mode="FULL_AND_PIECEWISE", **fields)
    found = config.resolve(
        RuntimeConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens, **runtime),
        registered_splitting_ops=OPS,
    ).cudagraph_capture_sizes
    assert found is not None
    return found


# --- rules for custom operators, copies ----------------------------------------------------------------


@pytest.mark.parametrize("rules", [["+a", "-b"], ["none", "+a"], ["+a", "+a"]])
def test_rules_for_custom_ops_that_are_well_formed(rules: list[str]) -> None:
    CompilationConfig(custom_ops=rules)


@pytest.mark.parametrize("rules", [["a"], ["+"], ["-"], ["all", "none"], ["none", "+a", "-a"]])
def test_rules_for_custom_ops_that_are_malformed_or_contradict(rules: list[str]) -> None:
    with pytest.raises(ConfigError, match="custom_ops"):
        CompilationConfig(custom_ops=rules)


def test_a_copy_means_the_same() -> None:
    config = CompilationConfig(use_inductor_graph_partition=True, splitting_ops=OPS)
    assert copy.deepcopy(config) == config and config.replace() == config


def test_a_list_that_was_given_is_not_the_configurations() -> None:
    given = list(OPS)
    config = CompilationConfig(splitting_ops=given)
    given.append("demo::later")
    assert config.splitting_ops == OPS


# --- splitting operators -------------------------------------------------------------------------------


def test_pieces_are_cut_at_what_is_registered() -> None:
    resolved = CompilationConfig(cudagraph_mode="FULL_AND_PIECEWISE").set_splitting_ops_for_v1(OPS)
    assert resolved.splitting_ops_contain_attention(["demo::attention"])


def test_ops_that_were_named_stay_with_inductors_own_partition() -> None:
    config = CompilationConfig(use_inductor_graph_partition=True, splitting_ops=OPS[:1])
    assert config.set_splitting_ops_for_v1(OPS).splitting_ops == OPS[:1]


def test_fusing_attention_leaves_no_piece_and_no_piecewise_graph() -> None:
    config = CompilationConfig(
        cudagraph_mode="PIECEWISE", pass_config={"fuse_attn_quant": True}
    ).set_splitting_ops_for_v1(OPS[:1], OPS[:1])
    assert config.splitting_ops == ()
    assert not config.cudagraph_mode.requires_piecewise_compilation()


def test_fusing_attention_and_cutting_at_it_contradict() -> None:
    config = CompilationConfig(splitting_ops=OPS, pass_config={"fuse_attn_quant": True})
    with pytest.raises(ConfigError, match="demo::attention"):
        config.set_splitting_ops_for_v1(OPS, OPS[:1])


def test_fusing_attention_goes_with_inductors_own_partition() -> None:
    config = CompilationConfig(
        cudagraph_mode="PIECEWISE",
        use_inductor_graph_partition=True,
        pass_config={"fuse_attn_quant": True},
    ).set_splitting_ops_for_v1(OPS, OPS[:1])
    assert config.splitting_ops_contain_attention(OPS[:1])
    assert config.cudagraph_mode.name == "PIECEWISE"


def test_settling_the_ops_twice_adds_nothing() -> None:
    once = CompilationConfig().set_splitting_ops_for_v1(OPS)
    assert once.set_splitting_ops_for_v1(OPS).splitting_ops == once.splitting_ops


@pytest.mark.parametrize(
    ("name", "cuts"),
    [("aten::add", True), ("aten::add.default", False), ("aten::add.Tensor", True)],
)
def test_an_operator_is_named_with_or_without_its_overload(name: str, cuts: bool) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    added = graph.call_function(torch.ops.aten.add.Tensor, (x, 1))
    graph.output((graph.call_function(torch.ops.aten.neg.default, (added,)),))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    _, items = split_graph(gm, [name])
    assert [item.is_splitting_graph for item in items] == ([True, False] if cuts else [False])


# --- capture sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "largest", "tokens", "found"),
    [
        (None, None, 2048, 256),
        ([1, 2, 4], 4, 2048, 4),
        ([1, 256], None, 2048, 256),
        (None, 2048, 257, 257),  # the largest batch is captured, whatever the steps are
        ([1, 2, 4, 15], None, 2048, 15),
    ],
)
def test_the_largest_capture_size(
    given: list[int] | None, largest: int | None, tokens: int, found: int
) -> None:
    fields: dict[str, object] = {}
    if given is not None:
        fields["cudagraph_capture_sizes"] = given
    if largest is not None:
        fields["max_cudagraph_capture_size"] = largest
    assert max(sizes(128, tokens, **fields)) == found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cudagraph_capture_sizes": [1, 2, 4], "max_cudagraph_capture_size": 8}, "maximum 8"),
        ({"cudagraph_capture_sizes": []}, "no size"),
        ({"max_cudagraph_capture_size": 0}, "largest size is 0"),
    ],
)
def test_sizes_that_contradict_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sizes(128, 2048, **fields)


@pytest.mark.parametrize(
    "fields", [{"cudagraph_capture_sizes": []}, {"max_cudagraph_capture_size": 0}]
)
def test_nothing_to_capture_is_fine_where_nothing_is_captured(fields: dict[str, object]) -> None:
    assert CompilationConfig(**fields).resolve(RuntimeConfig()).cudagraph_capture_sizes == ()


def test_a_cut_sequence_keeps_the_sizes_that_the_ranks_share() -> None:
    ranks = {"world_size": 2, "tensor_parallel_size": 2}
    given = {"cudagraph_capture_sizes": [1, 2, 4, 15], "pass_config": {"enable_sp": True}}
    assert sizes(128, 2048, **given, **ranks) == (2, 4)
    cut = sizes(32, uniform_decode_query_len=17, pass_config={"enable_sp": True}, **ranks)
    assert all(size % 2 == 0 for size in cut) and max(cut) == 512


@pytest.mark.parametrize("seqs", [100, 101])
def test_the_most_requests_are_captured_off_the_steps_too(seqs: int) -> None:
    assert seqs in sizes(seqs)


@pytest.mark.parametrize(
    ("seqs", "drafts", "captured"),
    [
        (8, 0, True),
        (32, 0, True),
        (64, 7, True),
        (256, 1, True),
        (32, 16, False),
        (64, 16, False),
        (128, 16, False),
        (256, 24, False),
        (33, 16, False),
        (24, 16, True),
    ],
)
def test_wide_decode_batches_do_not_raise_the_ceiling(
    seqs: int, drafts: int, captured: bool
) -> None:
    found = sizes(seqs, uniform_decode_query_len=1 + drafts)
    assert max(found) == min(seqs * (1 + drafts) * 2, 512)
    assert (seqs * (1 + drafts) in found) is captured


def test_the_number_of_default_sizes_stays_small() -> None:
    found = sizes(512, uniform_decode_query_len=17)
    assert max(found) == 512 and len(found) < 100


@pytest.mark.parametrize("seqs", [8, 32, 256, 300, 512, 600, 1024, 2048])
def test_without_drafts_the_largest_is_twice_the_requests_up_to_the_ceiling(seqs: int) -> None:
    assert max(sizes(seqs, 1_000_000)) == min(2 * seqs, 512)


def test_one_draft_token_does_not_raise_the_ceiling() -> None:
    found = sizes(300, 1_000_000, uniform_decode_query_len=2)
    assert max(found) == 512 and 600 not in found


def test_every_width_of_drafts_has_sizes() -> None:
    found = sizes(128, uniform_decode_query_len=17, further_decode_query_lens=[3])
    for width, requests in ((17, 16), (3, 128)):
        assert max(size // width for size in found if size % width == 0) >= requests


def test_the_token_budget_bounds_the_sizes() -> None:
    found = sizes(32, 512, uniform_decode_query_len=17)
    assert max(found) == 512 and 544 not in found


# --- compile sizes and ranges --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5])
def test_a_compile_size_that_would_be_padded_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="padded to"):
        CompilationConfig(
            cudagraph_mode="FULL", cudagraph_capture_sizes=[1, 2, 4, 8], compile_sizes=[size]
        )


def test_compile_sizes_may_name_the_capture_sizes() -> None:
    for given in ([1, 2, 4, 8], ["cudagraph_capture_sizes"]):
        config = CompilationConfig(
            cudagraph_mode="FULL", cudagraph_capture_sizes=[1, 2, 4, 8], compile_sizes=given
        )
        assert config.resolve(RuntimeConfig()).compile_sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("captures", [[], [1, 2, 4, 8]])
def test_where_nothing_is_captured_any_compile_size_is_reached(captures: list[int]) -> None:
    config = CompilationConfig(
        cudagraph_mode="NONE", cudagraph_capture_sizes=captures, compile_sizes=[3, 5, 7]
    )
    assert config.resolve(RuntimeConfig()).compile_sizes == (3, 5, 7)


def test_endpoints_cut_the_sizes_into_ranges() -> None:
    config = CompilationConfig(compile_ranges_endpoints=[8, 32])
    assert list(config.get_compile_ranges(8192)) == [Range(1, 8), Range(9, 32), Range(33, 8192)]


def test_a_single_size_wins_over_the_range_around_it() -> None:
    table = CompilationConfig(
        compile_ranges_endpoints=[8, 32], compile_sizes=[16, 64, 128]
    ).range_table(8192)
    assert len(table.entries) == 6
    served = {size: str(table.find(size)) for size in (1, 4, 16, 24, 48, 64, 8192)}
    assert served == {
        1: "[1, 8]",
        4: "[1, 8]",
        16: "[16, 16]",
        24: "[9, 32]",
        48: "[33, 8192]",
        64: "[64, 64]",
        8192: "[33, 8192]",
    }


# --- what a configuration makes happen -----------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def test_mode_none_sees_no_graph() -> None:
    decorated = piecework.support_torch_compile(
        type("Plain", (Model,), {}), dynamic_arg_dims={"x": 0}
    )
    decorated.compilation_config = CompilationConfig(mode="NONE")
    model, x = decorated(), torch.randn(3, 4)
    with counters.expect(num_graphs_seen=0, num_backend_compilations=0):
        torch.testing.assert_close(model(x), model.linear(x).relu())


@pytest.mark.parametrize("endpoints", [[], [8, 32]])
def test_each_range_is_compiled_once(endpoints: list[int]) -> None:
    config = CompilationConfig(backend="eager", compile_ranges_endpoints=endpoints)
    with counters.expect(num_graphs_seen=1, num_eager_compiles=1 + len(endpoints)):
        stitched = piecework.compile(Model(), (torch.randn(5, 4),), config=config)
        for size in (4, 16, 48, 500):
            assert stitched(torch.randn(size, 4)).shape == (size, 4)
