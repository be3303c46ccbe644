"""CompilationConfig as an object: fields, what it accepts, its errors, and that nothing can change it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import (
    CompilationConfig,
    CompilationMode,
    DynamicShapesConfig,
    PassConfig,
    RuntimeConfig,
    StitchingConfig,
)
from piecework.runtime.config.model import CACHE_KEY, FrozenMap

MODELS = [CompilationConfig, RuntimeConfig, PassConfig, DynamicShapesConfig, StitchingConfig]


def problems(error):
    return {each.field: each.message for each in error.value.problems}


def fails(*args, **fields):
    with pytest.raises(ConfigError) as caught:
        CompilationConfig(*args, **fields)
    return problems(caught)


@pytest.mark.parametrize("model", MODELS)
def test_every_field_has_a_description_a_default_and_a_hash_role(model):
    for name, field in model.model_fields.items():
        role = (field.json_schema_extra or {}).get(CACHE_KEY)
        assert role is True or role, f"{model.__name__}.{name} declares no role in the cache key"
        assert field.description and field.description.endswith("."), name
        assert not field.is_required(), name


@pytest.mark.parametrize(
    "given", [3, "3", "PIECEWORK_COMPILE", "piecework_compile", "VLLM_COMPILE", "vllm_compile"]
)
def test_mode_by_number_or_name(given):
    assert CompilationConfig(mode=given).mode is CompilationMode.PIECEWORK_COMPILE


@pytest.mark.parametrize("given", [4, -1, "4", "FAST", "", True, None, 3.0, [3]])
def test_a_wrong_mode_lists_the_modes(given):
    message = fails(mode=given)["mode"]
    for mode in CompilationMode:
        assert f"{mode.name} ({mode.value})" in message


def test_the_other_name_of_the_endpoints():
    config = CompilationConfig(compile_ranges_split_points=[256, 16])
    assert config.compile_ranges_endpoints == (16, 256)
    found = fails(compile_ranges_split_points=[1], compile_ranges_endpoints=[1])
    assert list(found) == ["compile_ranges_split_points"]


def test_sizes_are_sorted_and_once_endpoints_must_be_given_once():
    config = CompilationConfig(
        compile_sizes=[8, 1, 8, "cudagraph_capture_sizes"], cudagraph_capture_sizes=[4, 2, 4]
    )
    assert config.compile_sizes == (1, 8, "cudagraph_capture_sizes")
    assert config.cudagraph_capture_sizes == (2, 4)
    found = fails(compile_ranges_endpoints=[16, 4, 16, 4])
    assert found == {"compile_ranges_endpoints": "given more than once: 4, 16"}


@pytest.mark.parametrize("field", ["compile_sizes", "cudagraph_capture_sizes"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "many"])
def test_a_size_is_a_positive_whole_number(field, value):
    assert all(each.startswith(f"{field}.1") for each in fails(**{field: [1, value]}))


def test_lists_as_on_a_command_line():
    config = CompilationConfig(
        compile_sizes="1, 8", cudagraph_capture_sizes=4, custom_ops="none,+silu"
    )
    assert config.compile_sizes == (1, 8)
    assert config.cudagraph_capture_sizes == (4,)
    assert config.custom_ops == ("none", "+silu")


def test_splitting_ops_by_name_overload_packet_or_handle():
    class Handle:
        splitting_op_name = "demo::attention"

    relu, add = torch.ops.aten.relu, torch.ops.aten.add.Tensor
    config = CompilationConfig(splitting_ops=["a::b.c", relu, relu.default, add, Handle()])
    assert config.splitting_ops == (
        "a::b.c",
        "aten::relu",
        "aten::relu.default",
        "aten::add.Tensor",
        "demo::attention",
    )


@pytest.mark.parametrize("op", ["attention", "a::", "::b", "a.b", "a::b.c.d", 3, None, len])
def test_a_wrong_splitting_op_is_named(op):
    found = fails(splitting_ops=["a::b", op])
    assert list(found) == ["splitting_ops.1"]
    assert "ns::op" in found["splitting_ops.1"]


@pytest.mark.parametrize(
    "rules", [["all", "none"], ["all", "all"], ["+x", "-x"], ["silu"], ["+"], ["none", "y"]]
)
def test_custom_op_rules_that_contradict(rules):
    message = fails(custom_ops=rules)["custom_ops"]
    assert message.startswith("takes one of 'all' and 'none', and '+op' or '-op' for an op")
    assert all(repr(rule) in message for rule in rules)


@pytest.mark.parametrize("backend", ["", "two words", "a..b", ".a", "a:", "1x"])
def test_a_backend_is_a_name(backend):
    assert list(fails(backend=backend)) == ["backend"]


def test_passes_are_callables_or_names():
    config = CompilationConfig(inductor_passes={"a": len, "b": "pkg.module:fn"})
    assert config.inductor_passes["a"] is len
    assert "'c' must be a callable" in fails(inductor_passes={"c": 3})["inductor_passes"]
    assert "'d' must be" in fails(inductor_passes={"d": "no name"})["inductor_passes"]


def test_wrong_fields_are_reported_together():
    found = fails(
        mode="x",
        compile_ranges_endpoints=["a"],
        pass_config={"fuse_attn_quant": "perhaps", "unknown": 1},
        unknown=1,
        custom_ops=["all", "none"],
    )
    assert set(found) == {
        "mode",
        "compile_ranges_endpoints.0",
        "pass_config.fuse_attn_quant",
        "pass_config.unknown",
        "unknown",
        "custom_ops",
    }


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"use_inductor_graph_partition": True, "backend": "eager"},
            "use_inductor_graph_partition, backend",
        ),
        ({"use_inductor_graph_partition": True, "mode": 0}, "use_inductor_graph_partition, mode"),
        ({"cudagraph_mode": "FULL", "mode": 0}, "cudagraph_mode, mode"),
        (
            {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": []},
            "cudagraph_mode, cudagraph_capture_sizes",
        ),
        (
            {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [4], "compile_sizes": [3]},
            "compile_sizes, cudagraph_capture_sizes",
        ),
        ({"cudagraph_mode": "PIECEWISE", "mode": 1}, "cudagraph_mode, mode"),
        ({"cudagraph_mode": "FULL_AND_PIECEWISE", "mode": 2}, "cudagraph_mode, mode"),
        ({"cudagraph_mode": "PIECEWISE", "splitting_ops": []}, "cudagraph_mode, splitting_ops"),
        (
            {"cudagraph_capture_sizes": [1, 2], "max_cudagraph_capture_size": 1},
            "cudagraph_capture_sizes, max_cudagraph_capture_size",
        ),
    ],
)
def test_each_conflict(fields, expected):
    assert list(fails(**fields)) == [expected]
    for name in fields:
        # Without any one of its fields the conflict is gone.
        CompilationConfig(**{key: value for key, value in fields.items() if key != name})


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
    with pytest.raises(ConfigError) as caught:
        RuntimeConfig(**fields)
    assert list(problems(caught)) == [expected]


def test_nothing_can_be_assigned_or_deleted():
    config = CompilationConfig(inductor_compile_config={"a": [1, {"b": 2}]}, compile_sizes=[1])
    before = copy.deepcopy(config)
    for target, name in [
        (config, "mode"),
        (config.stitching_config, "emit_del"),
        (config, "unknown"),
    ]:
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
    with pytest.raises(ConfigError) as caught:
        CompilationConfig.model_validate({"mode": 9, "unknown": 1})
    assert set(problems(caught)) == {"mode", "unknown"}
    with pytest.raises(ConfigError):
        CompilationConfig.model_validate([])


def test_configs_are_values():
    config = CompilationConfig(
        cache_dir=Path("somewhere"), inductor_compile_config={"a": [1]}, splitting_ops=["a::b"]
    )
    for copied in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), config.replace()):
        assert copied == config and hash(copied) == hash(config)
    assert config != CompilationConfig()
