"""Compilers and passes that break their interface: a typed error that names them, or a piece that is used and not kept."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import piecework
from piecework.errors import ConfigError, PieceCompileError
from piecework.runtime.compilers import CompiledPiece
from piecework.runtime.config.compilation import CompilationConfig

sys.modules.setdefault("compiler_manners", sys.modules[__name__])


class Polite:
    """Runs pieces as they are, and keeps nothing of them."""

    name = "polite"

    def compute_hash(self, config: CompilationConfig) -> str:
        return type(self).__name__

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        return CompiledPiece(graph.forward)


class Keeping(Polite):
    def to_bytes(self, piece: CompiledPiece) -> object:
        return b"piece"

    def from_bytes(self, data: bytes, graph: torch.fx.GraphModule) -> object:
        return CompiledPiece(graph.forward)


class BareFunction(Polite):
    def compile(self, graph, *rest):  # type: ignore[no-untyped-def]
        return graph.forward


class Nothing(Polite):
    def compile(self, graph, *rest):  # type: ignore[no-untyped-def]
        return None


class OnlyToBytes(Polite):
    to_bytes = Keeping.to_bytes


class WithArgument(Polite):
    def __init__(self, needed: object) -> None: ...


class NotPicklable(Keeping):
    def to_bytes(self, piece: CompiledPiece) -> object:
        raise TypeError("cannot pickle this")


class ForgetfulLoader(Keeping):
    def from_bytes(self, data: bytes, graph: torch.fx.GraphModule) -> object:
        return None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def compile_with(compiler: type[Polite]) -> None:
    """Compile a model with ``compiler`` and check what it gives."""
    model, x = Model(), torch.randn(4, 8)
    config = CompilationConfig(backend=f"compiler_manners:{compiler.__name__}")
    stitched = piecework.compile(model, (x,), config=config)
    torch.testing.assert_close(stitched(x), model(x))


def own_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    own = (each for each in caplog.records if each.name.startswith("piecework"))
    return [each.getMessage() for each in own if each.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        (BareFunction, "compile returned a method, not a CompiledPiece"),
        (Nothing, "compile returned None, not a CompiledPiece"),
        (OnlyToBytes, "has no from_bytes"),
        (WithArgument, "can't be made without arguments: TypeError"),
    ],
)
def test_a_broken_interface_is_an_error_that_names_the_compiler(
    compiler: type[Polite], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_with(compiler)
    assert message in caught.value.message
    assert "polite" in caught.value.message or compiler.__name__ in caught.value.message
    assert caught.value.where == "backend"


def test_a_piece_without_bytes_is_used_and_not_kept(
    own_compile_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with piecework.counters.expect(num_backend_compilations=1, num_compiled_artifacts_saved=0):
            compile_with(NotPicklable)
    warned = own_warnings(caplog)
    assert len(warned) == 2 and all("used and not kept" in text for text in warned)
    assert not list(own_compile_cache.rglob("*.bin"))


def test_kept_bytes_that_load_to_nothing_are_compiled_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with piecework.counters.expect(num_backend_compilations=1, num_compiled_artifacts_saved=1):
        compile_with(ForgetfulLoader)
    with piecework.counters.expect(num_backend_compilations=1, num_compiled_artifacts_loaded=0):
        compile_with(ForgetfulLoader)
    (warning,) = own_warnings(caplog)
    assert "from_bytes returned None" in warning


def without_results(graph: torch.fx.Graph) -> None:
    graph.output_node().args = ((),)


def failing(graph: torch.fx.Graph) -> None:
    raise KeyError("p")


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("user_pass", "reason"),
    [(without_results, "without_results left a graph with 0 results"), (failing, "failing failed")],
)
def test_a_pass_that_fails_is_named_with_its_piece(
    user_pass: Callable[[torch.fx.Graph], None], reason: str, tmp_path: Path
) -> None:
    """Inductor wraps what a pass raises; the message is the pass's own all the same."""
    config = CompilationConfig(
        inductor_passes={"post_grad_custom_post_pass": user_pass}, debug_dump_path=tmp_path
    )
    with pytest.raises(PieceCompileError) as caught:
        piecework.compile(Model(), (torch.randn(4, 8),), config=config)
    assert caught.value.message.startswith("inductor failed on submod_0: pass ")
    assert reason in caught.value.message and "InductorError" not in caught.value.message
