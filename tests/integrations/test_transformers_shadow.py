"""Shadow mode in a running generate(): a wrong piece is named with its layers, tokens and caches are those of the stitched model."""

from __future__ import annotations

import sys

import pytest
import torch
from small_llms import build

from piecework.integrations.transformers import stitch, stitched_module
from piecework.integrations.transformers.request.dry import dry_request
from piecework.runtime.compilers import EagerAdaptor
from piecework.runtime.compilers.interface import CompiledPiece

transformers = pytest.importorskip("transformers")
sys.modules.setdefault("shadow_llama_compilers", sys.modules[__name__])


class WrongBetweenLayers(EagerAdaptor):
    """The second piece that is compiled, which stands between two layers' attention, scales its queries."""

    name = "wrong_between_layers"

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, graph, example_inputs, config, compile_range):  # type: ignore[no-untyped-def]
        made = super().compile(graph, example_inputs, config, compile_range)
        self.compiled += 1
        if self.compiled != 2:
            return made
        queries = next(
            number
            for number, node in enumerate(graph.graph.output_node().args[0])
            if "q_embed" in node.name
        )

        def wrong(*args: object) -> object:
            outputs = list(made.runnable(*args))
            outputs[queries] = outputs[queries] * 1.01
            return outputs

        return CompiledPiece(wrong)


def generated(model: torch.nn.Module, **how: object) -> torch.Tensor:
    ids = torch.randint(1, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 6, "do_sample": False, **how}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


@pytest.fixture(scope="module")
def right() -> torch.nn.Module:
    return stitch(build(num_hidden_layers=3), config={"backend": "eager"})


@pytest.fixture(scope="module")
def wrong() -> torch.nn.Module:
    return stitch(
        build(num_hidden_layers=3), config={"backend": "shadow_llama_compilers:WrongBetweenLayers"}
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_right_model_has_no_difference_and_the_same_tokens(
    cache: str, right: torch.nn.Module
) -> None:
    with stitched_module(right).shadow() as found:
        tokens = generated(right, cache_implementation=cache)
    assert torch.equal(tokens, generated(build(num_hidden_layers=3)))
    assert (found.calls, found.compared) == (6, 24) and not found.left_out
    assert found.first is None, str(found)


@pytest.mark.parametrize("captured", [False, True])
def test_the_wrong_piece_is_named_while_generate_runs(
    captured: bool, wrong: torch.nn.Module
) -> None:
    module = stitched_module(wrong)
    if captured:
        module.capture([2, 12], context_for=dry_request, pad=True, progress=False, estimate=False)
    alone = generated(wrong)
    with module.shadow() as found:
        tokens = generated(wrong)
    assert torch.equal(tokens, alone)  # its own tokens, not those of a right model
    first = found.first
    assert first is not None and first.call == 1
    pieces = module.pieces
    assert (first.piece, first.modules) == (pieces[1].name, pieces[1].modules)
    assert "layers.0" in first.modules and "layers.1" in first.modules
    assert "%q_embed" in first.output and "modeling_llama.py" in first.output
    # The pieces between other layers are the same program; the first and the last one are right.
    assert [each.piece for each in found.differences] == [pieces[1].name, pieces[2].name]
    if captured:  # none of the calls that were compared is counted as a replay, and later ones are
        assert sum(row.calls for row in module.call_report() if row.graph) == 6
        generated(wrong)
        assert sum(row.calls for row in module.call_report() if row.graph) == 12
