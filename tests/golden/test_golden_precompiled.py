"""Files of torch.compiler.precompile. In: three that torch 2.15 wrote, as they are and changed; out, each change is found, and what can't be told is said."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from piecework.cli import app
from piecework.errors import ArtifactError, UsageError
from piecework.golden.precompiled.diff import changes
from piecework.golden.precompiled.file import (
    Judgement,
    captured_now,
    judge,
    read_precompiled,
    vector_widths,
)

FOLDER = Path(__file__).with_name("precompiled")
NAMES = ("eager", "inductor_512", "inductor_256")
TEXTS = {name: (FOLDER / f"{name}.txt").read_text("utf-8") for name in NAMES}
NEW_NAMES = not hasattr(torch.compiler, "precompile")
"""Whether Inductor's files use names of a torch that this one is not yet."""


class Gated(nn.Module):
    """What the files were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.gelu(self.enter(x)) * self.scale)


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Gated().eval(), (torch.randn(4, 8),)


def cache_of(text: str, **changed: object) -> bytes:
    """The cache that torch would have written beside a text."""
    kept: dict[str, object] = {
        "format": "torch.compiler.precompile",
        "version": 1,
        "backend": "eager" if "BACKEND = 'eager'" in text else "inductor",
        "tracer": "make_fx",
        "code_hash": hashlib.sha256(text.encode()).hexdigest(),
        "artifact": None,
    }
    buffer = io.BytesIO()
    torch.save({**kept, **changed}, buffer)
    return buffer.getvalue()


def judged(text: str, **options: object) -> Judgement:
    return judge(read_precompiled(text, "file.py"), **options)  # type: ignore[arg-type]


def wrong(text: str, **options: object) -> list[str]:
    """The problems, but for names that a torch before 2.15 lacks."""
    found = judged(text, **options).problems
    return [each for each in found if not (NEW_NAMES and "assert_size_stride_grouped" in each)]


# --- as they were written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_wrote_is_in_order_on_the_machine_it_was_written_for(name: str) -> None:
    text = TEXTS[name]
    bits = int(name.partition("_")[2] or 512)
    found = judged(text, cache=cache_of(text), model=Gated(), vector_bits=bits)
    assert wrong(text, cache=cache_of(text), model=Gated(), vector_bits=bits) == []
    assert "the text is as it was written" in found.facts
    assert "the model has the parameters and buffers that it takes" in found.facts
    assert found.open == ["which torch wrote it: the file does not say"]


def test_the_cache_that_torch_wrote_is_read() -> None:
    cache = (FOLDER / "eager.cache").read_bytes()
    assert judged(TEXTS["eager"], cache=cache).problems == []


def test_what_was_not_given_is_said() -> None:
    found = judged(TEXTS["inductor_512"])
    assert [each.partition(":")[0] for each in found.open] == [
        "whether the text was edited",
        "which torch wrote it",
        "whether kernel cpp_fused_gelu_mul_native_layer_norm_0, written for vectors of 512 bits, suits this CPU",
        "whether it fits a model",
    ]


def test_names_that_this_torch_lacks_are_named() -> None:
    text = TEXTS["inductor_512"].replace("guards._reinterpret_tensor", "guards._reinterpret_much")
    assert any("torch._C._dynamo.guards._reinterpret_much" in each for each in wrong(text))
    text = TEXTS["eager"].replace("aten.gelu.default", "aten.gelu_of_tomorrow.default")
    assert any("torch.ops.aten.gelu_of_tomorrow" in each for each in wrong(text))


# --- edited files --------------------------------------------------------------------------------------


def edits(name: str, number: int) -> list[tuple[str, str]]:
    """Seeded edits of the program, comments left alone: a number, a name, an operator, a line."""
    text, draw = TEXTS[name], random.Random(name)
    lines = text.splitlines()
    code = [
        at for at, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")
    ]
    found = []
    while len(found) < number:
        at, kind = draw.choice(code), draw.choice(("number", "name", "line", "twice"))
        line = lines[at]
        if kind == "number":
            digits = [i for i, c in enumerate(line) if c.isdigit()]
            if not digits:
                continue
            i = draw.choice(digits)
            new = f"{line[:i]}{(int(line[i]) + 1) % 10}{line[i + 1 :]}"
        elif kind == "name":
            letters = [i for i, c in enumerate(line) if c.isalpha()]
            if not letters:
                continue
            i = draw.choice(letters)
            new = f"{line[:i]}{'q' if line[i] != 'q' else 'z'}{line[i + 1 :]}"
        else:
            new = "" if kind == "line" else f"{line}\n{line}"
        found.append((kind, "\n".join([*lines[:at], new, *lines[at + 1 :], ""])))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_forty_edits_of_each_file_are_found_by_its_cache_and_by_diff(name: str) -> None:
    original = read_precompiled(TEXTS[name], name)
    kept = cache_of(TEXTS[name])
    for kind, text in edits(name, 40):
        try:
            edited = read_precompiled(text, name)
        except ArtifactError:
            continue  # no Python any more, which is told as such
        assert any("SHA-256" in each for each in judge(edited, cache=kept).problems), kind
        told = changes(original, edited)
        assert bool(told) == (ast.dump(original.tree) != ast.dump(edited.tree)), (kind, told)


# What the text alone shows, without a cache or a model: (file, old, new, what is told).
SHOWN = [
    ("eager", "BACKEND = 'eager'", "BACKEND = 'other'", "no backend 'other'"),
    ("eager", "NUM_POSITIONAL_ARGS = 2", "NUM_POSITIONAL_ARGS = 0", "beyond the arguments"),
    ("eager", "MODULE_POSITIONS = [0]", "MODULE_POSITIONS = [7]", "beyond the arguments"),
    ("eager", "BUFFER_NAMES = ['scale']", "BUFFER_NAMES = []", "buffers do not belong"),
    ("eager", "BUFFER_SHAPES = [(16,)]", "BUFFER_SHAPES = [(16,), (2,)]", "buffers do not belong"),
    ("eager", "USER_INPUT_SHAPES = [(4, 8)]", "USER_INPUT_SHAPES = []", "inputs do not belong"),
    ("eager", "BUFFER_DTYPES = ['torch.float32']", "BUFFER_DTYPES = ['torch.f32']", "no dtype"),
    ("eager", "USER_INPUT_BOUNDS = ", "USER_INPUT_BINDINGS = ", "no literal USER_INPUT_BOUNDS"),
    ("eager", "GRAD_PARAM_INDICES = []", "GRAD_PARAM_INDICES = f()", "no literal GRAD_PARAM"),
    ("eager", "OUT_SPEC = '[1", "OUT_SPEC = '1", "OUT_SPEC is no tree"),
    ("eager", "gelu.default(addmm)", "gelu.default(admm)", "admm is read and never made"),
    ("eager", "aten.t.default(flat_1)", "aten.t.default(flat_9)", "flat_9 is read and never made"),
    ("eager", "flat_6, = fx_pytree", "= fx_pytree", "the graph takes"),
    ("eager", "aten.addmm.default", "aten.addnm.default", "has no torch.ops.aten.addnm"),
    ("eager", "def _graph_forward", "def _graph_backward", "no graph"),
    ("inductor_512", "((16, ), (4, 8), (16, 8))", "((16, ), (5, 8), (16, 8))", "expects arg5_1"),
    ("inductor_512", "PARAM_SHAPES = [(16, 8)", "PARAM_SHAPES = [(16, 9)", "hands it (16, 9)"),
    ("inductor_512", "arg4_1, arg5_1 = args", "arg4_1 = args", "the graph takes 5 values"),
    ("inductor_512", "addmm(arg1_1, arg5_1", "addmm(arg1_1, arg7_1", "arg7_1 is read"),
    ("inductor_512", "buf4 = buf0", "buf4 = buf9", "buf9 is read and never made"),
    (
        "inductor_512",
        "int64_t>(x1), static_cast<int64_t>(16));",
        "int64_t>(x1), static_cast<int64_t>(8));",
        "mixes vectors",
    ),
    (
        "inductor_512",
        "torch._C._dynamo.guards.assert_alignment",
        "torch._C._dynamo.guards.assert_much",
        "has no torch._C",
    ),
    (
        "inductor_512",
        "torch.ops.inductor._alloc_from_pool",
        "torch.ops.inductor._alloc_from_lake",
        "_alloc_from_lake",
    ),
    ("inductor_512", "# Generated by torch.compiler.precompile", "# Made by hand", "first line"),
]


@pytest.mark.parametrize(("name", "old", "new", "told"), SHOWN, ids=[row[3] for row in SHOWN])
def test_edits_that_the_text_alone_shows(name: str, old: str, new: str, told: str) -> None:
    text = TEXTS[name]
    assert old in text
    assert any(told in each for each in wrong(text.replace(old, new, 1)))


def test_what_is_no_python_any_more_is_an_error() -> None:
    with pytest.raises(ArtifactError, match="no Python"):
        read_precompiled(TEXTS["eager"].replace("def forward(", "def forward(("), "file.py")


def test_another_file_is_misuse() -> None:
    with pytest.raises(UsageError, match="no file of torch"):
        read_precompiled("print(1)\n", "file.py")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"code_hash": "0" * 64}, "SHA-256"),
        ({"backend": "inductor"}, "the cache's backend"),
        ({"tracer": "dynamo"}, "the cache's tracer"),
        ({"format": "another"}, "no cache of"),
        ({"version": 2}, "format version 2"),
    ],
)
def test_a_cache_of_something_else(changed: dict[str, object], told: str) -> None:
    text = TEXTS["eager"]
    assert any(told in each for each in wrong(text, cache=cache_of(text, **changed)))


def test_a_damaged_cache() -> None:
    damaged = cache_of(TEXTS["eager"])[:200]
    assert any("can't be read" in each for each in wrong(TEXTS["eager"], cache=damaged))


# --- other CPUs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "own"), [("inductor_512", 512), ("inductor_256", 256)])
@pytest.mark.parametrize("here", [0, 128, 256, 512])
def test_kernels_of_another_vector_width_are_wrong(name: str, own: int, here: int) -> None:
    told = [each for each in wrong(TEXTS[name], vector_bits=here) if "of another CPU" in each]
    assert bool(told) == (own != here)
    assert all(f"vectors of {own} bits, and here they have {here}" in each for each in told)


@pytest.mark.parametrize("here", [0, 256, 512])
def test_a_graph_without_kernels_suits_every_cpu(here: int) -> None:
    assert wrong(TEXTS["eager"], vector_bits=here) == []


@pytest.mark.parametrize(
    ("source", "widths"),
    [
        ("Vectorized<float>::loadu(p + x, static_cast<int64_t>(16));", {512}),
        ("Vectorized<int32_t>::loadu(p, static_cast<int64_t>(8));", {256}),
        ("VectorizedN<double, 2>::loadu(p, static_cast<int64_t>(16));", {512}),
        ("VectorizedN<int64_t,2>::loadu(p, static_cast<int64_t>(8));", {256}),
        ("Vectorized<float>::loadu(p, static_cast<int64_t>(3L));", set()),  # a rest
        (
            "Vectorized<at::BFloat16>::loadu(p, static_cast<int64_t>(16));",
            set(),
        ),  # half a vector or all
        ("float x = p[0];", set()),
    ],
)
def test_how_wide_vectors_are(source: str, widths: set[int]) -> None:
    assert vector_widths(source) == widths


def test_a_kernel_whose_width_can_not_be_read_is_left_open() -> None:
    text = TEXTS["inductor_512"].replace("Vectorized<float>::loadu", "Vectorized<at::Half>::loadu")
    found = judged(text, vector_bits=256)
    assert any("for which vectors kernel cpp_fused" in each for each in found.open)


def test_a_gpu_kernel_is_left_open_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "tri = async_compile.triton('tri', '''DeviceProperties(type='cuda', cc=90)''')\n"
    text = TEXTS["inductor_512"].replace("\nclass Runner", f"\n{kernel}\nclass Runner", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("GPU kernel tri" in each for each in judged(text).open)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert any("capability 90, and this is 80" in each for each in wrong(text))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert not any("of another GPU" in each for each in wrong(text))


# --- models that moved on ------------------------------------------------------------------------------


def renamed(model: Gated) -> None:
    model.gate = model.enter  # type: ignore[assignment]
    del model.enter


def retyped(model: Gated) -> None:
    model.enter.weight = nn.Parameter(model.enter.weight.to(torch.bfloat16))


def reordered(model: Gated) -> None:
    enter = model.enter
    del model.enter
    model.enter = enter


STALE: list[tuple[Callable[[Gated], object], str]] = [
    (renamed, "has no parameter enter.weight"),
    (retyped, "parameter enter.weight has dtype torch.bfloat16, and had torch.float32"),
    (reordered, "the model's parameters are in another order"),
    (lambda m: setattr(m, "enter", nn.Linear(8, 32)), "shape (32, 8), and had (16, 8)"),
    (lambda m: setattr(m, "enter", nn.Linear(8, 16, bias=False)), "no parameter enter.bias"),
    (
        lambda m: setattr(m, "more", nn.Linear(2, 2)),
        "does not know the model's parameter more.weight",
    ),
    (lambda m: m.register_buffer("shift", torch.ones(1)), "does not know the model's buffer shift"),
    (
        lambda m: m.register_buffer("scale", torch.ones(8)),
        "buffer scale has shape (8,), and had (16,)",
    ),
    (lambda m: m.register_buffer("scale", None), "has no buffer scale"),
    (lambda m: m.to("meta"), "has device meta, and had cpu"),
    (lambda m: setattr(m.norm, "weight", m.norm.bias), "has no parameter norm.bias"),
    (lambda m: setattr(m, "scale", nn.Parameter(m._buffers.pop("scale"))), "parameter scale"),
]


@pytest.mark.parametrize("name", ["eager", "inductor_512"])
@pytest.mark.parametrize(("change", "told"), STALE, ids=[told for _, told in STALE])
def test_a_model_that_moved_on(name: str, change: Callable[[Gated], object], told: str) -> None:
    model = Gated()
    change(model)
    assert any(told in each for each in wrong(TEXTS[name], model=model)), wrong(
        TEXTS[name], model=model
    )


def test_other_values_of_the_weights_are_no_difference() -> None:
    assert wrong(TEXTS["eager"], model=Gated()) == wrong(TEXTS["eager"], model=Gated()) == []


def test_the_graph_is_compared_with_what_torch_writes_now() -> None:
    """Where torch can write such files at all; else it is said that this was not done."""
    found, result = read_precompiled(TEXTS["eager"], "file.py"), Judgement()
    now = captured_now(found, Gated().eval(), (torch.randn(4, 8),), result)
    if NEW_NAMES:
        assert now is None and "no torch.compiler.precompile" in result.open[0]
        return
    assert now is not None and changes(found, now) == []


def test_a_changed_graph_is_found_where_torch_writes_such_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for torch's writer, so that the comparison is tested on every torch."""

    class Writer:
        @staticmethod
        def capture(fn, *, artifact_path, cache_path, backend):  # type: ignore[no-untyped-def]
            assert backend == "eager"
            text = TEXTS["eager"].replace("aten.gelu.default", "aten.relu.default")
            artifact_path.write_text(text)
            return Writer()

        def __enter__(self) -> Callable[..., object]:
            return lambda *args: None

        def __exit__(self, *exception: object) -> None:
            pass

    monkeypatch.setattr(torch.compiler, "precompile", Writer, raising=False)
    found = read_precompiled(TEXTS["eager"], "file.py")
    now = captured_now(found, Gated().eval(), (torch.randn(4, 8),), Judgement())
    assert now is not None
    (told,) = changes(found, now)
    assert "aten.gelu.default(v7) → v8 = torch.ops.aten.relu.default(v7)" in told
    result = Judgement()
    assert captured_now(found, Gated(), (torch.randn(4, 8), torch.randn(1)), result) is None
    assert result.problems == ["stale: the model is called with 2 arguments now"]


# --- two files -----------------------------------------------------------------------------------------


def difference(name: str, old: str, new: str) -> list[str]:
    assert old in TEXTS[name]
    before = read_precompiled(TEXTS[name], "before")
    return changes(before, read_precompiled(TEXTS[name].replace(old, new), "after"))


def test_comments_and_names_of_values_are_no_difference() -> None:
    assert difference("eager", "# See Note", "# See the note") == []
    assert difference("eager", "addmm = torch", "product = torch") != []  # read under another name
    renamed = TEXTS["eager"].replace(" addmm ", " product ").replace("(addmm)", "(product)")
    before, after = read_precompiled(TEXTS["eager"], "a"), read_precompiled(renamed, "b")
    assert [each for each in changes(before, after) if each.startswith("graph")] == []


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("eager", "aten.mul.Tensor", "aten.add.Tensor", "graph: v9 = torch.ops.aten.mul.Tensor"),
        ("eager", "(flat_2, flat_6, t)", "(flat_6, flat_2, t)", "the same call on other values"),
        ("eager", "'scale'", "'shift'", "buffer scale is gone"),
        (
            "eager",
            "BUFFER_SHAPES = [(16,)]",
            "BUFFER_SHAPES = [(8,)]",
            "float32[16] on cpu → float32[8]",
        ),
        (
            "eager",
            "USER_INPUT_SHAPES = [(4, 8)]",
            "USER_INPUT_SHAPES = [(None, 8)]",
            "USER_INPUT_SHAPES",
        ),
        ("eager", "mods.append(args[_i])", "mods.append(args[0])", "driver: forward differs"),
        (
            "inductor_512",
            "tmp3 * tmp10",
            "tmp3 + tmp10",
            "tmp3 * tmp10; → auto tmp11 = tmp3 + tmp10;",
        ),
        ("inductor_512", "alpha=1, beta=1", "alpha=1, beta=0", "graph: extern_kernels.addmm"),
        (
            "inductor_512",
            "from math import inf",
            "from cmath import inf",
            "module: from math import inf",
        ),
    ],
)
def test_differences_are_told_by_their_meaning(name: str, old: str, new: str, told: str) -> None:
    found = difference(name, old, new)
    assert any(told in each for each in found), found


def test_vector_widths_are_the_only_difference_of_two_machines() -> None:
    before, after = (read_precompiled(TEXTS[name], name) for name in NAMES[1:])
    assert changes(before, after) == [
        "kernel cpp_fused_gelu_mul_native_layer_norm_0: vectors of 512 → 256 bits"
    ]


# --- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(TEXTS[name])
        (tmp_path / f"{name}.cache").write_bytes(cache_of(TEXTS[name]))
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    return found.exit_code, found.output


def test_verify_on_the_command_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = files / "eager.py"
    code, text = run("verify", good, "--cache", files / "eager.cache")
    assert code == 0 and "the text is as it was written" in text and "not told" in text
    good.write_text(TEXTS["eager"].replace("1e-05", "1e-04"))
    code, text = run("verify", good, "--cache", files / "eager.cache")
    assert code == 1 and "WRONG edited" in text
    code, text = run("verify", good, "--cache", files / "eager.cache", "--json")
    assert code == 1 and json.loads(text)["problems"]
    assert run("verify", files / "nothing.py")[0] == 2
    assert run("verify", files, "--cache", files / "eager.cache")[0] == 2


def test_diff_on_the_command_line(files: Path) -> None:
    code, text = run("golden", "diff", files / "inductor_512.py", files / "inductor_256.py")
    assert code == 1 and "vectors of 512 → 256 bits" in text
    code, text = run("golden", "diff", files / "eager.py", files / "eager.py", "--json")
    assert code == 0 and json.loads(text) == {
        "same_text": True,
        "same_meaning": True,
        "changes": [],
    }
    (files / "other.py").write_text(TEXTS["eager"].replace("# See Note", "# See"))
    code, text = run("golden", "diff", files / "eager.py", files / "other.py")
    assert code == 1 and "the same meaning" in text
