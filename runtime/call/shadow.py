"""Shadow mode: each piece's uncompiled graph run beside it, to find the first piece that is wrong.

A caller gets what the stitched pieces computed. No piece is run twice that may keep state, draw
random numbers, or wait for another process.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx

from piecework.closeness import SMALLEST, tolerance_of
from piecework.codegen.graph.origin import graph_of, node_where, results_of, value_of
from piecework.codegen.graph.schemas import every_node, shows_nothing
from piecework.codegen.split.splitting import SplittingOps
from piecework.errors import BindError, ConfigError
from piecework.runtime import torch_compat
from piecework.runtime.compilers.interface import uncompiled
from piecework.runtime.pieces.program import Program
from piecework.runtime.splitting_op import registry
from piecework.runtime.store.surroundings import SELF_CONTAINED
from piecework.runtime.trace.writes import operator_calls, unwritten_outputs, written_inputs

_Piece = Callable[..., object]


@dataclass(frozen=True, slots=True)
class PieceDifference:
    """One piece, where it first gave something else than its graph.

    Attributes:
        piece: its submodule in ``split_gm``.
        modules: the module paths that it holds, ``first … last``.
        output: which output, or input that it writes, with the graph's node and the model's line.
        how: what is different, in words.
        error: the largest absolute error; infinite where shape, dtype or kind differ.
        allowed: the largest one that is not a difference.
        call: in which of the calls that were compared, from 1.
    """

    piece: str
    modules: str
    output: str
    how: str
    error: float
    allowed: float
    call: int

    def __str__(self) -> str:
        of = f" of {self.modules}" if self.modules else ""
        return f"{self.piece}{of}: {self.output} {self.how} (call {self.call})"


class Shadow:
    """What `StitchedModule.shadow` found so far; ``str()`` says it.

    Args:
        every: compare each call of so many, the first one among them.

    Attributes:
        calls: how many calls were compared.
        compared: how many runs of a piece were.
        left_out: piece → why it is not compared.

    Raises:
        ConfigError: ``every`` is no positive whole number.
    """

    def __init__(self, every: int) -> None:
        if type(every) is not int or every < 1:
            raise ConfigError(f"every must be a positive number; got {every!r}", where="every")
        self._every = every
        self._seen = self._able = 0
        self._counting = threading.Lock()
        self._found: dict[str, PieceDifference] = {}
        self.calls = 0
        self.compared = 0
        self.left_out: dict[str, str] = {}

    @property
    def differences(self) -> tuple[PieceDifference, ...]:
        """One for each piece that differed, in the order in which they were found."""
        return tuple(self._found.values())

    @property
    def first(self) -> PieceDifference | None:
        """The first piece that differed; None if none did."""
        return next(iter(self.differences), None)

    def __str__(self) -> str:
        count = len(self._found)
        said = f"{count} piece{'s' * (count > 1)} differ{'s' * (count == 1)}"
        lines = [
            f"compared {self.compared} runs of pieces in {self.calls} calls: "
            + (said if count else "no difference")
        ]
        lines += map(str, self.differences)
        lines += (f"not compared: {name}, {why}" for name, why in self.left_out.items())
        return "\n".join(lines)

    def begin(self, able: int, left_out: Mapping[str, str]) -> None:
        """Look at another trace: how many of its pieces are compared, and why the others are not."""
        self._able += able
        self.left_out.update(left_out)

    def require_some(self) -> None:
        """Raise `BindError` if there are pieces, and none of them can be compared."""
        if self.left_out and not self._able:
            name, why = next(iter(self.left_out.items()))
            raise BindError(
                f"no piece can be run a second time beside itself: {name}, {why}",
                where="shadow",
                hint="compare the whole model with its eager form instead",
            )

    def is_due(self) -> bool:
        """Count a call; whether it is one to compare."""
        with self._counting:
            due = self._seen % self._every == 0
            self._seen += 1
            self.calls += due
        return due

    def note(self, difference: PieceDifference | None) -> None:
        """Count a comparison, and keep the piece's first difference."""
        with self._counting:
            self.compared += 1
            if difference is not None:
                self._found.setdefault(difference.piece, difference)


class ShadowedPieces:
    """Runs the uncompiled graph of each piece of a program beside it.

    Args:
        program: whose pieces.
        splitting_ops: operators that the model is cut at, or would be.
        found: is told.

    Raises:
        ArtifactError: the program was loaded without its graphs.
    """

    def __init__(self, program: Program, splitting_ops: SplittingOps, found: Shadow) -> None:
        self._names, self._found = program.source.submod_names, found
        split_gm, modules = program.split_gm, {p.name: p.modules for p in program.pieces()}
        facts: dict[str, _Facts] = {}
        self._references: dict[str, _Reference] = {}
        inside = program.config.use_inductor_graph_partition
        why_not: dict[str, str] = {}
        for name in self._names:
            graph = graph_of(split_gm, name)
            _, structure = program.backends[name].compiled_of()
            known = facts.get(structure.key)
            if known is None:
                known = facts[structure.key] = _Facts.of(graph, splitting_ops)
            why = "Inductor cuts it, and it holds what it is cut at" if inside else known.why_once
            if why:
                why_not[name] = why
            else:
                self._references[name] = _Reference(name, modules[name], graph, known)
        found.begin(len(self._references), why_not)

    def serve(self, function: _Piece) -> _Piece:
        """What serves calls in place of a stitching function."""

        def run(*flat: object, **given: Sequence[_Piece]) -> object:
            if not self._found.is_due():
                return function(*flat, **given)
            default = function.__kwdefaults__["__vllm_submods__"]  # type: ignore[index]
            pieces = zip(self._names, given.get("__vllm_submods__", default), strict=True)
            beside = tuple(self._beside(name, piece) for name, piece in pieces)
            return function(*flat, __vllm_submods__=beside)

        return run

    def _beside(self, name: str, piece: _Piece) -> _Piece:
        reference = self._references.get(name)
        if reference is None:
            return piece

        def run(*args: object) -> object:
            # Its graph goes first: the piece may write to what both of them read.
            try:
                expected = reference.run(args)
            except Exception as error:  # noqa: BLE001 - the caller's own run goes on
                why = f"its graph fails beside it: {type(error).__name__}: {error}"
                self._found.left_out.setdefault(name, why)
                return piece(*args)
            results = piece(*args)
            self._found.note(reference.difference(expected, results, args, self._found))
            return results

        return run


@dataclass(frozen=True, slots=True)
class _Facts:
    """What is the same for all pieces of one structure.

    Attributes:
        why_once: why a piece can't be run beside itself; "" if it can.
        written: inputs that it writes to.
        unwritten: outputs whose memory it allocates and leaves as it is: they hold anything.
        dtypes: of all tensors in it.
    """

    why_once: str
    written: frozenset[int]
    unwritten: frozenset[int]
    dtypes: frozenset[torch.dtype]

    @classmethod
    def of(cls, graph: torch.fx.GraphModule, splitting_ops: SplittingOps) -> _Facts:
        nodes = list(every_node(graph))
        values = map(value_of, nodes)
        dtypes = frozenset(value.dtype for value in values if isinstance(value, torch.Tensor))
        why = next(filter(None, (_why_once(node, splitting_ops) for node in nodes)), "")
        random = () if why else (op for op, *given in operator_calls(graph) if _draws(op, *given))
        why = next((f"{op} draws random numbers" for op in random), why)
        return cls(why, written_inputs(graph), unwritten_outputs(graph), dtypes)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What a graph gave, and the copies of the inputs that it wrote to."""

    results: Sequence[object]
    written: Mapping[int, torch.Tensor]


class _Reference:
    """The uncompiled graph of one piece."""

    def __init__(self, name: str, modules: str, graph: torch.fx.GraphModule, facts: _Facts) -> None:
        self._name, self._modules, self._facts = name, modules, facts
        self._run = uncompiled(graph)
        self._outputs = results_of(graph.graph)
        self._inputs = graph.graph.find_nodes(op="placeholder")

    def run(self, args: Sequence[object]) -> _Expected:
        """Run the graph on what a piece is given, with copies of what it writes to."""
        given = _apart(args, self._facts.written)
        on = {each.device for each in args if isinstance(each, torch.Tensor)}
        devices = [each for each in on if each.type == "cuda"]
        with torch.no_grad(), torch.random.fork_rng(devices):
            results = self._run(*given)
        written = {i: given[i] for i in self._facts.written if isinstance(given[i], torch.Tensor)}
        return _Expected(_sequence(results), written)  # type: ignore[arg-type]

    def difference(
        self, expected: _Expected, results: object, args: Sequence[object], found: Shadow
    ) -> PieceDifference | None:
        """The first difference between what a piece did and what its graph did."""
        actual = _sequence(results)
        if len(actual) != len(expected.results):
            how = f"are {len(actual)}, and the graph gives {len(expected.results)}"
            return self._made("its outputs", how, math.inf, 0.0, found)
        pairs = [
            (f"output {number}{_named(self._outputs[number])}", *pair)
            for number, pair in enumerate(zip(expected.results, actual, strict=True))
            if number not in self._facts.unwritten
        ]
        pairs += [
            (f"input {self._inputs[number].name}, written in place,", before, args[number])
            for number, before in expected.written.items()
        ]
        # Of the least precise dtype in the piece: its other values come of those.
        tolerance = max(map(tolerance_of, self._facts.dtypes), default=0.0)
        for what, right, given in pairs:
            different = _different(right, given, tolerance)
            if different is not None:
                return self._made(what, *different, found)
        return None

    def _made(
        self, what: str, how: str, error: float, allowed: float, found: Shadow
    ) -> PieceDifference:
        return PieceDifference(self._name, self._modules, what, how, error, allowed, found.calls)


def _why_once(node: torch.fx.Node, splitting_ops: SplittingOps) -> str:
    """Why a piece with this node can't be run beside itself; "" if nothing is known against it."""
    target = node.target
    if node.op != "call_function":
        return ""
    if splitting_ops(node) or registry.find(target) is not None:
        return f"{target} is a splitting op, which may keep state"
    if torch_compat.collective_of(target) is not None:
        return f"{target} waits for other processes"
    if isinstance(target, torch._ops.HigherOrderOperator) and str(target) not in SELF_CONTAINED:
        return f"what {target} writes to is not known"
    if shows_nothing(target) and not torch_compat.is_torch_operator(target):
        return f"{target} declares neither a result nor a write"
    return ""


def _draws(op: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Whether a call draws random numbers; attention does so for its dropout alone."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    names = [each.name for each in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" not in names or given.get("dropout_p", 0.0) != 0.0


def _apart(args: Sequence[object], written: frozenset[int]) -> list[object]:
    """``args`` with copies of the memory that is written to; what shared memory shares it still."""
    copies: dict[int, torch.UntypedStorage] = {}
    for number in written:
        tensor = args[number]
        if isinstance(tensor, torch.Tensor):
            copies[torch_compat.storage_id(tensor)] = tensor.untyped_storage().clone()
    return [_on(copies, each) if copies else each for each in args]


def _on(copies: Mapping[int, torch.UntypedStorage], value: object) -> object:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return value
    storage = copies.get(torch_compat.storage_id(value))
    if storage is None:
        return value
    empty = torch.empty(0, dtype=value.dtype, device=value.device)
    return empty.set_(storage, value.storage_offset(), value.shape, value.stride())


def _sequence(results: object) -> Sequence[object]:
    return results if isinstance(results, (tuple, list)) else (results,)


def _named(output: object) -> str:
    return f", {node_where(output)}," if isinstance(output, torch.fx.Node) else ""


def _different(right: object, given: object, tolerance: float) -> tuple[str, float, float] | None:
    """How ``given`` differs, its largest error, and the one that is allowed; None if it is alike."""
    if not isinstance(right, torch.Tensor) or not isinstance(given, torch.Tensor):
        same = type(right) is type(given) and right == given
        return None if same else (f"is {given!r}, and the graph gives {right!r}", math.inf, 0.0)
    if (right.shape, right.dtype, right.device) != (given.shape, given.dtype, given.device):
        how = f"is {_kind(given)}, and the graph gives {_kind(right)}"
        return how, math.inf, 0.0
    if not (right.is_floating_point() or right.is_complex()):
        wrong = int((right != given).sum())
        return (f"differs in {wrong} of {right.numel()} elements", math.inf, 0.0) if wrong else None
    if right.numel() == 0:
        return None
    wide = torch.complex128 if right.is_complex() else torch.float64
    right, given = right.detach().to(wide), given.detach().to(wide)
    largest = right.abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    allowed = tolerance * max(largest, SMALLEST)
    wrong = ~torch.isclose(given, right, rtol=0.0, atol=allowed, equal_nan=True)
    if not wrong.any():
        return None
    error = (given - right)[wrong].abs().nan_to_num(math.inf).max().item()
    how = (
        f"is off by up to {error:.1e}, where {allowed:.1e} is allowed (largest value {largest:.1e})"
    )
    return how, error, allowed


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
