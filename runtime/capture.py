"""From a model to one graph. In: a callable and example arguments. Out: a `Capture`: the graph, where each of its inputs comes from, and how its outputs make the result.

The model is traced once by Dynamo and never run on data; its weights and its state are left as they were.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.entry_plan import Parameter
from piecework.errors import CaptureError, PieceworkError
from piecework.runtime import torch_compat
from piecework.runtime.arguments import parameters_of
from piecework.runtime.assumptions import Assumptions
from piecework.runtime.containers import leaves_of
from piecework.runtime.counters import counters
from piecework.runtime.dynamic_dims import set_mark, unmarked_afterwards
from piecework.runtime.places import readable
from piecework.runtime.weights import BoundWeights, Found


@dataclass(frozen=True, slots=True)
class Weight:
    """A graph input that is held by the model: a parameter, a buffer or another tensor found on it.

    Attributes:
        source: what Dynamo calls it, which tells how the model's code reached it.
    """

    path: str
    tensor: torch.Tensor
    source: str = ""


@dataclass(frozen=True, slots=True)
class Argument:
    """A graph input that is the call's argument number ``leaf``, counted over the flattened arguments."""

    leaf: int
    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """A graph input that is dimension ``dim`` of tensor argument ``leaf``."""

    leaf: int
    dim: int
    name: str


GraphInput = Weight | Argument | Size


@dataclass(frozen=True, slots=True)
class FromGraph:
    """A leaf of the result that is output number ``index`` of the graph."""

    index: int


@dataclass(frozen=True, slots=True)
class FromArgument:
    """A leaf of the result that is an argument passed through."""

    leaf: int


@dataclass(frozen=True, slots=True)
class FromWeight:
    """A leaf of the result that is a tensor of the model."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fixed:
    """A leaf of the result that did not depend on the arguments."""

    value: object


GraphCompiler = Callable[[torch.fx.GraphModule, tuple[GraphInput, ...]], None]

ResultLeaf = FromGraph | FromArgument | FromWeight | Fixed


@dataclass(slots=True)
class Capture:
    """One captured graph.

    Attributes:
        graph: flat placeholders (named after weights, parameters and sizes) and a flat tuple of outputs.
        inputs: where each placeholder comes from, in order.
        parameters: the model's parameters, each with what the trace assumed of its argument.
        assumptions: the symbols and guards behind them.
        weights: where the model keeps the tensors that the graph reads, and those that the model returns.
        out_spec: structure of the result.
        result: where each leaf of the result comes from.
    """

    graph: torch.fx.GraphModule
    inputs: tuple[GraphInput, ...]
    parameters: tuple[Parameter, ...]
    assumptions: Assumptions
    weights: BoundWeights
    out_spec: pytree.TreeSpec
    result: tuple[ResultLeaf, ...]


@dataclass(slots=True)
class _Trace:
    """What the backend saw while Dynamo traced."""

    graph: torch.fx.GraphModule | None = None
    inputs: tuple[GraphInput, ...] = ()
    stand_ins: list[object] = field(default_factory=list)


def capture(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    compile_graph: GraphCompiler,
    *,
    dynamic: bool | None = None,
    any_batch: bool = False,
) -> Capture:
    """Trace ``model`` and hand its graph to ``compile_graph`` while Dynamo's tracing context is open.

    Args:
        model: a module or function; weights are the tensors that it holds.
        args, kwargs: example arguments; any pytree of tensors, numbers and None.
        compile_graph: called once with the graph and where its inputs come from.
        dynamic: which dimensions become symbols: None takes all dimensions of the tensor arguments unless some are
            marked (``torch._dynamo.mark_dynamic``, ``mark_unbacked``, ``mark_static``), then only those.
        any_batch: if nothing is marked, trace the first dimension of each tensor for every size, 0 and 1 included; where
            the model's own code depends on it, trace as without this.

    Raises:
        CaptureError: a graph break, no tensor operation, no dynamic dimension, state changed by the forward, or an
            input or output that cannot be traced back.
    """
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    if any_batch and dynamic is None and _dynamic(leaves, None):
        tensors = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim()]
        with unmarked_afterwards(tensors):
            for tensor in tensors:
                set_mark(tensor, 0, unbacked=True)
            try:
                return _capture_once(model, args, kwargs, compile_graph, True)
            except PieceworkError as error:
                if not torch_compat.data_dependent(error):
                    raise
    return _capture_once(model, args, kwargs, compile_graph, dynamic)


def _capture_once(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    compile_graph: GraphCompiler,
    dynamic: bool | None,
) -> Capture:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    names = _leaf_names(model, args, kwargs)
    sources = {source: i for i, source in enumerate(_sources(args, kwargs))}
    held = _tensors_of(model)
    trace = _Trace()

    def backend(gm: torch.fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        trace.graph = gm
        trace.inputs = _trace_back(gm, example_inputs, leaves, names, sources, held)
        _rename(gm, trace.inputs)
        _require_dynamic(gm, leaves)
        compile_graph(gm, trace.inputs)
        trace.stand_ins = _stand_ins(gm)
        return lambda *_: list(trace.stand_ins)

    state = _State(model)
    try:
        result = _run_dynamo(model, args, kwargs, backend, _dynamic(leaves, dynamic))
    finally:
        changes = state.restore()
    if trace.graph is None:
        raise CaptureError(
            "the model has no tensor operation to capture", hint="call it with tensor arguments"
        )
    changed = [each.path for each in changes if not _is_written_in_place(each, trace)]
    if changed:
        raise CaptureError(
            "forward changes the model's own state, which a captured graph would not do",
            where=changed[0],
            hint="keep such state in a registered buffer, or outside the model",
        )
    counters.num_graphs_seen += 1
    result_leaves, out_spec = pytree.tree_flatten(result)
    assumptions = _assumptions(trace, leaves, names)
    results = tuple(_result_leaf(leaf, trace.stand_ins, leaves, held) for leaf in result_leaves)
    return Capture(
        graph=trace.graph,
        inputs=trace.inputs,
        parameters=parameters_of(model, args, kwargs, assumptions.assume),
        assumptions=assumptions,
        weights=BoundWeights.of(model, _modules_of(model), _found(trace.inputs, results, held)),
        out_spec=out_spec,
        result=results,
    )


def _found(
    inputs: Sequence[GraphInput],
    results: Sequence[ResultLeaf],
    held: Mapping[int, tuple[str, torch.Tensor]],
) -> list[Found]:
    """The weights that the graph reads, then those that are only returned."""
    found = {
        id(each.tensor): Found(each.path, each.tensor, each.source)
        for each in inputs
        if isinstance(each, Weight)
    }
    for leaf in results:
        if isinstance(leaf, FromWeight):
            path, tensor = held[id(leaf.tensor)]
            found.setdefault(id(tensor), Found(path, tensor))
    return list(found.values())


def _run_dynamo(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    backend: Callable[..., object],
    dynamic: bool | None,
) -> object:
    # Dynamo caches by code object; a copy of its own keeps captures independent of each other.
    code = _call_model.__code__.replace()
    entry = types.FunctionType(code, _call_model.__globals__, "piecework_capture")
    compiled = torch.compile(entry, backend=backend, fullgraph=True, dynamic=dynamic)
    # What Dynamo remembers of sizes that other captures had must not decide which dimensions of this one are dynamic.
    settings = {"specialize_float": True, "automatic_dynamic_shapes": False}
    try:
        with torch.no_grad(), torch._dynamo.config.patch(settings):
            return compiled(model, *args, **kwargs)
    except Exception as error:
        own = _own_error(error)
        if own is not None:
            raise own from own.__cause__ or error
        inner = torch_compat.backend_failure(error)
        if inner is not None:
            raise inner from None
        if torch_compat.dynamo_failure(error):
            raise _capture_error(error) from error
        raise


def _call_model(model, *args, **kwargs):  # type: ignore[no-untyped-def]
    return model(*args, **kwargs)


def _own_error(error: BaseException) -> PieceworkError | None:
    """The typed error that Dynamo may have wrapped."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, PieceworkError):
            return current
        inner = getattr(current, "inner_exception", None)
        current = inner or current.__cause__ or current.__context__
    return None


def _capture_error(error: BaseException) -> CaptureError:
    text = str(error)
    reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    frames = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    return CaptureError(
        f"the model can't be captured as one graph: {reason}",
        where=_frame(frames[-1]) if frames else None,
        hint="move the Python construct out of forward or behind a piecework.splitting_op; "
        "the chained exception has Dynamo's full explanation",
    )


def _frame(line: str) -> str:
    """``model.py:41 in forward`` from a traceback's ``File "…/model.py", line 41, in forward``."""
    parts = line.split(", ")
    file = parts[0].removeprefix("File ").strip('"').rpartition("/")[2]
    number = parts[1].removeprefix("line ") if len(parts) > 1 else "?"
    return f"{file}:{number}" + (f" {parts[2]}" if len(parts) > 2 else "")


# --- inputs ----------------------------------------------------------------------------------------

_SIZE_SOURCE = re.compile(r"(?P<tensor>.+)\.size\(\)\[(?P<dim>\d+)\]")
_MARKS = ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices", "_dynamo_static_indices")


def _dynamic(leaves: Sequence[object], wish: bool | None) -> bool | None:
    if wish is not None:
        return wish
    marked = any(getattr(leaf, mark, None) for leaf in leaves for mark in _MARKS)
    return None if marked else True


def _require_dynamic(gm: torch.fx.GraphModule, leaves: Sequence[object]) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or all(getattr(t, "_dynamo_static_indices", None) for t in tensors):
        return
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("example_value")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        if any(torch_compat.symbol_of(size) for size in sizes):
            return
    raise CaptureError(
        "no dimension of the inputs is dynamic: the trace fixed every size",
        hint="use example sizes of 2 or more and avoid constants that depend on them; to serve size 1 as well, mark "
        "the dimension with torch._dynamo.decorators.mark_unbacked; if fixed sizes are wanted, say so with "
        "torch._dynamo.mark_static",
    )


def _tensors_of(model: Callable[..., object]) -> dict[int, tuple[str, torch.Tensor]]:
    """Tensors that ``model`` holds, by identity, with their paths."""
    held: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in _modules_of(model):
        for source in (module.named_parameters, module.named_buffers):
            for name, tensor in source(remove_duplicate=False):
                held.setdefault(id(tensor), (f"{prefix}{name}", tensor))
    return held


def _modules_of(model: Callable[..., object]) -> list[tuple[str, torch.nn.Module]]:
    """Modules reachable from ``model``: itself, its ``__self__``, or what it closes over."""
    if isinstance(model, torch.nn.Module):
        return [("", model)]
    owner = getattr(model, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return [("", owner)]
    found: list[tuple[str, torch.nn.Module]] = []
    code = getattr(model, "__code__", None)
    cells = getattr(model, "__closure__", None) or ()
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        with contextlib.suppress(ValueError):  # an empty cell holds nothing yet
            if isinstance(cell.cell_contents, torch.nn.Module):
                found.append((f"{name}.", cell.cell_contents))
    return [("", found[0][1])] if len(found) == 1 else found


def _leaf_names(
    model: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]
) -> tuple[str, ...]:
    """A name for each flattened argument: the parameter's, with a path into containers."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in parameters if p.kind in plain]
    names: list[str] = []
    for index, arg in enumerate(args):
        base = positional[index] if index < len(positional) else f"args_{index}"
        names += [base + suffix for suffix in _suffixes(arg)]
    for key, value in kwargs.items():
        names += [key + suffix for suffix in _suffixes(value)]
    return tuple(names)


def _sources(args: Sequence[object], kwargs: Mapping[str, object]) -> list[str]:
    """What Dynamo calls each flattened argument of `_call_model`."""
    found = [f"L['args'][{i}]{suffix}" for i, arg in enumerate(args) for suffix in _suffixes(arg)]
    return found + [
        f"L['kwargs'][{k!r}]{s}" for k, value in kwargs.items() for s in _suffixes(value)
    ]


def _suffixes(value: object) -> list[str]:
    return [suffix for suffix, _ in leaves_of(value)]


def _trace_back(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[object],
    leaves: Sequence[object],
    names: Sequence[str],
    sources: Mapping[str, int],
    held: dict[int, tuple[str, torch.Tensor]],
) -> tuple[GraphInput, ...]:
    """Where each placeholder of ``gm`` comes from."""
    by_identity: dict[int, int] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            by_identity.setdefault(id(leaf), index)
    placeholders = gm.graph.find_nodes(op="placeholder")
    found: list[GraphInput | None] = []
    for node, example in zip(placeholders, example_inputs, strict=True):
        if isinstance(example, torch.Tensor) and id(example) in by_identity:
            leaf = by_identity[id(example)]
            found.append(Argument(leaf, names[leaf]))
        elif isinstance(example, torch.Tensor):
            source = torch_compat.placeholder_source(node)
            path, tensor = held.get(id(example), (readable(source), example))
            found.append(Weight(path, tensor, source))
        else:
            found.append(None)
    tensors = [
        (g.leaf, node)
        for g, node in zip(found, placeholders, strict=True)
        if isinstance(g, Argument)
    ]
    sizes = _sizes(tensors)
    count = 0
    for index, node in enumerate(placeholders):
        if found[index] is not None:
            continue
        found[index] = _size_or_int(node, sizes, leaves, names, sources, f"s{count}")
        count += 1
    return tuple(g for g in found if g is not None)


def _sizes(tensors: Sequence[tuple[int, torch.fx.Node]]) -> dict[str, tuple[int, int]]:
    """Symbol → the first argument and dimension that it is the size of."""
    sizes: dict[str, tuple[int, int]] = {}
    for leaf, node in tensors:
        value = node.meta["example_value"]
        for dim, size in enumerate(value.shape):
            symbol = torch_compat.symbol_of(size)
            if symbol is not None:
                sizes.setdefault(symbol, (leaf, dim))
    return sizes


def _size_or_int(
    node: torch.fx.Node,
    sizes: dict[str, tuple[int, int]],
    leaves: Sequence[object],
    names: Sequence[str],
    sources: Mapping[str, int],
    name: str,
) -> GraphInput:
    value = node.meta["example_value"]
    symbol = torch_compat.symbol_of(value)
    if symbol in sizes:
        leaf, dim = sizes[symbol]
        return Size(leaf, dim, name)
    source = torch_compat.placeholder_source(node)
    read = _SIZE_SOURCE.fullmatch(source)
    if read is not None and read["tensor"] in sources:  # a size that the trace fixed to a number
        return Size(sources[read["tensor"]], int(read["dim"]), name)
    leaf = sources.get(source)
    if leaf is not None and type(leaves[leaf]) is int:
        return Argument(leaf, names[leaf])
    raise CaptureError(
        f"input {source or node.name} of the graph is neither an argument, a size of one, nor a weight",
        hint="pass it as a tensor, or make it a constant of the model",
    )


def _rename(gm: torch.fx.GraphModule, inputs: Sequence[GraphInput]) -> None:
    """Name placeholders after what they are, so that emitted source reads well."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    named = {node.name: node for node in gm.graph.nodes}
    for node, source in zip(placeholders, inputs, strict=True):
        wish = source.path if isinstance(source, Weight) else source.name
        name = re.sub(r"\W", "_", wish).strip("_") or "input"
        if name[0].isdigit():  # a child of a Sequential or ModuleList at the root
            name = f"m_{name}"
        holder = named.get(name)
        if holder is node:
            continue
        if holder is not None:  # an intermediate value gives way; a placeholder keeps its name
            if holder.op == "placeholder":
                node._rename(name)
                continue
            holder._rename(f"{name}_1")
            named[holder.name] = holder
        node.name = name
        named[name] = node


def _assumptions(trace: _Trace, leaves: Sequence[object], names: Sequence[str]) -> Assumptions:
    assert trace.graph is not None
    placeholders = trace.graph.graph.find_nodes(op="placeholder")
    fakes: dict[int, object] = {}
    wished: dict[str, str] = {}
    for node, source in zip(placeholders, trace.inputs, strict=True):
        value = node.meta["example_value"]
        if isinstance(source, Argument):
            fakes[source.leaf] = value
        symbol = torch_compat.symbol_of(value)
        if isinstance(source, Size) and symbol is not None:
            wished[symbol] = source.name
    return Assumptions(fakes, wished, leaves, names)


# --- outputs ---------------------------------------------------------------------------------------


class _StandInInt(int):
    """An integer with an identity, in place of a size that the graph returns."""


def _stand_ins(gm: torch.fx.GraphModule) -> list[object]:
    """One distinguishable object per graph output, for Dynamo's code that packs the result."""
    returned = gm.graph.output_node().args[0]
    outputs = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    stand_ins: list[object] = []
    for node in outputs:
        value = node.meta.get("example_value") if isinstance(node, torch.fx.Node) else node
        stand_ins.append(
            _StandInInt(0) if isinstance(value, (int, torch.SymInt)) else torch.empty(0)
        )
    return stand_ins


def _result_leaf(
    leaf: object,
    stand_ins: Sequence[object],
    leaves: Sequence[object],
    held: dict[int, tuple[str, torch.Tensor]],
) -> ResultLeaf:
    for index, stand_in in enumerate(stand_ins):
        if leaf is stand_in:
            return FromGraph(index)
    if isinstance(leaf, torch.Tensor):
        for index, argument in enumerate(leaves):
            if leaf is argument:
                return FromArgument(index)
        if id(leaf) in held:
            return FromWeight(leaf)
    elif leaf is None or isinstance(
        leaf, (int, float, complex, str, bytes, torch.dtype, torch.device)
    ):
        return Fixed(leaf)
    raise CaptureError(
        f"the model returns a {type(leaf).__qualname__}, which can't be rebuilt from the graph",
        hint="return tensors, numbers and None in tuples, lists, dicts, or classes registered with "
        "torch.utils._pytree.register_pytree_node",
    )


# --- the model's own state -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Change:
    """An attribute that tracing changed; ``before`` and ``now`` are None where there was or is nothing."""

    path: str
    before: object = None
    now: object = None


class _State:
    """A shallow record of a model's Python attributes, parameters and buffers, to notice and undo what tracing changed."""

    def __init__(self, model: Callable[..., object]) -> None:
        self._kept = [
            (prefix + name, values, dict(values), self._sizes(values))
            for prefix, root in _modules_of(model)
            for name, module in root.named_modules()
            for values in (module.__dict__, module._parameters, module._buffers, module._modules)
        ]

    @staticmethod
    def _sizes(values: Mapping[str, object]) -> dict[str, int]:
        containers = (list, dict, set)
        return {k: len(v) for k, v in values.items() if isinstance(v, containers)}

    def restore(self) -> list[_Change]:
        """Put attributes back; returns what had changed."""
        changed: list[_Change] = []
        for path, now, before, sizes in self._kept:
            for key in {**before, **now}:
                if now.get(key) is not before.get(key) or (key in now) != (key in before):
                    name = f"{path}.{key}".lstrip(".")
                    changed.append(_Change(name, before.get(key), now.get(key)))
                    if key in before:
                        now[key] = before[key]
                    else:
                        del now[key]
            after = self._sizes(now)
            own = [k for k in sizes if k not in ("_parameters", "_buffers", "_modules")]
            changed += [_Change(f"{path}.{k}".lstrip(".")) for k in own if after.get(k) != sizes[k]]
        return changed


def _is_written_in_place(change: _Change, trace: _Trace) -> bool:
    """Whether what was assigned is the very weight, as ``self.state += 1`` does: the graph writes it in place already."""
    index = next((i for i, each in enumerate(trace.stand_ins) if each is change.now), None)
    if index is None or trace.graph is None:
        return False
    returned = trace.graph.graph.output_node().args[0]
    written = returned[index].meta.get("example_value")  # type: ignore[index, union-attr]
    for node, source in zip(
        trace.graph.graph.find_nodes(op="placeholder"), trace.inputs, strict=True
    ):
        if isinstance(source, Weight) and source.tensor is change.before:
            return torch_compat.is_same_view(node.meta["example_value"], written)
    return False
