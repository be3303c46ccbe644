"""Seeing and changing what runs: notes on failures, the debugger, profiler names, and edited source."""

from __future__ import annotations

import io
import pdb
import re
import traceback

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import BindError, ConfigError, EmitError


@piecework.splitting_op("debugging::check", mutates_args=("out",))
def check(x: torch.Tensor, out: torch.Tensor) -> None:
    if x.max() > 100:
        raise ValueError("too large")
    out.copy_(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        check(x, out)
        return out + self.table(index)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, index)
        return x * 2


INPUTS = (torch.randn(2, 8), torch.tensor([0, 1]))


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def stitched(model: Model) -> piecework.StitchedModule:
    return piecework.compile(model, (torch.randn(3, 8), torch.tensor([0, 1, 2])), config=EAGER)


@pytest.mark.parametrize(
    ("inputs", "kind", "said"),
    [
        ((INPUTS[0], torch.tensor([0, 9])), IndexError, ("in submod_", "__vllm_submods__[")),
        ((torch.full((2, 8), 200.0), INPUTS[1]), ValueError, ("in check", "test_debugging.py")),
    ],
)
def test_a_failure_names_the_piece_or_operator_and_its_layer(
    stitched: piecework.StitchedModule, inputs: object, kind: type, said: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as failure:
        stitched(*inputs)  # type: ignore[misc]
    (note,) = failure.value.__notes__
    assert note.startswith(said[0]) and "of layers.0" in note and said[1] in note
    shown = "".join(traceback.format_exception(failure.value))
    assert "<piecework:" in shown and said[0].removeprefix("in ") in shown


def test_the_debugger_steps_through_the_emitted_file(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    shown = io.StringIO()
    typed = io.StringIO("step\n" * 400 + "continue\n")
    debugger = pdb.Pdb(stdin=typed, stdout=shown, nosigint=True, readrc=False)
    debugger.use_rawinput = False
    result = debugger.runcall(stitched.entry, *INPUTS)
    torch.testing.assert_close(result, model(*INPUTS))
    lines = shown.getvalue().splitlines()
    stops = [line for line in lines if line.startswith("> <piecework:") and "execution_fn" in line]
    assert stops, shown.getvalue()
    assert any("-> " in line and "__vllm_submods__[0](" in line for line in lines)


def test_pieces_have_names_in_a_profile_when_asked(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    with torch.profiler.profile() as named, stitched.named_pieces():
        result = stitched(*INPUTS)
    torch.testing.assert_close(result, model(*INPUTS))
    keys = {event.key for event in named.key_averages()}
    assert any(key.startswith("submod_") and "layers.0" in key for key in keys)
    assert any(key.startswith("check") and key.endswith("layers.0") for key in keys)
    with torch.profiler.profile() as plain:
        stitched(*INPUTS)
    assert not any(event.key.startswith("submod_") for event in plain.key_averages())


def test_an_edit_is_proved_or_runs_with_its_difference(
    model: Model, stitched: piecework.StitchedModule
) -> None:
    code = stitched.source.code
    changed = code.replace("return (mul,)", "return (mul + 1,)")
    assert changed != code
    for text, more in ((changed, 1), ("# my own comment\n" + code, 0)):
        edited = stitched.use_edited(text)
        assert (edited.proof is None) == bool(edited.difference) == bool(more)
        torch.testing.assert_close(stitched(*INPUTS), model(*INPUTS) + more)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda code: "def execution_fn(:\n", "not Python"),
        (lambda code: code.replace("def execution_fn", "def other_fn"), "takes \\(None\\)"),
        (lambda code: code.replace("execution_fn(", "execution_fn(extra, "), "its callers pass"),
        (lambda code: code.replace("(mul,)", "(" * 9_999 + "mul" + ")" * 9_999), "is not Python"),
        (lambda code: code.replace("(mul,)", "+".join(["mul"] * 200_000)), "is not Python"),
        (lambda code: code.replace("(mul,)", "mul" + ".a" * 200_000), "is not Python"),
        (lambda code: f"{code}\n1 / 0\n", "fails where it is defined: ZeroDivisionError"),
        (lambda code: f"{code}\nimport no_such_module_anywhere\n", "no_such_module_anywhere"),
    ],
)
def test_an_edit_that_breaks_the_contract_is_refused(
    model: Model, stitched: piecework.StitchedModule, change: object, says: str
) -> None:
    with pytest.raises((EmitError, BindError), match=says):
        stitched.use_edited(change(stitched.source.code))  # type: ignore[operator]
    torch.testing.assert_close(stitched(*INPUTS), model(*INPUTS))


def test_the_log_says_what_was_traced_cut_compiled_and_shared(caplog) -> None:  # type: ignore[no-untyped-def]
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2))).eval()
    with caplog.at_level("INFO", "piecework"):
        piecework.compile(layers, (torch.randn(4, 8),), config=EAGER, splitting_ops=[])
    assert re.search("Sequential: traced .*1 pieces, cut at nothing", caplog.text)
    assert "submod_0 for batch all: compiled by eager" in caplog.text


def test_a_profile_has_a_row_for_each_piece_and_operator_and_leaves_nothing_behind(
    stitched: piecework.StitchedModule,
) -> None:
    x, index = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    before = stitched(x, index)
    profile = stitched.profile(x, index, profiled_calls=3)
    names = [row.name.partition(" ")[0] for row in profile.rows]
    assert sorted(names) == ["check", *(piece.name for piece in stitched.pieces)]
    calls = {row.name.partition(" ")[0]: row.calls for row in profile.rows}
    assert calls["check"] == 2 and all(n == 1 for name, n in calls.items() if name != "check")
    times = [row.microseconds for row in profile.rows]
    assert times == sorted(times, reverse=True) and min(times) > 0
    assert all(row.kernels is None for row in profile.rows)  # eager pieces have no generated code
    lines = str(profile).splitlines()
    heading = next(line for line in lines if line.startswith("stage"))
    shown = next(line for line in lines if line.startswith("submod_0 layers.0"))
    calls_shown, microseconds, *_ = shown[heading.index("calls") :].split()
    [row] = [row for row in profile.rows if row.name.startswith("submod_0 ")]
    assert microseconds == f"{row.microseconds:.1f}" and float(calls_shown) == row.calls
    assert torch.equal(stitched(x, index), before)
    with pytest.raises(ConfigError, match="positive number; got 0"):
        stitched.profile(x, index, profiled_calls=0)
