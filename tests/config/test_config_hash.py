"""The configuration's part of the cache key: every field by its role, and equal wherever it is computed."""

from __future__ import annotations

import pytest
from processes import python

from piecework.runtime.config.compilation import CompilationConfig, RuntimeConfig
from piecework.runtime.config.model import digest, factors_of, group_of, is_keyed

# A base without conflicts under any single change, and another value for each field of it and of
# the runtime that is no number and no switch.
BASE = {"splitting_ops": ["a::b"], "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [1, 4]}
OTHER = {
    "repeated_layers": ("layers",),
    "repeated_blocks": "off",
    "mode": 2,
    "backend": "eager",
    "debug_dump_path": "dumps",
    "cache_dir": "cache",
    "custom_ops": ["all"],
    "splitting_ops": ["a::b", "c::d"],
    "compile_sizes": [1],
    "compile_ranges_endpoints": [16],
    "inductor_compile_config": {"max_autotune": True},
    "single_size_inductor_config": {"max_autotune": True},
    "inductor_passes": {"post_grad_custom_post_pass": "textwrap:dedent"},
    "cudagraph_mode": "PIECEWISE",
    "cudagraph_capture_sizes": [1, 8],
    "max_cudagraph_capture_size": 4,
    "type": "unbacked",
    "further_decode_query_lens": [1],
    "dtype": "bfloat16",
    "model_name": "other",
}
ONE_VALUE = {"compile_cache_save_format", "compile_mm_encoder"}
# What must never be in the key, by the cache's own rules: a change of role here is a decision.
NEVER = {"debug_dump_path", "cache_dir", "compile_cache_save_format", "compile_sizes"}
NEVER |= {"compile_ranges_endpoints", "cudagraph_num_of_warmups", "cudagraph_capture_sizes"}
NEVER |= {"max_cudagraph_capture_size"}


def leaf_fields(model, prefix=()):
    for name, field in model.model_fields.items():
        group = group_of(model, name)
        if group is None:
            yield (*prefix, name), is_keyed(field)
        else:
            yield from leaf_fields(group, (*prefix, name))


def changed(config, name, *rest):
    """``config`` with another valid value of one field."""
    value = getattr(config, name)
    if rest:
        return config.replace(**{name: changed(value, *rest)})
    if name in OTHER:
        return config.replace(**{name: OTHER[name]})
    return config.replace(**{name: not value if isinstance(value, bool) else value + 1})


@pytest.mark.parametrize(
    ("path", "keyed"),
    [each for each in leaf_fields(CompilationConfig) if each[0][0] not in ONE_VALUE],
    ids=lambda each: ".".join(each) if isinstance(each, tuple) else "",
)
def test_a_change_of_a_field_changes_the_hash_exactly_if_its_role_says_so(path, keyed):
    base = CompilationConfig(**BASE)
    other = changed(base, *path)
    assert other != base
    assert (other.compute_hash() != base.compute_hash()) is keyed
    assert not (keyed and path[0] in NEVER)


@pytest.mark.parametrize("name", RuntimeConfig.model_fields)
def test_the_runtime_by_its_roles(name):
    base = RuntimeConfig(world_size=2, data_parallel_size=2)
    other = changed(base, name)
    keyed = is_keyed(RuntimeConfig.model_fields[name])
    assert (digest(factors_of(other)) != digest(factors_of(base))) is keyed


def test_what_means_the_same_has_one_hash():
    def same(left, right):
        return CompilationConfig(**left).compute_hash() == CompilationConfig(**right).compute_hash()

    assert same({"splitting_ops": ["a::b", "c::d"]}, {"splitting_ops": ["c::d", "a::b", "c::d"]})
    assert same({"custom_ops": ["none", "+a", "+b"]}, {"custom_ops": ["+b", "+a", "-c"]})
    assert same({}, {"custom_ops": ["none"]})
    assert not same({}, {"custom_ops": ["all"]})
    assert same({"custom_ops": ["all"]}, {"custom_ops": ["+a", "all"]})
    assert not same({"custom_ops": ["all"]}, {"custom_ops": ["all", "-a"]})
    assert same({"mode": 3}, {"mode": "VLLM_COMPILE"})
    options = {"b": {"y": 1, "x": [2]}, "a": True}
    backwards = {"a": True, "b": {"x": (2,), "y": 1}}
    assert same({"inductor_compile_config": options}, {"inductor_compile_config": backwards})


PASS_MODULE = """
FACTOR = {factor}

def helper(graph):
    return FACTOR

def a_pass(graph):
    return (lambda: helper(graph))()
"""

PRINT_HASH = """
from piecework.runtime.config.compilation import CompilationConfig
print(CompilationConfig(
    splitting_ops={"a::b", "c::d", "e::f"},
    inductor_compile_config={"a": {1, "x", (2, 3)}, "b": {"c": 1.5}},
    inductor_passes={"slot": "my_passes:a_pass"},
    cache_dir=".",
).compute_hash())
"""


def hash_in_process(folder, seed, factor=1):
    folder.mkdir(parents=True)
    (folder / "my_passes.py").write_text(PASS_MODULE.format(factor=factor))
    home = {"PYTHONHASHSEED": str(seed), "HOME": str(folder)}
    return python("-c", PRINT_HASH, cwd=folder, **home).stdout.strip()


def test_the_hash_is_the_same_in_every_process_and_place(tmp_path):
    first = hash_in_process(tmp_path / "here", seed=0)
    assert len(first) == 64
    assert hash_in_process(tmp_path / "moved" / "there", seed=1) == first
    assert hash_in_process(tmp_path / "changed", seed=0, factor=2) != first
