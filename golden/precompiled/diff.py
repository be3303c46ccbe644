"""What changed between two files of `torch.compiler.precompile`. In: both, parsed. Out: sentences, meaning first; none where they mean the same.

Names of values, comments and layout are no difference. Neither file is executed.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence

from piecework.golden.precompiled.file import ASPECTS, TENSORS, Precompiled, vector_widths

GRAPH_FUNCTIONS = ("_graph_forward",)


def changes(before: Precompiled, after: Precompiled) -> list[str]:
    """The differences in meaning, as sentences."""
    if ast.dump(before.tree) == ast.dump(after.tree):
        return []
    found = [
        *_convention(before.convention, after.convention),
        *_statements(before, after),
        *_kernels(before, after),
        *_functions(before, after),
    ]
    return found or _rest(before, after)


def _convention(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    found = []
    for kind in ("PARAM", "BUFFER"):
        found += _tensors(kind, before, after)
    told = {f"{kind}_{each}" for kind in ("PARAM", "BUFFER") for each in ("NAMES", *ASPECTS)}
    for name in sorted((before.keys() | after.keys()) - told):
        old, new = before.get(name), after.get(name)
        if old != new:
            found.append(f"{name}: {old} → {new}")
    return found


def _tensors(kind: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    word = TENSORS[kind]
    old, new = _by_name(kind, before), _by_name(kind, after)
    found = [f"{word} {name} is gone" for name in old if name not in new]
    found += [f"{word} {name} is new" for name in new if name not in old]
    for name in old:
        if name in new and old[name] != new[name]:
            found.append(f"{word} {name}: {_described(old[name])} → {_described(new[name])}")
    if not found and list(old) != list(new):
        found.append(f"the {word}s are in another order")
    return found


def _by_name(kind: str, known: Mapping[str, object]) -> dict[str, tuple[object, ...]]:
    names = known.get(f"{kind}_NAMES")
    columns = [known.get(f"{kind}_{each}") for each in ASPECTS]
    if not isinstance(names, list):
        return {}
    rows = [each if isinstance(each, list) else [] for each in columns]
    return {
        name: tuple(row[at] if at < len(row) else None for row in rows)
        for at, name in enumerate(names)
    }


def _described(row: tuple[object, ...]) -> str:
    shape, dtype, device = row
    return f"{str(dtype).removeprefix('torch.')}{list(shape) if isinstance(shape, tuple) else shape} on {device}"


class _Anonymous(ast.NodeTransformer):
    """Names of values become their number, in order of first use; what they are called does not matter."""

    def __init__(self, keep: bool, kernels: frozenset[str]) -> None:
        self.keep, self.kernels = keep, kernels
        self.numbers: dict[str, int] = {}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id in self.kernels or not (
            isinstance(node.ctx, ast.Store) or node.id in self.numbers
        ):
            return node
        number = self.numbers.setdefault(node.id, len(self.numbers))
        return ast.Name(f"v{number}" if self.keep else "_", node.ctx)


def _canonical(found: Precompiled, keep: bool) -> list[str]:
    """The graph's statements; with ``keep``, each value has a number, else all are alike."""
    inputs, body = found.graph
    rename = _Anonymous(keep, frozenset(found.kernels))
    rename.numbers = {name: at for at, name in enumerate(inputs)}
    return [ast.unparse(rename.visit(ast.parse(ast.unparse(node)).body[0])) for node in body]


def _statements(before: Precompiled, after: Precompiled) -> list[str]:
    """What the graphs do, step by step."""
    old, new = _canonical(before, False), _canonical(after, False)
    texts = _canonical(before, True), _canonical(after, True)
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if tag != "equal":
            gone, come = _step(texts[0][a:b]), _step(texts[1][c:d])
            found.append(f"graph: {gone or 'nothing'} → {come or 'nothing'}")
    if not found:
        for at, (left, right) in enumerate(zip(*texts, strict=True)):
            if left != right:
                found.append(f"graph, step {at}: the same call on other values: {left} → {right}")
                break
    if len(before.graph[0]) != len(after.graph[0]):
        found.append(f"graph: {len(before.graph[0])} inputs → {len(after.graph[0])}")
    return found


def _step(lines: Sequence[str]) -> str:
    return "; ".join(lines)


def _kernels(before: Precompiled, after: Precompiled) -> list[str]:
    old, new = before.kernels, after.kernels
    found = [f"kernel {name} is gone" for name in old if name not in new]
    found += [f"kernel {name} is new" for name in new if name not in old]
    for name in old:
        if name not in new or old[name] == new[name]:
            continue
        widths = vector_widths(old[name]), vector_widths(new[name])
        if widths[0] != widths[1]:
            bits = [", ".join(map(str, sorted(each))) or "no" for each in widths]
            found.append(f"kernel {name}: vectors of {bits[0]} → {bits[1]} bits")
            continue
        pairs = zip(old[name].splitlines(), new[name].splitlines(), strict=False)
        line = next((f"{a.strip()} → {b.strip()}" for a, b in pairs if a != b), "its length")
        found.append(f"kernel {name}: {line}")
    return found


def _functions(before: Precompiled, after: Precompiled) -> list[str]:
    """The driver and AOTAutograd's wrappers around the graph."""
    found = []
    for name in sorted(before.functions.keys() | after.functions.keys()):
        if name in GRAPH_FUNCTIONS:
            continue
        old, new = (
            [ast.unparse(each) for each in side.functions.get(name, ())] for side in (before, after)
        )
        if old != new:
            found.append(f"driver: {name} differs (another torch wrote it, or it was edited)")
    return found


def _rest(before: Precompiled, after: Precompiled) -> list[str]:
    """Whatever else of the module differs."""
    old, new = ([ast.unparse(node) for node in side.tree.body] for side in (before, after))
    found = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if tag != "equal":
            gone, come = (_step([t.splitlines()[0] for t in part]) for part in (old[a:b], new[c:d]))
            found.append(f"module: {gone or 'nothing'} → {come or 'nothing'}")
    return found
