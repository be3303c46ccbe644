"""Every statement of a diff of two real revisions is true: in, a 6-layer and a 32-layer model and a change to it; out, each statement held against both graphs."""

import re
from dataclasses import replace
from functools import cache

import pytest
from revision_truth import Judge
from revisions import REVISIONS, Model, compiled, layouts, plain, revision

import piecework
from piecework.golden.compare.diff import SourceDiff, compare_sources
from piecework.golden.show.diff_text import summary_lines
from piecework.golden.text.texts import text_of

# The others, and all of the larger model but three, run at night.
QUICK = {
    6: [
        "act", "residual", "op added everywhere", "layer appended", "module renamed", "splitting op added everywhere",
        "scale changed", "arguments swapped", "bias", "dtype", "another result", "last norm gone", "not split",
    ],
    32: ["op added", "layer inserted", "splitting op added"],
}  # fmt: skip


@cache
def _before(count: int) -> piecework.StitchedModule:
    return compiled(Model(layouts(count)))


def _diff(before: piecework.StitchedModule, after: piecework.StitchedModule) -> SourceDiff:
    return compare_sources(text_of(before, "before").code, text_of(after, "after").code)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        pytest.param(kind, count, marks=[] if kind in QUICK[count] else [pytest.mark.nightly])
        for count in QUICK
        for kind in REVISIONS
    ],
)
@pytest.mark.filterwarnings("ignore:splitting ops that are named")
def test_every_statement_is_true_and_none_is_missing(kind: str, count: int) -> None:
    after = revision(kind, count)
    there = _diff(_before(count), after)
    assert Judge(_before(count), after, there).judge() >= 1
    back = _diff(after, _before(count))
    assert Judge(after, _before(count), back).judge() >= 1


@cache
def _plain_before() -> piecework.StitchedModule:
    return plain("", 6)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "kind",
    [
        "act",
        "op added",
        "splitting op added",
        "arguments swapped",
        "layer inserted",
        "layer removed",
        "first layers changed",
    ],
)
def test_statements_are_true_where_nothing_says_which_layer_a_piece_is_of(kind: str) -> None:
    before, after = _plain_before(), plain(kind, 6)
    assert Judge(before, after, _diff(before, after)).judge() >= 1
    assert Judge(after, before, _diff(after, before)).judge() >= 1


def test_what_is_false_or_unsaid_is_noticed() -> None:
    before, after = _plain_before(), plain("splitting op added", 6)
    diff = _diff(before, after)
    for number, change in enumerate(diff.changes):
        if change.group in ("provenance", "constants", "module", "liveness"):
            continue
        less = diff.changes[:number] + diff.changes[number + 1 :]
        others = [replace(diff, changes=less)] if change.group not in ("names", "signature") else []
        if change.subjects:
            swapped = tuple((right or "none", left or "none") for left, right in change.subjects)
            wrong = replace(change, subjects=swapped)
            others.append(
                replace(diff, changes=(*less[:number], wrong, *less[number:])),
            )
        for other in others:
            try:
                Judge(before, after, other).judge()
            except (AssertionError, KeyError, StopIteration):
                continue
            pytest.fail(f"not noticed: {change}, now {set(other.changes) - set(diff.changes)}")


@pytest.mark.parametrize("kind", ["bias", "arguments swapped", "splitting op added", "op added"])
def test_what_happens_in_each_of_many_layers_is_said_in_few_lines(kind: str) -> None:
    """The list has every change; a summary says those of one kind once, with their number."""
    everywhere = {
        "bias": {"bias": True},
        "arguments swapped": {"swapped": True},
        "splitting op added": {"reduced": True},
        "op added": {"scaled": True},
    }[kind]
    after = compiled(Model([replace(each, **everywhere) for each in layouts(32)]))
    found = _diff(_before(32), after)
    lines = [line.plain for line in summary_lines(found)]
    assert len(lines) < 25, "\n".join(lines)
    said = [int(number) for line in lines for number in re.findall(r"and (\d+) more", line)]
    assert sum(said) + len(lines) > len(found.changes)


def test_a_number_that_is_a_value_is_no_number_of_a_name() -> None:
    """Changes of several values are told apart, however alike they are."""
    scales = [replace(each, scale=0.25 if at % 2 else 0.75) for at, each in enumerate(layouts(6))]
    lines = [line.plain for line in summary_lines(_diff(_before(6), compiled(Model(scales))))]
    assert sum("0.25" in line for line in lines) == 1 and sum("0.75" in line for line in lines) == 1
