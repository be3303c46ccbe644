"""From stitching source to replay source: a straight-line function that replays one descriptor."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import assert_never

import torch.fx

from piecework.codegen.graph.origin import results_of
from piecework.codegen.graph.structure import new_placeholder
from piecework.codegen.plan import ir
from piecework.codegen.plan.literals import is_inline_literal, literal_text, targets_text
from piecework.codegen.plan.names import CONSTS, NameTable, is_identifier
from piecework.codegen.plan.render import const_rows, render, table_rows
from piecework.codegen.proof.graph_run import same_constant
from piecework.codegen.replay import plan
from piecework.codegen.replay.proof import prove_replay
from piecework.codegen.stitch.lower import LowerOptions
from piecework.codegen.stitch.source import StitchedSource, generate_source
from piecework.errors import EmitError

REPLAY_NAME = "replay"
WHOLE = "whole_forward"


def whole_forward(
    split_gm: torch.fx.GraphModule, source: StitchedSource
) -> tuple[torch.fx.GraphModule, StitchedSource]:
    """The forward as one piece, for a full graph, and its source."""
    graph = torch.fx.Graph()
    inputs = [new_placeholder(graph, each.name) for each in source.module.entry.parameters]
    call, results = graph.call_module(WHOLE, tuple(inputs)), []
    for index, each in enumerate(results_of(split_gm.graph)):
        name = each.name if isinstance(each, torch.fx.Node) else None
        element = (call, index)
        results.append(graph.create_node("call_function", operator.getitem, element, name=name))
    graph.output(tuple(results))
    whole_gm = torch.fx.GraphModule({WHOLE: split_gm}, graph)
    return whole_gm, generate_source(whole_gm, LowerOptions(submods=(WHOLE,), emit_del=False))


def generate_replay(
    source: StitchedSource, split_gm: torch.fx.GraphModule, facts: plan.ReplayFacts
) -> plan.ReplaySource:
    """Emit the replay of one descriptor: the proved source, with replays for its pieces' calls."""
    planner = _Planner(source, split_gm, facts)
    module = planner.module()
    text = planner.text(module)
    replay = plan.ReplaySource(text, planner.held, planner.numbers, source.consts, module)
    prove_replay(replay, source, split_gm, facts)
    return replay


class _Planner:
    """Rewrites the stitching plan: calls of pieces become replays, what they return is held."""

    def __init__(
        self, source: StitchedSource, split_gm: torch.fx.GraphModule, facts: plan.ReplayFacts
    ) -> None:
        stitched = source.module
        if len(facts.pieces) != len(source.submod_names):
            raise EmitError(
                f"{len(facts.pieces)} pieces were captured, the graph has {len(source.submod_names)}"
            )
        self.source, self.facts = source, facts
        taken = {REPLAY_NAME, *(each.name for each in (*stitched.functions, stitched.entry))}
        taken |= {each.name for each in stitched.entry.parameters}
        taken |= {*(each.name for each in stitched.bound), *(a.name for a in stitched.aliases)}
        taken |= {target for stmt in stitched.entry.body for target in stmt.targets}
        taken |= {module.partition(".")[0] for module in stitched.imports}
        self.names = NameTable(frozenset(taken))
        self.held: dict[str, plan.Held] = {}
        self.rows: list[str] = []  # what they are, for the header
        self.returned: dict[str, list[str]] = {}  # what each submodule's static outputs are called
        self.stage = self.names.claim("stage")
        self.inputs = self.names.claim("inputs")
        # results of pieces that follow from the sizes
        self.numbers: dict[str, tuple[plan.Held, object]] = {}
        self.calls = {str(n.target): n for n in split_gm.graph.find_nodes(op="call_module")}
        self.places = {**facts.places}  # by name in the text
        self.known: dict[str, object] = {**facts.numbers, **facts.sizes}
        self.live: set[str] = set()

    def module(self) -> ir.Module:
        stitched = self.source.module
        body = list(self._body(stitched.entry.body))
        used = {name for stmt in body for name in stmt.uses}
        self.numbers = {name: number for name, number in self.numbers.items() if name in used}
        for name in dict.fromkeys([*self.facts.staged, *self.facts.places]):
            if name in used:
                kind = "persistent buffer" if name in self.facts.staged else "weight"
                self._hold(name, plan.Held("input", name=name), kind)
        entry = ir.Function(REPLAY_NAME, (ir.Parameter(self.inputs),), tuple(body))
        return replace(stitched, entry=entry, submod_names=(), bound=())

    def text(self, module: ir.Module) -> str:
        rows = self.rows + [
            f"{', '.join(names)}: output of {submod}" for submod, names in self.returned.items()
        ]
        graphs = f"graphs: {self.facts.title}, address policy: {self.facts.policy}"
        held = table_rows("Held by this module; each is the same memory at every replay", rows)
        header = ["", *self.facts.banner, graphs, *held, *const_rows(module)]
        numbers = {**self.facts.sizes, **{name: value for name, (_, value) in self.numbers.items()}}
        sizes = [f"{name} = {literal_text(value)}" for name, value in numbers.items()]
        return render(module, "replay source", header, sizes)

    def _hold(self, name: str, held: plan.Held, what: str) -> None:
        self.held[name] = held
        self.rows.append(f"{name}: {what}")

    def _body(self, body: tuple[ir.Statement, ...]) -> Iterator[ir.Statement]:
        if self.facts.staged:
            what = ", ".join(self.facts.staged)
            self._hold(self.stage, plan.Held("stage"), f"copies {what} into persistent buffers")
            note = f"inputs: {what}, padded to {self.facts.tokens}"
            yield _made(f"{self.stage}({self.inputs})", note, self.inputs)
        for stmt in body:
            if stmt.piece is not None:
                yield from self._piece(stmt, stmt.piece)
            elif stmt.kind == "nested":
                raise EmitError(
                    f"a function of the text calls pieces itself, which has no replay form: {stmt.text[:80]}",
                    where=stmt.origin.source or stmt.text.partition("(")[0],
                    hint="inline the nested graph, or run it uncaptured",
                )
            elif stmt.kind == "del":
                kept = tuple(name for name in stmt.targets if name in self.live)
                if kept:
                    yield ir.deletion(kept)
            else:
                self.live.update(stmt.targets)
                yield stmt

    def _piece(self, stmt: ir.Statement, piece: ir.PieceCall) -> Iterator[ir.Statement]:
        index, facts = piece.index, self.facts.pieces[piece.index]
        submod = self.source.submod_names[index]
        if facts.eager_reason is not None:
            name = self.names.claim(submod)
            self._hold(name, plan.Held("replay", index), "runs uncaptured")
            self.live.update(stmt.targets)
            note = f"{stmt.origin.module}: runs uncaptured: {facts.eager_reason}".removeprefix(": ")
            text = targets_text(stmt.targets, stmt.unpack) + f"{name}({piece.arguments})"
            yield replace(stmt, text=text, origin=ir.Origin(module=note), piece=None)
            return
        leaves = piece.leaves
        if leaves is None:
            why = "a piece takes a container or a keyword, which has no replay form"
            raise EmitError(why, where=submod)
        reads = _reads(stmt, piece, facts, leaves)
        self._check_operands(submod, leaves, facts)
        buffers: dict[int, str] = {}
        for leaf, each in enumerate(facts.reads):
            if isinstance(each, plan.Staged):
                buffers[leaf] = name = self.names.claim(f"{submod}_in_{leaf}")
                self._hold(name, plan.Held("buffer", index, leaf), f"static buffer of {submod}")
                note = f"fresh tensor: address policy {self.facts.policy!r} stages it for {submod}"
                yield _made(f"{name}.copy_({leaves[leaf]})", note, name, leaves[leaf])
        replay = self.names.claim(f"replay_{index}")
        self._hold(replay, plan.Held("replay", index), f"static graph of {submod}")
        yield _made(f"{replay}()", reads)
        for leaf, name in buffers.items():
            if getattr(facts.reads[leaf], "writes_back", False):
                text = f"{leaves[leaf]}.copy_({name})"
                yield _made(text, f"{submod} changed it in place", leaves[leaf], name)
        known = self._results(submod)
        for element, target in enumerate(stmt.targets):
            held = plan.Held("output", index, element if stmt.unpack else None)
            output = facts.output(held.at)
            self.places[target] = output
            number = known.get(held.at)
            if isinstance(output, plan.Frozen):
                # A result that nobody takes has no number.
                if held.at in known and not same_constant(number, output.value):
                    why = f"{target} was {output.value!r} at the capture, and is {number!r} by the graph"
                    raise _differs(submod, why)
                if is_inline_literal(output.value):
                    self.numbers[target], self.known[target] = (held, output.value), output.value
                    continue
            self.held[target] = held
            self.returned.setdefault(submod, []).append(target)

    def _results(self, submod: str) -> dict[int | None, object]:
        """What each result of a piece is by the captured sizes; None if it is no number."""
        call, numbers = self.calls[submod], self.facts.numbers
        picked = {
            user.args[1]: numbers.get(user.name)
            for user in call.users
            if user.target is operator.getitem
        }
        return {None: numbers.get(call.name), **picked}

    def _check_operands(self, submod: str, leaves: tuple[str, ...], facts: plan.PieceFacts) -> None:
        """Check that a captured piece reads the memory and has the numbers that its call passes."""
        for index, (leaf, read) in enumerate(zip(leaves, facts.reads, strict=True)):
            match read:
                case plan.InPlace(place, owner) if leaf in self.places:
                    if self.places[leaf] != place:
                        why = f"operand {index} is {leaf}, and the capture reads other memory ({owner})"
                        raise _differs(submod, why)
                case plan.Frozen(value) if not leaf.startswith(CONSTS):
                    # Built into the graph: what the operand is at the captured sizes, whatever the data.
                    known = literal_text(self.known[leaf]) if leaf in self.known else leaf
                    if not is_inline_literal(value) or literal_text(value) != known:
                        why = f"operand {index} is {known} by the captured sizes, and was {value!r}"
                        raise _differs(submod, why)


def _differs(submod: str, why: str) -> EmitError:
    return EmitError(f"the replay differs from the graph: {why}", where=submod)


def _reads(
    stmt: ir.Statement, piece: ir.PieceCall, facts: plan.PieceFacts, leaves: tuple[str, ...]
) -> str:
    """What the replay reads, and who keeps it in place, for the comment above it."""
    if len(facts.reads) != len(leaves):
        raise EmitError(
            f"piece {piece.index} was captured with {len(facts.reads)} arguments, the graph passes {len(leaves)}"
        )
    owners: dict[str, list[str]] = {}
    for leaf, read in zip(leaves, facts.reads, strict=True):
        named = leaf in stmt.uses
        match read:
            case plan.InPlace(owner=owner) if named:
                owners.setdefault(owner, []).append(leaf)
            case plan.Staged():
                owners.setdefault("staged", []).append(leaf if named else "a constant")
            case plan.InPlace() | plan.Frozen():
                pass
            case _:
                assert_never(read)
    shown = [f"{owner}: {', '.join(names)}" for owner, names in owners.items() if owner != "weight"]
    weights = len(owners.get("weight", ()))
    shown += [f"{weights} weight{'s' * (weights != 1)}"] if weights else []
    head = stmt.origin.module or f"piece {piece.index}"
    return f"{head}  reads {'; '.join(shown) or 'nothing'}"


def _made(text: str, note: str, *uses: str) -> ir.Statement:
    used = tuple(filter(is_identifier, uses))
    return ir.Statement(text, uses=used, origin=ir.Origin(module=note))
