"""From stitching source to replay source: a straight-line function that replays one descriptor."""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

import torch.fx

from piecework.codegen.graph.origin import results_of
from piecework.codegen.graph.structure import new_placeholder
from piecework.codegen.plan import ir
from piecework.codegen.plan.ir import LowerOptions
from piecework.codegen.plan.literals import is_inline_literal, literal_text, targets_text
from piecework.codegen.plan.names import CONSTS, NameTable, is_identifier
from piecework.codegen.plan.render import const_rows, render, table_rows
from piecework.codegen.proof.graph_run import same_constant
from piecework.codegen.replay import plan
from piecework.codegen.replay.proof import prove_replay
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
        leaves, reads = piece.leaves, facts.reads
        if leaves is None:
            why = "a piece takes a container or a keyword, which has no replay form"
            raise EmitError(why, where=submod)
        if len(reads) != len(leaves):
            why = f"captured with {len(reads)} arguments, the graph passes {len(leaves)}"
            raise EmitError(f"piece {index} was {why}")
        owners: dict[str, list[str]] = {}
        brought_back: list[ir.Statement] = []
        for number, (leaf, read) in enumerate(zip(leaves, reads, strict=True)):
            match read:
                case plan.InPlace(place, owner):
                    if self.places.get(leaf, place) != place:
                        why = f"is {leaf}, and the capture reads other memory ({owner})"
                        raise _differs(submod, f"operand {number} {why}")
                    if leaf in stmt.uses:
                        owners.setdefault(owner, []).append(leaf)
                case plan.Staged(writes_back):
                    shown = leaf if leaf in stmt.uses else "a constant"
                    owners.setdefault("staged", []).append(shown)
                    name = self.names.claim(f"{submod}_in_{number}")
                    held = plan.Held("buffer", index, number)
                    self._hold(name, held, f"static buffer of {submod}")
                    why = f"address policy {self.facts.policy!r} stages it for {submod}"
                    yield _made(f"{name}.copy_({leaf})", f"fresh tensor: {why}", name, leaf)
                    if writes_back:
                        why = f"{submod} changed it in place"
                        brought_back.append(_made(f"{leaf}.copy_({name})", why, leaf, name))
                case plan.Frozen(value):
                    # Built into the graph: what the operand is at the captured sizes, whatever the data.
                    known = literal_text(self.known[leaf]) if leaf in self.known else leaf
                    built_in = literal_text(value) if is_inline_literal(value) else None
                    if not leaf.startswith(CONSTS) and built_in != known:
                        why = f"is {known} by the captured sizes, and was {value!r}"
                        raise _differs(submod, f"operand {number} {why}")
                case _:
                    assert_never(read)
        replay = self.names.claim(f"replay_{index}")
        self._hold(replay, plan.Held("replay", index), f"static graph of {submod}")
        head = stmt.origin.module or f"piece {index}"
        yield _made(f"{replay}()", f"{head}  reads {_shown(owners) or 'nothing'}")
        yield from brought_back
        self._keep_results(stmt, index, submod)

    def _keep_results(self, stmt: ir.Statement, index: int, submod: str) -> None:
        """Note where a piece's results lie; numbers must be what the graph makes of the sizes."""
        facts = self.facts.pieces[index]
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


def _differs(submod: str, why: str) -> EmitError:
    return EmitError(f"the replay differs from the graph: {why}", where=submod)


def _shown(owners: Mapping[str, Sequence[str]]) -> str:
    """What a replay reads, by who keeps it in place, for the comment above it."""
    shown = [f"{owner}: {', '.join(names)}" for owner, names in owners.items() if owner != "weight"]
    weights = len(owners.get("weight", ()))
    shown += [f"{weights} weight{'s' * (weights != 1)}"] if weights else []
    return "; ".join(shown)


def _made(text: str, note: str, *uses: str) -> ir.Statement:
    used = tuple(filter(is_identifier, uses))
    return ir.Statement(text, uses=used, origin=ir.Origin(module=note))
