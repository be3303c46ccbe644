"""Replay source: it serves as the uncaptured run, and a text or a capture that differs is refused."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import EAGER
from torch import nn

import piecework
from piecework.codegen.plan.render import format_source
from piecework.codegen.replay.emit import generate_replay
from piecework.codegen.replay.plan import Frozen, InPlace, ReplayFacts
from piecework.codegen.replay.proof import prove_replay
from piecework.errors import EmitError
from piecework.golden.cases import Case, import_graph
from piecework.runtime.batch.forward_context import set_forward_context
from piecework.runtime.graphs.serve import replay as captured_module

CASES = Path(__file__).parent.parent.parent / "golden" / "cases"


stack = import_graph(Case("captured_replay", CASES / "captured_replay"))


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = stack.Stack().requires_grad_(False)
    return model, piecework.compile(model, (torch.randn(4, 8),), config=EAGER)


def capture(stitched, sizes=(4,), **options):
    return stitched.capture(sizes, progress=False, estimate=False, poison=True, **options)


def facts_of(stitched, size: int) -> ReplayFacts:
    """The facts of a capture, as `CapturedModel` hands them to the emitter."""
    kept: list[ReplayFacts] = []
    real = captured_module.generate_replay

    def keep(source, split_gm, facts):
        kept.append(facts)
        return real(source, split_gm, facts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_module, "generate_replay", keep)
        capture(stitched, [size])
    return kept[0]


# --- the text --------------------------------------------------------------------------------------


def test_every_size_from_one_equals_the_uncaptured_run(compiled) -> None:
    model, stitched = compiled
    capture(stitched, [1, 2, 4, 8])
    for n in range(1, 11):
        x = torch.randn(n, 8)
        with set_forward_context(skip_cuda_graphs=True):
            uncaptured = stitched(x)
        torch.testing.assert_close(stitched(x), uncaptured, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stitched(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["copy", "eager"])
def test_the_text_is_in_blacks_format_and_defines_what_it_reads(compiled, policy: str) -> None:
    _, stitched = compiled
    capture(stitched, [8], address_policy=policy)
    source = stitched.static_graphs.source_for(8)
    assert format_source(source.code) == source.code
    tree = ast.parse(source.code)
    stored = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.ctx.__class__ is ast.Store
    }
    defined = stored | set(source.held) | {"torch", "__vllm_consts__"}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    defined |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert read <= defined


def test_the_address_decision_is_visible(compiled) -> None:
    _, stitched = compiled
    capture(stitched, [4])
    staged = stitched.static_graphs.source_for(4).code
    assert (
        "# fresh tensor: address policy 'copy' stages it for submod_2\n    submod_2_in_1.copy_("
        in staged
    )
    capture(stitched, [4], address_policy="eager")
    eager = stitched.static_graphs.source_for(4).code
    assert "runs uncaptured: argument 1 (fresh tensor) enters it" in eager
    assert "submod_2(" in eager and ".copy_(" not in eager and "replay_0()" in eager


# --- the proof -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("    replay_1()\n", "", "stages or brings back an operand|differs from the graph"),
        ("    replay_0()\n", "    replay_0()\n    replay_0()\n", "differs from the graph"),
        ("    submod_2_in_1.copy_(fresh_default)\n", "", "operand 1 is not staged before it"),
        ("_in_1.copy_(fresh_default)", "_in_1.copy_(left)", "is not staged before it"),
        ("submod_2_in_1.copy_(fresh_default)", "submod_4_in_1.copy_(submod_1_1)", "not staged|fails"),
        ('submod_1(left, right, out, "', 'submod_1(right, left, out, "', "another argument 0"),
        ('"layers.0")', '"layers.1")', "another argument"),
        ("    stage(inputs)\n", "", "not staged first"),
        ("s0 = 4\n", "s0 = 8\n", "s0 is 4 in this capture"),
        ("s0 = 4\n", "s0 = True\n", "s0 is 4 in this capture"),
        ("s0 = 4\n", "s0 = 4\nstage = torch.sin\n", "differs from the graph"),
        ("s0 = 4\n", "s0 = 4\n__builtins__ = torch\n", "no text may bind"),
        ("replay_0()", "replay_0(left)", "takes no arguments"),
        ("return (x_1,)", "return (x_2,)", "returns something else"),
        ("    replay_1()\n", "    replay_2()\n", "a call of something else"),
        ("    replay_1()\n", "    replay_0 = replay_1\n    replay_1()\n", "fails where it runs"),
        ("    replay_2()\n", "    replay_2()\n    submod_4_in_1.copy_(submod_3)\n", "brings|fails"),
        ("def replay(inputs):", "def replay(inputs) -> print():", "annotations are"),
        ("def replay(inputs):", "def replay(inputs, *more):", "fails where it runs"),
        ("stage(inputs)", "stage(inputs, more=1)", "something else than the inputs"),
        ("_default)\n", "_default, more=print())\n", "a call of something else"),
    ],
)  # fmt: skip
def test_a_text_that_differs_is_refused(compiled, before: str, after: str, why: str) -> None:
    _, stitched = compiled
    facts = facts_of(stitched, 4)
    replay = stitched.static_graphs.source_for(4)
    prove_replay(replay, stitched.source, stitched.split_gm, facts)
    assert before in replay.code
    wrong = replace(replay, code=replay.code.replace(before, after, 1))
    with pytest.raises(EmitError, match=why):
        prove_replay(wrong, stitched.source, stitched.split_gm, facts)


# --- what is captured ------------------------------------------------------------------------------


def with_read(facts: ReplayFacts, piece: int, leaf: int, read) -> ReplayFacts:
    pieces = list(facts.pieces)
    reads = list(pieces[piece].reads)
    reads[leaf] = read
    pieces[piece] = replace(pieces[piece], reads=tuple(reads))
    return replace(facts, pieces=tuple(pieces))


def test_a_capture_that_reads_other_memory_is_refused(compiled) -> None:
    _, stitched = compiled
    facts = facts_of(stitched, 4)
    code = stitched.static_graphs.source_for(4).code
    assert generate_replay(stitched.source, stitched.split_gm, facts).code == code
    for piece, each in enumerate(facts.pieces):
        for leaf, read in enumerate(each.reads):
            if isinstance(read, InPlace):
                wrong, why = InPlace("elsewhere", read.owner), "reads other memory"
            elif isinstance(read, Frozen):
                wrong, why = Frozen(5), r"operand .* is 4 .*, and was 5"
            else:
                continue
            with pytest.raises(EmitError, match=why):
                generate_replay(
                    stitched.source, stitched.split_gm, with_read(facts, piece, leaf, wrong)
                )


# --- memory that operands share --------------------------------------------------------------------


@piecework.splitting_op("replay_source::halves", rows="independent")
def halves(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, 2 * x], -1)


halves.register_fake(lambda x: x.new_empty(x.shape[0], 2 * x.shape[1]))


def test_a_wide_fresh_tensor_is_staged_once_for_several_readers() -> None:
    leave = nn.Linear(16, 8)

    def model(x):
        wide = halves(x @ torch.ones(8, 8))
        return leave(wide) + wide[:, 8:]

    stitched = piecework.compile(model, (torch.randn(4, 8),), config=EAGER)
    capture(stitched, [4])
    x = torch.randn(3, 8)
    torch.testing.assert_close(stitched(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert stitched.static_graphs.source_for(4).code.count(".copy_(") == 1
