"""``piecework trace``: the file opens as a trace, and every piece is in it with its layers."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import torch
from models import Block, Layers, mix_pair
from typer.testing import CliRunner, Result

import piecework
from piecework.cli import app

sys.modules.setdefault("trace_factories", sys.modules[__name__])


def layers() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return Layers(Block(mix_pair) for _ in range(2)).eval(), (torch.randn(4, 8),)


def invoke(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def slices(text: str) -> dict[str, int]:
    """Name → how often, of what a trace shows as a bar, each with a beginning and a length."""
    found: dict[str, int] = {}
    for event in json.loads(text)["traceEvents"]:
        assert event["name"] != "unknown"  # what becomes of a name that the profiler can't write
        if event.get("ph") == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            found[event["name"]] = found.get(event["name"], 0) + 1
    return found


def test_pieces_and_operators_are_named_by_layer(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    result = invoke("trace", "trace_factories:layers", "-o", file, "--backend", "eager")
    assert result.exit_code == 0, result.output
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]
    found = slices(file.read_text())
    model, args = layers()
    pieces = piecework.compile(model, args, config={"backend": "eager"}).pieces
    assert len(pieces) == 3
    for piece in pieces:
        name = f"{piece.name} {piece.modules.replace('…', '...')}"
        assert found[name] == 1 and f"1  {name}\n" in result.output
    assert found["mix layers.0"] == found["mix layers.1"] == 1
    assert any(name.startswith("aten::") for name in found)  # what is inside is there too


def test_replays_are_named_by_piece_graph_and_layer(tmp_path: Path) -> None:
    file = tmp_path / "trace.json.gz"
    options = ["--backend", "eager", "--sizes", "2,8", "--json"]
    result = invoke("trace", "trace_factories:layers", "-o", file, *options)
    assert result.exit_code == 0, result.output
    found = slices(gzip.decompress(file.read_bytes()).decode())
    said = json.loads(result.stdout)
    assert said["trace"] == str(file) and said["ranges"].items() <= found.items()
    replays = [name for name in said["ranges"] if name.startswith("replay submod_")]
    assert len(replays) == 3 and all(name.endswith(", PIECEWISE tokens=8") for name in replays)
    assert found["stage inputs"] == found["mix layers.0"] == found["mix layers.1"] == 1


def test_every_kind_of_call_of_a_decoder_that_is_served_whole_is_named(tmp_path: Path) -> None:
    config, folder, file = tmp_path / "bloom.json", tmp_path / "out", tmp_path / "trace.json"
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    config.write_text(json.dumps({"model_type": "bloom", **sizes}))
    made = invoke("compile", config, "-o", folder, "--backend", "eager")
    assert made.exit_code == 0 and "compile again" not in made.output, made.output
    result = invoke("trace", folder, "-o", file, "--tokens", 3, "--json")
    assert result.exit_code == 0, result.output
    ranges = json.loads(result.stdout)["ranges"]
    assert sum(count for name, count in ranges.items() if name.startswith("submod_0 ")) == 3


def test_nothing_is_named_after_a_trace() -> None:
    model, args = layers()
    stitched = piecework.compile(model, args, config={"backend": "eager"})
    before = dict(stitched.traces[0].entry.now.function.__globals__)
    with torch.profiler.profile(), stitched.named_pieces():
        stitched(*args)
    assert dict(stitched.traces[0].entry.now.function.__globals__) == before
    with torch.profiler.profile() as plain:
        stitched(*args)
    assert not any("layers." in event.key for event in plain.key_averages())


def test_the_layer_of_an_operator_is_that_of_the_line_that_runs() -> None:
    """An edited source has other lines: its operators go by their own names."""
    model, args = layers()
    stitched = piecework.compile(model, args, config={"backend": "eager"})
    stitched.use_edited("# mine\n" + stitched.source.code)
    with torch.profiler.profile() as profile, stitched.named_pieces():
        stitched(*args)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mix"] == 2 and not any(key.startswith("mix ") for key in counts)
