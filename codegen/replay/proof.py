"""Proves replay source on tokens: each replay stands for the next call of its piece.

That a captured piece reads the memory of its operands is checked where the text is emitted.
"""

import torch.fx
from torch.utils import _pytree as pytree

from piecework.codegen.proof.graph_run import Named, Token, run_graph, same_constant
from piecework.codegen.proof.prove import At, Reporting, TextRun, linkage_of, parsed, refuse
from piecework.codegen.replay.plan import Held, ReplayFacts, ReplaySource, Staged
from piecework.codegen.stitch.source import StitchedSource
from piecework.errors import EmitError


def prove_replay(
    replay: ReplaySource, source: StitchedSource, split_gm: torch.fx.GraphModule, facts: ReplayFacts
) -> None:
    """Prove that ``replay`` runs what ``split_gm`` says; raises `EmitError` where it does not."""
    _ReplayRun(replay, source, split_gm, facts).check()


class _ReplayRun(TextRun):
    """Runs a replay's text; what it holds is a token of the graph, or stands for itself."""

    def __init__(
        self,
        replay: ReplaySource,
        source: StitchedSource,
        split_gm: torch.fx.GraphModule,
        facts: ReplayFacts,
    ) -> None:
        linked = linkage_of(source.module, source.options, replay.consts)
        graph = run_graph(split_gm, linked)
        super().__init__(replay.code, graph, linked)
        self.replay, self.facts = replay, facts
        self.calls = {each.target: each for each in graph.events if isinstance(each.target, Named)}
        names = [each.name for each in source.module.entry.parameters]
        self.tokens = dict(zip(names, (token for _, token in graph.parameters), strict=True))
        self.tokens |= graph.held
        self.scope |= {name: self._held(each) for name, each in replay.held.items()}
        self.inputs = Token()
        self.staged = not facts.staged
        self.filled: dict[tuple[int, int | None], object] = {}  # (piece, leaf) → what was copied
        self.due: dict[tuple[int, int | None], object] = {}  # what is to be brought back

    def check(self) -> None:
        tree, name = parsed(self.code), self.replay.module.entry.name
        self.prove(Reporting(self.code, tree, self.scope, name))
        if self.filled or self.due:
            raise EmitError("the text stages or brings back an operand that no replay has")
        if not self.staged:
            raise EmitError("the inputs are not staged first")

    def run_entry(self, text: Reporting) -> object:
        for name, (held, value) in self._numbers().items():
            if not same_constant(value, self.scope.get(name)):
                raise EmitError(
                    f"{name} is {value!r} in this capture, not {self.scope.get(name)!r}"
                )
            self.scope[name] = held
        return self.scope[text.entry](self.inputs)

    def _numbers(self) -> dict[str, tuple[object, object]]:
        """Name of a number in the text → its token, and what it was in the capture."""
        found = {n: (self.tokens[n], value) for n, value in self.facts.sizes.items()}
        return found | {n: (self._held(e), value) for n, (e, value) in self.replay.numbers.items()}

    def _held(self, held: Held) -> object:
        if held.kind == "input":
            return self.tokens[held.name]
        if held.kind != "output":
            return held
        result = self.calls[self.submods[held.piece]].result
        return result if held.at is None else result.element(held.at)

    def called(self, at: At, target: object, /, *args: object, **kwargs: object) -> object:
        if not isinstance(target, Held):
            return super().called(at, target, *args, **kwargs)
        if target.kind == "replay":
            return self._replayed(at, target.piece, *args, **kwargs)
        if kwargs or self.staged or self.next or args != (self.inputs,):
            refuse(self.code, at[0], "something else than the inputs is staged, or later")
        self.staged = True
        return None

    def method(
        self, at: At, value: object, name: str, /, *args: object, **kwargs: object
    ) -> object:
        copies = name == "copy_" and len(args) == 1 and not kwargs
        if copies and isinstance(value, Held):
            self.filled[value.piece, value.at] = args[0]
        elif copies and isinstance(args[0], Held):
            if self.due.pop((args[0].piece, args[0].at), None) is not value:
                refuse(self.code, at[0], "something is brought back that the piece did not change")
        else:
            return super().method(at, value, name, *args, **kwargs)
        return None

    def _replayed(self, at: At, piece: int, /, *args: object, **kwargs: object) -> object:
        facts, submod = self.facts.pieces[piece], self.submods[piece]
        if facts.eager_reason is not None:
            return self.event(at, submod, *args, **kwargs)
        event = self.calls.get(submod)
        if args or kwargs or event is None:
            refuse(
                self.code, at[0], "a replay takes no arguments, and its piece is one that is called"
            )
        self.event(at, submod, *event.args, **event.kwargs)
        for index, (leaf, read) in enumerate(
            zip(pytree.tree_leaves(event.args), facts.reads, strict=True)
        ):
            if isinstance(read, Staged):
                key = piece, index
                if key not in self.filled or not self.same(leaf, self.filled.pop(key)):
                    refuse(self.code, at[0], f"operand {index} is not staged before it")
                if read.writes_back:
                    self.due[key] = leaf
        return None
