"""The command line: what it prints, its exit codes, and that a refused command leaves nothing behind."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from models import Block, mix_pair
from processes import python
from torch import nn
from typer.testing import CliRunner, Result

import piecework
from piecework.cli import app
from piecework.cli.console import short_warnings

sys.modules.setdefault("cli_factories", sys.modules[__name__])


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def small() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Block(mix_pair), (torch.randn(4, 8),)


def breaks() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Breaks(), (torch.randn(4, 8),)


def nonsense() -> int:
    return 3


def alone() -> nn.Module:
    return Block(mix_pair)


def three() -> tuple[object, ...]:
    return (*small(), {})


def leaves() -> object:
    sys.exit(0)


def crashes() -> object:
    return _deep_inside()


def _deep_inside() -> object:
    raise RuntimeError("no weights today")


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def compiled(folder: Path, model: str = "cli_factories:small") -> Result:
    return invoke("compile", model, "-o", folder, "--backend", "eager")


def test_compile_show_run(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()  # an empty one is used
    result = compiled(folder)
    assert result.exit_code == 0, result.output
    assert "2 pieces, 2 unique, between 1 splitting submodule" in result.output
    names = ["artifact", "graph.py", "manifest.json", "stitched.py"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    shown = invoke("show", folder)
    assert shown.exit_code == 0 and "def execution_fn(" in shown.output
    assert json.loads(invoke("show", folder, "--json").output)["seed"] == 0

    ran = invoke("run", folder, "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.output)
    assert report["same_source"] and report["agree"] and report["relative_difference"] <= 1e-4


TOYS = """
import json
import torch
from piecework.integrations.protocol import LoadedModel

def load(path, seed):
    size = json.loads(path.read_text()).get("toy")
    if size is None:
        return None
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(size, 4), torch.nn.ReLU()).eval()
    return LoadedModel.of_calls(model, [((torch.randn(4, size),), {})], path.read_text())
"""


def test_models_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its integration is found by its entry point, and asked before transformers' are."""
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "toys-1.0.dist-info").mkdir()
    info = "Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n"
    (tmp_path / "toys-1.0.dist-info" / "METADATA").write_text(info)
    points = "[piecework.integrations]\ntoys = toys:load\n"
    (tmp_path / "toys-1.0.dist-info" / "entry_points.txt").write_text(points)
    (tmp_path / "toy.json").write_text('{"toy": 8}')
    monkeypatch.syspath_prepend(str(tmp_path))
    result = compiled(tmp_path / "out", str(tmp_path / "toy.json"))
    assert result.exit_code == 0, result.output
    ran = invoke("run", tmp_path / "out", "--json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.output)["agree"]


def test_a_causal_lm_from_a_config(tmp_path: Path) -> None:
    config, folder = tmp_path / "tiny.json", tmp_path / "out"
    demo = Path(piecework.__file__).parent / "examples" / "llama_demo.json"
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config.write_text(json.dumps(json.loads(demo.read_text()) | small | {"num_attention_heads": 4}))
    result = compiled(folder, str(config))
    assert result.exit_code == 0, result.output
    config.unlink()  # the folder stands on its own
    assert (folder / "artifact").is_file()
    traced = piecework.counters.num_graphs_seen
    ran = invoke("run", folder, "--tokens", 5, "--json")
    assert ran.exit_code == 0, ran.output
    assert len(json.loads(ran.output)["tokens"]) == 5
    covered = invoke("coverage", folder, "--sizes", "1,2", "--tokens", 3)
    assert covered.exit_code == 0, covered.output
    shown = invoke("trace", folder, "-o", tmp_path / "trace.json", "--tokens", 3, "--json")
    assert shown.exit_code == 0, shown.output
    ranges = json.loads(shown.output)["ranges"]
    # A forward for each token.
    assert [ranges[f"attention model.layers.{n}.self_attn"] for n in (0, 1)] == [3, 3]
    assert sum(name.startswith("submod_") for name in ranges) == 3
    assert piecework.counters.num_graphs_seen == traced  # all were loaded


@pytest.mark.nightly
@pytest.mark.inductor
def test_demo_shows_what_a_call_costs_beside_torch_compile() -> None:
    result = invoke("demo", "--backend", "eager", "--tokens", 2, "--host-time")
    assert result.exit_code == 0, result.output
    row = r"^ *(eager|torch\.compile|piecework|by hand) +\d+ µs \(\d+ to \d+\) █+$"
    found = re.findall(row, result.output, re.M)
    assert found == ["eager", "torch.compile", "piecework", "by hand"]
    said = r"torch.compile took \d+\.\d\d times as long as piecework \(half of the rounds: "
    assert re.search(said, result.output)


def test_demo_says_that_tokens_are_equal_and_leaves_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = invoke("demo", "--backend", "eager", "--tokens", 4)
    assert result.exit_code == 0, result.output
    assert "tokens equal" in result.output and "9 pieces, 3 unique" in result.output
    assert "host time" not in result.output  # there are no kernels to compare without a compiler
    assert list(tmp_path.iterdir()) == []
    assert invoke("demo", "--backend", "eager", "--tokens", 2, "-o", "demo").exit_code == 0
    assert (tmp_path / "demo" / "stitched.py").is_file()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no/such/model", "there is no model at 'no/such/model'"),
        ("no_such_module:factory", "there is no factory"),
        ("cli_factories:nothing", "there is no factory"),
        ("cli_factories:nonsense", "must return (module, example_inputs); it returned a int"),
        ("cli_factories:alone", "it returned a Block"),
        ("cli_factories:three", "it returned a tuple of 3"),
        ("cli_factories:leaves", "fails with SystemExit: 0 (test_cli.py:"),
        ("cli_factories.py", "write cli_factories:factory"),
        ("cli_factories.py:small", "write cli_factories:small"),
        ("./cli_factories:small", "write cli_factories:small"),
        ("cli_factories:crashes", "fails with RuntimeError: no weights today (test_cli.py:"),
        ("cli_factories:breaks", "can't be captured as one graph"),
    ],
)
def test_a_bad_model_is_misuse_and_leaves_nothing(tmp_path: Path, model: str, says: str) -> None:
    result = compiled(tmp_path / "out", model)
    assert result.exit_code == 2
    assert says in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["compile {} -o out", "serve {}", "trace {} -o out.json"])
def test_a_misnamed_model_is_told_before_anything_heavy_is_imported(command: str) -> None:
    words = command.format("no/such/model").split()
    code = f"""
import sys
from typer.testing import CliRunner
from piecework.cli import app
result = CliRunner().invoke(app, {words!r})
print(result.exit_code, result.output, {{"torch", "transformers"}} & set(sys.modules))
"""
    said = python("-c", code).stdout
    assert said.startswith("2 UsageError: there is no model at")
    assert said.rstrip().endswith("set()"), said


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json", ""),
        ("{}", ""),
        ('{"model_type": "nope"}', ""),
        ('{"model_type": "llava"}', ""),
        ('{"model_type": "llama", "hidden_size": "x"}', "field 'hidden_size'"),
    ],
)
def test_a_bad_config_is_misuse(tmp_path: Path, text: str, says: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    result = compiled(tmp_path / "out", str(config))
    assert result.exit_code == 2, result.output
    assert "UsageError" in result.output and says in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_output_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    result = compiled(kept.parent)
    assert result.exit_code == 2 and "is not empty" in result.output
    assert [p.name for p in kept.parent.iterdir()] == ["kept.txt"] and kept.read_text() == "mine"


def test_a_changed_source_is_not_run_as_generated(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    compiled(folder)
    source = folder / "stitched.py"
    source.write_text(source.read_text().replace("return", "return  # mine\n    return", 1))
    result = invoke("run", folder)
    assert result.exit_code == 2 and "not the one that was generated" in result.output


def test_an_edited_source_runs_when_asked_and_says_how_it_differs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    compiled(folder)
    source = folder / "stitched.py"
    generated = source.read_text()
    source.write_text("# mine\n" + generated)
    kept = invoke("run", folder, "--edited", "--json")
    assert kept.exit_code == 0, kept.output
    assert json.loads(kept.output)["edited"]["proved"]
    verified = invoke("verify", folder)
    assert verified.exit_code == 0 and "proved" in verified.output

    lines = generated.splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.startswith("    return (")]
    lines[place] = lines[place].replace("return (", "return (2 * ").replace(",)", ",)")
    source.write_text("\n".join(lines) + "\n")
    changed = invoke("run", folder, "--edited")
    assert changed.exit_code == 1, changed.output
    assert "edited source: not the graph" in changed.output and "they DISAGREE" in changed.output
    refuted = invoke("verify", folder)
    assert refuted.exit_code == 1 and "not proved" in refuted.output

    source.write_text("def execution_fn(: broken")
    assert invoke("run", folder, "--edited").exit_code == 2


def test_verify_tells_what_the_model_computes_otherwise_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_model.py").write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.relu(x) * 2\n"
        "def make():\n"
        "    return Model().eval(), (torch.ones(4, 3),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "out"
    compiled(folder, "their_model:make")
    assert invoke("verify", folder).exit_code == 0
    (folder / "artifact").unlink()
    assert "compiling again: the folder has no artifact" in invoke("run", folder).output

    import their_model

    monkeypatch.setattr(their_model.Model, "forward", lambda self, x: torch.tanh(x) * 2)
    result = invoke("verify", folder)
    assert result.exit_code == 1
    assert "proved" in result.output
    assert "the model computes something else now in submod_0" in result.output
    source = folder / "stitched.py"
    lines = [line for line in source.read_text().splitlines() if "submod_0  " not in line]
    source.write_text("\n".join(lines) + "\n")
    result = invoke("verify", folder)
    assert result.exit_code == 0
    assert "what pieces computed can't be told" in result.output


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"format": 99}'])
def test_a_damaged_manifest_is_misuse(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "out"
    compiled(folder)
    (folder / "manifest.json").write_text(manifest)
    result = invoke("show", folder)
    assert result.exit_code == 2 and "ArtifactError" in result.output


def test_a_warning_of_the_commands_own_names_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    short_warnings()
    assert warnings.formatwarning("mind", UserWarning, "script.py", 6) == "warning: mind\n"
    assert "other.py:6: UserWarning" in warnings.formatwarning("mind", UserWarning, "other.py", 6)


def test_a_crash_in_the_factory_shows_its_own_traceback_and_no_other(tmp_path: Path) -> None:
    result = compiled(tmp_path / "out", "cli_factories:crashes")
    shown = result.output
    assert result.exit_code == 2
    assert shown.count("Traceback (most recent call last):") == 1
    assert "in crashes" in shown and "in _deep_inside" in shown and "plain.py" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_module_that_fails_to_import_is_misuse_too(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "factory_that_lacks.py").write_text("import nothing_like_that\n")
    (tmp_path / "factory_with_errors.py").write_text("def make(:\n")
    lacks = invoke("compile", "factory_that_lacks:make", "-o", tmp_path / "out")
    assert lacks.exit_code == 2 and "fails with ModuleNotFoundError" in lacks.output
    assert "factory_that_lacks.py" in lacks.output and "there is no factory" not in lacks.output
    wrong = invoke("compile", "factory_with_errors:make", "-o", tmp_path / "out")
    assert wrong.exit_code == 2 and "SyntaxError" in wrong.output


def test_settings_come_from_a_file_and_from_options(tmp_path: Path) -> None:
    file, folder, dump = tmp_path / "c.toml", tmp_path / "out", tmp_path / "dump"
    file.write_text('backend = "eager"\ncompile_workers = 2\n')
    options = ["--config", file, "-O.compile_workers=1", "-O.stitching_config.emit_del=false"]
    result = invoke("compile", "cli_factories:small", "-o", folder, *options, "--dump", dump)
    assert result.exit_code == 0, result.output
    made = json.loads((folder / "manifest.json").read_text())["config"]
    assert (made["backend"], made["compile_workers"]) == ("eager", 1)
    assert "del " not in (folder / "stitched.py").read_text()
    assert any(dump.rglob("*.html")) or any(dump.rglob("*.py"))

    ran = invoke("run", folder)
    assert ran.exit_code == 0 and "source as in the folder" in ran.output, ran.output
    assert "results (float32[4, 8]) differ by 0.0e+00 relative" in ran.output
    other = invoke("run", folder, "-O.stitching_config.emit_del=true")
    assert (
        other.exit_code == 1 and "source DIFFERENT: the folder was made with other" in other.output
    )
    with_others = "-O.stitching_config.emit_del=true"
    for options, again in (((), False), ((with_others,), True)):
        covered = invoke("coverage", folder, "--sizes", "4", *options)
        assert covered.exit_code == 0, covered.output
        assert ("compiling again: other settings" in covered.output) == again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("-O.nothing=1", "nothing"),
        ("-O.backend=indutor", "no compiler 'indutor'"),
        ("--backend indutor", "no compiler 'indutor'"),
        ("--config /nowhere.toml", "/nowhere.toml"),
        *((f"--dump {folder}", "UsageError") for folder in ("file", "file/below", "out", "out/in")),
        *((f"-o {folder}", "UsageError") for folder in ("file", "file/below", "missing/below")),
    ],
)
def test_settings_and_folders_are_checked_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = invoke("compile", "cli_factories:crashes", "-o", "out", *options.split())
    assert result.exit_code == 2 and says in result.output
    assert "no weights today" not in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


TRACE = "trace cli_factories:crashes -o"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("bench stitching --out file", "can't write folder"),
        ("serve ./nothing", "there is no model at"),
        ("serve . --capture 1,x", "(--capture)"),
        ("run .", "is not a folder made by piecework compile"),
        *((f"coverage nothing --sizes {sizes}", "batch size") for sizes in ("x", "0", ",")),
        ("coverage nothing --sizes 1,2 --mode FAST", "FAST"),
        ("coverage nothing --sizes 1,2 --policy guess", "guess"),
        (f"{TRACE} missing/trace.json", "there is no folder"),
        (f"{TRACE} .", "is a folder"),
        (f"{TRACE} trace.json --sizes x", "is no list of batch sizes"),
        (f"{TRACE} trace.json --backend indutor", "no compiler 'indutor'"),
    ],
)
def test_misuse_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    result = invoke(*command.split())
    assert result.exit_code == 2 and says in result.output, result.output
    assert "stitching:" not in result.output and [p.name for p in tmp_path.iterdir()] == ["file"]
    assert ("made by piecework compile" in result.output) is (command == "run .")


def test_every_command_has_help_with_an_example() -> None:
    commands = ["demo", "compile", "show", "run", "verify", "bench", "coverage", "serve", "trace"]
    commands += [f"cache {each}" for each in ("ls", "explain", "verify", "gc")]
    commands += [f"config {each}" for each in ("show", "schema", "check")]
    for command in commands:
        result = invoke(*command.split(), "--help")
        shown = " ".join(result.output.split())
        assert result.exit_code == 0 and f"Example: piecework {command}" in shown


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"piecework {piecework.__version__}\n"


def test_show_of_a_compile_cache(tmp_path: Path) -> None:
    for number, model in enumerate(("backbone", "drafter")):
        folder = tmp_path / "torch_compile_cache" / "piecework" / "0a" / "rank_0_0" / model
        folder.mkdir(parents=True)
        (folder / "stitched.py").write_text(
            f"def execution_fn(x_{number}):\n    return x_{number}\n"
        )
    output = invoke("show", tmp_path).output
    assert "def execution_fn(x_0)" in output and "drafter" in output
