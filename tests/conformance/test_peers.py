"""Behaviours that vLLM's and SGLang's own tests hold, and where ours hold them. A behaviour that no file of ours holds is not for this table."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HELD: dict[str, tuple[str, ...]] = {
    # cutting and writing out
    "indexing stays with what returned the sequence; whole shapes never cross a cut": ("codegen/test_split.py",),
    "neighbouring operators share a submodule, operators and pieces alternate": ("codegen/test_split.py",),
    "constants are shared, keep their order, and are never written as a repr": ("codegen/test_consts.py", "codegen/test_codegen_nodes.py"),
    "a compiled submodule is called by its index, values die after their last use": ("codegen/test_codegen_bind.py", "codegen/test_codegen_nodes.py"),
    # sizes, ranges and configuration
    "rules for custom ops, attention fusion and splitting ops contradict or settle": ("config/test_config_resolve.py",),
    "default capture sizes, their ceiling, drafts, sequence parallelism, token budget": ("batch/test_graph_sizes.py",),
    "a single size wins over the range around it, each range is compiled once": ("batch/test_ranges.py", "pieces/test_piece_ranges.py"),
    # dispatch
    "each mode has its keys, adapters multiply them, largest first": ("batch/test_dispatch.py",),
    "decode batches are padded up, mixed ones never run in a decode graph": ("batch/test_dispatch.py",),
    "a graph that was not captured gives way to the next": ("batch/test_dispatch.py",),
    "adapters of a batch choose its graph": ("batch/test_dispatch.py", "graphs/test_capture_modes.py"),
    # wrapper and forward context
    "the wrapper captures once, replays, steps aside, refuses or copies moved inputs": ("graphs/test_graph_wrapper.py", "graphs/test_graph_address.py"),
    "a failed capture can be tried again, clearing forgets every graph": ("graphs/test_graph_wrapper.py",),
    "a context is seen inside, gone after an exception, and not in another thread": ("batch/test_forward_context.py",),
    # captured models
    "graphs and live operators alternate, in order at each replay": ("graphs/test_capture_api.py", "graphs/test_capture_calls.py"),
    "a batch between two sizes is padded and cut, one beyond runs uncaptured": ("graphs/test_padding.py", "graphs/test_capture_api.py"),
    "new tensors of live operators reach the next graph": ("graphs/test_graph_address.py",),
    # compiled classes
    "classes compile under conditions, apart from each other, subclasses choose": ("compile/test_decorators.py",),
    "a branch on a size is never taken for the other side": ("compile/test_traces.py",),
    "each kind of dynamic shape serves every batch": ("compile/test_shape_types.py",),
    "counters count what was traced, cut and compiled": ("house/test_counters.py",),
    # artifacts
    "bytes are kept under their hash and loaded once": ("store/test_standalone_artifacts.py",),
    "a saved model loads without a trace or a compiler": ("artifact/test_artifact.py",),
}  # fmt: skip


@pytest.mark.parametrize("behaviour", HELD)
def test_our_own_tests_hold_it(behaviour: str) -> None:
    for name in HELD[behaviour]:
        assert "\ndef test_" in (TESTS / name).read_text(), name
