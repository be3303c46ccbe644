"""What `compare_sources` says: each kind of change in its own words, and never "the same" about code that differs."""

import ast
import collections
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import piecework
from piecework.errors import UsageError
from piecework.golden.diff import COSMETIC, SourceDiff, compare_sources
from piecework.golden.show import summary_lines
from piecework.golden.texts import text_of

CASES = Path(__file__).parent.parent.parent / "golden" / "cases"
GOLDENS = sorted(CASES.glob("*/expected.py"))

HEAD = """\
# piecework stitching source, format 1
# model: three layers
#
# __vllm_submods__:
#   [0] submod_0
#   [1] submod_2
#   [2] submod_4
#
# __vllm_consts__:
#   [0] device cpu
#   [1] dtype float16

import torch

attn = torch.ops.ns.attn


def rotate(x, layer):
    half = x.chunk(2)
    y = torch.cat(half, layer)
    del half
    return y

"""

ENTRY = """
def execution_fn(x, w, *, __vllm_submods__):
    q, out = __vllm_submods__[0](x, w)
    attn(q, out, 1)
    del q
    h, q_1, out_1 = __vllm_submods__[1](out, x, w)
    del out
    attn(q_1, out_1, 2)
    del q_1
    r = rotate(out_1, 3)
    del out_1
    y = __vllm_submods__[2](r, h, __vllm_consts__[0])
    del h, r
    return (y, x)
"""

BEFORE = HEAD + ENTRY


def said(diff: SourceDiff, group: str) -> list[str]:
    return [f"{c.mark} {c.message}" for c in diff.changes if c.group == group]


def changed(*replacements: tuple[str, str], text: str = BEFORE) -> SourceDiff:
    """The difference to ``text`` after replacing each left by its right, which must be there."""
    after = text
    for old, new in replacements:
        assert old in after, old
        after = after.replace(old, new)
    return compare_sources(text, after)


def test_equal_texts_have_no_changes() -> None:
    diff = compare_sources(BEFORE, BEFORE)
    assert (diff.changes, diff.headline, diff.unified()) == ((), "identical", "")
    assert diff.same_text and diff.same_meaning


MERGED_ENTRY = """
def execution_fn(x, w, *, __vllm_submods__):
    h, q_1, out_1 = __vllm_submods__[0](x, w)
    attn(q_1, out_1, 2)
    del q_1
    r = rotate(out_1, 3)
    del out_1
    y = __vllm_submods__[1](r, h, __vllm_consts__[0])
    del h, r
    return (y, x)
"""
MERGED = HEAD.replace("#   [1] submod_2\n#   [2] submod_4", "#   [1] submod_2") + MERGED_ENTRY


def test_two_pieces_that_became_one_are_merged_and_not_removed() -> None:
    diff = compare_sources(BEFORE, MERGED)
    assert said(diff, "pieces") == ["⇉ submod_0 and submod_2 became one: submod_0"]
    assert said(diff, "calls") == ["- call outside the pieces attn is gone"]
    assert said(diff, "names") == ["~ 1 piece renumbered: submod_4 → submod_2"]
    assert {c.group for c in diff.changes} == {"pieces", "calls", "names"}


def test_one_piece_that_became_two_is_split() -> None:
    diff = compare_sources(MERGED, BEFORE)
    assert said(diff, "pieces") == ["⇇ submod_0 became 2: submod_0 and submod_2"]
    assert said(diff, "calls") == ["+ call outside the pieces attn"]


def test_three_pieces_become_one() -> None:
    after = HEAD.replace("#   [1] submod_2\n#   [2] submod_4\n", "") + (
        "\ndef execution_fn(x, w, *, __vllm_submods__):\n"
        "    y = __vllm_submods__[0](x, w, __vllm_consts__[0])\n"
        "    return (y, x)\n"
    )
    diff = compare_sources(BEFORE, after)
    assert said(diff, "pieces") == ["⇉ submod_0, submod_2 and submod_4 became one: submod_0"]


def test_a_piece_that_only_went_is_removed_and_one_that_came_is_added() -> None:
    shorter = ENTRY.replace("    h, q_1, out_1 = __vllm_submods__[1](out, x, w)\n", "").replace(
        "    attn(q_1, out_1, 2)\n    del q_1\n", ""
    )
    shorter = shorter.replace("    del out\n", "").replace("rotate(out_1", "rotate(out")
    shorter = shorter.replace("del out_1", "del out").replace("(r, h,", "(r, x,")
    after = HEAD.replace(
        "#   [1] submod_2\n#   [2] submod_4", "#   [1] submod_4"
    ) + shorter.replace("__vllm_submods__[2]", "__vllm_submods__[1]").replace("del h, r", "del r")
    gone = compare_sources(BEFORE, after)
    assert "- piece submod_2 is gone" in said(gone, "pieces")
    assert "- call outside the pieces attn is gone" in said(gone, "calls")
    came = compare_sources(after, BEFORE)
    assert "+ piece submod_2" in said(came, "pieces")
    assert "+ call outside the pieces attn" in said(came, "calls")


@pytest.mark.parametrize(
    ("replacements", "group", "message"),
    [
        ([("attn(q, out, 1)", "attn(q, out, 7)")], "arguments", "~ attn, argument 2: 1 → 7"),
        ([("[1](out, x, w)", "[1](x, out, w)")], "arguments", "↕ submod_2: the same arguments in another order: x, out, w"),
        ([("[1](out, x, w)", "[1](out, x)")], "arguments", "~ submod_2 no longer takes w"),
        ([("attn(q, out, 1)", "attn(q, out, layer=1)")], "arguments", "~ attn, argument 2: 1 → layer=1"),
        ([("__vllm_consts__[0])", "__vllm_consts__[1])")], "arguments", "~ submod_4, argument 2: __vllm_consts__[device cpu] → __vllm_consts__[dtype float16]"),
        ([("device cpu", "device cuda:0")], "constants", "- device cpu is gone"),
        ([("device cpu", "device cuda:0")], "constants", "+ device cuda:0"),
        ([("    del q\n", "")], "liveness", "- q is no longer deleted"),
        ([("    del q_1\n", ""), ("del h, r", "del h, r, q_1")], "liveness", "~ q_1 lives longer: deleted after submod_4 in line 34, was after attn in line 31"),
        ([("    return (y, x)", "    del w\n    return (y, x)")], "liveness", "+ w is now deleted after submod_4 in line 35"),
        ([("torch.cat(half, layer)", "torch.stack(half, layer)")], "calls", "~ torch.stack (gives y) calls torch.stack and not torch.cat"),
        ([("(y, x)", "(x, y)")], "signature", "~ the result: (y, x) → (x, y)"),
        ([("(x, w, *,", "(x, w, bias, *,")], "signature", "+ parameter bias"),
        ([("(x, w, *,", "(w, x, *,")], "signature", "↕ parameters are in another order: w, x, __vllm_submods__"),
        ([("(x, w, *,", "(x, w=None, *,")], "signature", "~ parameter w is now w=None"),
        ([("(x, w, *,", "(x, /, w, *,")], "signature", "~ parameter x is now x (by position only)"),
        ([("rotate(x, layer)", "rotate(x, layer, eps)")], "signature", "+ parameter eps"),
        ([("torch.ops.ns.attn", "torch.ops.ns.flash")], "module", "~ name attn: torch.ops.ns.attn → torch.ops.ns.flash"),
        ([("import torch\n", "import torch\nimport math\n")], "module", "+ import math"),
        ([("format 1", "format 2")], "module", "~ format 1 → 2"),
        ([("y = __vllm_submods__[2]", "(y,) = __vllm_submods__[2]")], "pieces", "~ submod_4 gives (y) and not y"),
        ([("h, q_1, out_1 =", "q_1, h, out_1 =")], "pieces", "~ submod_2 gives its results in another order: q_1, h, out_1"),
        ([("__vllm_submods__[1](out", "__vllm_submods__[0](out"), ("__vllm_submods__[0](x", "__vllm_submods__[1](x")], "pieces", "~ submod_0 runs where submod_2 ran"),
    ],
)  # fmt: skip
def test_each_change_has_its_words(
    replacements: list[tuple[str, str]], group: str, message: str
) -> None:
    diff = changed(*replacements)
    assert message in said(diff, group)
    assert not diff.same_meaning


def test_functions_are_followed_through_a_new_name() -> None:
    diff = changed(("rotate", "turn"))
    assert said(diff, "names") == ["~ rotate is now called turn"]
    assert diff.same_meaning
    diff = changed(("def rotate", "def twice(x):\n    return x + x\n\n\ndef rotate"))
    assert said(diff, "functions") == ["+ twice(x)"]
    assert said(compare_sources(diff.after.text, BEFORE), "functions") == ["- twice is gone"]


def test_a_change_inside_of_a_function_names_the_function() -> None:
    (change,) = (c for c in changed(("chunk(2)", "chunk(3)")).changes)
    assert (change.function, change.group) == ("rotate", "arguments")
    assert change.message == ".chunk (gives half), argument 1: 2 → 3"
    assert (change.before_line, change.after_line) == (19, 19)


def test_renamed_values_are_one_cosmetic_change() -> None:
    diff = changed(("q_1", "linear_7"), ("out_1", "empty"))
    assert diff.same_meaning and not diff.same_text
    assert said(diff, "names") == ["~ 2 values renamed: q_1 → linear_7, out_1 → empty"]
    assert [c.group for c in diff.changes] == ["names"]


def test_comments_and_layout_keep_the_meaning() -> None:
    assert changed(("    attn(q, out, 1)", "    # layers.0\n    attn(q, out, 1)")).headline == (
        "same meaning; comments differ"
    )
    assert changed(("import torch\n", "import torch\n\n")).headline == "same meaning; layout differ"


def test_lines_are_those_of_the_files() -> None:
    change = next(c for c in changed(("attn(q_1, out_1, 2)", "attn(q_1, out_1, 4)")).changes)
    assert BEFORE.splitlines()[change.before_line - 1] == "    attn(q_1, out_1, 2)"


@pytest.mark.parametrize("text", ["", "x = (", "print('no function')", "\0"])
def test_what_is_no_source_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"old\.py") as caught:
        compare_sources(text, BEFORE, before_name="old.py")
    assert "Hint" in str(caught.value)


# --- no change of code goes unsaid ---------------------------------------------------------------


def _mutants(text: str) -> Iterator[ast.Module]:
    """Systematic changes of meaning, each in one place of one function."""
    tree = ast.parse(text)
    functions = [i for i, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef)]
    for f in functions:
        body = tree.body[f].body  # type: ignore[attr-defined]
        for number, stmt in enumerate(body):
            if not isinstance(stmt, ast.Return):
                mutant = copy.deepcopy(tree)
                del mutant.body[f].body[number]
                yield mutant
            if number + 1 < len(body) and not isinstance(body[number + 1], ast.Return):
                mutant = copy.deepcopy(tree)
                statements = mutant.body[f].body
                statements[number : number + 2] = reversed(statements[number : number + 2])
                yield mutant
            if isinstance(stmt, (ast.Assign, ast.Expr)):
                mutant = copy.deepcopy(tree)
                mutant.body[f].body.insert(number, copy.deepcopy(stmt))
                yield mutant
            for position, node in enumerate(ast.walk(stmt)):
                yield from _changed_nodes(tree, f, number, position, node)


def _changed_nodes(
    tree: ast.Module, f: int, number: int, position: int, node: ast.AST
) -> Iterator[ast.Module]:
    def mutant() -> tuple[ast.Module, ast.AST]:
        new = copy.deepcopy(tree)
        return new, list(ast.walk(new.body[f].body[number]))[position]

    if isinstance(node, ast.Constant) and type(node.value) is int:
        new, at = mutant()
        at.value += 1
        yield new
    if isinstance(node, ast.Call) and len(node.args) > 1:
        new, at = mutant()
        at.args.reverse()
        yield new
        new, at = mutant()
        del at.args[-1]
        yield new
    if isinstance(node, ast.Attribute):
        new, at = mutant()
        at.attr += "_"
        yield new


def _same_dels(text: str) -> str:
    """``text`` with runs of deletions sorted: their order among themselves has no meaning that anybody relies on."""
    tree = ast.parse(text)
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        body: list[ast.stmt] = []
        for stmt in function.body:
            previous = body[-1] if body else None
            if isinstance(stmt, ast.Delete) and isinstance(previous, ast.Delete):
                previous.targets = sorted([*previous.targets, *stmt.targets], key=ast.unparse)
            else:
                body.append(stmt)
        function.body = body
    return ast.unparse(tree)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.parent.name)
def test_no_mutant_is_called_the_same(golden: Path) -> None:
    text = golden.read_text()
    count = 0
    for mutant in _mutants(text):
        after = ast.unparse(ast.fix_missing_locations(mutant))
        if _same_dels(after) == _same_dels(text):
            continue
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        diff = compare_sources(text, f"{head}\n{after}\n")
        assert not diff.same_meaning, f"called {diff.headline!r}:\n{diff.unified()}"
        count += 1
    assert count >= 5


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.parent.name)
def test_reformatting_and_renaming_is_called_the_same(golden: Path) -> None:
    text = golden.read_text()
    tree = ast.parse(text)
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        local = {
            n.id
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in local:
                node.id = f"renamed_{node.id}"
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    diff = compare_sources(text, f"{head}\n{ast.unparse(tree)}\n")
    assert diff.same_meaning, [c for c in diff.changes if c.group not in COSMETIC]


def test_long_sources_are_compared_quickly_enough_to_align_them_all() -> None:
    """A thousand layers, one of them changed: everything else is paired."""

    def source(literal: int) -> str:
        lines = [
            f"    v{i + 1} = __vllm_submods__[{i}](v{i}, {literal if i == 500 else 0})"
            for i in range(1000)
        ]
        rows = "\n".join(f"#   [{i}] submod_{i}" for i in range(1000))
        return (
            f"# __vllm_submods__:\n{rows}\n\ndef execution_fn(v0, *, __vllm_submods__):\n"
            + "\n".join(lines)
            + "\n    return v1000\n"
        )

    diff = compare_sources(source(0), source(5))
    assert said(diff, "arguments") == ["~ submod_500, argument 1: 0 → 5"]
    assert len(diff.changes) == 1 and len(diff.pairs) == 1001


# --- what pieces compute ----------------------------------------------------------------------------


def with_digests(*digests: str) -> str:
    text = BEFORE
    for row, digest in zip(("[0] submod_0", "[1] submod_2", "[2] submod_4"), digests, strict=True):
        text = text.replace(row, f"{row}  {digest}".rstrip())
    return text


def test_a_piece_that_computes_something_else_is_a_change_of_meaning() -> None:
    diff = compare_sources(with_digests("aa", "bb", "cc"), with_digests("aa", "dd", "cc"))
    assert said(diff, "pieces") == ["~ submod_2 computes something else"]
    assert not diff.same_meaning and diff.headline == "pieces: 1"


def test_pieces_with_the_same_change_are_one_line() -> None:
    diff = compare_sources(with_digests("aa", "bb", "bb"), with_digests("aa", "dd", "dd"))
    wanted = "~ submod_2 … submod_4 (2 pieces) compute something else"
    assert said(diff, "pieces") == [wanted]


def test_a_digest_that_only_one_side_has_says_nothing_about_meaning() -> None:
    diff = compare_sources(BEFORE, with_digests("aa", "", "cc"))
    assert diff.same_meaning and not diff.same_text


# --- revisions of a real model ------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, act: str = "silu", scale: float = 0.5, bias: bool = False) -> None:
        super().__init__()
        self.act, self.scale = getattr(torch.nn.functional, act), scale
        self.up = torch.nn.Linear(8, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + mix(self.act(self.up(x)), self.scale)


@piecework.splitting_op("golden_diff::mix", mutates_args=())
def mix(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x * scale


mix.register_fake(lambda x, scale: torch.empty_like(x))


def revision(*layers: Layer) -> str:
    """The source of a model of these layers."""
    model = torch.nn.Sequential(collections.OrderedDict(layers=torch.nn.Sequential(*layers)))
    stitched = piecework.compile(model.eval(), (torch.zeros(4, 8),), config={"backend": "eager"})
    return text_of(stitched, "revision").code


@pytest.mark.parametrize(
    ("layers", "lines"),
    [
        ([Layer(), Layer(), Layer(), Layer()], []),
        ([Layer(), Layer(), Layer()], ["piece", "mix is gone", "bound weight"]),
        ([Layer(), Layer("gelu"), Layer(), Layer()], ["submod_2 computes something else"]),
        ([Layer(scale=0.25), Layer(), Layer(), Layer()], ["mix, argument 1: 0.5 → 0.25"]),
        ([Layer(bias=True), Layer(), Layer(), Layer()], ["submod_0", "now takes", "f32[8] = layers.0.up.bias"]),
        ([*(Layer() for _ in range(5))], ["+ piece", "+ call outside the pieces mix", "+ bound weight"]),
    ],
    ids=["same", "layer removed", "activation", "scale", "bias", "layer added"],
)  # fmt: skip
def test_revisions_of_a_model_are_told_in_meaning(layers: list[Layer], lines: list[str]) -> None:
    diff = compare_sources(revision(*(Layer() for _ in range(4))), revision(*layers))
    said = "\n".join(line.plain for line in summary_lines(diff))
    assert diff.same_text is (lines == [])
    assert not lines or not diff.same_meaning
    for line in lines:
        assert line in said, said


def test_what_happens_in_each_of_many_layers_is_said_in_few_lines() -> None:
    before = revision(*(Layer() for _ in range(12)))
    after = revision(*(Layer("gelu", 0.25, bias=True) for _ in range(12)))
    diff = compare_sources(before, after)
    lines = [line.plain for line in summary_lines(diff)]
    assert len(diff.changes) > 24 > 2 * len(lines), "\n".join(lines)
    assert any("11 more" in line for line in lines)


def test_a_number_that_is_a_value_is_no_number_of_a_name() -> None:
    """Changes of several values are told apart, however alike they are."""
    after = revision(*(Layer(scale=0.25 if at % 2 else 0.75) for at in range(8)))
    diff = compare_sources(revision(*(Layer() for _ in range(8))), after)
    lines = [line.plain for line in summary_lines(diff)]
    assert sum("0.25" in line for line in lines) == 1 and sum("0.75" in line for line in lines) == 1
