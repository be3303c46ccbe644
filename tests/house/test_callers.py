"""Nothing without a caller. In: every function, class and method of codegen/ and runtime/. Out: none that only tests mention and no page documents."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from field_names import METHODS, SIGNATURES

ROOT = Path(__file__).parents[2]
FACES = {"__init__.py", "runtime/__init__.py", "runtime/graphs/__init__.py"}
Place = tuple[str, int]
Definition = tuple[str, int, int, str]

# Called by what is no code of ours.
CALLED_FROM_OUTSIDE = {
    "model_post_init": "pydantic",
    "persistent_id": "pickle",
    "persistent_load": "pickle",
    "reducer_override": "pickle",
    "_repr_html_": "notebooks",
}
# Names of the field (FEATURES.md, NAMES.md) that users call and no page shows.
OF_THE_FIELD = {
    *SIGNATURES,
    *METHODS,
    *(name for each in METHODS.values() for name in each.split()),
}
OF_THE_FIELD |= {"max_cudagraph_mode", "piecewise_graphs"}


def sources() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        outside = (
            name.startswith(("tests/", "golden/cases/", "build/", "docs/")) or "/." in f"/{name}"
        )
        if not outside:
            found[name] = ast.parse(path.read_text())
    return found


def exported(tree: ast.Module) -> set[int]:
    """Lines of ``__all__``, which calls nothing."""
    lists = (
        each
        for each in tree.body
        if isinstance(each, ast.Assign)
        and any(getattr(target, "id", "") == "__all__" for target in each.targets)
    )
    return {n.lineno for each in lists for n in ast.walk(each) if isinstance(n, ast.Constant)}


def mentions(files: dict[str, ast.Module]) -> dict[str, list[Place]]:
    """Names and strings of the code, and the words of templates and of the project's file, with their places."""
    found: dict[str, list[Place]] = defaultdict(list)
    for name, tree in files.items():
        silent = exported(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found[node.id].append((name, node.lineno))
            elif isinstance(node, ast.Attribute):
                found[node.attr].append((name, node.end_lineno or node.lineno))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said = name not in FACES and node.lineno not in silent
                found[node.value] += [(name, node.lineno)] if said else []
    for path in (*ROOT.glob("templates/*.jinja"), ROOT / "pyproject.toml"):
        for word in re.findall(r"\w+", path.read_text()):
            found[word].append((path.name, 0))
    return found


def definitions(files: dict[str, ast.Module]) -> list[Definition]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        (
            name,
            min([node.lineno, *(each.lineno for each in node.decorator_list)]),
            node.end_lineno or node.lineno,
            node.name,
        )
        for name, tree in files.items()
        if name.startswith(("runtime/", "codegen/"))
        for node in ast.walk(tree)
        if isinstance(node, kinds) and not node.name.startswith("__")
    ]


@cache
def without_caller(roots: frozenset[str] = frozenset()) -> list[Definition]:
    """Definitions that nothing mentions outside themselves and outside others of these; ``roots`` are called."""
    files = sources()
    used = mentions(files)
    waiting = [one for one in definitions(files) if one[3] not in roots]
    dead: list[Definition] = []

    def inside(place: Place, one: Definition) -> bool:
        return place[0] == one[0] and one[1] <= place[1] <= one[2]

    while True:
        now = [
            one
            for one in waiting
            if all(any(inside(place, each) for each in (one, *dead)) for place in used[one[3]])
        ]
        if not now:
            return dead
        dead += now
        waiting = [one for one in waiting if one not in now]


def test_every_function_has_a_caller_or_a_page() -> None:
    pages = "\n".join(p.read_text() for p in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    known = set(re.findall(r"\w+", pages)) | OF_THE_FIELD | set(CALLED_FROM_OUTSIDE)
    left = [f"{file}:{first} {name}" for file, first, _, name in without_caller(frozenset(known))]
    assert not left, "nothing calls " + ", ".join(left)


def test_the_list_names_nothing_that_has_a_caller() -> None:
    assert set(CALLED_FROM_OUTSIDE) <= {name for *_, name in without_caller()}
