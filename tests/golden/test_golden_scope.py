"""`undefined_names`: every read of a name that is not bound at that point, and no other."""

from pathlib import Path

import pytest

from piecework.golden.text.scope import undefined_names

CASES = Path(__file__).parent.parent.parent / "golden" / "cases"


def body(*lines: str, parameters: str = "x") -> str:
    return f"import torch\n\ndef execution_fn({parameters}):\n" + "".join(
        f"    {line}\n" for line in lines
    )


@pytest.mark.parametrize(
    ("code", "problems"),
    [
        (body("return x"), []),
        (body("return y"), ["line 4: 'y' is not defined"]),
        (body("y = y + x", "return y"), ["line 4: 'y' is not defined"]),
        (body("y = x", "del y", "return y"), ["line 6: 'y' is not defined"]),
        (body("y = x", "del y", "del y", "return x"), ["line 6: 'y' is not defined"]),
        (body("y = x", "del y", "y = x", "return y"), []),
        (body("a, (b, *c) = x", "return a, b, c"), []),
        (body("return torch.add(x, len(__vllm_consts__))"), []),
        (body("return math.pi"), ["line 4: 'math' is not defined"]),
        (body("return [i for i in x] + [i]"), []),  # lambda and comprehension names are not followed
        (body("return (lambda z: z)(x)"), []),
        (body("y = other(x)", "return y") + "\ndef other(a):\n    return a\n", []),
        (body("torch = torch.float", "return torch"), ["line 4: 'torch' is not defined"]),
        ("alias = later\nlater = 1\n" + body("return later"), ["line 1: 'later' is not defined"]),
        (body("return x", parameters="x=missing"), ["line 3: 'missing' is not defined"]),
        (body("return x, args, kw, o", parameters="x, *args, o=None, **kw"), []),
        (body("with torch.no_grad() as g:", "    y = x", "return y, g"), []),
        (body("if x:", "    return z", "return x"), ["line 5: 'z' is not defined"]),
        (body("for i in x:", "    y = i", "return y"), []),
        (body("try:", "    y = x", "except ValueError as e:", "    raise e", "return y"), []),
        (body("return weight"), ["line 4: 'weight' is not defined"]),
    ],
)  # fmt: skip
def test_reads_of_unbound_names(code: str, problems: list[str]) -> None:
    assert undefined_names(code) == problems


def test_provided_names_are_bound() -> None:
    assert undefined_names(body("return weight"), ["weight"]) == []


def test_what_is_not_python_is_an_error() -> None:
    with pytest.raises(SyntaxError):
        undefined_names("def f(:")


@pytest.mark.parametrize("golden", sorted(CASES.glob("*/expected.py")), ids=lambda p: p.parent.name)
def test_dropping_any_statement_that_binds_a_used_name_is_found(golden: Path) -> None:
    lines = golden.read_text().splitlines()
    dropped = 0
    for number, line in enumerate(lines):
        name = line.strip().partition(" = ")[0]
        if not (line.startswith("    ") and " = " in line and name.isidentifier()):
            continue
        if line.rstrip().endswith(("(", "[", "{", ",")):
            continue
        indent = line[: len(line) - len(line.lstrip())]
        text = "\n".join([*lines[:number], f"{indent}pass", *lines[number + 1 :]])
        later = "\n".join(lines[number + 1 :]).partition("\ndef ")[0]
        if name in later:
            dropped += 1
            assert any(f"'{name}'" in problem for problem in undefined_names(text, _bound(lines)))
    if golden.parent.name == "straight_line":
        assert dropped > 0


def _bound(lines: list[str]) -> list[str]:
    return [
        line[4:].partition(":")[0] for line in lines if line.startswith("#   ") and " = " in line
    ]
