"""A model that runs stitched. In: a model and example arguments. Out: a callable like the model, with its source, graph and pieces to read.

The model's weights are shared, never copied; its Python code does not run again after the capture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.fx
from piecework.codegen import StitchedSource
from piecework.codegen.split import SplittingOp as SplittingOpLike
from piecework.errors import BindError, ConfigError, InputError
from piecework.runtime.backend import PieceworkBackend
from piecework.runtime.capture import (
    Argument,
    Capture,
    Fixed,
    FromArgument,
    FromGraph,
    FromWeight,
    GraphInput,
    ResultLeaf,
    Size,
    Weight,
    capture,
)
from piecework.runtime.config import CompilationConfig
from piecework.runtime.counters import counters
from piecework.runtime.report import Piece, Report
from torch.utils import _pytree as pytree


def compile(
    model: Callable[..., object],
    example_args: Sequence[object] = (),
    example_kwargs: Mapping[str, object] | None = None,
    *,
    splitting_ops: Sequence[SplittingOpLike] | None = None,
    config: CompilationConfig | None = None,
) -> StitchedModule:
    """Compile ``model`` piecewise and stitch it.

    Args:
        model: a module or function, captured whole.
        example_args, example_kwargs: arguments to trace with, by shape and dtype only; nothing is run on their data. Every
            dimension becomes dynamic unless some are marked with ``torch._dynamo.mark_dynamic`` or ``mark_unbacked``;
            then only those do. Without example arguments the first call's arguments are used.
        splitting_ops: where to cut; None means every op registered with `splitting_op`.
        config: see `CompilationConfig`.

    Returns:
        A `StitchedModule`, called like ``model``. It serves inference: it runs without recording gradients.

    Raises:
        CaptureError: the model can't be captured as one graph, or has no dynamic dimension.
        SplitError: a splitting op is unknown or has no fake implementation.
        PieceCompileError: a compiler failed on a piece.

    Example:
        >>> stitched = piecework.compile(model, (torch.randn(4, 64),))
        >>> print(stitched.source.code)
        >>> stitched(torch.randn(7, 64))
    """
    stitched = StitchedModule(model, splitting_ops=splitting_ops, config=config)
    if example_args or example_kwargs:
        stitched.prepare(*example_args, **(example_kwargs or {}))
    return stitched


class StitchedModule:
    """A compiled model; see `compile`.

    Attributes:
        model: the model that was given; it holds the weights.
        config: the configuration.
    """

    def __init__(
        self,
        model: Callable[..., object],
        *,
        splitting_ops: Sequence[SplittingOpLike] | None = None,
        config: CompilationConfig | None = None,
    ) -> None:
        if not callable(model):
            raise ConfigError(f"a model must be callable; got a {type(model).__qualname__}")
        self.model = model
        self.config = config or CompilationConfig()
        counters.num_models_seen += 1
        self._backend = PieceworkBackend(
            self.config, _model_name(model), splitting_ops=splitting_ops
        )
        self._capture: Capture | None = None
        self._function: Callable[..., object] | None = None

    # --- use -------------------------------------------------------------------------------------

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model. Shapes may differ from the example's in dynamic dimensions only.

        Raises:
            InputError: the arguments break what the trace assumed.
        """
        if self._function is None:
            self.prepare(*args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._run(args, kwargs)
        return self._run(args, kwargs)

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Capture, compile and stitch now, tracing with these arguments."""
        if self._function is not None:
            raise BindError("this module is compiled already", hint="compile the model again")
        start = time.perf_counter()
        captured = capture(self.model, args, kwargs, self._compile_graph)
        tracing = time.perf_counter() - start - sum(self._backend.phases.values())
        self._backend.phases = {"capture": tracing, **self._backend.phases}
        weights = self._bound_weights(captured)
        self._function = self._backend.bind(weights)
        self._capture = captured

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: Sequence[GraphInput]) -> None:
        placeholders = graph.graph.find_nodes(op="placeholder")
        bound = {
            node.name: source.path
            for node, source in zip(placeholders, inputs, strict=True)
            if isinstance(source, Weight)
        }
        self._backend.prepare(graph, bound)

    def _bound_weights(self, captured: Capture) -> dict[str, torch.Tensor]:
        """Values of the names that the emitted module holds."""
        tensors = {s.path: s.tensor for s in captured.inputs if isinstance(s, Weight)}
        return {row.name: tensors[row.path] for row in self.source.module.bound}

    def _run(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        captured, function = self._capture, self._function
        assert captured is not None and function is not None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != captured.in_spec:
            raise InputError(
                "the arguments have another structure than those that the model was traced with",
                hint="pass the same arguments by position and by name",
            )
        check_leaves(captured, leaves)
        holds_weights = bool(self.source.module.bound)
        inputs = [
            _input(source, leaves)
            for source in captured.inputs
            if not (holds_weights and isinstance(source, Weight))
        ]
        backend = self._backend
        if backend.range_table is None:
            outputs = function(*inputs)
        else:  # one look-up per forward; nothing inside the function dispatches
            batch = backend.batch_size([_input(source, leaves) for source in captured.inputs])
            outputs = function(*inputs, __vllm_submods__=backend.submods_for(batch))
        return pytree.tree_unflatten(
            [_result(leaf, outputs, leaves) for leaf in captured.result], captured.out_spec
        )

    # --- what was made ---------------------------------------------------------------------------

    @property
    def source(self) -> StitchedSource:
        """The emitted source, exactly what runs."""
        source = self._backend.source
        if source is None:
            raise self._not_yet("source")
        return source

    @property
    def split_gm(self) -> torch.fx.GraphModule:
        """The stitching graph."""
        if self._backend.split_gm is None:
            raise self._not_yet("split_gm")
        return self._backend.split_gm

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The compiled pieces, in order of execution."""
        if self._function is None:
            raise self._not_yet("pieces")
        return self._backend.pieces()

    def report(self) -> Report:
        """What the compilation did: pieces, unique pieces, seconds per phase."""
        if self._function is None:
            raise self._not_yet("report")
        return self._backend.report()

    @staticmethod
    def _not_yet(what: str) -> BindError:
        return BindError(
            f"there is no {what} yet: the model is compiled at its first call",
            hint="pass example arguments to piecework.compile, or call the module once",
        )


def check_leaves(captured: Capture, leaves: Sequence[object]) -> None:
    """Raise `InputError` for the first argument that breaks what the trace assumed of it."""
    sizes: dict[str, int] = {}
    fakes = _fake_arguments(captured)
    for index, (name, now) in enumerate(zip(captured.leaf_names, leaves, strict=True)):
        fake = fakes.get(index)
        if isinstance(fake, torch.Tensor):
            _check_tensor(name, now, fake, sizes)
        elif fake is None and not isinstance(captured.leaves[index], torch.Tensor):
            expected = captured.leaves[index]
            if type(now) is not type(expected) or now != expected:
                raise InputError(
                    f"argument {name} was {expected!r} when the model was traced and is {now!r} now",
                    hint="compile the model again for another value",
                )


def _fake_arguments(captured: Capture) -> dict[int, object]:
    placeholders = captured.graph.graph.find_nodes(op="placeholder")
    return {
        source.leaf: node.meta["example_value"]
        for node, source in zip(placeholders, captured.inputs, strict=True)
        if isinstance(source, Argument)
    }


def _check_tensor(name: str, now: object, fake: torch.Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(now, torch.Tensor):
        raise InputError(f"argument {name} must be a tensor, not a {type(now).__qualname__}")
    for what, expected, actual in (
        ("dtype", fake.dtype, now.dtype),
        ("device", fake.device, now.device),
        ("rank", fake.dim(), now.dim()),
    ):
        if expected != actual:
            raise InputError(
                f"argument {name} has {what} {actual}; the model was traced with {expected}"
            )
    for dim, (expected, size) in enumerate(zip(fake.shape, now.shape, strict=True)):
        if isinstance(expected, torch.SymInt):
            known = sizes.setdefault(str(expected), size)
            if known != size:
                raise InputError(
                    f"argument {name} has size {size} in dimension {dim}; another argument with the same "
                    f"dimension has {known}"
                )
        elif expected != size:
            raise InputError(
                f"argument {name} has size {size} in dimension {dim}, which the trace fixed to {expected}",
                hint="mark the dimension as dynamic with torch._dynamo.mark_dynamic and compile again",
            )


def _input(source: GraphInput, leaves: Sequence[object]) -> object:
    if isinstance(source, Argument):
        return leaves[source.leaf]
    if isinstance(source, Size):
        tensor = leaves[source.leaf]
        assert isinstance(tensor, torch.Tensor)
        return tensor.size(source.dim)
    return source.tensor


def _result(leaf: ResultLeaf, outputs: Sequence[object], leaves: Sequence[object]) -> object:
    match leaf:
        case FromGraph(index):
            return outputs[index]
        case FromArgument(index):
            return leaves[index]
        case FromWeight(tensor):
            return tensor
        case Fixed(value):
            return value


def _model_name(model: Callable[..., object]) -> str:
    if isinstance(model, torch.nn.Module):
        return type(model).__name__
    return str(getattr(model, "__qualname__", type(model).__name__)).rpartition("<locals>.")[2]
