"""Proves replay source by running it on tokens: a replay stands for the call of its piece.

What each captured piece reads is held against its operands, place by place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

import torch.fx

from piecework.codegen.plan.literals import is_inline_literal
from piecework.codegen.proof.graph_run import Event, Token, run_graph, same_constant
from piecework.codegen.proof.prove import TextRun, parse_text
from piecework.codegen.replay import plan
from piecework.codegen.stitch.source import StitchedSource, linkage_of
from piecework.errors import EmitError

_Buffer = tuple[int, int]  # a piece, and the leaf of its arguments that is staged


def verify_replay(
    replay: plan.ReplaySource,
    source: StitchedSource,
    split_gm: torch.fx.GraphModule,
    facts: plan.ReplayFacts,
) -> None:
    """Prove that ``replay`` runs what ``split_gm`` says, on the memory that was captured.

    The memory of operands that operators make, only the first checked replay knows.
    """
    _ReplayRun(replay, source, split_gm, facts).check()


class _ReplayRun(TextRun):
    """Runs a replay's text; what the runtime holds for it is a token of the graph, or itself."""

    def __init__(
        self,
        replay: plan.ReplaySource,
        source: StitchedSource,
        split_gm: torch.fx.GraphModule,
        facts: plan.ReplayFacts,
    ) -> None:
        linked = linkage_of(source.module, source.options, replay.consts)
        graph = run_graph(split_gm, linked)
        tree = parse_text(replay.code, "replay source")
        super().__init__(replay.code, tree, replay.module.entry.name, graph, linked)
        self.replay, self.facts, self.names = replay, facts, source.submod_names
        names = [each.name for each in source.module.entry.parameters]
        self.tokens = dict(zip(names, (token for _, token in graph.parameters), strict=True))
        self.tokens |= graph.held
        self.calls = {event.target: event for event in graph.events}
        self.places = {self.tokens[name]: place for name, place in facts.places.items()}
        self.numbers: dict[str, object] = {**facts.numbers}
        self.numbers |= {self.tokens[name].name: size for name, size in facts.sizes.items()}
        self.inputs = Token("inputs")
        self.staged = not facts.staged
        self.filled: dict[_Buffer, object] = {}
        self.due: dict[_Buffer, object] = {}

    def check(self) -> None:
        given = self.functions[self.entry].args
        wanted = [each.name for each in self.replay.module.entry.parameters]
        others = (given.vararg, given.kwarg, given.defaults, given.kwonlyargs)
        if [each.arg for each in given.args] != wanted or any(others):
            self.refuse(given.args[0], f"{self.entry} takes other parameters")
        self.define({name: self._held(each) for name, each in self.replay.held.items()})
        self.module.update(self._numbers())
        self.prove([self.inputs])
        if self.filled or self.due:
            raise EmitError("the text stages or brings back an operand that no replay has")
        if not self.staged:
            raise EmitError("the inputs are not staged first")

    def _held(self, held: plan.Held) -> object:
        match held:
            case plan.HeldOutput(piece, element):
                return self._output(piece, element)
            case plan.HeldInput(name):
                return self.tokens[name]
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
                known = output.value if isinstance(output, plan.Frozen) else None
                found[name] = self._output(held.piece, held.element)
            else:
                found[name] = self.tokens.get(name)
            if known is None or not same_constant(known, value):
                raise EmitError(
                    f"the replay differs from the graph: {name} is {known!r} in this capture, not {value!r}"
                )
        return found

    # --- what is recorded --------------------------------------------------------------------------

    def called(self, line: int, target: object, /, *args: object, **kwargs: object) -> object:
        match target:
            case plan.HeldStage():
                if kwargs or self.staged or self.next or args != (self.inputs,):
                    self.refuse(line, "something else than the inputs is staged, or later")
                self.staged = True
            case plan.HeldReplay(piece):
                return self._replayed(line, piece, *args, **kwargs)
            case _:
                return super().called(line, target, *args, **kwargs)
        return None

    def called_method(
        self, line: int, value: object, name: str, /, *args: object, **kwargs: object
    ) -> object:
        copies = name == "copy_" and len(args) == 1 and not kwargs
        if copies and isinstance(value, plan.HeldBuffer):
            self.filled[value.piece, value.leaf] = args[0]
        elif copies and isinstance(args[0], plan.HeldBuffer):
            if self.due.pop((args[0].piece, args[0].leaf), None) != value:
                self.refuse(line, "something is brought back that the piece did not change")
        else:
            return super().called_method(line, value, name, *args, **kwargs)
        return None

    # --- one piece ---------------------------------------------------------------------------------

    def _replayed(self, line: int, piece: int, /, *args: object, **kwargs: object) -> object:
        facts, target = self.facts.pieces[piece], f"submod {self.names[piece]}"
        if facts.eager_reason is not None:
            return self.event(line, target, *args, **kwargs)
        event = self.calls.get(target)
        if args or kwargs or event is None:
            self.refuse(line, "a replay takes no arguments, and its piece is one that is called")
        self.event(line, target, *event.args, **event.kwargs)
        self._check_operands(line, piece, facts, event)
        self._place_outputs(line, facts, event)
        return None

    def _check_operands(self, line: int, piece: int, facts: plan.PieceFacts, event: Event) -> None:
        leaves = list(_flat(event.args))
        if len(leaves) != len(facts.reads):
            why = f"captured with {len(facts.reads)} operands, the graph has {len(leaves)}"
            self.refuse(line, why)
        for index, (leaf, read) in enumerate(zip(leaves, facts.reads, strict=True)):
            why = ""
            match read:
                case plan.Staged(writes_back=changed):
                    key = piece, index
                    holds = key in self.filled and self.filled.pop(key) == leaf
                    why = f"operand {index} is not staged before it"
                    if changed:
                        self.due[key] = leaf
                case plan.InPlace() if isinstance(leaf, Token) and leaf in self.places:
                    holds = self.places[leaf] == read.place
                    why = f"operand {index} is {leaf.name}, and the capture reads other memory ({read.owner})"
                case plan.Frozen() if isinstance(leaf, Token) or is_inline_literal(leaf):
                    # Built into the graph: what the operand is at the captured sizes, whatever the data.
                    known = self.numbers.get(leaf.name, leaf) if isinstance(leaf, Token) else leaf
                    holds = known is read.value or same_constant(known, read.value)
                    why = f"operand {index} is {known!r} by the captured sizes, and was {read.value!r}"
                case plan.InPlace() | plan.Frozen():
                    continue  # what an operator made, an object of the graph
                case _:
                    assert_never(read)
            if not holds:
                self.refuse(line, f"the replay differs from the graph: {why}")

    def _place_outputs(self, line: int, facts: plan.PieceFacts, event: Event) -> None:
        outputs, result = facts.outputs, event.result
        tokens: dict[int | None, Token] = {None: result}
        if isinstance(outputs, tuple) and result.size is not None:
            if result.size != len(outputs):
                self.refuse(line, f"{len(outputs)} outputs were captured, not {result.size}")
            tokens = {index: result.element(index) for index in range(result.size)}
        for element, token in tokens.items():
            output = facts.output(element)
            if isinstance(output, plan.Frozen) and token.is_node:
                known = self.numbers.get(token.name)
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
