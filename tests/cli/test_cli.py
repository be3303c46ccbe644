"""The command line: what it prints, its exit codes, and that a refused command leaves nothing behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import mix
from torch import nn
from typer.testing import CliRunner, Result

import piecework
from piecework.cli import app

sys.modules.setdefault("cli_factories", sys.modules[__name__])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.enter(x)
        out = torch.empty_like(y)
        mix(y, out)
        return self.leave(out)


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def small() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Small(), (torch.randn(4, 8),)


def breaks() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Breaks(), (torch.randn(4, 8),)


def nonsense() -> int:
    return 3


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def compiled(folder: Path, model: str = "cli_factories:small") -> Result:
    return invoke("compile", model, "-o", folder, "--backend", "eager")


def test_compile_show_run(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = compiled(folder)
    assert result.exit_code == 0, result.output
    assert "2 pieces, 2 unique, between 1 splitting submodules" in result.output
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


def test_a_causal_lm_from_a_config(tmp_path: Path) -> None:
    fields = json.loads(
        (Path(piecework.__file__).parent / "examples" / "llama_demo.json").read_text()
    )
    fields.update(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=8, num_attention_heads=4
    )
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(fields))
    folder = tmp_path / "out"
    result = compiled(folder, str(config))
    assert result.exit_code == 0, result.output
    config.unlink()  # the folder stands on its own
    assert (folder / "artifact" / "manifest.json").is_file()
    traced = piecework.counters.num_graphs_seen
    ran = invoke("run", folder, "--tokens", 5, "--json")
    assert ran.exit_code == 0, ran.output
    assert len(json.loads(ran.output)["tokens"]) == 5
    covered = invoke("coverage", folder, "--sizes", "1,2", "--tokens", 3)
    assert covered.exit_code == 0, covered.output
    assert piecework.counters.num_graphs_seen == traced  # both were loaded


def test_demo_says_that_tokens_are_equal(tmp_path: Path) -> None:
    result = invoke("demo", "--backend", "eager", "--tokens", 4, "-o", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "tokens equal" in result.output
    assert "9 pieces, 3 unique" in result.output
    assert (tmp_path / "demo" / "stitched.py").is_file()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no/such/model", "there is no model at 'no/such/model'"),
        ("no_such_module:factory", "there is no factory"),
        ("cli_factories:nothing", "there is no factory"),
        ("cli_factories:nonsense", "must return (module, example_inputs)"),
        ("cli_factories:breaks", "can't be captured as one graph"),
    ],
)
def test_a_bad_model_is_misuse_and_leaves_nothing(tmp_path: Path, model: str, says: str) -> None:
    result = compiled(tmp_path / "out", model)
    assert result.exit_code == 2
    assert (says in result.output and "Hint:" in result.output) or says in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["not json", "{}", '{"model_type": "nope"}', '{"model_type": "t5"}']
)
def test_a_bad_config_is_misuse(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    result = compiled(tmp_path / "out", str(config))
    assert result.exit_code == 2, result.output
    assert "UsageError" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_an_output_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    result = compiled(kept.parent)
    assert result.exit_code == 2 and "is not empty" in result.output
    assert [p.name for p in kept.parent.iterdir()] == ["kept.txt"] and kept.read_text() == "mine"


def test_an_empty_output_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert compiled(tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("place", ["file", "file/below", "missing/below"])
def test_an_output_that_cannot_be_made_is_misuse(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    result = compiled(tmp_path / place)
    assert result.exit_code == 2 and "UsageError" in result.output
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
    assert "edited source: not the graph" in changed.output and "agree: False" in changed.output
    refuted = invoke("verify", folder)
    assert refuted.exit_code == 1 and "not proved" in refuted.output

    source.write_text("def execution_fn(: broken")
    assert invoke("run", folder, "--edited").exit_code == 2


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"format": 99}'])
def test_a_damaged_manifest_is_misuse(tmp_path: Path, manifest: str) -> None:
    folder = tmp_path / "out"
    compiled(folder)
    (folder / "manifest.json").write_text(manifest)
    result = invoke("show", folder)
    assert result.exit_code == 2 and "ArtifactError" in result.output


def test_a_folder_of_another_kind_is_misuse(tmp_path: Path) -> None:
    result = invoke("run", tmp_path)
    assert result.exit_code == 2 and "is not a folder made by piecework compile" in result.output


def test_every_command_has_help_with_an_example() -> None:
    for command in ("demo", "compile", "show", "run", "verify", "bench"):
        result = invoke(command, "--help")
        assert result.exit_code == 0 and f"Example: piecework {command}" in result.output


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"piecework {piecework.__version__}\n"
