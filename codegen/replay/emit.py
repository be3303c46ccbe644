"""From stitching source to replay source. In: a `StitchedSource`, its graph, and what was captured of each piece. Out: a straight-line function that replays one descriptor.

Nothing is executed, and no tensor is touched; every place where the text relies on memory staying put is checked against the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import assert_never

import torch.fx

from piecework.codegen.plan import ir
from piecework.codegen.plan.check import check_ir
from piecework.codegen.plan.literals import is_inline_literal, literal_text
from piecework.codegen.plan.liveness import definitions, uses
from piecework.codegen.plan.names import NameTable
from piecework.codegen.plan.render import const_rows, render, table_rows
from piecework.codegen.replay.plan import (
    Buffer,
    Frozen,
    Held,
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
from piecework.codegen.replay.proof import ReplayProof, verify_replay
from piecework.codegen.stitch.source import StitchedSource
from piecework.errors import EmitError

REPLAY_NAME = "replay"


def generate_replay(
    source: StitchedSource, split_gm: torch.fx.GraphModule, facts: ReplayFacts
) -> tuple[ReplaySource, ReplayProof]:
    """Emit the replay function of one captured descriptor and prove it against the stitching graph.

    The function takes the tuple of inputs that are staged, and returns what ``execution_fn`` returns for the captured
    size: static memory, which the next replay overwrites.

    Raises:
        EmitError: the capture does not fit the graph: a piece reads memory that is not its operand's.
    """
    plan = _Planner(source, facts)
    module = plan.module()
    check_ir(module, len(source.consts), REPLAY_NAME)
    text = _render(module, plan, facts)
    emitted = ReplaySource(text, plan.held, source.consts, module)
    return emitted, verify_replay(emitted, source, split_gm, facts)


class _Planner:
    """Rewrites the stitching plan: calls of pieces become replays, what they return is held."""

    def __init__(self, source: StitchedSource, facts: ReplayFacts) -> None:
        stitched = source.module
        if len(facts.pieces) != len(source.submod_names):
            raise EmitError(
                f"{len(facts.pieces)} pieces were captured, the graph has {len(source.submod_names)}"
            )
        self.source, self.facts = source, facts
        taken = {"torch", REPLAY_NAME, "execution_fn", *(row.name for row in stitched.bound)}
        taken |= {alias.name for alias in stitched.aliases}
        taken |= {function.name for function in stitched.functions}
        taken |= {parameter.name for parameter in stitched.entry.parameters}
        for stmt in stitched.entry.body:
            taken |= set(definitions(stmt))
        taken |= {module.partition(".")[0] for module in stitched.imports}
        self.names = NameTable(frozenset(taken))
        self.held: dict[str, Held] = {}
        self.stage = self.names.claim("stage")
        self.inputs = self.names.claim("inputs")
        self.buffers: dict[tuple[int, int], str] = {}
        self.numbers: dict[str, object] = (
            {}
        )  # results of pieces that follow from the captured sizes
        self.live: set[str] = set()

    def module(self) -> ir.Module:
        stitched = self.source.module
        body = list(self._body(stitched.entry.body))
        used = {name for stmt in body for name in uses(stmt)}
        self.numbers = {name: number for name, number in self.numbers.items() if name in used}
        for name in [*self.facts.staged, *self.facts.places]:
            if name in used:
                self.held[name] = HeldInput(name)
        entry = ir.Function(REPLAY_NAME, (ir.Parameter(self.inputs),), tuple(body), False)
        provided = tuple(dict.fromkeys([*self.held, *self.facts.sizes, *self.numbers]))
        return replace(stitched, entry=entry, submod_names=(), bound=(), provided=provided)

    def _body(self, body: tuple[ir.Stmt, ...]) -> Iterator[ir.Stmt]:
        if self.facts.staged:
            self.held[self.stage] = HeldStage()
            what = ", ".join(self.facts.staged)
            note = f"inputs: {what}, padded to {self.facts.tokens}"
            yield _call(self.stage, (ir.Name(self.inputs),), note)
        for stmt in body:
            match stmt:
                case ir.CallSubmod():
                    yield from self._piece(stmt)
                case ir.CallInlined(passes_submods=True):
                    raise EmitError(
                        f"function {stmt.function} calls pieces itself, which has no replay form",
                        where=stmt.origin.source or stmt.function,
                        hint="inline the nested graph, or run it uncaptured",
                    )
                case ir.Delete(names):
                    kept = tuple(name for name in names if name in self.live)
                    if kept:
                        yield ir.Delete(kept)
                case _:
                    self.live.update(definitions(stmt))
                    yield stmt

    def _piece(self, stmt: ir.CallSubmod) -> Iterator[ir.Stmt]:
        index, facts = stmt.index, self.facts.pieces[stmt.index]
        submod = self.source.submod_names[index]
        if facts.eager_reason is not None:
            name = self.names.claim(submod)
            self.held[name] = HeldReplay(index)
            self.live.update(stmt.targets)
            note = f"{stmt.origin.module}: runs uncaptured: {facts.eager_reason}"
            call = ir.Call(ir.Global(name), stmt.arguments)
            yield ir.Assign(stmt.targets, stmt.unpack, call, _noted(note.removeprefix(": ")))
            return
        leaves = leaves_of(stmt.arguments, submod)
        for number, buffer in enumerate(facts.buffers):
            yield self._fill(index, number, buffer, leaves)
        replay = self.names.claim(f"replay_{index}")
        self.held[replay] = HeldReplay(index)
        yield _call(replay, (), _reads(stmt, facts, leaves))
        for number, buffer in enumerate(facts.buffers):
            if buffer.writes_back:
                yield self._bring_back(index, number, buffer, leaves)
        for element, target in enumerate(stmt.targets):
            output = facts.output(element if stmt.unpack else None)
            if isinstance(output, Frozen) and is_inline_literal(output.value):
                self.numbers[target] = output.value
            else:
                self.held[target] = HeldOutput(index, element if stmt.unpack else None)

    def _fill(
        self, index: int, number: int, buffer: Buffer, leaves: tuple[ir.Expr, ...]
    ) -> ir.Stmt:
        submod = self.source.submod_names[index]
        if self.facts.policy != "copy":
            raise EmitError(
                f"address policy {self.facts.policy!r} stages nothing, and {submod} has buffers"
            )
        values = tuple(leaves[leaf] for leaf in buffer.leaves)
        note = f"fresh tensor: address policy {self.facts.policy!r} stages it for {submod}"
        if buffer.plain:
            name = self.names.claim(f"{submod}_in_{buffer.leaves[0]}")
            target = _copy(ir.Name(name), values[0], note)
        else:
            name = self.names.claim(f"stage_{submod}_in_{buffer.leaves[0]}")
            target = _call(name, values, note)
        self.held[name] = HeldBuffer(index, number)
        self.buffers[index, number] = name
        return target

    def _bring_back(
        self, index: int, number: int, buffer: Buffer, leaves: tuple[ir.Expr, ...]
    ) -> ir.Stmt:
        submod = self.source.submod_names[index]
        values = tuple(leaves[leaf] for leaf in buffer.leaves)
        note = f"{submod} changed it in place"
        if buffer.plain:
            return _copy(values[0], ir.Name(self.buffers[index, number]), note)
        name = self.names.claim(f"bring_back_{submod}_in_{buffer.leaves[0]}")
        self.held[name] = HeldBack(index, number)
        return _call(name, values, note)


def leaves_of(arguments: ir.Arguments, submod: str) -> tuple[ir.Expr, ...]:
    """The leaves of a piece's arguments, in the order in which a capture flattens them.

    Raises:
        EmitError: an argument is a container of another kind than list or tuple, or is passed by keyword.
    """
    if arguments.kwargs:
        raise EmitError("a piece is called with keywords, which has no replay form", where=submod)

    def walk(expr: ir.Expr) -> Iterator[ir.Expr]:
        match expr:
            case ir.TupleExpr(items) | ir.ListExpr(items):
                for item in items:
                    yield from walk(item)
            case ir.Name() | ir.Literal() | ir.Const() | ir.Global():
                yield expr
            case _:
                raise EmitError(
                    f"a piece takes a {type(expr).__name__}, which has no replay form", where=submod
                )

    return tuple(leaf for arg in arguments.args for leaf in walk(arg))


def _reads(stmt: ir.CallSubmod, facts: PieceFacts, leaves: tuple[ir.Expr, ...]) -> str:
    """What the replay reads, and who keeps it in place, for the comment above it."""
    if len(facts.reads) != len(leaves):
        raise EmitError(
            f"piece {stmt.index} was captured with {len(facts.reads)} arguments, the graph passes {len(leaves)}"
        )
    owners: dict[str, list[str]] = {}
    for leaf, read in zip(leaves, facts.reads, strict=True):
        match read:
            case InPlace(owner=owner) if isinstance(leaf, ir.Name):
                owners.setdefault(owner, []).append(leaf.id)
            case Staged():
                owners.setdefault("staged", []).append(getattr(leaf, "id", "a constant"))
            case InPlace() | Frozen():
                pass
            case _:
                assert_never(read)
    shown = [f"{owner}: {', '.join(names)}" for owner, names in owners.items() if owner != "weight"]
    weights = len(owners.get("weight", ()))
    shown += [f"{weights} weight{'s' * (weights != 1)}"] if weights else []
    head = stmt.origin.module or f"piece {stmt.index}"
    return f"{head}  reads {'; '.join(shown) or 'nothing'}"


def _call(name: str, args: tuple[ir.Expr, ...], note: str) -> ir.Stmt:
    return ir.Assign((), False, ir.Call(ir.Global(name), ir.Arguments(args)), _noted(note))


def _copy(into: ir.Expr, value: ir.Expr, note: str) -> ir.Stmt:
    call = ir.Call(ir.Attribute(into, "copy_"), ir.Arguments((value,)))
    return ir.Assign((), False, call, _noted(note))


def _noted(note: str) -> ir.Origin:
    return ir.Origin(module=note)


# --- text ------------------------------------------------------------------------------------------


def _render(module: ir.Module, plan: _Planner, facts: ReplayFacts) -> str:
    graphs = f"graphs: {facts.title}, address policy: {facts.policy}"
    held = "Held by this module; each is the same memory at every replay"
    header = ["", *facts.banner, graphs, *table_rows(held, list(_rows(plan))), *const_rows(module)]
    numbers = {**facts.sizes, **plan.numbers}
    sizes = [f"{name} = {literal_text(value)}" for name, value in numbers.items()]
    return str(render(module, "replay source", header, sizes))


def _rows(plan: _Planner) -> Iterator[str]:
    """One line for each held name, outputs of a piece together."""
    outputs: dict[int, list[str]] = {}
    submods = plan.source.submod_names
    for name, held in plan.held.items():
        match held:
            case HeldOutput(piece):
                outputs.setdefault(piece, []).append(name)
            case HeldStage():
                yield f"{name}: copies {', '.join(plan.facts.staged)} into persistent buffers"
            case HeldBuffer(piece) | HeldBack(piece):
                yield f"{name}: static buffer of {submods[piece]}"
            case HeldReplay(piece):
                eager = plan.facts.pieces[piece].eager_reason is not None
                what = "runs uncaptured" if eager else f"static graph of {submods[piece]}"
                yield f"{name}: {what}"
            case HeldInput():
                kind = "persistent buffer" if name in plan.facts.staged else "weight"
                yield f"{name}: {kind}"
            case _:
                assert_never(held)
    for piece, names in outputs.items():
        yield f"{', '.join(names)}: output of {submods[piece]}"
