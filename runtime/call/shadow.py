"""Shadow mode: each piece's uncompiled graph run beside it, to find the first piece that is wrong.

A caller gets what the stitched pieces computed. No piece is run twice that may keep state, draw
random numbers, or wait for another process.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.fx

from piecework.closeness import apart, tolerance_of
from piecework.codegen.graph.origin import graph_of, node_where, results_of, value_of
from piecework.codegen.graph.schemas import every_node, shows_nothing
from piecework.codegen.split.splitting import SplittingOps
from piecework.errors import BindError, ConfigError
from piecework.runtime import torch_compat
from piecework.runtime.compilers.interface import uncompiled
from piecework.runtime.pieces.program import Program
from piecework.runtime.splitting_op import registry
from piecework.runtime.store.surroundings import SELF_CONTAINED
from piecework.runtime.trace.writes import unwritten_outputs, written_inputs

_Piece = Callable[..., object]


@dataclass(frozen=True, slots=True)
class PieceDifference:
    """One piece, where it first gave something else than its graph."""

    piece: str  # its submodule in ``split_gm``
    modules: str  # the module paths that it holds, ``first … last``
    output: str  # which output, or input that it writes, with the graph's node and the model's line
    how: str  # what is different, in words
    error: float  # the largest absolute error; infinite where shape, dtype or kind differ
    allowed: float  # the largest one that is not a difference
    call: int  # in which of the calls that were compared, from 1

    def __str__(self) -> str:
        of = f" of {self.modules}" if self.modules else ""
        return f"{self.piece}{of}: {self.output} {self.how} (call {self.call})"


@dataclass
class Shadow:
    """What `StitchedModule.shadow` found so far; ``str()`` says it."""

    every: int = 1  # compare each call of so many
    calls: int = 0  # how many were compared
    compared: int = 0  # runs of pieces in them
    left_out: dict[str, str] = field(default_factory=dict)  # pieces, and why
    found: dict[str, PieceDifference] = field(default_factory=dict)
    _seen: int = field(default=0, repr=False)
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"every must be a positive number; got {self.every!r}", where="every")

    @property
    def differences(self) -> tuple[PieceDifference, ...]:
        """One for each piece that differed, in the order in which they were found."""
        return tuple(self.found.values())

    @property
    def first(self) -> PieceDifference | None:
        """The first piece that differed; None if none did."""
        return next(iter(self.found.values()), None)

    def __str__(self) -> str:
        result = f"{len(self.found)} pieces differ" if self.found else "no difference"
        lines = [f"compared {self.compared} runs of pieces in {self.calls} calls: {result}"]
        left_out = (f"not compared: {name}, {why}" for name, why in self.left_out.items())
        return "\n".join([*lines, *map(str, self.found.values()), *left_out])

    def beside(self, program: Program, splitting_ops: SplittingOps) -> Callable[[_Piece], _Piece]:
        """What makes of a stitching function one that runs the graph of each piece beside it."""
        names = program.source.submod_names
        references: dict[str, _Reference] = {}
        modules = {piece.name: piece.modules for piece in program.pieces}
        for name in names:
            graph = graph_of(program.split_gm, name)
            if program.config.use_inductor_graph_partition:
                self.left_out[name] = "Inductor cuts it, and it holds what it is cut at"
            elif why := _why_once(graph, splitting_ops):
                self.left_out[name] = why
            else:
                references[name] = _Reference(name, modules[name], graph)
        if names and not references:
            why = f"no piece can be run a second time beside itself: {names[0]}, {self.left_out[names[0]]}"
            hint = "compare the whole model with its eager form instead"
            raise BindError(why, where="shadow", hint=hint)

        def serve(function: _Piece) -> _Piece:
            def run(*flat: object, **given: Sequence[_Piece]) -> object:
                with self._counting:
                    due = self._seen % self.every == 0
                    self._seen += 1
                    self.calls += due
                if not due:
                    return function(*flat, **given)
                default = function.__kwdefaults__["__vllm_submods__"]  # type: ignore[index]
                pieces = zip(names, given.get("__vllm_submods__", default), strict=True)
                both = tuple(self._both(references.get(name), piece) for name, piece in pieces)
                return function(*flat, __vllm_submods__=both)

            return run

        return serve

    def _both(self, reference: _Reference | None, piece: _Piece) -> _Piece:
        if reference is None:
            return piece

        def run(*args: object) -> object:
            if reference.name in self.left_out:
                return piece(*args)
            # Its graph goes first: the piece may write to what both of them read.
            try:
                expected, written = reference.run(args)
            except Exception as error:  # noqa: BLE001 - the caller's own run goes on
                why = f"its graph fails beside it: {type(error).__name__}: {error}"
                self.left_out.setdefault(reference.name, why)
                return piece(*args)
            results = piece(*args)
            difference = reference.difference(expected, written, results, args, self.calls)
            with self._counting:
                self.compared += 1
                if difference is not None:
                    self.found.setdefault(reference.name, difference)
            return results

        return run


class _Reference:
    """The uncompiled graph of one piece."""

    def __init__(self, name: str, modules: str, graph: torch.fx.GraphModule) -> None:
        self.name, self._modules = name, modules
        self._run = uncompiled(graph)
        self._outputs = results_of(graph.graph)
        self._inputs = graph.graph.find_nodes(op="placeholder")
        self._written, self._unwritten = written_inputs(graph), unwritten_outputs(graph)
        values = map(value_of, every_node(graph))
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        # Of the least precise dtype in the piece: its other values come of those.
        self._tolerance = max(map(tolerance_of, dtypes), default=0.0)

    def run(self, args: Sequence[object]) -> tuple[object, dict[int, torch.Tensor]]:
        """What the graph gives of a piece's arguments, and copies of those that it writes to."""
        tensors = {n: each for n, each in enumerate(args) if isinstance(each, torch.Tensor)}
        held = [torch_compat.storage_id(each) for each in tensors.values()]
        if self._written and len(set(held)) < len(held):
            raise RuntimeError("it writes to arguments, and some share memory")
        copies = {n: tensors[n].clone() for n in self._written if n in tensors}
        gpus = {each.device for each in tensors.values() if each.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(list(gpus)):
            before = _random_states(gpus)
            results = self._run(*(copies.get(n, each) for n, each in enumerate(args)))
            if not all(map(torch.equal, before, _random_states(gpus))):
                raise RuntimeError("it draws random numbers")
        return results, copies

    def difference(
        self,
        expected: object,
        written: Mapping[int, torch.Tensor],
        results: object,
        args: Sequence[object],
        call: int,
    ) -> PieceDifference | None:
        """The first difference between what a piece did and what its graph did, on copies."""
        right, given = (x if isinstance(x, (tuple, list)) else (x,) for x in (expected, results))
        pairs: list[tuple[str, object, object]] = [("number of outputs", len(right), len(given))]
        for number, pair in enumerate(zip(right, given, strict=False)):
            output = self._outputs[number]
            where = f", {node_where(output)}," if isinstance(output, torch.fx.Node) else ""
            if number not in self._unwritten:
                pairs.append((f"output {number}{where}", *pair))
        for number, copy in written.items():
            name = self._inputs[number].name
            pairs.append((f"input {name}, written in place,", copy, args[number]))
        for what, one, other in pairs:
            different = _different(one, other, self._tolerance)
            if different is not None:
                return PieceDifference(self.name, self._modules, what, *different, call)
        return None


def _random_states(gpus: set[torch.device]) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in gpus)]


def _why_once(graph: torch.fx.GraphModule, splitting_ops: SplittingOps) -> str:
    """Why a piece can't be run beside itself; "" if nothing is known against it."""
    for node in every_node(graph):
        target = node.target
        if node.op != "call_function":
            continue
        if splitting_ops(node) or registry.find(target) is not None:
            return f"{target} is a splitting op, which may keep state"
        if torch_compat.collective_of(target) is not None:
            return f"{target} waits for other processes"
        if isinstance(target, torch._ops.HigherOrderOperator) and str(target) not in SELF_CONTAINED:
            return f"what {target} writes to is not known"
        if shows_nothing(target) and not torch_compat.is_torch_operator(target):
            return f"{target} declares neither a result nor a write"
    return ""


def _different(right: object, given: object, tolerance: float) -> tuple[str, float, float] | None:
    """How ``given`` differs, its largest error, and what is allowed; None if it is alike."""
    if not isinstance(right, torch.Tensor) or not isinstance(given, torch.Tensor):
        same = type(right) is type(given) and right == given
        return None if same else (f"is {given!r}, and the graph gives {right!r}", math.inf, 0.0)
    kinds = [
        f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)} on {each.device}"
        for each in (given, right)
    ]
    if kinds[0] != kinds[1]:
        return f"is {kinds[0]}, and the graph gives {kinds[1]}", math.inf, 0.0
    if not (right.is_floating_point() or right.is_complex()):
        wrong = int((right != given).sum())
        return (f"differs in {wrong} of {right.numel()} elements", math.inf, 0.0) if wrong else None
    error = apart(right, given, tolerance)
    if error is None:
        return None
    off, allowed, largest = error
    limit = f"where {allowed:.1e} is allowed (largest value {largest:.1e})"
    return f"is off by up to {off:.1e}, {limit}", off, allowed
