"""Regions of state that a graph opens and closes: autocast, gradient and inference mode.

State belongs to the thread, not to the graph: a region that stayed open from one piece to another would be lost by a compiled piece, and one that an
exception leaves open changes everything that the thread does later. So each submodule opens and closes its own, and emitted text closes in ``finally``.
Any other state (a level of ``torch.func``, the default dtype) stays inside of one piece: a graph is not cut there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.fx
from torch.fx.node import Argument

from piecework.codegen.graph.origin import node_where
from piecework.errors import SplitError


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of state.

    Attributes:
        name: what messages call it.
        enter, leave: torch's functions that open and close a region. One function for a setting: it is set, and set again to what it was.
        whole: a region may not be cut.
        in_pieces: compiled pieces open it too. Inference mode changes no value, only what may be recorded of them, and
            compilers can't trace it.
    """

    name: str
    enter: str
    leave: str
    whole: bool = True
    in_pieces: bool = True

    @property
    def is_setting(self) -> bool:
        return self.enter == self.leave


# fmt: off
_KINDS = (
    Kind("autocast", "_enter_autocast", "_exit_autocast", whole=False),
    Kind("gradient mode", "_set_grad_enabled", "_set_grad_enabled", whole=False),
    Kind("inference mode", "_enter_inference_mode", "_exit_inference_mode", whole=False, in_pieces=False),
    Kind("torch.vmap", "_vmap_increment_nesting", "_vmap_decrement_nesting"),
    Kind("torch.func.grad", "_grad_increment_nesting", "_grad_decrement_nesting"),
    Kind("torch.func.jvp", "_jvp_increment_nesting", "_jvp_decrement_nesting"),
    Kind("torch.func.functionalize", "_func_increment_nesting", "_func_decrement_nesting"),
    Kind("the torch.func stack", "pop_dynamic_layer_stack", "push_dynamic_layer_stack"),
    Kind("forward-mode differentiation", "_enter_dual_level", "_exit_dual_level"),
    Kind("the current device", "_exchange_device", "_maybe_exchange_device"),
    Kind("the current device", "_accelerator_exchangeDevice", "_accelerator_maybeExchangeDevice"),
    Kind("a profiler range", "_record_function_enter_new", "_record_function_exit"),
    Kind("a profiler range", "_record_function_enter", "_record_function_exit"),
    Kind("saved-tensor hooks", "_saved_tensors_hooks_disable", "_saved_tensors_hooks_enable"),
    *(Kind(f"the state of {name}", name, name) for name in (
        "_set_fwd_grad_enabled", "set_default_dtype", "_set_default_dtype", "_set_deterministic_algorithms", "use_deterministic_algorithms",
        "set_float32_matmul_precision", "_set_float32_matmul_precision", "_sdpa_kernel", "set_inplace_requires_grad_allowed",
    )),
)
# fmt: on
_ENTERS = {kind.enter: kind for kind in _KINDS}
_LEAVES = frozenset(kind.leave for kind in _KINDS)


def _state(node: torch.fx.Node) -> str:
    """The function of torch that ``node`` opens or closes a region with; "" for any other node."""
    name = getattr(node.target, "__name__", None) if node.op == "call_function" else None
    if type(name) is not str or (name := name.partition(".")[0]) not in _ENTERS.keys() | _LEAVES:
        return ""  # an overload is called op.overload
    module = getattr(node.target, "__module__", None) or ""
    return name if module.partition(".")[0] == "torch" else ""


@dataclass(eq=False, slots=True)
class Region:
    """A stretch of a graph in one state: the node that opens it, and the one that closes it."""

    kind: Kind
    enter: torch.fx.Node
    leave: torch.fx.Node


def regions_in(graph: torch.fx.Graph) -> list[Region]:
    """The regions of ``graph``; each lies inside of another or beside it.

    Raises:
        SplitError: a region is not closed, is closed twice, or overlaps with another.
    """
    finals = {name: node for node in graph.nodes if (name := _state(node))}
    found: list[Region] = []
    stack: list[Region] = []
    for node in graph.nodes if finals else ():
        name = _state(node)
        kind, last = _ENTERS.get(name), stack[-1] if stack else None
        inside = kind is not None and kind.is_setting and any(each.kind is kind for each in stack)
        if inside and not _same_call(node, finals[name]):
            continue  # set again inside the region
        if kind is not None and not inside:
            stack.append(Region(kind, node, node))
            continue
        if not name:
            continue
        if last is None or last.kind.leave != name or _closes_another(node, last):
            raise _unbalanced(name, node, "is closed where it is not the last one opened")
        last.leave = stack.pop().leave = node
        if not (node.users or any(last.enter < each for each in node.all_input_nodes)):
            found.append(last)
        elif not last.kind.whole:
            why = "is closed with a value that is made inside of it, or for its result"
            raise _unbalanced(name, node, why)
    if stack:
        raise _left_open(stack[-1])
    return found


def _left_open(region: Region) -> SplitError:
    name = region.kind.name
    return SplitError(
        f"the model changes {name} and does not change it back, which compiled pieces can't do to their caller",
        where=node_where(region.enter),
        hint=f"set {name} with a with-statement, or outside of the model",
    )


def _closes_another(node: torch.fx.Node, region: Region) -> bool:
    """Whether a call that closes a region is handed what opened another one."""
    given = node.args[0] if node.args else None
    node_given = isinstance(given, torch.fx.Node) and not region.kind.is_setting
    return node_given and given is not region.enter


def _unbalanced(name: str, node: torch.fx.Node, what: str) -> SplitError:
    return SplitError(
        f"a region that {name} closes {what}, so that an exception would leave it open",
        where=node_where(node),
        hint="set it with a with-statement",
    )


def _same_call(left: torch.fx.Node, right: torch.fx.Node) -> bool:
    """Two nodes that call the same with the same constants."""
    calls = [(each.target, each.args, dict(each.kwargs)) for each in (left, right)]
    return left is right or repr(calls[0]) == repr(calls[1])


# --- across cuts ---------------------------------------------------------------------------------


class Regions:
    """The regions of a graph that is cut.

    Attributes:
        borders: the nodes that open and close regions; each piece has its own. Regions that are not cut stay where they are.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        """Read ``graph``.

        Raises:
            SplitError: something is entered or set, and not left or set back.
        """
        self.borders: set[torch.fx.Node] = set()
        self._around: dict[torch.fx.Node, tuple[Region, ...]] = {}
        states = [(name, node) for node in graph.nodes if (name := _state(node))]
        finals, calls = dict(states), Counter(name for name, _ in states)
        now: list[Region] = []
        for node in graph.nodes if states else ():
            name = _state(node)
            if name:
                own = [each for each in now if each.kind.leave == name]
                own = [each for each in own if not _closes_another(node, each)]
                kind = own[-1].kind if own else _ENTERS.get(name)
                if kind is None:
                    raise _unbalanced(name, node, "was not opened")
                if not kind.whole:
                    self.borders.add(node)
                place = now.index(own[-1]) if own else len(now)
                if kind.is_setting:
                    # It is set last to what it was before; whatever else is set in between is a region.
                    back = calls[name] > 1 and _same_call(node, finals[name])
                    now[place : place + 1] = [] if back else [Region(kind, node, finals[name])]
                elif own:
                    now.pop(place).leave = node
                else:
                    now.append(Region(kind, node, node))
            self._around[node] = tuple(now)
        if now:
            raise _left_open(now[-1])
        self.borders |= _feeding_only(self.borders)

    def around(self, node: torch.fx.Node) -> tuple[Region, ...]:
        """The regions that are open at ``node`` and may be cut, outermost first."""
        return tuple(each for each in self._around.get(node, ()) if not each.kind.whole)

    def may_cut(self, node: torch.fx.Node) -> bool:
        """Whether a graph can be cut before ``node``."""
        return not any(region.kind.whole for region in self._around.get(node, ()))

    def refuse_cuts(self, splitting: Iterable[torch.fx.Node]) -> None:
        """Check that no splitting op is inside a region that can't be cut.

        Raises:
            SplitError: one is.
        """
        for node in splitting:
            for region in self._around.get(node, ()):
                if region.kind.whole:
                    raise SplitError(
                        f"splitting op {node.target} is called inside {region.kind.name}, which is kept in one compiled piece",
                        where=node_where(node),
                        hint=f"call the operator outside of {region.kind.name}, or leave it out of the splitting ops",
                    )


def _feeding_only(borders: set[torch.fx.Node]) -> set[torch.fx.Node]:
    """Calls without operands whose results only open or close regions."""
    inputs = {source for node in borders for source in node.all_input_nodes} - borders
    return {
        node
        for node in inputs
        if node.op == "call_function"
        and not node.all_input_nodes
        and all(user in borders for user in node.users)
    }


class RegionWriter:
    """Opens and closes regions in the graph of a submodule, so that each node that is written next runs in its own."""

    def __init__(self, regions: Regions, graph: torch.fx.Graph, *, splitting: bool) -> None:
        self._regions, self._graph, self._splitting = regions, graph, splitting
        self._open: list[tuple[Region, tuple[Argument, ...], dict[str, Argument]]] = []

    def move_to(self, node: torch.fx.Node) -> None:
        wanted = self._regions.around(node)
        wanted = tuple(each for each in wanted if self._splitting or each.kind.in_pieces)
        pairs = zip(wanted, self._open, strict=False)
        common = len([*itertools.takewhile(lambda pair: pair[0] is pair[1][0], pairs)])
        self.close(common)
        for region in wanted[common:]:
            self._enter(region)

    def close(self, depth: int = 0) -> None:
        """Close all regions but ``depth``."""
        while len(self._open) > depth:
            region, args, kwargs = self._open.pop()
            self._graph.call_function(region.leave.target, args, kwargs)  # type: ignore[arg-type]

    def _enter(self, region: Region) -> None:
        """Open ``region``; whatever closing it takes is written first, so that it can be closed at any time."""
        copied: dict[torch.fx.Node, torch.fx.Node] = {}
        for source in (*region.leave.all_input_nodes, *region.enter.all_input_nodes):
            if source is region.enter or source in copied:
                continue
            if source.all_input_nodes or source.op != "call_function":
                raise SplitError(
                    f"{region.kind.name} is set to a value that the graph computes",
                    where=node_where(region.enter),
                    hint="set it to a constant",
                )
            copied[source] = self._graph.node_copy(source)
        copied[region.enter] = self._graph.node_copy(region.enter, lambda n: copied[n])
        left = (region.leave.args, region.leave.kwargs)
        args, kwargs = torch.fx.node.map_arg(left, lambda n: copied[n])
        self._open.append((region, args, kwargs))
