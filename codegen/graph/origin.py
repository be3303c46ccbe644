"""Where a statement comes from: module path, source line and shapes; no absolute path gets out."""

import ast
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.fx

from piecework.codegen.graph.consts import short_type
from piecework.codegen.plan import ir

_FRAME = re.compile(r'^\s*File "(?P<file>[^"\n]+)", line (?P<line>\d+)', re.MULTILINE)
_SUBSCRIPT = re.compile(r"\[['\"]?([^'\"\[\]]+)['\"]?\]")
_ROOT = re.compile(r"^(L\['\w+'\]|L__\w+___|G\['\w+'\])\.?")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_OWN_FRAMES = tuple(os.path.join(_PACKAGE, room) for room in ("runtime", "integrations"))
_LONGEST_SIZE = 48
_UNSAFE = re.compile(r"[^\w.\-:<>/ \[\]]")


class SymbolNames:
    """Names symbols ``s0, s1, …`` in order of first sight."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def know(self, names: Mapping[str, str], taken: Iterable[str]) -> None:
        """Use ``names`` (symbol → the parameter that it is), and none that is ``taken``."""
        self._names = {**names, **self._names}
        self._taken |= {*taken, *names.values()}

    def _name(self, symbol: str) -> str:
        if symbol not in self._names:
            numbers = itertools.count(len(self._names))
            self._names[symbol] = next(
                name for n in numbers if (name := f"s{n}") not in self._taken
            )
            self._taken.add(self._names[symbol])
        return self._names[symbol]

    def __call__(self, size: object) -> str:
        if isinstance(size, int) and not isinstance(size, torch.SymInt):
            return str(size)
        text = tidy(str(size)) if isinstance(size, torch.SymInt) else str(size)
        return re.sub(r"\b[usz]\d+\b", lambda found: self._name(found.group()), text)


def tidy(size: str) -> str:
    """A computed size without the brackets that sympy writes for care: ``4*(s0//16)``."""
    try:
        text = ast.unparse(ast.parse(size, mode="eval"))
    except (SyntaxError, ValueError):
        text = size
    for sign in ("*", "//"):
        text = text.replace(f" {sign} ", sign)
    return text if len(text) <= _LONGEST_SIZE else "…"


def graph_of(gm: torch.fx.GraphModule, name: str) -> torch.fx.GraphModule:
    """The graph that a call of submodule ``name`` runs."""
    found = gm.get_submodule(name)
    assert isinstance(found, torch.fx.GraphModule)
    return found


def nodes_of(gm: torch.fx.GraphModule, names: Iterable[str]) -> Iterator[tuple[str, torch.fx.Node]]:
    """Every node of the submodules ``names``, each with the name of its submodule."""
    return ((name, node) for name in names for node in graph_of(gm, name).graph.nodes)


def results_of(graph: torch.fx.Graph) -> list[object]:
    """What ``graph`` returns; a single value is a list of one."""
    returned = graph.output_node().args[0]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]


def value_of(node: torch.fx.Node) -> object:
    """The fake value that tracing recorded for ``node``, or None."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    return node.meta.get("val")


def module_path(node: torch.fx.Node) -> str:
    """The innermost module that ran ``node``: ``layers.3.self_attn``; "" when unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = next(reversed(stack.values()))
    return dotted_path(entry[0] if isinstance(entry, tuple) else str(entry))


def dotted_path(source: str) -> str:
    """The module that Dynamo calls ``source`` (``L['model'].layers[3]``)."""
    path = _SUBSCRIPT.sub(r".\1", _ROOT.sub("", source.replace("._modules", "")))
    return _comment_safe(path.strip("."))


def source_line(node: torch.fx.Node) -> str:
    """``file.py:41``, the innermost user frame recorded for ``node``; "" when unknown."""
    frame = _user_frame(node)
    if frame is None:
        return ""
    return f"{_comment_safe(os.path.basename(frame['file']))}:{frame['line']}"


def source_code(node: torch.fx.Node) -> str:
    """The line that `source_line` names, if it is a whole ASCII statement; else ""."""
    frame = _user_frame(node)
    if frame is None:
        return ""
    code = frame.string[frame.end() :].partition("\n")[2].partition("\n")[0].strip()
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    return code if code.isascii() and code.isprintable() and not _FRAME.match(code) else ""


def _user_frame(node: torch.fx.Node) -> re.Match[str] | None:
    """The innermost frame that was recorded for ``node``."""
    trace = node.meta.get("stack_trace")
    frames = _FRAME.finditer(trace) if isinstance(trace, str) else iter(())
    users = [each for each in frames if not each["file"].startswith(_OWN_FRAMES)]
    return users[-1] if users else None


def node_where(node: torch.fx.Node) -> str:
    """How errors name a node: ``node %add_1, model.py:41``."""
    line = source_line(node)
    return f"node %{ascii(node.name)[1:-1]}" + (f", {line}" if line else "")


def origin_of(node: torch.fx.Node, symbols: SymbolNames) -> ir.Origin:
    shapes = shapes_of([node], symbols)
    return ir.Origin(module_path(node), source_line(node), shapes, source_code(node))


def origin_of_piece(piece: torch.fx.GraphModule, symbols: SymbolNames) -> ir.Origin:
    """Origin of a submodule: its first and last module path or line, and its results."""
    nodes = [n for n in piece.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    paths = list(filter(None, map(module_path, nodes)))
    lines = filter(None, map(source_line, nodes if len(nodes) == 1 or not paths else []))
    outputs = [n for n in results_of(piece.graph) if isinstance(n, torch.fx.Node)]
    return ir.Origin(_from_to(paths), _from_to(list(lines)), shapes_of(outputs, symbols))


def _from_to(places: Sequence[str]) -> str:
    return " … ".join(dict.fromkeys((places[0], places[-1]))) if places else ""


def shapes_of(nodes: Iterable[torch.fx.Node], symbols: Callable[[object], str]) -> str:
    """Types of what ``nodes`` yield, tensors with their shapes: ``f32[1, s0, 64], i64[4]``."""
    found: list[str] = []
    for node in nodes:
        value = value_of(node)
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, torch.Tensor):
                found.append(short_type(each, symbols))
            elif isinstance(each, torch.SymInt):
                found.append(f"int {symbols(each)}")
    return ", ".join(found)


def _comment_safe(text: str) -> str:
    """No character that could end a comment or disguise it survives."""
    return _UNSAFE.sub("?", ascii(text)[1:-1])
