"""Static graphs of a stitched model in one call: the pieces, the head, what is padded, and what generate() makes of it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import EAGER
from small_llms import build, generated

from piecework.errors import BindError, ConfigError, StaticGraphError
from piecework.integrations.transformers import stitch, stitched_module, unstitch
from piecework.integrations.transformers.request.state import dry_request
from piecework.runtime.counters import counters
from piecework.runtime.graphs.serve.report import MeasuredSize
from piecework.runtime.stitched import StitchedModule

transformers = pytest.importorskip("transformers")


def served(module: StitchedModule) -> dict[str, tuple[int, int]]:
    """Graph → its calls, and the rows that they were padded by."""
    found: dict[str, tuple[int, int]] = {}
    for row in module.call_report():
        if row.graph:
            calls, padding = found.get(row.graph, (0, 0))
            found[row.graph] = calls + row.calls, padding + row.padding
    return found


def test_one_call_captures_pieces_and_head(caplog: pytest.LogCaptureFixture) -> None:
    eager = build()
    with caplog.at_level(logging.WARNING):
        model = stitch(copy.deepcopy(eager), config=EAGER, capture=[1, 2, 4])
    assert "stand-in" in caplog.text
    for batch in (1, 2, 3, 4, 5):
        assert torch.equal(generated(model, batch), generated(eager, batch)), batch
    pieces, head = stitched_module(model), model.lm_head.forward.stitched
    last = pieces.coverage(6)[-1]
    assert (last.first, last.last, last.mode.name) == (5, 6, "NONE")
    # 7 steps behind each prefill; a prefill has one row of each sequence at the head.
    assert served(pieces) == {"tokens=1": (7, 0), "tokens=2": (7, 0), "tokens=4": (14, 7)}
    assert served(head) == {"tokens=1": (8, 0), "tokens=2": (8, 0), "tokens=4": (16, 8)}
    unstitch(model)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(generated(model, 2), generated(eager, 2))


def test_a_capture_that_is_refused_leaves_the_model_as_it_was() -> None:
    model = build()
    for wrong in ("all", 4):
        with pytest.raises(ConfigError, match="capture is"):
            stitch(model, config=EAGER, capture=wrong)
    before = set(vars(model))
    with pytest.raises((ConfigError, StaticGraphError)):
        stitch(model, config=EAGER, capture=[0])
    assert set(vars(model)) == before
    assert "forward" not in vars(model.model)


def test_auto_that_keeps_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(size: int, ways: object, device: object, *, seconds: float) -> MeasuredSize:
        return MeasuredSize(size, {"stitched": 1.0, "captured": 2.0})

    monkeypatch.setattr("piecework.runtime.graphs.serve.report.measured", judge)
    monkeypatch.setattr("piecework.integrations.transformers.stitcher.AUTO_MAXIMUM", 2)
    model = stitch(build(), config=EAGER, capture="auto")
    assert "faster in another way: 1 (stitched), 2 (stitched)" in caplog.text
    generated(model, 2)
    stitched = stitched_module(model)
    [row] = stitched.call_report()
    assert (row.mode, row.reason) == ("NONE", "nothing is captured") and row.calls >= 8
    for ask in (stitched.coverage, stitched.wake_up):
        with pytest.raises(BindError, match="each was slower from a graph"):
            ask()
    stitched.capture([2], context_for=dry_request, pad=True, progress=False)
    generated(model, 2)
    assert any(row.graph for row in stitched.call_report())
    stitched.sleep()
    with pytest.raises(BindError, match=r"wake_up\(\)"):
        stitched.coverage()


@pytest.mark.parametrize("cache", ["static", None])
def test_generate_does_not_compile_a_stitched_model_again(cache: str | None) -> None:
    eager = build()
    model = stitch(copy.deepcopy(eager), config=EAGER)
    how = transformers.CompileConfig(backend="eager", fullgraph=False)
    how._compile_all_devices = True  # as on a GPU
    torch._dynamo.reset()
    seen = torch._dynamo.utils.counters["stats"]["calls_captured"]
    with counters.expect(num_graphs_seen=0):
        ours = generated(model, 2, cache_implementation=cache, compile_config=how)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == seen
    assert torch.equal(ours, generated(eager, 2))
    unstitch(model)
    generated(model, 2, cache_implementation="static", compile_config=how)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > seen  # its own again
