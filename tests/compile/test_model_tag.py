"""Model tags and the completion callback: they belong to a block, a thread and a task, and reach the compilation."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.errors import CaptureError, ConfigError
from piecework.runtime.config.compilation import CompilationConfig
from piecework.runtime.model_tag import (
    ModelTag,
    compilation_complete,
    current_model_tag,
    model_tag_is_set,
    set_model_tag,
    set_on_compilation_complete,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_blocks_nest_and_end() -> None:
    assert current_model_tag() == ModelTag("backbone", False) and not model_tag_is_set()
    with set_model_tag("target"):
        with set_model_tag("vision", is_encoder=True) as tag:
            assert current_model_tag() is tag and tag.is_encoder
        assert current_model_tag() == ModelTag("target")
        with pytest.raises(ZeroDivisionError), set_model_tag("other"):
            _ = 1 / 0
        assert current_model_tag().tag == "target"
    assert not model_tag_is_set()


def test_another_thread_sees_no_tag() -> None:
    seen: list[str] = []
    with set_model_tag("drafter"):
        thread = threading.Thread(target=lambda: seen.append(current_model_tag().tag))
        thread.start()
        thread.join()
    assert seen == ["backbone"]


@pytest.mark.parametrize("tag", ["", "../up", "a/b", "a b", ".hidden", "-x", "x" * 101, 3])
def test_a_tag_that_is_no_folder_name_is_refused(tag: object) -> None:
    with pytest.raises(ConfigError, match="can't be a model tag"), set_model_tag(tag):  # type: ignore[arg-type]
        pass


def test_the_tag_labels_what_is_compiled() -> None:
    with set_model_tag("drafter"):
        drafter = piecework.compile(Model(), (torch.randn(4, 8),), config=EAGER)
    target = piecework.compile(Model(), (torch.randn(4, 8),), config=EAGER)
    assert "# model: drafter.Model\n" in drafter.source.code
    assert "# model: Model\n" in target.source.code
    assert (drafter.report().model, target.report().model) == ("drafter.Model", "Model")


@pytest.mark.inductor
def test_two_models_of_one_process_have_cache_folders_of_their_own(tmp_path: Path) -> None:
    config = CompilationConfig(cache_dir=str(tmp_path))
    for tag in ("target", "drafter"):
        with set_model_tag(tag):
            stitched = piecework.compile(Model(), config=config)
        stitched(
            torch.randn(4, 8)
        )  # compiled after the block; the tag is the one that it was made under
    assert {path.parent.name for path in tmp_path.rglob("stitched.py")} == {"target", "drafter"}


def test_an_encoders_last_range_is_open() -> None:
    config = CompilationConfig(backend="eager", compile_ranges_endpoints=[4])
    with set_model_tag("vision", is_encoder=True):
        encoder = piecework.compile(Model(), (torch.randn(4, 8),), config=config)
    assert encoder.report().ranges[-1].batches.startswith("[5")
    encoder(torch.randn(100_000, 8))


def test_the_callback_hears_of_each_compilation_once() -> None:
    heard: list[str] = []
    with set_on_compilation_complete(lambda: heard.append("outer")):
        stitched = piecework.compile(Model(), config=EAGER)
        assert heard == []
        stitched(torch.randn(4, 8))
        stitched(torch.randn(5, 8))
        assert heard == ["outer"]
        with set_on_compilation_complete(lambda: heard.append("inner")):
            piecework.compile(Model(), (torch.randn(4, 8),), config=EAGER)
        assert heard == ["outer", "inner"]
    piecework.compile(Model(), (torch.randn(4, 8),), config=EAGER)
    compilation_complete()
    assert heard == ["outer", "inner"]


def test_the_callback_does_not_hear_of_a_failure() -> None:
    heard: list[str] = []
    with set_on_compilation_complete(lambda: heard.append("done")), pytest.raises(CaptureError):
        piecework.compile(lambda x: x.sum().item() > 0 or x, (torch.randn(4),), config=EAGER)
    assert heard == []
