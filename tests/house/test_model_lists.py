"""The harness behind the table of ordinary models: what counts as a difference, how arguments follow a batch size, how a row that hangs is told."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from piecework.bench import models
from piecework.bench.lists.isolated import FILE, RowResult, Task, run_rows
from piecework.bench.lists.judge import Answer, difference
from piecework.bench.lists.page import behind, markdown
from piecework.bench.lists.sample import Sample, resized
from piecework.bench.lists.shrink import LEVELS, shrink
from piecework.bench.lists.trial import Options, Outcome, Verdict, try_sample


@dataclass
class Box:
    value: torch.Tensor


ROWS = torch.arange(6.0).view(2, 3)
DIFFERENT = {
    "a value": (ROWS, ROWS + 1e-3),
    "a dtype": (ROWS, ROWS.double()),
    "a shape": (ROWS, ROWS.view(3, 2)),
    "a number": (3, 4),
    "a number's type": (3, 3.0),
    "structure": ((ROWS,), [ROWS]),
    "order of keys": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "none": (ROWS, None),
    "a torch.Size": ((ROWS.shape,), ((2, 3),)),
    "a field": (Box(ROWS), Box(ROWS * 2)),
    "a parameter": (ROWS, torch.nn.Parameter(ROWS)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_difference_is_told(what: str) -> None:
    one, two = DIFFERENT[what]
    assert difference(Answer(one, ()), Answer(two, ()))
    assert difference(Answer(0, one), Answer(0, two))
    assert not difference(Answer(one, two), Answer(one, two))


def test_strides_count_where_stock_has_them() -> None:
    one, two = Answer(ROWS, ()), Answer(ROWS.t().contiguous().t(), ())
    assert not difference(one, two)
    assert difference(one, two, strided={0}) == "output 0: strides (3, 1) instead of (1, 2)"


def test_values_may_be_twice_as_far_as_stock() -> None:
    expected, stock = Answer(ROWS, ()), Answer(ROWS + 1e-3, ())
    assert not difference(Answer(ROWS - 1.9e-3, ()), expected, stock)
    assert difference(Answer(ROWS - 2.1e-3, ()), expected, stock)
    assert difference(Answer(ROWS * float("nan"), ()), expected, stock)


def test_arguments_follow_the_batch_size() -> None:
    mask, weight = torch.tensor([True, False]), torch.ones(3)
    batch, at = resized((ROWS, weight), {"mask": mask})
    assert batch == 2
    (rows, same), kwargs = at(5)
    assert rows.shape == (5, 3) and torch.equal(rows[2:4], ROWS)
    assert torch.equal(same, weight) and kwargs["mask"].tolist() == [True, False, True, False, True]
    assert at(0)[0][0].shape == (0, 3)
    assert resized((torch.ones(()),), {})[0] == -1


def test_shrink_keeps_proportions_and_small_numbers() -> None:
    stages = {"depths": [3, 4, 6], "hidden_sizes": [96, 192, 384]}
    plain = {"hidden_size": 768, "num_hidden_layers": 12, "num_channels": 3}
    config = SimpleNamespace(**plain, **stages, pad_token_id=50257, layer_norm_eps=1e-5)
    shrink(config, 0)
    assert (config.hidden_size, config.num_hidden_layers, config.num_channels) == (32, 2, 3)
    assert config.depths == [1, 1, 1] and config.hidden_sizes == [16, 32, 64]
    assert config.pad_token_id < 99 and config.layer_norm_eps == 1e-5
    assert len(LEVELS) > 1


class Picky(torch.nn.Module):
    """Runs for at least two rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(0) < 2:
            raise ValueError("too few")
        return x * 2


def test_sizes_that_eager_refuses_are_left_out() -> None:
    sample = Sample(Picky, lambda n: ((torch.ones(n, 3),), {}))
    outcome = try_sample(sample, Options(backend="eager"))
    found = {name: each.status for name, each in outcome.verdicts.items()}
    assert found == {"stock": "equal", "piecework": "equal"}
    assert outcome.verdicts["piecework"].zero == ""


def test_unwritten_memory_is_no_answer() -> None:
    make = lambda: lambda x: torch.empty(64) + x.sum()  # noqa: E731
    sample = Sample(make, lambda n: ((torch.ones(n),), {}))
    outcome = try_sample(sample, Options(backend="eager"))
    assert "two runs differ" in outcome.skipped and not outcome.verdicts


def test_row_that_takes_too_long_is_stopped_and_one_without_model_is_told() -> None:
    options = Options(backend="eager")
    tasks = [Task("tutorials", "DLRM", "", options)]
    (stopped,) = run_rows(tasks, limit=0.0)
    assert "stopped after 0 s" in stopped.problem
    (unknown,) = run_rows([Task("tutorials", "nothing", "", options)])
    assert "nothing" in unknown.problem and not unknown.outcome.verdicts


def test_page_tells_what_stock_serves_and_piecework_does_not() -> None:
    refused = Verdict("refused", "CaptureError: a | b. Hint: c", "", "")
    found = {
        "served": Outcome({"stock": Verdict("equal"), "piecework": refused}),
        "neither": Outcome({"stock": Verdict("refused", "Unsupported: x"), "piecework": refused}),
        "counted": Outcome({"piecework": Verdict("equal")}, pieces=6, unique=3, traces=2),
        "hung": Outcome({"piecework": Verdict("failed", "hung")}),
    }
    rows = [RowResult("list", name, "text", outcome) for name, outcome in found.items()]
    # What failed is behind, whatever stock does.
    assert [row.name for row in rows if behind(row)] == ["served", "hung"]
    rows.append(RowResult("list", "missing", "", problem="not built: no package"))
    text = markdown("Title", rows, ["how"])
    assert text.startswith("# Title\n") and "Of 5 models 4 run." in text
    assert "piecework 1 equal, 2 refused, 1 failed." in text
    assert "| served | text | equal | refused |  |  |  | CaptureError: a \\| b. |" in text
    assert "| counted | text |  | equal | 6 | 3 | 2 |  |" in text
    assert "No small model runs of missing." in text


def test_a_run_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An encoder, with what stock refuses and piecework serves; asked again it is not tried again, and the page is the same."""
    chosen = ["--list", "encoders", "--only", "^(distilbert|llava)$", "--together"]
    chosen += ["--out", str(tmp_path), "--page", str(tmp_path / "page.md")]
    assert models.main(chosen) == 0
    assert "1/1 encoders: distilbert, piecework equal" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / FILE).read_text())["rows"]
    assert row["outcome"]["traces"] == 2
    page = (tmp_path / "page.md").read_text()
    assert "| distilbert | text | equal |" in page
    assert models.main(chosen) == 0 and "distilbert" not in capsys.readouterr().out
    assert (tmp_path / "page.md").read_text() == page
