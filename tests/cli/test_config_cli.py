"""``piecework config``: what it prints, its exit codes, and that its output can be fed back."""

from __future__ import annotations

import json
import shlex
import tomllib

import pytest
from processes import python
from typer.testing import CliRunner

from piecework.cli.config import config_app
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.config.text import json_schema, markdown_table, parse_overrides

GOOD = 'mode = 0\n[stitching_config]\nemit_del = false\n[inductor_compile_config]\n"a.b" = 1\n'


def from_toml(text):
    return CompilationConfig.model_validate(tomllib.loads(text))


def run(*arguments):
    return CliRunner().invoke(config_app, [str(each) for each in arguments])


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return path


def test_show_prints_toml_that_reads_back(good):
    result = run("show", good, "-O3", "-O.compile_sizes=1,8")
    assert result.exit_code == 0
    config = from_toml(result.stdout)
    assert config.mode == 3 and config.compile_sizes == (1, 8)
    assert not config.stitching_config.emit_del


@pytest.mark.parametrize("form", ["json", "toml", "options"])
def test_show_in_each_format_means_the_same(good, form):
    result = run("show", good, "--changed", "--format", form)
    assert result.exit_code == 0
    match form:
        case "json":
            config = CompilationConfig.model_validate_json(result.stdout)
        case "toml":
            config = from_toml(result.stdout)
        case _:
            options = parse_overrides(CompilationConfig, result.stdout.splitlines())
            config = CompilationConfig.model_validate(options)
    assert config == from_toml(GOOD)


def test_show_resolved_as_json():
    result = run(
        "show", "-O.cudagraph_mode=FULL", "-R.max_num_seqs=4", "-O.compile_sizes=2", "--json"
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["config"]["cudagraph_capture_sizes"] == [1, 2, 4, 8]
    assert report["runtime"]["max_num_seqs"] == 4
    assert report["ranges"] == [[2, 2], [1, 8192]]
    assert report["hash"] == CompilationConfig.model_validate(report["config"]).compute_hash()
    assert "runtime" not in json.loads(run("show", "--json").stdout)


def test_show_resolved_as_text_reads_back():
    result = run("show", "--resolve", "-O.cudagraph_mode=FULL", "--changed")
    assert "# compiled for [1, 8192]" in result.stdout
    assert from_toml(result.stdout).max_cudagraph_capture_size == 512


@pytest.mark.parametrize(
    "arguments",
    [
        "show -O.mode=9",
        "show absent.toml",
        "show --format yaml",
        "show -Omode=1",
        "show -R.rank=3",
        "check",
        "check absent.toml",
        "check -O.mode",
        "check -O.mode=0 -R.x.=1",
        "show --no-such-option",
    ],
)
def test_misuse_exits_with_2_and_says_why(arguments):
    result = run(*shlex.split(arguments))
    assert result.exit_code == 2
    assert result.stderr and not result.stdout
    assert "Traceback" not in result.stderr


def test_check_of_a_good_file(good):
    result = run("check", good)
    assert (result.exit_code, result.stdout) == (0, "The configuration is valid.\n")
    result = run("check", good, "--json")
    assert json.loads(result.stdout) == {"valid": True, "problems": []}


def test_check_lists_all_problems(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('mode = 9\nunknown = 1\n[stitching_config]\nemit_del = "perhaps"\n')
    result = run("check", path)
    assert result.exit_code == 1
    assert "3 problems" in result.stderr and not result.stdout
    result = run("check", path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    fields = {each["field"] for each in report["problems"]}
    assert not report["valid"] and fields == {"mode", "unknown", "stitching_config.emit_del"}


def test_check_finds_what_does_not_fit_the_runtime(good):
    arguments = ["check", good, "-O.compile_sizes=[100]", "-O.compile_ranges_endpoints=[99]"]
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "-R.max_num_batched_tokens=64", "-R.max_num_seqs=8", "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert [each["field"] for each in problems] == ["compile_sizes", "compile_ranges_endpoints"]
    result = run(*arguments, "-R.max_num_seqs=9999")
    assert result.exit_code == 1 and "max_num_seqs" in result.stderr


@pytest.mark.parametrize("content", ["mode = ", "{", b"\xff\xfe"])
def test_check_of_a_file_that_cannot_be_parsed(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("check", path, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["field"] == str(path)


def test_schema_in_each_form(tmp_path):
    assert json.loads(run("schema", "--json").stdout) == json_schema(CompilationConfig)
    assert run("schema", "--markdown").stdout == markdown_table(CompilationConfig)
    lines = run("schema").stdout.splitlines()
    assert lines[0].startswith("mode (") and any(
        line.startswith("stitching_config.emit_del (default true; in cache key: yes)")
        for line in lines
    )
    assert run("schema", "--runtime").stdout.startswith("max_num_batched_tokens (")


def test_configurations_are_read_without_torch():
    code = "import sys, piecework.cli.config; print('torch' in sys.modules)"
    assert python("-c", code).stdout == "False\n"
