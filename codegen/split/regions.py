"""Regions of state that a graph opens and closes: autocast, gradient mode, torch.func.

State is the thread's: each submodule opens and closes autocast, gradient and inference mode for
itself, in a ``finally``; a graph is not cut inside of any other.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.fx
from torch.fx.node import Argument

from piecework.codegen.graph.origin import node_where
from piecework.errors import SplitError

# torch's functions that open a region, and those that close it.
_PAIRS = {
    "_enter_autocast": "_exit_autocast",
    "_enter_inference_mode": "_exit_inference_mode",
    "_vmap_increment_nesting": "_vmap_decrement_nesting",
    "_grad_increment_nesting": "_grad_decrement_nesting",
    "_jvp_increment_nesting": "_jvp_decrement_nesting",
    "_func_increment_nesting": "_func_decrement_nesting",
    "pop_dynamic_layer_stack": "push_dynamic_layer_stack",
    "_enter_dual_level": "_exit_dual_level",
    "_exchange_device": "_maybe_exchange_device",
    "_accelerator_exchangeDevice": "_accelerator_maybeExchangeDevice",
    "_record_function_enter_new": "_record_function_exit",
    "_record_function_enter": "_record_function_exit",
    "_saved_tensors_hooks_disable": "_saved_tensors_hooks_enable",
}
# What is set, and set again to what it was before.
_SETTINGS = frozenset(
    [
        *("_set_grad_enabled", "_set_fwd_grad_enabled", "set_inplace_requires_grad_allowed"),
        *("set_default_dtype", "_set_default_dtype", "_sdpa_kernel"),
        *("use_deterministic_algorithms", "_set_deterministic_algorithms"),
        *("set_float32_matmul_precision", "_set_float32_matmul_precision"),
    ]
)
_STATE = _SETTINGS | _PAIRS.keys() | {*_PAIRS.values()}
_CUT = ("_enter_autocast", "_enter_inference_mode", "_set_grad_enabled")


@dataclass(eq=False, slots=True)
class Region:
    """A stretch of a graph in one state."""

    name: str
    enter: torch.fx.Node
    leave: torch.fx.Node

    @property
    def may_cut(self) -> bool:
        return self.name in _CUT


def _state(node: torch.fx.Node) -> str:
    """The function of torch that ``node`` opens or closes a region with; "" for any other node."""
    name = getattr(node.target, "__name__", None) if node.op == "call_function" else None
    if type(name) is not str or (name := name.partition(".")[0]) not in _STATE:
        return ""  # an overload is called op.overload
    module = getattr(node.target, "__module__", None) or ""
    return name if module.partition(".")[0] == "torch" else ""


def _closes_another(node: torch.fx.Node, region: Region) -> bool:
    """Whether a call that closes a region is handed what opened another one."""
    given = node.args[0] if node.args and region.name not in _SETTINGS else None
    return isinstance(given, torch.fx.Node) and given is not region.enter


def _unbalanced(what: str, node: torch.fx.Node) -> SplitError:
    return SplitError(
        f"the model {what}, which compiled pieces can't do to their caller",
        where=node_where(node),
        hint="set it with a with-statement, or outside of the model",
    )


class Regions:
    """The regions of a graph."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        """Read ``graph``."""
        self.closed: list[Region] = []
        self.borders: set[torch.fx.Node] = set()
        self.crossing: torch.fx.Node | None = None  # it closes a region that is not the last one
        self._around: dict[torch.fx.Node, tuple[Region, ...]] = {}
        states = {node: name for node in graph.nodes if (name := _state(node))}
        finals = {name: repr((node.args, node.kwargs)) for node, name in states.items()}
        calls, now = Counter(states.values()), list[Region]()
        for node in graph.nodes if states else ():
            name = states.get(node, "")
            own = [each for each in now if _PAIRS.get(each.name, each.name) == name]
            own = [each for each in own if not _closes_another(node, each)]
            # A setting is set last to what it was before.
            back = calls[name] > 1 and repr((node.args, node.kwargs)) == finals[name]
            if name in _PAIRS or (name in _SETTINGS and not own and not back):
                now.append(Region(name, node, node))
                own = now[-1:]
            elif own and (back or name not in _SETTINGS):
                self._close(now, own[-1], node)
            elif name and name not in _SETTINGS:
                raise _unbalanced(f"calls {name} without what opens its region", node)
            if (own and own[-1].may_cut) or name in _CUT:
                self.borders.add(node)
            self._around[node] = tuple(now)
        if now:
            raise _unbalanced(f"calls {now[-1].name} and does not change it back", now[-1].enter)
        self.borders |= _feeding_only(self.borders)

    def _close(self, now: list[Region], region: Region, node: torch.fx.Node) -> None:
        region.leave = node
        if region is not now[-1]:
            self.crossing = self.crossing or node
        now.remove(region)
        if not (node.users or any(region.enter < each for each in node.all_input_nodes)):
            self.closed.append(region)
        elif region.may_cut:
            self.crossing = self.crossing or node

    def around(self, node: torch.fx.Node) -> tuple[Region, ...]:
        """The regions that are open at ``node`` and may be cut, outermost first."""
        return tuple(each for each in self._around.get(node, ()) if each.may_cut)

    def may_cut(self, node: torch.fx.Node) -> bool:
        """Whether a graph can be cut before ``node``."""
        return all(region.may_cut for region in self._around.get(node, ()))

    def refuse_cuts(self, splitting: Iterable[torch.fx.Node]) -> None:
        """Check that no splitting op is inside a region that can't be cut."""
        for node in splitting:
            for region in self._around.get(node, ()):
                if not region.may_cut:
                    raise SplitError(
                        f"splitting op {node.target} is called inside what {region.name} opens, which is kept in one compiled piece",
                        where=node_where(node),
                        hint="call the operator outside of it, or leave it out of the splitting ops",
                    )


def regions_in(graph: torch.fx.Graph) -> list[Region]:
    """The regions of ``graph`` that a ``finally`` can close."""
    regions = Regions(graph)
    if regions.crossing is not None:
        raise _unbalanced("closes a region inside of which another one is open", regions.crossing)
    return regions.closed


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
    """Opens and closes regions in the graph of a submodule."""

    def __init__(self, regions: Regions, graph: torch.fx.Graph, *, splitting: bool) -> None:
        self._regions, self._graph, self._splitting = regions, graph, splitting
        self._open: list[tuple[Region, tuple[Argument, ...], dict[str, Argument]]] = []

    def move_to(self, node: torch.fx.Node) -> None:
        wanted = self._regions.around(node)
        if not self._splitting:
            wanted = tuple(each for each in wanted if each.name != "_enter_inference_mode")
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
        """Open ``region``; whatever closing it takes is written first."""
        copied: dict[torch.fx.Node, torch.fx.Node] = {}
        for source in (*region.leave.all_input_nodes, *region.enter.all_input_nodes):
            if source is region.enter or source in copied:
                continue
            if source.all_input_nodes or source.op != "call_function":
                raise SplitError(
                    f"{region.name} is given a value that the graph computes",
                    where=node_where(region.enter),
                    hint="set it to a constant",
                )
            copied[source] = self._graph.node_copy(source)
        copied[region.enter] = self._graph.node_copy(region.enter, lambda n: copied[n])
        left = (region.leave.args, region.leave.kwargs)
        args, kwargs = torch.fx.node.map_arg(left, lambda n: copied[n])
        self._open.append((region, args, kwargs))
