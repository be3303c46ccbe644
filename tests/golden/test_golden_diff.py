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
from piecework.golden.review import summary_lines
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


def test_a_piece_and_a_call_that_went_or_came_are_said_so() -> None:
    """What two pieces computed is computed by one."""
    after = BEFORE
    for old, new in (
        ("#   [1] submod_2\n#   [2] submod_4", "#   [1] submod_2"),
        ("    q, out = __vllm_submods__[0](x, w)\n    attn(q, out, 1)\n    del q\n", ""),
        ("__vllm_submods__[1](out, x, w)\n    del out\n", "__vllm_submods__[0](x, w)\n"),
        ("__vllm_submods__[2]", "__vllm_submods__[1]"),
    ):
        assert old in after
        after = after.replace(old, new)
    gone, came = compare_sources(BEFORE, after), compare_sources(after, BEFORE)
    assert said(gone, "pieces") == [
        "- piece submod_2 is gone",
        "~ submod_0 gives (h, q_1, out_1) and not (q, out)",
    ]
    assert said(gone, "calls") == ["- call attn is gone"]
    assert said(gone, "names") == ["~ of pieces: submod_4 → submod_2"]
    assert said(came, "pieces")[0] == "+ piece submod_2" and said(came, "calls") == ["+ call attn"]


@pytest.mark.parametrize(
    ("replacements", "group", "message"),
    [
        ([("attn(q, out, 1)", "attn(q, out, 7)")], "arguments", "~ attn, argument 2: 1 → 7"),
        ([("[1](out, x, w)", "[1](x, out, w)")], "arguments", "~ submod_2, argument 0: out → x; argument 1: x → out"),
        ([("[1](out, x, w)", "[1](out, x)")], "arguments", "~ submod_2 no longer takes w"),
        ([("attn(q, out, 1)", "attn(q, out, layer=1)")], "arguments", "~ attn, argument 2: 1 → layer=1"),
        ([("__vllm_consts__[0])", "__vllm_consts__[1])")], "arguments", "~ submod_4, argument 2: __vllm_consts__[device cpu] → __vllm_consts__[dtype float16]"),
        ([("device cpu", "device cuda:0")], "constants", "- device cpu is gone"),
        ([("device cpu", "device cuda:0")], "constants", "+ device cuda:0"),
        ([("    del q\n", "")], "liveness", "- q is no longer deleted"),
        ([("    del q_1\n", ""), ("del h, r", "del h, r, q_1")], "liveness", "~ q_1 is deleted after submod_4 in line 34, was after attn in line 31"),
        ([("    return (y, x)", "    del w\n    return (y, x)")], "liveness", "+ w is now deleted after submod_4 in line 35"),
        ([("torch.cat(half, layer)", "torch.stack(half, layer)")], "calls", "~ torch.stack (gives y) calls torch.stack and not torch.cat"),
        ([("(y, x)", "(x, y)")], "signature", "~ the result: (y, x) → (x, y)"),
        ([("(x, w, *,", "(x, w, bias, *,")], "signature", "~ (x, w, *, __vllm_submods__) → (x, w, bias, *, __vllm_submods__)"),
        ([("torch.ops.ns.attn", "torch.ops.ns.flash")], "module", "~ name attn: torch.ops.ns.attn → torch.ops.ns.flash"),
        ([("import torch\n", "import torch\nimport math\n")], "module", "+ import math"),
        ([("format 1", "format 2")], "module", "~ format: 1 → 2"),
        ([("y = __vllm_submods__[2]", "(y,) = __vllm_submods__[2]")], "pieces", "~ submod_4 gives (y,) and not y"),
        ([("h, q_1, out_1 =", "q_1, h, out_1 =")], "pieces", "~ submod_2 gives (q_1, h, out_1) and not (h, q_1, out_1)"),
        ([("__vllm_submods__[1](out", "__vllm_submods__[0](out"), ("__vllm_submods__[0](x", "__vllm_submods__[1](x")], "pieces", "~ submod_0 runs where submod_2 ran"),
    ],
)  # fmt: skip
def test_each_change_has_its_words(
    replacements: list[tuple[str, str]], group: str, message: str
) -> None:
    diff = changed(*replacements)
    assert message in said(diff, group)
    assert not diff.same_meaning


def test_what_has_another_name_means_the_same() -> None:
    diff = changed(("rotate", "turn"))
    assert diff.same_meaning and said(diff, "names") == ["~ of the module: rotate → turn"]
    diff = changed(("q_1", "linear_7"), ("out_1", "empty"))
    assert diff.same_meaning and not diff.same_text
    assert [c.group for c in diff.changes] == ["names"]
    assert said(diff, "names") == ["~ of values: q_1 → linear_7, out_1 → empty"]


def test_functions_that_came_and_changed_are_named() -> None:
    diff = changed(("def rotate", "def twice(x):\n    return x + x\n\n\ndef rotate"))
    assert said(diff, "functions") == ["+ twice(x)"]
    assert said(compare_sources(diff.after.text, BEFORE), "functions") == ["- twice(x) is gone"]
    (change,) = changed(("chunk(2)", "chunk(3)")).changes
    assert (change.function, change.group) == ("rotate", "arguments")
    assert change.message == "x.chunk (gives half), argument 0: 2 → 3"
    assert (change.before_line, change.after_line) == (19, 19)


def test_comments_and_layout_keep_the_meaning() -> None:
    assert changed(("    attn(q, out, 1)", "    # layers.0\n    attn(q, out, 1)")).headline == (
        "same meaning; comments differ"
    )
    assert changed(("import torch\n", "import torch\n\n")).headline == "same meaning; layout differ"


@pytest.mark.parametrize("text", ["", "x = (", "print('no function')", "\0"])
def test_what_is_no_source_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"old\.py") as caught:
        compare_sources(text, BEFORE, before_name="old.py")
    assert "Hint" in str(caught.value)


# --- no change of code goes unsaid ---------------------------------------------------------------


def _mutants(text: str) -> Iterator[ast.Module]:
    """Systematic changes of meaning, each in one place of one function."""
    tree = ast.parse(text)
    for f, function in enumerate(tree.body):
        for number, stmt in enumerate(
            function.body if isinstance(function, ast.FunctionDef) else ()
        ):
            for change in (_without, _swapped, _twice):
                mutant = copy.deepcopy(tree)
                change(mutant.body[f].body, number)
                yield mutant
            for position, _ in enumerate(ast.walk(stmt)):
                for change in (_larger, _reversed, _shorter, _otherwise):
                    mutant = copy.deepcopy(tree)
                    change([*ast.walk(mutant.body[f].body[number])][position])
                    yield mutant


def _without(body: list[ast.stmt], at: int) -> None:
    if not isinstance(body[at], ast.Return):
        del body[at]


def _swapped(body: list[ast.stmt], at: int) -> None:
    if not any(isinstance(each, ast.Return) for each in body[at : at + 2]):
        body[at : at + 2] = reversed(body[at : at + 2])


def _twice(body: list[ast.stmt], at: int) -> None:
    if isinstance(body[at], (ast.Assign, ast.Expr)):
        body.insert(at, copy.deepcopy(body[at]))


def _larger(node: ast.AST) -> None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1


def _reversed(node: ast.AST) -> None:
    if isinstance(node, ast.Call):
        node.args.reverse()


def _shorter(node: ast.AST) -> None:
    if isinstance(node, ast.Call):
        del node.args[1:]


def _otherwise(node: ast.AST) -> None:
    if isinstance(node, ast.Attribute):
        node.attr += "_"


def _same_dels(text: str) -> str:
    """``text`` with runs of deletions sorted: their order among themselves has no meaning."""
    tree = ast.parse(text)
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        body: list[ast.stmt] = []
        for stmt in function.body:
            if isinstance(stmt, ast.Delete) and body and isinstance(body[-1], ast.Delete):
                body[-1].targets = sorted([*body[-1].targets, *stmt.targets], key=ast.unparse)
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


def test_long_sources_are_paired_whole() -> None:
    """A thousand layers, one of them changed."""
    rows = "".join(f"#   [{i}] submod_{i}\n" for i in range(1000))
    lines = [f"    v{i + 1} = __vllm_submods__[{i}](v{i}, 0)\n" for i in range(1000)]
    head = f"# __vllm_submods__:\n{rows}\ndef execution_fn(v0, *, __vllm_submods__):\n"
    before = f"{head}{''.join(lines)}    return v1000\n"
    diff = compare_sources(before, before.replace("(v500, 0)", "(v500, 5)"))
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
        ([Layer(), Layer(), Layer()], ["- piece", "- call mix", "bound weight"]),
        ([Layer(), Layer("gelu"), Layer(), Layer()], ["submod_2 computes something else"]),
        ([Layer(scale=0.25), Layer(), Layer(), Layer()], ["argument 1: 0.5 → 0.25"]),
        ([Layer(bias=True), Layer(), Layer(), Layer()], ["submod_0", "now takes", "f32[8] = layers.0.up.bias"]),
        ([*(Layer() for _ in range(5))], ["+ piece", "+ call mix", "+ bound weight"]),
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
