"""``piecework.compile(...).capture(sizes)``: any batch size in, the model's own results out, whatever was captured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from captured import sizes_of
from models import EAGER, Block, fresh, mix_pair
from torch import nn
from typer.testing import CliRunner

import piecework
from piecework.cli import app
from piecework.errors import BindError, InputError, StaticGraphError
from piecework.runtime.batch.forward_context import get_forward_context, set_forward_context
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.graphs import CUDAGraphMode

sys.modules.setdefault("capture_factories", sys.modules[__name__])
SIZES = [2, 4, 8]  # the model broadcasts over its batch, which the trace takes to be 2 or more


@piecework.splitting_op("capture_api::scaled", rows="independent")
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * float(get_forward_context().attn_metadata or 1)


scaled.register_fake(torch.empty_like)


class Stack(nn.Module):
    def __init__(self, layers: int = 2, op=fresh) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mix_pair, f"layers.{i}", after=op) for i in range(layers))

    def forward(self, x: torch.Tensor, positions: torch.Tensor, scale: torch.Tensor):
        height, width, _ = positions.unbind(0)
        x = x + (height - width).float()[:, None] * scale
        for layer in self.layers:
            x = layer(x)
        return {"rows": x, "columns": x.t(), "sums": (x.sum(-1), None)}


def batch(n: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(n, 8), torch.randint(0, 9, (3, n)), torch.randn(8)


def compiled(config: CompilationConfig = EAGER, op=fresh, **options):
    model = Stack(op=op).requires_grad_(False)
    x, positions, scale = batch(5)
    torch._dynamo.mark_dynamic(x, 0)  # said at once; it takes four traces to find out
    torch._dynamo.mark_dynamic(positions, 1)
    return model, piecework.compile(model, (x, positions, scale), config=config, **options)


def captured(sizes=SIZES, op=fresh, **options):
    options = {"progress": False, "estimate": False, "poison": True, **options}
    model, stitched = compiled(op=op)
    return model, stitched.capture(sizes, **options)


def equal(stitched, model, n: int) -> None:
    args = batch(n)
    torch.testing.assert_close(stitched(*args), model(*args), rtol=1e-4, atol=1e-3)


# --- results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "op"), [("copy", fresh), ("eager", fresh), ("refuse", None)])
def test_every_size_gives_the_results_of_the_model_under_poisoned_padding(policy: str, op) -> None:
    """Under "refuse" out-buffers alone connect the pieces."""
    model, stitched = captured(op=op, address_policy=policy)
    assert sizes_of(stitched) == SIZES
    for n in [*range(2, 11), 3, 8, 2]:
        equal(stitched, model, n)
    assert policy != "refuse" or "copy_" not in stitched.static_graphs.source_for(8).code


def test_results_are_the_callers_own_unless_it_wants_static_ones() -> None:
    _, stitched = captured([2])
    first = stitched(*batch(2))["rows"]
    kept = first.clone()
    stitched(*batch(2))
    assert torch.equal(first, kept)
    stitched.capture([2], clone_outputs=False, progress=False, estimate=False)
    first = stitched(*batch(2))["rows"]
    kept = first.clone()
    second = stitched(*batch(2))["rows"]
    assert first.data_ptr() == second.data_ptr() and not torch.equal(first, kept)


def test_splitting_ops_see_the_callers_forward_context() -> None:
    model, stitched = captured([4], op=scaled, context_for=None)
    args = batch(3)
    for metadata in (2, 5):
        with set_forward_context(metadata):
            torch.testing.assert_close(stitched(*args), model(*args), rtol=1e-4, atol=1e-3)
    with set_forward_context(3, skip_cuda_graphs=True):
        torch.testing.assert_close(stitched(*args), model(*args), rtol=1e-4, atol=1e-3)


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("binds", [True, False])
def test_replaced_weights_are_detected(binds: bool) -> None:
    config = CompilationConfig(backend="eager", stitching_config={"bind_weights": binds})
    model, stitched = compiled(config)
    stitched.capture([4], progress=False, estimate=False)
    equal(stitched, model, 3)
    model.layers[1].leave.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    with pytest.raises((InputError, StaticGraphError), match=r"layers\.1\.leave\.weight"):
        stitched(*batch(3))
    stitched.rebind()
    with pytest.raises(BindError, match=r"nothing is captured.*wake_up\(\)"):
        stitched.coverage()
    equal(stitched, model, 3)
    stitched.capture([4], progress=False, estimate=False)
    assert stitched.coverage()[0].mode is CUDAGraphMode.PIECEWISE
    equal(stitched, model, 3)


def test_rebinding_the_same_weights_keeps_the_graphs() -> None:
    model, stitched = captured([4])
    stitched.rebind()
    assert sizes_of(stitched) == [4]
    equal(stitched, model, 2)


# --- the command line ------------------------------------------------------------------------------


def stack() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Stack(), batch(5)


def invoke(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_line_shows_coverage_and_memory(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    made = invoke("compile", "capture_factories:stack", "-o", folder, "--backend", "eager")
    assert made.exit_code == 0, made.output
    result = invoke("coverage", folder, "--sizes", "2,4,8", "--max", 9, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    spans = [(row["first"], row["last"], row["mode"]) for row in said["coverage"]]
    assert spans[-1] == (9, 9, "NONE") and spans[0] == (2, 2, "PIECEWISE")
    assert [each["tokens"] for each in said["memory"]["graphs"]] == [8, 4, 2]
    shown = invoke("coverage", folder, "--sizes", "2,4")
    assert shown.exit_code == 0 and "batch  tokens  mode" in shown.output
    assert "static graphs hold" in shown.output
    counted = invoke("coverage", folder, "--sizes", "8", "--mode", "FULL", "--tokens", 1, "--json")
    assert counted.exit_code == 0, counted.output
    [row] = json.loads(counted.stdout)["calls"]
    assert row["mode"] == "FULL" and row["calls"] >= 1
    assert row["reason"] == "padded to the next captured size"
    for bad in ("2,x", "0"):
        refused = invoke("coverage", folder, "--sizes", bad)
        assert refused.exit_code == 2 and "Error" in refused.output
