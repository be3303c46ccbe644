"""Proves replay source as stitching source is: it is run on the same tokens, and a replay stands for the call of its piece.

What each captured piece reads is held against its operands, place by place. The planning of the replay is not relied on.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import assert_never

import torch.fx

from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.proof.graph_run import Event, Token, run_graph, same_constant
from piecework.codegen.proof.prove import Proof
from piecework.codegen.proof.text_run import TextRun, parse_text
from piecework.codegen.replay.plan import (
    Frozen,
    HeldBack,
    HeldBuffer,
    HeldInput,
    HeldOutput,
    HeldReplay,
    HeldStage,
    InPlace,
    PieceFacts,
    ReplayFacts,
    ReplaySource,
    Staged,
)
from piecework.codegen.stitch.source import StitchedSource, linkage_of
from piecework.errors import EmitError

_Buffer = tuple[int, int]  # a piece, and the number of one of its buffers


@dataclass(frozen=True, slots=True)
class ReplayProof:
    """What was proved.

    Attributes:
        stitched: the text, with replays for calls of pieces, against the graph.
        replays: pieces that are replayed.
        operands: operands of replayed pieces that were found where the graph reads them, or staged.
        vouched: operands that operators between the pieces make, whose memory only the first checked replay knows.
    """

    stitched: Proof
    replays: int
    operands: int
    vouched: int


def verify_replay(
    replay: ReplaySource, source: StitchedSource, split_gm: torch.fx.GraphModule, facts: ReplayFacts
) -> ReplayProof:
    """Prove that ``replay`` runs what ``split_gm`` says, on the memory that was captured.

    Raises:
        EmitError: a piece is missing, out of order or without its staged operands, an operator has other operands, or a
            captured piece reads memory that is not its operand's.
    """
    return _ReplayRun(replay, source, split_gm, facts).prove()


class _ReplayRun(TextRun):
    """Runs a replay's text; what the runtime holds for it is a token of the graph, or itself."""

    def __init__(
        self,
        replay: ReplaySource,
        source: StitchedSource,
        split_gm: torch.fx.GraphModule,
        facts: ReplayFacts,
    ) -> None:
        linked = linkage_of(source.module, source.options, replay.consts)
        graph = run_graph(split_gm, linked)
        tree = parse_text(replay.code, "replay source")
        super().__init__(replay.code, tree, replay.module.entry.name, graph, linked)
        self.replay, self.facts, self.names = replay, facts, source.submod_names
        names = [each.name for each in source.module.entry.parameters]
        self.tokens = dict(zip(names, (token for _, token in graph.parameters), strict=True))
        self.tokens |= {name: graph.weights[path] for name, path in linked.bound.items()}
        self.calls = {event.target: event for event in graph.events}
        self.places: dict[Token, Hashable] = {
            self.tokens[name]: place for name, place in facts.places.items()
        }
        self.inputs = Token("inputs")
        self.staged = not facts.staged
        self.filled: dict[_Buffer, tuple[object, ...]] = {}
        self.due: dict[_Buffer, tuple[object, ...]] = {}
        self.replays = self.operands = self.vouched = 0

    def prove(self) -> ReplayProof:
        function = self.functions[self.entry]
        taken = [each.arg for each in function.args.args]
        wanted = [each.name for each in self.replay.module.entry.parameters]
        given = function.args
        if taken != wanted or given.vararg or given.kwarg or given.defaults or given.kwonlyargs:
            self.refuse(function, f"{function.name} takes other parameters")
        for name in self.bound_names():
            if name in self.replay.held:
                raise EmitError(f"the replay differs from the graph: {name} is bound by the text")
        held = {name: self._held(each) for name, each in self.replay.held.items()}
        returned = self.run({**held, **self._numbers()}, [self.inputs])
        if self.filled or self.due:
            raise EmitError("the text stages or brings back an operand that no replay has")
        if not self.staged:
            self.refuse(function, "the inputs are not staged first")
        self.finish(returned)
        proof = Proof(len(self.graph.events), self.statements)
        return ReplayProof(proof, self.replays, self.operands, self.vouched)

    def _held(self, held: object) -> object:
        match held:
            case HeldOutput(piece, element):
                return self._output(piece, element)
            case HeldInput(name):
                return self.tokens[name]
            case _:
                return held

    def _output(self, piece: int, element: int | None) -> Token:
        result = self.calls[f"submod {self.names[piece]}"].result
        return result if element is None else result.element(element)

    def _numbers(self) -> dict[str, object]:
        """What the literals at module level stand for: a size of the capture, or a number that a piece returned."""
        found: dict[str, object] = {}
        for name, value in self.literals.items():
            known: object = self.facts.sizes.get(name)
            if name in self.replay.numbers:
                held = self.replay.numbers[name]
                output = self.facts.pieces[held.piece].output(held.element)
                known = output.value if isinstance(output, Frozen) else None
                found[name] = self._output(held.piece, held.element)
            else:
                found[name] = self.tokens.get(name)
            if name in self.facts.sizes and not same_constant(known, value):
                raise EmitError(
                    f"the replay differs from the graph: {name} is {known} in this capture"
                )
            if known is None or not same_constant(known, value):
                raise EmitError(f"the replay differs from the graph: {name} = {value!r} is nowhere")
        return found

    # --- what is recorded --------------------------------------------------------------------------

    def called(
        self, line: int, target: object, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        match target:
            case HeldStage():
                if self.staged or self.next or list(args) != [self.inputs] or kwargs:
                    self.refuse(line, "something else than the inputs is staged, or later")
                self.staged = True
            case HeldReplay(piece):
                return self._replayed(line, piece, args, kwargs)
            case HeldBuffer(piece, number) | HeldBack(piece, number) if kwargs:
                self.refuse(line, "a copy gets more than the operand")
            case HeldBuffer(piece, number):
                self.filled[piece, number] = args
            case HeldBack(piece, number):
                self._brought_back(line, (piece, number), args)
            case _:
                return super().called(line, target, args, kwargs)
        return None

    def called_method(
        self,
        line: int,
        value: object,
        name: str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> object:
        copies = name == "copy_" and len(args) == 1 and not kwargs
        if copies and isinstance(value, HeldBuffer):
            self.filled[value.piece, value.buffer] = args
        elif copies and isinstance(args[0], HeldBuffer):
            self._brought_back(line, (args[0].piece, args[0].buffer), (value,))
        else:
            return super().called_method(line, value, name, args, kwargs)
        return None

    def _brought_back(self, line: int, key: _Buffer, values: tuple[object, ...]) -> None:
        if self.due.pop(key, None) != values:
            self.refuse(line, "something is brought back that the piece did not change")

    # --- one piece ---------------------------------------------------------------------------------

    def _replayed(
        self, line: int, piece: int, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> object:
        facts, target = self.facts.pieces[piece], f"submod {self.names[piece]}"
        if facts.eager_reason is not None:
            return self._event(line, target, args, kwargs)
        if args or kwargs:
            self.refuse(line, "a replay takes no arguments")
        event = self.calls.get(target)
        if event is None:
            self.refuse(line, "the stitching source does not call this piece")
        self._event(line, target, event.args, event.kwargs)
        self._check_operands(line, piece, facts, event)
        self._place_outputs(line, facts, event)
        self.replays += 1
        return None

    def _check_operands(self, line: int, piece: int, facts: PieceFacts, event: Event) -> None:
        leaves = list(_flat(event.args))
        if len(leaves) != len(facts.reads):
            why = f"captured with {len(facts.reads)} operands, the graph has {len(leaves)}"
            self.refuse(line, why)
        for number, buffer in enumerate(facts.buffers):
            expected = tuple(leaves[leaf] for leaf in buffer.leaves)
            if self.filled.pop((piece, number), None) != expected:
                self.refuse(line, f"operands {list(buffer.leaves)} are not staged before it")
            if buffer.writes_back:
                self.due[piece, number] = expected
        for index, (leaf, read) in enumerate(zip(leaves, facts.reads, strict=True)):
            match read:
                case Staged(buffer=number):
                    known = index in facts.buffers[number].leaves
                    self._require(line, known, f"operand {index} has no buffer")
                case InPlace() if type(leaf) is Token and leaf in self.places:
                    same = self.places[leaf] == read.place
                    why = f"operand {index} is {leaf.name}, and the capture reads other memory"
                    self._require(line, same, f"{why} ({read.owner})")
                case InPlace():
                    self.vouched += 1
                case Frozen():
                    self._check_frozen(line, index, leaf, read)
                case _:
                    assert_never(read)

    def _require(self, line: int, holds: bool, why: str) -> None:
        if not holds:
            self.refuse(line, f"the replay differs from the graph: {why}")
        self.operands += 1

    def _check_frozen(self, line: int, index: int, leaf: object, read: Frozen) -> None:
        """What is built into the graph must be what the operand is at the captured sizes, whatever the data."""
        known = leaf
        if type(leaf) is Token:
            numbers = {**self.facts.numbers, **self._sizes()}
            if leaf.name not in numbers:
                why = (
                    f"operand {index} is {leaf.name}, which does not follow from the captured sizes"
                )
                self._require(line, False, f"{why}, and was captured as {read.value!r}")
            known = numbers[leaf.name]
        elif not is_inline_literal(leaf):  # an object that the graph holds
            self.vouched += 1
            return
        same = known is read.value or same_constant(known, read.value)
        self._require(line, same, f"operand {index} is {known!r}, and was {read.value!r}")

    def _sizes(self) -> dict[str, object]:
        return {self.tokens[name].name: size for name, size in self.facts.sizes.items()}

    def _place_outputs(self, line: int, facts: PieceFacts, event: Event) -> None:
        outputs, result = facts.outputs, event.result
        several = isinstance(outputs, tuple) and result.kind is not None
        if several and result.size != len(outputs):  # type: ignore[arg-type]
            self.refuse(line, f"{len(outputs)} outputs were captured, not {result.size}")  # type: ignore[arg-type]
        tokens = dict(result.elements()) if several else {None: result}
        for element, token in tokens.items():
            output = facts.output(element)
            if isinstance(output, Frozen) and token.picked:
                known = self.facts.numbers.get(token.name)
                unknown = known is None and output.value is None
                if not unknown and (known is None or not same_constant(known, output.value)):
                    why = f"{token.name} was {output.value!r} at the capture, and is {known!r} by the graph"
                    self.refuse(line, why)
            self.places[token] = output


def _flat(argument: object) -> Iterator[object]:
    if isinstance(argument, (tuple, list)):
        for each in argument:
            yield from _flat(each)
    else:
        yield argument
