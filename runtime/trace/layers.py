"""Layers that are alike, traced once as torch's nested compile regions, whose calls are then written out.

Torch traces a region again where what it guarded of the first does not hold of the next.
"""

from __future__ import annotations

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
    """The layers of a model that a trace may go through once.

    Args:
        names: dotted names of the modules whose children they are.

    Attributes:
        text: what became of it, for the report.
    """

    names: Sequence[str] = ()
    text: str = ""
    _failed: bool = False
    _marks: dict[type, tuple[Callable[..., object], object]] = field(default_factory=dict)

    @contextlib.contextmanager
    def marked(self, model: Callable[..., object]) -> Iterator[None]:
        """Mark the classes of the layers for the block, which traces ``model``; no other thread traces meanwhile."""
        kinds = [] if self._failed else self._classes(model)
        if not kinds:
            yield
            return
        with torch_compat.one_trace_at_a_time():
            try:
                for kind in kinds:
                    self._mark(kind)
                yield
            finally:
                self._unmark()

    def _classes(self, model: Callable[..., object]) -> list[type]:
        """The classes of which two layers are called; none of torch's own."""
        if not self.names or not isinstance(model, torch.nn.Module):
            return []
        modules = dict(model.named_modules(remove_duplicate=False))
        held = [each for name in self.names if name in modules for each in modules[name].children()]
        counts = Counter(type(each) for each in held)
        found = [kind for kind, count in counts.items() if count > 1 and _can_be_marked(kind)]
        if not found:
            self.text = f"every layer was traced: no module {' or '.join(self.names)} holds two of one class"
        return found

    def _mark(self, kind: type) -> None:
        mark = torch_compat.compile_region(kind.forward)  # type: ignore[attr-defined]
        if mark is None:
            self.text = "every layer was traced: this torch shares no traces"
            return
        self._marks[kind] = mark, vars(kind).get("forward")
        kind.forward = mark  # type: ignore[attr-defined]

    def _unmark(self) -> None:
        """Take the marks off, unless somebody put something else in their place."""
        while self._marks:
            kind, (mark, own) = self._marks.popitem()
            if vars(kind).get("forward") is not mark:
                continue
            if own is None:
                del kind.forward  # type: ignore[attr-defined]
            else:
                kind.forward = own  # type: ignore[attr-defined]

    def write_out(self, gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """``gm`` with the nodes of each region in the place of its calls; for the backend of the trace, which takes the marks off.

        Raises:
            RegionError: a call can't be written out.
        """
        torch_compat.guard_past_marks([mark for mark, _ in self._marks.values()])
        self._unmark()
        calls = torch_compat.region_calls(gm.graph)
        if not calls:
            return gm
        bodies = {str(call.args[1]) for call in calls}
        flat = _FlatGraph(torch_compat.graph_module(gm, copy.deepcopy(gm.graph)))
        flat.gm.meta = gm.meta
        flat.write_out()
        if not torch_compat.guard_alike(flat.alike):
            raise RegionError("this torch does not let what was traced once be guarded of all")
        self.text = f"one trace served {len(calls) - len(bodies)} of {len(calls)} repeated layers"
        return flat.gm

    def gave_up(self, error: Exception) -> bool:
        """Whether a trace may have failed because of the marks, so that one without them may do."""
        if self._failed or not self.names or torch_compat.data_dependent(error):
            return False
        self._failed = True
        self.text = f"every layer was traced: {_reason(error)}"
        _log.info("repeated layers are traced one by one: %s", error)
        return True


def _reason(error: Exception) -> str:
    """Why a trace of regions failed, shortly."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(getattr(cause, "inner_exception", cause), KeyError) or "KeyError" in str(
            cause
        ):
            return "a layer fixes a size that is dynamic before it; mark the dynamic dimensions of the example"
        cause = cause.__cause__
    return str(error).partition("\n")[0].partition(". Hint")[0]


def _can_be_marked(kind: type) -> bool:
    forward = getattr(kind, "forward", None)
    return isinstance(forward, types.FunctionType) and kind.__module__.partition(".")[0] != "torch"


@dataclass(slots=True)
class _FlatGraph:
    """A graph whose calls of regions are written out.

    Attributes:
        gm: the graph, changed in place.
        alike: modules that were not traced → the one that was, by identity.
    """

    gm: torch.fx.GraphModule
    alike: dict[int, int] = field(default_factory=dict)
    _first: dict[str, torch.fx.Node] = field(default_factory=dict)

    def write_out(self) -> None:
        while calls := torch_compat.region_calls(self.gm.graph):
            for call in calls:
                self._inline(call)
        for node in list(self.gm.graph.find_nodes(op="get_attr")):
            if not node.users:
                self.gm.graph.erase_node(node)
        self.gm.delete_all_unused_submodules()
        self.gm.recompile()

    def _inline(self, call: torch.fx.Node) -> None:
        name = str(call.args[0].target)  # type: ignore[union-attr]
        body: torch.fx.GraphModule = self.gm.get_submodule(name)  # type: ignore[assignment]
        first = self._first.setdefault(name, call)
        if first is not call:
            self._note_alike(first, call)
        copied = _Copy(self.gm, body, call, first)
        results = copied.nodes()
        for user in list(call.users):
            if user.target is not operator.getitem:
                raise RegionError("the results of a region are taken in a way of their own")
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            self.gm.graph.erase_node(user)
        self.gm.graph.erase_node(call)

    def _note_alike(self, first: torch.fx.Node, call: torch.fx.Node) -> None:
        one, other = torch_compat.module_of(first), torch_compat.module_of(call)
        if one is None or other is None:
            raise RegionError("torch does not say which module called a region")
        if one != other:
            self.alike[other] = one


@dataclass(slots=True)
class _Copy:
    """The nodes of one call of a region, made from those of its body.

    Args:
        gm: where they are put, before ``call``.
        first: the call that the body was traced for.
    """

    gm: torch.fx.GraphModule
    body: torch.fx.GraphModule
    call: torch.fx.Node
    first: torch.fx.Node
    _env: dict[torch.fx.Node, torch.fx.Node] = field(default_factory=dict)
    _memory: torch_compat.MemoryLike = field(default_factory=torch_compat.MemoryLike)

    def nodes(self) -> Sequence[Any]:
        """Write them; returns what stands for each result."""
        graph = self.body.graph
        operands = self.call.args[2:]
        for old, new in zip(graph.find_nodes(op="placeholder"), operands, strict=True):
            self._note(old, new)  # type: ignore[arg-type]
            self._env[old] = new  # type: ignore[assignment]
        (results,) = graph.output_node().args
        known = dict(zip(results, _value(self.call), strict=True))  # type: ignore[arg-type, call-overload]
        for old, value in known.items():
            if isinstance(old, torch.fx.Node) and not self._memory.is_like(_value(old), value):
                raise RegionError("the results of a region share memory in another way than traced")
        values = [*map(_value, self.call.all_input_nodes), *pytree.tree_leaves(_value(self.call))]
        mode = torch_compat.fake_mode_of(values)
        with mode, torch.no_grad(), torch_compat.no_new_guards(mode):
            for node in graph.nodes:
                if node.op not in ("placeholder", "output"):
                    self._env[node] = self._copy(node, known)
        return pytree.tree_map_only(torch.fx.Node, self._env.__getitem__, results)  # type: ignore[no-any-return]

    def _note(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        one, other = _value(old), _value(new)
        if not self._memory.is_like(one, other):
            raise RegionError("the inputs of a region share memory in another way than traced")
        if _kind(one) != _kind(other):
            raise RegionError("the inputs of a region are not of the kinds that were traced")

    def _copy(self, node: torch.fx.Node, known: dict[Any, Any]) -> torch.fx.Node:
        if node.meta.get("unbacked_bindings") and self.call is not self.first:
            raise RegionError("a region has a size that depends on data")
        with self.gm.graph.inserting_before(self.call):
            made = self.gm.graph.node_copy(node, self._env.__getitem__)
        made.meta = dict(node.meta)
        if node.op == "get_attr":
            made.target = self._attribute(str(node.target))
        if node in known:
            made.meta["example_value"] = known[node]
        elif "example_value" in node.meta:
            made.meta["example_value"] = pytree.tree_map_only(
                torch.Tensor, self._memory.tensor, _value(node)
            )
        self._place(made)
        return made

    def _attribute(self, name: str) -> str:
        """The name that an attribute of the body has in the whole graph."""
        value = getattr(self.body, name)
        wanted, number = name, 0
        while getattr(self.gm, wanted, value) is not value:
            number += 1
            wanted = f"{name}_{number}"
        setattr(self.gm, wanted, value)
        return wanted

    def _place(self, made: torch.fx.Node) -> None:
        """Say of a node that it is this call's, where the body says that it is the first call's."""
        stack = made.meta.get("nn_module_stack")
        own, first = (each.meta.get("nn_module_stack") for each in (self.call, self.first))
        if not stack or not own or not first or own is first:
            return
        before, after = list(first.values())[-1][0], list(own.values())[-1][0]
        moved: dict[str, object] = dict(own)
        for key, (path, kind) in stack.items():
            if key not in first:
                moved[key] = path.replace(before, after, 1), kind
        made.meta["nn_module_stack"] = moved


def _kind(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return str(value)
    sizes = [str(each) for each in (*value.shape, *value.stride(), value.storage_offset())]
    return value.dtype, value.device, sizes


def _value(node: object) -> Any:
    return node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node
