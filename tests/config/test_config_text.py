"""Configurations as JSON, TOML and options: round trips (also by hypothesis), merging, and unreadable input."""

from __future__ import annotations

import json
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piecework.errors import ConfigError
from piecework.runtime.config.compilation import CompilationConfig, CUDAGraphMode
from piecework.runtime.config.text import (
    merge,
    parse_overrides,
    read_data,
    to_data,
    to_json,
    to_overrides,
    to_toml,
)

read = CompilationConfig.model_validate
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = text | numbers | st.booleans()
sizes = st.lists(st.integers(1, 4096), unique=True, max_size=5)
op_names = st.lists(st.sampled_from(["a::b", "a::b.c", "demo::attention"]), unique=True, min_size=1)


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=6,
    )


OPTIONAL = {
    "backend": st.sampled_from(["inductor", "eager", "pkg.module:Compiler"]),
    "debug_dump_path": st.sampled_from(["dumps", "a b/c", "12", "null"]),
    "cache_dir": st.sampled_from(["cache", "true"]),
    "custom_ops": st.sampled_from([["none"], ["all", "-silu"], ["+silu", "-norm"]]),
    "splitting_ops": st.none() | op_names,
    "repeated_layers": st.sampled_from([[], ["model.layers"]]),
    "repeated_blocks": st.sampled_from(["found", "off", ["model.layers"]]),
    "compile_sizes": sizes | st.just(["cudagraph_capture_sizes", 3]),
    "compile_ranges_endpoints": sizes,
    "inductor_passes": st.dictionaries(text, st.just("os.path:join"), max_size=2),
    "cudagraph_num_of_warmups": st.integers(0, 9),
    "cudagraph_copy_inputs": st.booleans(),
    "max_cudagraph_capture_size": st.none() | st.integers(1, 512),
    "pass_config": st.fixed_dictionaries({}, optional={"enable_sp": st.booleans()}),
    "dynamic_shapes_config": st.fixed_dictionaries({"type": st.sampled_from(["auto", "unbacked"])}),
    "stitching_config": st.fixed_dictionaries({}, optional={"emit_del": st.booleans()}),
}


@st.composite
def configs(draw, leaves=scalars):
    """Valid configurations that touch every kind of field (and only sometimes the default)."""
    options = {"inductor_compile_config": st.dictionaries(text, nested(leaves), max_size=3)}
    fields = draw(st.fixed_dictionaries({}, optional={**OPTIONAL, **options}))
    fields["mode"] = draw(st.sampled_from([0, 1, 2, 3]))
    if fields["mode"] == 3 and fields.get("splitting_ops") != []:
        fields["cudagraph_mode"] = draw(st.sampled_from(CUDAGraphMode))
    return CompilationConfig(**fields)


@settings(deadline=None, max_examples=150)
@given(configs(), configs(leaves=scalars | st.none()), st.booleans())
def test_what_is_written_reads_back(plain, config, only_changed):
    assert read(tomllib.loads(to_toml(plain, only_changed=only_changed))) == plain
    assert read(json.loads(to_json(config, only_changed=only_changed))) == config
    assert read(parse_overrides(CompilationConfig, to_overrides(config))) == config


def test_a_named_pass_is_written_by_name():
    config = CompilationConfig(inductor_passes={"slot": json.dumps})
    assert to_data(config)["inductor_passes"] == {"slot": "json:dumps"}
    again = read(json.loads(to_json(config)))
    assert again.inductor_passes["slot"] == "json:dumps"
    assert again.compute_hash() == config.compute_hash()


@pytest.mark.parametrize("value", [object(), json.dumps, [{"a": object()}]])
def test_what_could_not_be_read_back_is_refused(value):
    config = CompilationConfig(inductor_compile_config={"option": value})
    for write in (to_json, to_toml, to_overrides):
        with pytest.raises(ConfigError, match="can't be written") as caught:
            write(config)
        assert caught.value.where == "inductor_compile_config"


def test_files_by_suffix(tmp_path):
    (tmp_path / "a.toml").write_text("mode = 0\n[stitching_config]\nemit_del = false\n")
    (tmp_path / "a.json").write_text('{"mode": 0, "stitching_config": {"emit_del": false}}')
    assert read_data(tmp_path / "a.toml") == read_data(tmp_path / "a.json")
    wrong = {
        "a.yaml": b"mode: 0",
        "bad.json": b"\xff\xfe",
        "list.json": b"[]",
        "b.toml": b"mode = ",
    }
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
    for name in (*wrong, "absent.json"):
        with pytest.raises(ConfigError) as caught:
            read_data(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["3"], {"mode": 3}),
        (["-O3"], {"mode": 3}),
        ([".mode=VLLM_COMPILE"], {"mode": "VLLM_COMPILE"}),
        (["-O.stitching_config.emit_del=false"], {"stitching_config": {"emit_del": False}}),
        ([".compile_sizes=[1,8]"], {"compile_sizes": [1, 8]}),
        ([".compile_sizes=1,8"], {"compile_sizes": "1,8"}),
        ([".compile_ranges_split_points=[4]"], {"compile_ranges_split_points": [4]}),
        ([".backend=pkg:C=x"], {"backend": "pkg:C=x"}),
        ([".cache_dir="], {"cache_dir": ""}),
        ([".splitting_ops=null"], {"splitting_ops": None}),
        (
            [".inductor_compile_config.triton.cudagraphs=true", ".inductor_compile_config.a=1"],
            {"inductor_compile_config": {"triton.cudagraphs": True, "a": 1}},
        ),
        (
            ['{"stitching_config": {"emit_del": false}}', ".stitching_config.check_inputs=true"],
            {"stitching_config": {"emit_del": False, "check_inputs": True}},
        ),
    ],
)
def test_options(given, expected):
    assert parse_overrides(CompilationConfig, given) == expected


def test_options_as_a_person_would_write_them():
    config = CompilationConfig(
        mode=0,
        compile_sizes=[1, 8],
        cache_dir="12",
        stitching_config={"emit_del": False},
        inductor_compile_config={"triton.cudagraphs": True, "a = b": "x"},
    )
    assert to_overrides(config) == [
        "-O.mode=NONE",
        '-O.cache_dir="12"',
        "-O.compile_sizes=[1,8]",
        '-O{"inductor_compile_config": {"a = b": "x"}}',
        "-O.inductor_compile_config.triton.cudagraphs=true",
        "-O.stitching_config.emit_del=false",
    ]


@pytest.mark.parametrize("bad", ["mode=1", ".=2", ".backend", "{", ".stitching_config.=1"])
def test_an_option_of_another_form_is_an_error(bad):
    with pytest.raises(ConfigError, match=r"is not of the form -O\.field=value"):
        parse_overrides(CompilationConfig, [bad])


def test_options_win_over_a_file_and_groups_merge():
    below = {
        "mode": 0,
        "compile_ranges_endpoints": [4],
        "stitching_config": {"emit_del": False},
        "inductor_compile_config": {"a": 1, "b": {"c": 1}},
    }
    options = ["3", ".compile_ranges_endpoints=[8]", ".pass_config.enable_sp=true"]
    options.append('.inductor_compile_config.b={"d":2}')
    above = parse_overrides(CompilationConfig, options)
    config = read(merge(below, above))
    assert config.mode == 3 and config.compile_ranges_endpoints == (8,)
    assert not config.stitching_config.emit_del and config.pass_config.enable_sp
    assert config.inductor_compile_config == {"a": 1, "b": {"d": 2}}
    assert below["mode"] == 0 and below["stitching_config"] == {"emit_del": False}
