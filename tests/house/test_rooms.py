"""Who may import whom. In: every import of the package, those inside functions too. Out: none against the order of the rooms, no circle, no folder too full."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the top of the house down: a room imports from rooms further down, and from itself.
ORDER = (
    "__main__",
    "cli",
    "bench",
    "golden",
    "integrations",
    "integrations.transformers",
    "integrations.transformers.request",
    "integrations.protocol",
    "examples",
    "piecework",
    "runtime",
    "runtime.decorators",
    "runtime.bundle",
    "runtime.compile",
    "runtime.stitched",
    "runtime.artifact",
    "runtime.traces",
    "runtime.graphs",
    "runtime.graphs.serve",
    "runtime.graphs.plan",
    "runtime.graphs.stage",
    "runtime.graphs.memory",
    "runtime.graphs.device",
    "runtime.call",
    "runtime.pieces",
    "runtime.compilers",
    "runtime.trace",
    "runtime.observe",
    "runtime.config",
    "runtime.watch",
    "runtime.store",
    "codegen",
    "templates",
    "runtime.batch",
    "runtime.splitting_op",
    "runtime.model_tag",
    "runtime.counters",
    "runtime.torch_compat",
    "errors",
    "faces",
    "collector",
    "scope",
    "closeness",
    "code_objects",
)
# Faces hand names on from everywhere, by a table that is read when a name is asked for; for type checkers they import them.
FACES = {"__init__.py", "runtime/__init__.py", "runtime/graphs/__init__.py"}
FLAT = 8  # files of runtime/ itself
FULL = 13  # files of any other folder


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below ``piecework``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("tests", "build", "docs") or any(
            p.startswith(".") for p in relative.parts
        ):
            continue
        if relative.parts[:2] == ("golden", "cases"):
            continue
        name = ".".join(relative.with_suffix("").parts)
        found[name.removesuffix("__init__").removesuffix(".") or "piecework"] = path
    return found


def for_type_checkers(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def imports_of(path: Path, *, types: bool = True) -> set[str]:
    """Names below ``piecework`` that a file imports, anywhere in it; ``types``: those for type checkers too."""
    found = set()
    tree = ast.parse(path.read_text())
    checked = {
        id(inner)
        for block in ast.walk(tree)
        if for_type_checkers(block)
        for inner in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not types and id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            named = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide their room"
            inner = [f"{node.module}.{each.name}" for each in node.names]
            named = [
                n if n.removeprefix("piecework.") in modules() else str(node.module) for n in inner
            ]
        else:
            continue
        for name in named:
            if name == "piecework":
                found.add("piecework")
            elif name.startswith("piecework."):
                found.add(name.removeprefix("piecework."))
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if name in ORDER:
            return name
    raise AssertionError(f"{module} is in no room: put it into ORDER of {Path(__file__).name}")


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module: str) -> None:
    path = modules()[module]
    if str(path.relative_to(ROOT)) in FACES:
        return
    floor = ORDER.index(room_of(module))
    for other in imports_of(path):
        if room_of(other) == room_of(module):
            continue
        assert ORDER.index(room_of(other)) > floor, f"{module} imports {other}, which is above it"


def test_modules_make_no_circle() -> None:
    """Inside a room too, lazy imports counted; imports for type checkers alone are not there when a program runs."""
    graph = {
        name: {o for o in imports_of(path, types=False) if o != name}
        for name, path in modules().items()
        if str(path.relative_to(ROOT)) not in FACES
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above[above.index(name) :], name))
        if name in done or name not in graph:
            return
        for other in sorted(graph[name]):
            visit(other, (*above, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_order_names_no_room_that_is_gone() -> None:
    rooms = {room_of(name) for name in modules()}
    assert set(ORDER) - rooms <= {"templates"}


def test_folders_are_not_too_full() -> None:
    for folder in {path.parent for path in modules().values()}:
        files = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        limit = FLAT if folder == ROOT / "runtime" else FULL
        assert len(files) <= limit, f"{folder.relative_to(ROOT)} has {len(files)} files"
