"""The page of peers' behaviour. In: the table and this folder's tests. Out: neither has what the other lacks, and the page is current."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import peers

ROOT = peers.HERE.parents[1]


def test_every_test_has_a_peer_and_every_peer_a_test() -> None:
    names = [name for _, _, name in peers.own_tests()]
    assert len(names) == len(set(names)) >= 80
    assert set(names) == set(peers.BEHAVIOURS)
    assert all(peers.BEHAVIOURS.values())


def test_what_is_tested_elsewhere_is_there() -> None:
    for _, _, ours in peers.ELSEWHERE:
        path, _, name = ours.partition("::")
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        assert not name or name in {
            node.name for node in tree.body if isinstance(node, ast.FunctionDef)
        }, ours


def test_the_page_is_current() -> None:
    assert (
        peers.PAGE.read_text("utf-8") == peers.page()
    ), "run python tests/conformance/peers.py to write docs/conformance.md"
