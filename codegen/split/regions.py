"""Regions of state that a graph enters and leaves: autocast, gradient and inference mode, default dtype, ``torch.func`` levels. In: a graph. Out: which node opens a region and which closes it, and the regions around each node.

State belongs to the thread, not to the graph: a region that stayed open from one piece to another would be lost by a compiled
piece, and one that an exception leaves open changes everything that the thread does later. So each submodule opens and closes
its own, and emitted text closes in ``finally``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.fx.node import Argument

from piecework.codegen.graph.origin import node_where
from piecework.errors import SplitError, UnsupportedNode

Key = tuple[str, str]  # module and name of a function


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of state.

    Attributes:
        name: what messages call it.
        enters, exits: the functions that open and close a region. The same ones for a setting: it is set to a value, and
            set again to what it was.
        passes: the exit takes what the enter returned.
        whole: values inside can't leave, so a region may not be cut.
        in_pieces: compiled pieces open it too. Inference mode changes no value, only what may be recorded of them, and
            compilers can't trace it.
    """

    name: str
    enters: frozenset[Key]
    exits: frozenset[Key]
    passes: bool = False
    whole: bool = False
    in_pieces: bool = True

    @property
    def is_setting(self) -> bool:
        return self.enters == self.exits


def _pair(
    name: str, modules: str, enter: str, leave: str, *, whole: bool = False, in_pieces: bool = True
) -> Kind:
    """A region whose exit takes what its enter returned; ``modules``: where some torch release has the two."""
    places = modules.split()
    enters, exits = ({(m, f) for m in places for f in fs.split()} for fs in (enter, leave))
    return Kind(name, frozenset(enters), frozenset(exits), True, whole, in_pieces)


def _level(name: str, enter: str, leave: str) -> Kind:
    """A level of ``torch.func`` or of forward-mode differentiation: last in, first out."""
    places = ("torch._C._functorch", "torch._functorch.predispatch", "torch.autograd.forward_ad")
    enters, exits = (frozenset((m, f) for m in places for f in fs) for fs in ((enter,), (leave,)))
    return Kind(name, enters, exits, whole=True)


def _setting(name: str, *functions: Key) -> Kind:
    return Kind(name, frozenset(functions), frozenset(functions))


_DEVICES = "torch.cuda torch.xpu torch._C torch._C._accelerator"
# fmt: off
_KINDS = (
    _pair("autocast", "torch.amp.autocast_mode", "_enter_autocast", "_exit_autocast"),
    _pair("inference mode", "torch.autograd.grad_mode", "_enter_inference_mode", "_exit_inference_mode", in_pieces=False),
    _pair("the current device", _DEVICES, "_exchange_device", "_maybe_exchange_device"),
    _pair("the current device", _DEVICES, "_accelerator_exchangeDevice", "_accelerator_maybeExchangeDevice"),
    _pair("a profiler range", "torch._ops.profiler", "_record_function_enter_new _record_function_enter", "_record_function_exit"),
    _pair("the torch.func stack", "torch._C._functorch", "pop_dynamic_layer_stack", "push_dynamic_layer_stack", whole=True),
    _level("torch.vmap", "_vmap_increment_nesting", "_vmap_decrement_nesting"),
    _level("torch.func.grad", "_grad_increment_nesting", "_grad_decrement_nesting"),
    _level("torch.func.jvp", "_jvp_increment_nesting", "_jvp_decrement_nesting"),
    _level("torch.func.functionalize", "_func_increment_nesting", "_func_decrement_nesting"),
    _level("forward-mode differentiation", "_enter_dual_level", "_exit_dual_level"),
    _setting("gradient mode", ("torch._C", "_set_grad_enabled")),
    _setting("forward gradient mode", ("torch._C", "_set_fwd_grad_enabled")),
    _setting("the default dtype", ("torch", "set_default_dtype"), ("torch._C", "_set_default_dtype")),
    _setting("deterministic algorithms", ("torch._C", "_set_deterministic_algorithms"), ("torch", "use_deterministic_algorithms")),
    _setting("the precision of float32 products", ("torch", "set_float32_matmul_precision"), ("torch._C", "_set_float32_matmul_precision")),
    _setting("the attention backends", ("torch.nn.attention", "_sdpa_kernel")),
    _setting("saved-tensor hooks", ("torch._C._autograd", "_saved_tensors_hooks_disable"), ("torch._C._autograd", "_saved_tensors_hooks_enable")),
    _setting("in-place requires_grad_ under torch.func", ("torch._C._functorch", "set_inplace_requires_grad_allowed")),
)
# fmt: on
_ENTERS = {key: kind for kind in _KINDS for key in kind.enters}
_EXITS = {key: kind for kind in _KINDS for key in kind.exits}
_NAMES = frozenset(name for _, name in (*_ENTERS, *_EXITS))


def _kind_of(node: torch.fx.Node) -> Kind | None:
    """The kind of region that calling ``node`` opens, closes or sets."""
    name = getattr(node.target, "__name__", None) if node.op == "call_function" else None
    if type(name) is not str or (name := name.partition(".")[0]) not in _NAMES:
        return None  # an overload is called op.overload
    key = (getattr(node.target, "__module__", None), name)
    return _ENTERS.get(key) or _EXITS.get(key)  # type: ignore[arg-type]


def _opens(kind: Kind, node: torch.fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", "")).partition(".")[0]
    return (getattr(node.target, "__module__", ""), name) in kind.enters


def has_regions(graph: torch.fx.Graph) -> bool:
    """True if a node of ``graph`` opens a region or sets something."""
    kinds = ((each, _kind_of(each)) for each in graph.nodes)
    return any(kind is not None and _opens(kind, each) for each, kind in kinds)


def regions_in(graph: torch.fx.Graph) -> dict[torch.fx.Node, torch.fx.Node]:
    """Node that opens a region → node that closes it; regions are nested in each other.

    Raises:
        UnsupportedNode: a region is not closed, is closed twice, or overlaps with another.
    """
    found: dict[torch.fx.Node, torch.fx.Node] = {}
    finals = _final_settings(graph)
    stack: list[tuple[Kind, torch.fx.Node]] = []
    for node in graph.nodes:
        kind = _kind_of(node)
        if kind is None:
            continue
        is_open = any(each is kind for each, _ in stack)
        if kind.is_setting and is_open and not _same_call(node, finals[kind]):
            continue  # set again inside the region
        if not is_open if kind.is_setting else _opens(kind, node):
            stack.append((kind, node))
            continue
        last, entered = stack.pop() if stack else (None, node)
        if last is not kind or (kind.passes and node.args[:1] != (entered,)):
            raise _unbalanced(kind, node, "is closed where it is not the last one opened")
        if node.users or any(entered < each for each in node.all_input_nodes):
            why = "is closed with a value that is made inside of it, or for its result"
            raise _unbalanced(kind, node, why)
        found[entered] = node
    if stack:
        raise _unbalanced(*stack[-1], "is opened and not closed")
    return found


def _unbalanced(kind: Kind, node: torch.fx.Node, what: str) -> UnsupportedNode:
    return UnsupportedNode(
        f"a region of {kind.name} {what}, so that an exception would leave it open",
        where=node_where(node),
        hint=f"set {kind.name} with a with-statement",
    )


def _final_settings(graph: torch.fx.Graph) -> dict[Kind, torch.fx.Node]:
    """Setting → the node that sets it last, which is what it was before."""
    kinds = ((_kind_of(node), node) for node in graph.nodes)
    return {kind: node for kind, node in kinds if kind is not None and kind.is_setting}


def _same_call(left: torch.fx.Node, right: torch.fx.Node) -> bool:
    """Two nodes that call the same with the same constants."""
    calls = [(each.target, each.args, dict(each.kwargs)) for each in (left, right)]
    return left is right or repr(calls[0]) == repr(calls[1])


# --- across cuts ---------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Region:
    """A stretch of a graph in one state: the node that opens it, and the one that a piece closes it with."""

    kind: Kind
    enter: torch.fx.Node
    leave: torch.fx.Node | None = None


@dataclass(slots=True)
class Regions:
    """The nodes that open and close regions (``borders``), and the regions open at each other node, outermost first.

    Levels of ``torch.func`` are no borders: they stay where they are, and `refuse_cuts` sees that nothing is cut inside one.
    """

    borders: set[torch.fx.Node] = field(default_factory=set)
    _around: dict[torch.fx.Node, tuple[_Region, ...]] = field(default_factory=dict)
    _set_before: set[Kind] = field(default_factory=set)

    @classmethod
    def of(cls, graph: torch.fx.Graph) -> Regions:
        """Read ``graph``.

        Raises:
            SplitError: something is entered or set, and not left or set back.
        """
        found = cls()
        if has_regions(graph):
            found._read(graph)
        return found

    def _read(self, graph: torch.fx.Graph) -> None:
        finals = _final_settings(graph)
        open_now: list[_Region] = []
        for node in graph.nodes:
            kind = _kind_of(node)
            if kind is None or kind.whole:
                self._around[node] = tuple(open_now)
            if kind is not None:
                change = self._set if kind.is_setting else self._enter_or_leave
                change(kind, node, finals.get(kind, node), open_now)
        for region in open_now:
            # Set again to what it was set back to before: nothing follows that would run in it.
            again = region.enter is region.leave and region.kind in self._set_before
            if not again:
                raise _left_open(region.kind, region.enter)
        self.borders |= _feeding_only(self.borders)

    def _set(
        self, kind: Kind, node: torch.fx.Node, final: torch.fx.Node, open_now: list[_Region]
    ) -> None:
        """Take what is set last for what it was before; whatever else is set in between is a region."""
        place = next((i for i, each in enumerate(open_now) if each.kind is kind), len(open_now))
        if place < len(open_now) and _same_call(node, final):
            del open_now[place]
        else:
            open_now[place : place + 1] = [_Region(kind, node, final)]
        if node is not final:
            self._set_before.add(kind)
        self.borders.add(node)

    def _enter_or_leave(
        self, kind: Kind, node: torch.fx.Node, _: torch.fx.Node, open_now: list[_Region]
    ) -> None:
        if _opens(kind, node):
            open_now.append(_Region(kind, node))
            self._around[node] = tuple(open_now)
        else:
            mine = [each for each in open_now if each.kind is kind]
            mine = [each for each in mine if not kind.passes or node.args[:1] == (each.enter,)]
            if not mine:
                raise _left_open(kind, node)
            mine[-1].leave = node
            open_now.remove(mine[-1])
        if not kind.whole:
            self.borders.add(node)

    def around(self, node: torch.fx.Node) -> tuple[_Region, ...]:
        return tuple(each for each in self._around.get(node, ()) if not each.kind.whole)

    def may_cut(self, node: torch.fx.Node) -> bool:
        """Whether a graph can be cut before ``node``: it is not inside a level of ``torch.func``."""
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
                        f"splitting op {node.target} is called inside {region.kind.name}, whose values exist in one "
                        f"compiled piece only",
                        where=node_where(node),
                        hint=f"call the operator outside of {region.kind.name}, or leave it out of the splitting ops",
                    )

    def writer(self, graph: torch.fx.Graph, *, splitting: bool) -> RegionWriter:
        """What opens and closes regions in the graph of a piece, or of a splitting submodule."""
        return RegionWriter(self, graph, splitting)


def _left_open(kind: Kind, node: torch.fx.Node) -> SplitError:
    return SplitError(
        f"the model changes {kind.name} and does not change it back, which compiled pieces can't do to their caller",
        where=node_where(node),
        hint=f"set {kind.name} with a with-statement, or outside of the model",
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
    """Opens and closes regions in a piece's graph, so that each node that is written next runs in its own."""

    def __init__(self, regions: Regions, graph: torch.fx.Graph, splitting: bool) -> None:
        self._regions = regions
        self._splitting = splitting
        self._graph = graph
        self._open: list[tuple[_Region, tuple[Argument, ...], dict[str, Argument]]] = []

    def move_to(self, node: torch.fx.Node) -> None:
        wanted = self._regions.around(node)
        wanted = tuple(each for each in wanted if self._splitting or each.kind.in_pieces)
        common = 0
        while common < min(len(wanted), len(self._open)) and (
            self._open[common][0] is wanted[common]
        ):
            common += 1
        self._close_to(common)
        for region in wanted[common:]:
            self._enter(region)

    def close(self) -> None:
        self._close_to(0)

    def _enter(self, region: _Region) -> None:
        """Open ``region``; whatever closing it takes is written first, so that it can be closed at any time."""
        leave = region.leave
        assert leave is not None
        copied: dict[torch.fx.Node, torch.fx.Node] = {}
        for source in (*leave.all_input_nodes, *region.enter.all_input_nodes):
            if source is not region.enter and source not in copied:
                copied[source] = self._copy(region, source)
        entered = self._graph.node_copy(region.enter, lambda n: copied[n])
        copied[region.enter] = entered
        args, kwargs = torch.fx.node.map_arg((leave.args, leave.kwargs), lambda n: copied[n])
        self._open.append((region, args, kwargs))

    def _copy(self, region: _Region, source: torch.fx.Node) -> torch.fx.Node:
        if source.all_input_nodes or source.op != "call_function":
            raise SplitError(
                f"{region.kind.name} is set to a value that the graph computes",
                where=node_where(region.enter),
                hint="set it to a constant",
            )
        return self._graph.node_copy(source)

    def _close_to(self, depth: int) -> None:
        while len(self._open) > depth:
            region, args, kwargs = self._open.pop()
            assert region.leave is not None
            self._graph.call_function(region.leave.target, args, kwargs)  # type: ignore[arg-type]
