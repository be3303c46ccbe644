"""CompilationConfig as an object: what it accepts, its errors, and that nothing can change it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, CompilationMode, RuntimeConfig
from piecework.runtime.config.model import FrozenMap

RELU, ADD = torch.ops.aten.relu, torch.ops.aten.add.Tensor


class Handle:
    splitting_op_name = "demo::attention"


def problems(make, *args, **fields):
    with pytest.raises(ConfigError) as caught:
        make(*args, **fields)
    return {each.field: each.message for each in caught.value.problems}


def fails(**fields):
    return problems(CompilationConfig, **fields)


MODES = [3, "3", "PIECEWORK_COMPILE", "piecework_compile", "VLLM_COMPILE", "vllm_compile"]


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        *(("mode", each, CompilationMode.PIECEWORK_COMPILE) for each in MODES),
        ("compile_ranges_endpoints", [256, 16], (16, 256)),
        ("compile_sizes", [8, 1, 8, "cudagraph_capture_sizes"], (1, 8, "cudagraph_capture_sizes")),
        ("compile_sizes", "1, 8", (1, 8)),
        ("cudagraph_capture_sizes", [4, 2, 4], (2, 4)),
        ("cudagraph_capture_sizes", 4, (4,)),
        ("custom_ops", "none,+silu", ("none", "+silu")),
        (
            "splitting_ops",
            ["a::b.c", RELU, RELU.default, ADD, Handle()],
            ("a::b.c", "aten::relu", "aten::relu.default", "aten::add.Tensor", "demo::attention"),
        ),
        ("inductor_passes", {"a": len, "b": "pkg.fn"}, FrozenMap({"a": len, "b": "pkg.fn"})),
    ],
)
def test_what_is_given_is_settled(field, given, expected):
    assert getattr(CompilationConfig(**{field: given}), field) == expected


def test_the_other_name_of_the_endpoints():
    config = CompilationConfig(compile_ranges_split_points=[256, 16])
    assert config.compile_ranges_endpoints == (16, 256)
    found = fails(compile_ranges_split_points=[1], compile_ranges_endpoints=[1])
    assert list(found) == ["compile_ranges_split_points"]


MODE_NAMES = [f"{mode.name} ({mode.value})" for mode in CompilationMode]
RULES = "takes one of 'all' and 'none', and '+op' or '-op' for an op, not {}"


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        *(("mode", each, MODE_NAMES) for each in (4, -1, "4", "FAST", "", True, None, 3.0, [3])),
        ("compile_ranges_endpoints", [16, 4, 16, 4], ["given more than once: 4, 16"]),
        ("custom_ops", ["all", "none"], [RULES.format("'all', 'none'")]),
        ("custom_ops", ["all", "all"], [RULES.format("'all', 'all'")]),
        ("custom_ops", ["+x", "-x"], [RULES.format("'+x', '-x'")]),
        ("custom_ops", ["silu"], [RULES.format("'silu'")]),
        ("custom_ops", ["+"], [RULES.format("'+'")]),
        ("custom_ops", ["none", "y"], [RULES.format("'none', 'y'")]),
        *(("backend", each, [""]) for each in ("", "two words", "a..b", ".a", "a:", "1x")),
        ("inductor_passes", {"c": 3}, ["'c' must be a callable"]),
        ("inductor_passes", {"d": "no name"}, ["'d' must be"]),
    ],
)
def test_what_is_wrong_is_said(field, given, said):
    (message,) = fails(**{field: given}).values()
    assert all(each in message for each in said)


@pytest.mark.parametrize(
    ("field", "first", "wrong"),
    [
        *(("compile_sizes", 1, each) for each in (0, -1, 2.0, True, "many")),
        *(("cudagraph_capture_sizes", 1, each) for each in (0, -1, 2.0, True, "many")),
        *(("splitting_ops", "a::b", each) for each in ("attention", "a::", "::b", "a.b")),
        *(("splitting_ops", "a::b", each) for each in ("a::b.c.d", 3, None, len)),
    ],
)
def test_the_wrong_one_of_a_list_is_named(field, first, wrong):
    assert all(each.startswith(f"{field}.1") for each in fails(**{field: [first, wrong]}))


def test_wrong_fields_are_reported_together():
    wrong = {
        "mode": "x",
        "compile_ranges_endpoints": ["a"],
        "pass_config": {"fuse_attn_quant": "perhaps", "unknown": 1},
        "unknown": 1,
        "custom_ops": ["all", "none"],
    }
    fields = {"mode", "unknown", "custom_ops", "compile_ranges_endpoints.0"}
    fields |= {"pass_config.fuse_attn_quant", "pass_config.unknown"}
    assert set(fails(**wrong)) == set(problems(CompilationConfig.model_validate, wrong)) == fields


PARTITION, SIZES = "use_inductor_graph_partition", "cudagraph_capture_sizes"


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (f"{PARTITION}, backend", [True, "eager"]),
        (f"{PARTITION}, mode", [True, 0]),
        ("cudagraph_mode, mode", ["FULL", 0]),
        ("cudagraph_mode, mode", ["PIECEWISE", 1]),
        ("cudagraph_mode, mode", ["FULL_AND_PIECEWISE", 2]),
        (f"cudagraph_mode, {SIZES}", ["FULL", []]),
        ("cudagraph_mode, splitting_ops", ["PIECEWISE", []]),
        (f"compile_sizes, {SIZES}", [[3], [4]]),
        (f"{SIZES}, max_cudagraph_capture_size", [[1, 2], 1]),
    ],
)
def test_each_conflict(names, values):
    fields = dict(zip(names.split(", "), values, strict=True))
    captured = {"cudagraph_mode": "FULL"} if "compile_sizes" in names else {}
    assert list(fails(**captured, **fields)) == [names]
    for name in fields:  # without any one of its fields the conflict is gone
        CompilationConfig(**captured, **{n: value for n, value in fields.items() if n != name})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rank": 2, "world_size": 2}, "rank, world_size"),
        ({"dp_rank": 1}, "dp_rank, data_parallel_size"),
        ({"world_size": 3, "tensor_parallel_size": 2}, "world_size, tensor_parallel_size"),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs, max_num_batched_tokens"),
    ],
)
def test_each_conflict_of_the_runtime(fields, expected):
    assert list(problems(RuntimeConfig, **fields)) == [expected]
    RuntimeConfig(max_num_seqs=8, max_num_batched_tokens=8, world_size=2, rank=1)


def test_nothing_can_be_assigned_or_deleted():
    config = CompilationConfig(inductor_compile_config={"a": [1, {"b": 2}]}, compile_sizes=[1])
    before = copy.deepcopy(config)
    levers = config.stitching_config
    for target, name in [(config, "mode"), (levers, "emit_del"), (config, "unknown")]:
        with pytest.raises(ValueError, match="frozen"):
            setattr(target, name, 0)
    with pytest.raises(ValueError, match="frozen"):
        del config.mode
    options = config.inductor_compile_config
    with pytest.raises(TypeError):
        options["a"] = 1
    assert options["a"] == (1, FrozenMap({"b": 2}))
    assert config == before


def test_replace_and_validate_make_checked_copies():
    config = CompilationConfig(backend="eager")
    changed = config.replace(mode=0, stitching_config={"emit_del": False})
    assert (config.mode, changed.mode) == (CompilationMode.PIECEWORK_COMPILE, CompilationMode.NONE)
    assert not changed.stitching_config.emit_del and config.stitching_config.emit_del
    with pytest.raises(ConfigError):
        config.replace(mode=1, cudagraph_mode="PIECEWISE")
    with pytest.raises(ConfigError, match="unknown"):
        config.replace(unknown=1)
    with pytest.raises(ConfigError):
        CompilationConfig.model_validate([])


def test_configs_are_values():
    config = CompilationConfig(
        cache_dir=Path("somewhere"), inductor_compile_config={"a": [1]}, splitting_ops=["a::b"]
    )
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.replace()):
        assert copied == config and hash(copied) == hash(config)
    assert config != CompilationConfig()
