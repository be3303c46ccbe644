"""Layers that are alike, traced once as torch's nested compile regions, then written out.

Torch traces a region again where what it guarded of the first does not hold of the next.
"""

import contextlib
import copy
import logging
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.errors import CaptureError
from piecework.runtime import torch_compat

_log = logging.getLogger(__name__)


class RegionError(CaptureError):
    """A call of a region that can't be written out: every layer is traced then."""


@dataclass(slots=True)
class RepeatedLayers:
    """The layers of a model that a trace may go through once."""

    names: Sequence[str] = ()
    text: str = ""  # what became of it, for the report
    _failed: bool = False
    _marks: dict[Any, tuple[Callable[..., object], object]] = field(default_factory=dict)

    @contextlib.contextmanager
    def marked(self, model: Callable[..., object]) -> Iterator[None]:
        """Mark the layers' classes for the block, which traces ``model``, alone among threads."""
        kinds = [] if self._failed else self._classes(model)
        with torch_compat.one_trace_at_a_time() if kinds else contextlib.nullcontext():
            try:
                for kind in kinds:
                    mark = torch_compat.compile_region(kind.forward)
                    if mark is None:
                        self.text = "every layer was traced: this torch shares no traces"
                        break
                    self._marks[kind] = mark, vars(kind).get("forward")
                    kind.forward = mark
                yield
            finally:
                self._unmark()

    def _classes(self, model: Callable[..., object]) -> list[Any]:
        """The classes of which two layers are called; none of torch's own."""
        if not self.names or not isinstance(model, torch.nn.Module):
            return []
        modules = dict(model.named_modules(remove_duplicate=False))
        held = [each for name in self.names if name in modules for each in modules[name].children()]
        found = [
            kind
            for kind, count in Counter(map(type, held)).items()
            if count > 1 and isinstance(kind.forward, types.FunctionType)
            if kind.__module__.partition(".")[0] != "torch"
        ]
        if not found:
            self.text = f"every layer was traced: no module {' or '.join(self.names)} holds two of one class"
        return found

    def _unmark(self) -> None:
        """Take the marks off, unless somebody put something else in their place."""
        while self._marks:
            kind, (mark, own) = self._marks.popitem()
            if vars(kind).get("forward") is mark:
                del kind.forward
                if own is not None:
                    kind.forward = own

    def write_out(self, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """``gm`` with regions' nodes in place of their calls, for the backend; takes marks off."""
        torch_compat.guard_past_marks([mark for mark, _ in self._marks.values()])
        self._unmark()
        calls = torch_compat.region_calls(gm.graph)
        if not calls:
            return gm
        flat = torch_compat.graph_module(gm, copy.deepcopy(gm.graph))
        flat.meta = gm.meta
        if not torch_compat.guard_alike(_inlined(flat)):
            raise RegionError("this torch does not let what was traced once be guarded of all")
        _Refaked(flat).run()
        shared = len(calls) - len({str(call.args[1]) for call in calls})
        self.text = f"one trace served {shared} of {len(calls)} repeated layers"
        return flat

    def gave_up(self, error: Exception) -> bool:
        """Whether a trace may have failed because of the marks, so that one without them may do."""
        if self._failed or not self.names or torch_compat.data_dependent(error):
            return False
        self._failed = True
        self.text = f"every layer was traced: {str(error).splitlines()[0].partition('. Hint')[0]}"
        _log.info("repeated layers are traced one by one: %s", error)
        return True


def _inlined(gm: torch.fx.GraphModule) -> dict[int, int]:
    """Put the nodes of regions in the place of calls; untraced modules → the traced one."""
    alike: dict[int, int] = {}
    first: dict[str, torch.fx.Node] = {}
    while calls := torch_compat.region_calls(gm.graph):
        for call in calls:
            traced = first.setdefault(str(call.args[0].target), call)  # type: ignore[union-attr]
            one, other = torch_compat.module_of(traced), torch_compat.module_of(call)
            if one is None or other is None:
                raise RegionError("torch does not say which module called a region")
            if one != other:
                alike[other] = one
            _inline(gm, call, traced)
    for node in list(gm.graph.find_nodes(op="get_attr")):
        if not node.users:
            gm.graph.erase_node(node)
    gm.delete_all_unused_submodules()
    gm.recompile()
    return alike


def _inline(gm: torch.fx.GraphModule, call: torch.fx.Node, traced: torch.fx.Node) -> None:
    """Copy the nodes of a body, which was traced for the call ``traced``, before a call of it."""
    body: Any = gm.get_submodule(str(call.args[0].target))  # type: ignore[union-attr]
    given = zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True)
    nodes: dict[torch.fx.Node, Any] = dict(given)
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            made = nodes[node] = gm.graph.node_copy(node, nodes.__getitem__)
            made.meta = dict(node.meta)
            if node.op == "get_attr":
                made.target = _attribute(gm, str(node.target), getattr(body, str(node.target)))
            _place(made, call, traced)
    (results,) = torch.fx.node.map_arg(body.graph.output_node().args, nodes.__getitem__)
    for user in list(call.users):
        if user.target is not operator.getitem:
            raise RegionError("the results of a region are taken in a way of their own")
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def _attribute(gm: torch.fx.GraphModule, name: str, value: object) -> str:
    """The name that an attribute of a body has in the whole graph."""
    wanted, number = name, 0
    while getattr(gm, wanted, value) is not value:
        number += 1
        wanted = f"{name}_{number}"
    setattr(gm, wanted, value)
    return wanted


def _place(made: torch.fx.Node, call: torch.fx.Node, traced: torch.fx.Node) -> None:
    """Say of a node that it is this call's, where the body says that it is the traced call's."""
    stack = made.meta.get("nn_module_stack")
    own, first = (each.meta.get("nn_module_stack") for each in (call, traced))
    if not stack or not own or not first or own is first:
        return
    before, after = list(first.values())[-1][0], list(own.values())[-1][0]
    moved = {k: (at.replace(before, after, 1), kind) for k, (at, kind) in stack.items()}
    made.meta["nn_module_stack"] = {**own, **{k: v for k, v in moved.items() if k not in first}}


class _Refaked(torch.fx.Interpreter):
    """Gives each node of a flat graph its fake value: memory is shared as the nodes share it."""

    def run(self) -> None:  # type: ignore[override]
        inputs = [each.meta["example_value"] for each in self.graph.find_nodes(op="placeholder")]
        with torch_compat.on_fakes(inputs):
            super().run(*inputs)

    def run_node(self, n: torch.fx.Node) -> Any:
        traced = n.meta.get("example_value")
        if n.op == "get_attr" and traced is not None:
            return traced
        if n.meta.get("unbacked_bindings"):
            raise RegionError("beside regions there is a size that depends on data")
        value = super().run_node(n)
        if traced is not None and _shapes(traced) != _shapes(value):
            raise RegionError(f"{n.name} has another shape than was traced")
        if traced is not None and n.op != "placeholder":
            n.meta["example_value"] = value
        return value


def _shapes(value: object) -> list[str]:
    return [str(each.shape) for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]
