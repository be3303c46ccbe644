"""Dynamo's marks, context, sources, failures and trace events."""

import contextlib
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.fx
from torch.fx._lazy_graph_module import _LazyGraphModule

Kind = Literal["dynamic", "unbacked", "static", "maybe"]


@dataclass(frozen=True, slots=True)
class Mark:
    """One mark of Dynamo's on a dimension of an example."""

    kind: Kind  # unbacked: for every size, 0 and 1 too; maybe: dynamic, unless the code fixes it
    dim: int
    low: int | None = None
    high: int | None = None
    shape_id: str | None = None  # unbacked dimensions with one id become one symbol

    def put_on(self, tensor: torch.Tensor) -> None:
        if self.kind == "unbacked":
            torch._dynamo.decorators.mark_unbacked(tensor, self.dim, shape_id=self.shape_id)
        elif self.kind == "static":
            torch._dynamo.mark_static(tensor, self.dim)
        elif self.kind == "maybe":
            torch._dynamo.maybe_mark_dynamic(tensor, self.dim)
        else:
            torch._dynamo.mark_dynamic(tensor, self.dim, min=self.low, max=self.high)


def unbacked_mark(tensor: torch.Tensor, dim: int) -> Mark:
    """The mark of an unbacked dimension; dimensions of equal size become one symbol."""
    return Mark("unbacked", dim, shape_id=f"size_{tensor.size(dim)}")


def marks_of(value: object) -> tuple[Mark, ...]:
    if not isinstance(value, torch.Tensor):
        return ()
    ranges = {each.dim: each for each in getattr(value, "_dynamo_dynamic_range", None) or ()}
    kinds: tuple[Kind, ...] = ("dynamic", "unbacked", "static")
    return tuple(
        Mark(kind, dim, getattr(bounds, "min", None), getattr(bounds, "max", None))
        for kind in kinds
        for dim in sorted(getattr(value, f"_dynamo_{kind}_indices", None) or ())
        for bounds in [ranges.get(dim) if kind == "dynamic" else None]
    )


def unmark_dynamic(tensor: torch.Tensor) -> tuple[int, ...]:
    """Take ``mark_dynamic``'s marks off ``tensor``; returns the dimensions that had one."""
    found = tuple(sorted(getattr(tensor, "_dynamo_dynamic_indices", None) or ()))
    for name in ("_dynamo_dynamic_indices", "_dynamo_dynamic_range"):
        vars(tensor).pop(name, None)
    return found


def traced_inputs() -> dict[str, object]:
    """What stands for each input of the running trace, read or not, by Dynamo's name."""
    mode = getattr(tracing_context(), "fake_mode", None)
    tracked = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None) or ()
    return {str(each.source.name): each.fake for each in tracked}


#: Dynamo's tracing context while a backend runs; None outside.
tracing_context = torch._guards.TracingContext.try_get


def placeholder_source(node: torch.fx.Node) -> str:
    """Dynamo's name of where a graph input comes from, ``L['x'].size()[0]``; "" when unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return str(getattr(source, "name", ""))


def placeholder_sources(graph: torch.fx.GraphModule) -> list[str]:
    """`placeholder_source` of each input; where Dynamo dropped it (AOT compile), by the tensor."""
    nodes = graph.graph.find_nodes(op="placeholder")
    found = [placeholder_source(node) for node in nodes]
    values = [node.meta.get("example_value") for node in nodes]
    mode = torch._guards.detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])
    known = getattr(getattr(mode, "shape_env", None), "tracked_fakes", None) or ()
    tensors = {id(each.fake): each.source.name for each in known}
    return [source or str(tensors.get(id(v), "")) for source, v in zip(found, values, strict=True)]


def dynamo_failure(error: BaseException) -> bool:
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def backend_failure(error: BaseException) -> Exception | None:
    """The exception of a Dynamo backend that ``error`` wraps, if it does."""
    if isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
        return error.inner_exception
    return None


def asks_for_restart(error: BaseException) -> bool:
    """Whether ``error`` is how a compiler asks Dynamo to trace again."""
    return isinstance(error, torch._dynamo.exc.RestartAnalysis)


def lists_attributes() -> bool:
    """Whether Dynamo can trace ``vars`` of an instance that the code made (from 2.12 on)."""
    return hasattr(torch._dynamo.variables, "DunderDictVariable")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised for, as Dynamo wraps it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__


def data_dependent(error: BaseException) -> bool:
    """Whether ``error`` comes from a decision on a size that the trace was not told."""
    texts = (f"{type(each).__name__} {each}" for each in causes(error))
    return any("data-dependent" in t or "GuardOnDataDependentSymNode" in t for t in texts)


def dynamo_backend(name: str) -> Callable[..., object]:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def keep_out_of_traces(function: types.FunctionType, reason: str) -> None:
    """Let Dynamo call ``function`` and never trace it, without a wrapper in the way."""
    marks = {"_torchdynamo_disable": True, "_torchdynamo_disable_msg": reason}
    function.__dict__.update(marks)
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))


def original_of(model: Callable[..., object]) -> Callable[..., object]:
    """What ``torch.compile`` was given, if ``model`` is its result; ``model`` otherwise."""
    if isinstance(model, torch.nn.Module):
        kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
        return model._orig_mod if kind is not None and isinstance(model, kind) else model
    if getattr(model, "_torchdynamo_disable", False):  # by torch.compiler.disable, which means it
        return model
    return getattr(model, "_torchdynamo_orig_callable", model)


def size_oblivious_tracing() -> contextlib.AbstractContextManager[object]:
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)


@contextlib.contextmanager
def quiet_trial() -> Iterator[None]:
    """A trace in the block may fail without a report on the log; other threads' reports pass."""
    mine = threading.get_ident()
    names = ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes", "_guards")

    def passes(record: logging.LogRecord) -> bool:
        return record.thread != mine

    with contextlib.ExitStack() as stack:
        for logger in (logging.getLogger(f"torch.{name}") for name in names):
            logger.addFilter(passes)
            stack.callback(logger.removeFilter, passes)
        yield


def one_trace_at_a_time() -> contextlib.AbstractContextManager[object]:
    """Dynamo's own lock: while it is held, no other thread traces."""
    from torch._dynamo import convert_frame

    return convert_frame.compile_lock


def own_symbol_per_dimension() -> contextlib.AbstractContextManager[object]:
    """A context in which equal backed dimensions of the example are not one symbol."""
    from torch.fx.experimental import _config

    return _config.patch(use_duck_shape=False)


@contextlib.contextmanager
def on_fakes(values: Iterable[object]) -> Iterator[None]:
    """Run operators on fake values of a trace in the block; leaves no guard and no symbol."""
    from torch._dispatch.python import enable_python_dispatcher

    modes = (getattr(value, "fake_mode", None) for value in values)
    mode = next((each for each in modes if each is not None), None)
    env = getattr(mode, "shape_env", None)
    with contextlib.ExitStack() as stack:
        if env is not None:
            stack.enter_context(env.ignore_fresh_unbacked_symbols())
            stack.enter_context(env.suppress_guards())
        # With the decompositions that a trace runs: composite kernels may read sizes that are symbols.
        for each in (mode or contextlib.nullcontext(), torch.no_grad(), enable_python_dispatcher()):
            stack.enter_context(each)
        yield


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``), as ``piecework_<name>``."""
    about = {"name": f"piecework_{name}", "encoding": "string"}
    torch._logging.trace_structured("artifact", metadata_fn=lambda: about, payload_fn=text)


def timed_scope(name: str) -> contextlib.AbstractContextManager[object]:
    """A scope in Dynamo's compile-time events; empty where Dynamo is not imported."""
    timed = getattr(sys.modules.get("torch._dynamo.utils"), "dynamo_timed", None)
    return contextlib.nullcontext() if timed is None else timed(f"piecework.{name}")


def graph_module(
    root: torch.nn.Module | Mapping[str, object], graph: torch.fx.Graph, name: str = "GraphModule"
) -> torch.fx.GraphModule:
    """A GraphModule that makes Python of its graph when it is first run or read."""
    return _LazyGraphModule(root, graph, name)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Dynamo's context of one trace, kept for what is done with its graph afterwards."""

    _tracing: object
    _compiling: object

    @classmethod
    def running(cls) -> Self:
        return cls(torch._guards.TracingContext.try_get(), torch._guards.CompileContext.try_get())

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Be in the context for the block, alone among threads; sizes' decisions are recorded."""
        guards = torch._guards
        env = getattr(getattr(self._tracing, "fake_mode", None), "shape_env", None)
        frozen = getattr(env, "frozen", False)
        with contextlib.ExitStack() as stack:
            for each in (one_trace_at_a_time(), own_symbol_per_dimension(), torch.no_grad()):
                stack.enter_context(each)
            stack.enter_context(guards.compile_context(self._compiling))  # type: ignore[arg-type]
            stack.enter_context(guards.tracing(self._tracing))  # type: ignore[arg-type]
            if env is not None:
                env.frozen = False
                stack.callback(setattr, env, "frozen", frozen)
            yield


def forget_imports() -> None:
    """Let Dynamo look modules up again, which it does once a process and name."""
    from torch._dynamo import symbolic_convert

    symbolic_convert._import_module.cache_clear()
