"""Proof that replay source does what its graph does. In: replay source, the stitching source, the graph and the capture's facts. Out: a `ReplayProof`, or an `EmitError`.

Each replay in the text is put back to the call it stands for, and the result is proved against the graph as stitching source is; then
what each captured piece reads is held against its operands, place by place. The planning of the replay is not relied on.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch.fx

from piecework.codegen.graph.targets import ENTRY_NAME
from piecework.codegen.plan.literals import read_literal
from piecework.codegen.plan.names import SUBMODS
from piecework.codegen.plan.render import flat_statements
from piecework.codegen.proof.grammar import check_grammar, parse_text
from piecework.codegen.proof.operands import same_constant
from piecework.codegen.proof.verify import Proof, verify_text
from piecework.codegen.replay.plan import (
    Frozen,
    HeldBack,
    HeldBuffer,
    HeldReplay,
    HeldStage,
    InPlace,
    ReplayFacts,
    ReplaySource,
    Staged,
)
from piecework.codegen.stitch.source import StitchedSource, linkage_of
from piecework.errors import EmitError


@dataclass(frozen=True, slots=True)
class ReplayProof:
    """What was proved.

    Attributes:
        stitched: the text with its replays put back, against the graph.
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
    return _Checker(replay, source, facts).check(split_gm)


class _Checker:
    def __init__(self, replay: ReplaySource, source: StitchedSource, facts: ReplayFacts) -> None:
        self.replay, self.source, self.facts = replay, source, facts
        self.places: dict[str, Hashable] = dict(facts.places)
        self.entry = _entry_of(source)
        self.calls = _piece_calls(self.entry)
        self.written: dict[str, object] = {}
        self.filled: dict[tuple[int, int], tuple[str, ...]] = {}
        self.due: dict[tuple[int, int], tuple[str, ...]] = {}
        self.replays = self.operands = self.vouched = 0

    def check(self, split_gm: torch.fx.GraphModule) -> ReplayProof:
        self.graph = _GraphCalls(split_gm, self.source.submod_names)
        code = self.replay.code
        tree = parse_text(code, "replay source")
        check_grammar(code, tree)
        body: list[ast.stmt] = []
        for stmt in tree.body:
            if isinstance(stmt, ast.FunctionDef) and stmt.name == self.replay.module.entry.name:
                self._require_signature(stmt)
                self._require_held(_bound_inside(stmt), stmt)
                body.append(self._put_back(stmt))
            elif not self._is_size(stmt):
                self._require_held(_bound_by(stmt), stmt)
                body.append(stmt)
        for name, value in self.written.items():
            known = self.places.get(name)
            if not (isinstance(known, Frozen) and same_constant(known.value, value)):
                raise EmitError(f"the replay differs from the graph: {name} = {value!r} is nowhere")
        code = ast.unparse(ast.fix_missing_locations(ast.Module(body, type_ignores=[])))
        source = self.source
        linked = linkage_of(source.module, source.options, self.replay.consts)
        proof = verify_text(code, split_gm, linked, lifetimes=False)
        return ReplayProof(proof, self.replays, self.operands, self.vouched)

    def _is_size(self, stmt: ast.stmt) -> bool:
        match stmt:
            case ast.Assign(targets=[ast.Name(id=name)], value=text) if (
                read_literal(text) is not None
            ):
                value = ast.literal_eval(text)
                if name in self.facts.sizes:
                    if not same_constant(self.facts.sizes[name], value):
                        raise _differs(stmt, f"{name} is {self.facts.sizes[name]} in this capture")
                else:
                    self.written[name] = value  # a piece's result, which is looked at there
                return True
        return False

    def _require_held(self, names: Iterable[str], stmt: ast.stmt) -> None:
        """The runtime binds the held names and the sizes; a text that bound one itself would mean something else by it."""
        for name in names:
            if name in self.replay.held or name in self.facts.sizes:
                raise _differs(stmt, f"{name} is bound by the text")

    # --- the function ------------------------------------------------------------------------------

    def _require_signature(self, function: ast.FunctionDef) -> None:
        """It takes the staged inputs, and nothing else."""
        args = function.args
        given = [each.arg for each in (*args.args, *args.kwonlyargs)]
        taken = [parameter.name for parameter in self.replay.module.entry.parameters]
        if given != taken or args.kwonlyargs or args.vararg or args.kwarg or args.defaults:
            raise _differs(function, f"{function.name} takes other parameters")

    def _put_back(self, function: ast.FunctionDef) -> ast.FunctionDef:
        """The function as it would be in stitching source."""
        statements = list(function.body)
        if self.facts.staged:
            self._require_stage(statements.pop(0), function)
        body = self._block(statements)
        if self.filled or self.due:
            raise EmitError("the text stages or brings back an operand that no replay has")
        self.entry.body = body
        return self.entry

    def _block(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements as stitching source has them, those of regions too."""
        body: list[ast.stmt] = []
        for stmt in statements:
            if isinstance(stmt, ast.Try):
                stmt.body = self._block(stmt.body) or [ast.Pass()]
                body.append(stmt)
                continue
            found = self._statement(stmt)
            if found is not None:
                body.append(found)
        return body

    def _require_stage(self, stmt: ast.stmt, function: ast.FunctionDef) -> None:
        call = _bare_call(stmt)
        inputs = [each.arg for each in function.args.args]
        if call is None or not isinstance(self._held(call.func), HeldStage):
            raise _differs(stmt, "the inputs are not staged first")
        if [getattr(arg, "id", None) for arg in call.args] != inputs or call.keywords:
            raise _differs(stmt, "something else than the inputs is staged")

    def _statement(self, stmt: ast.stmt) -> ast.stmt | None:
        """``stmt`` as stitching source has it; None for copies, which are remembered until their replay."""
        call = _bare_call(stmt)
        held = None if call is None else self._held(call.func)
        if call is not None and isinstance(held, HeldReplay):
            return self._replayed(stmt, call, held.piece)
        if call is not None and isinstance(held, (HeldBuffer, HeldBack)) and call.keywords:
            raise _differs(stmt, "a copy gets more than the operand")
        if call is not None and isinstance(held, HeldBuffer):
            self.filled[held.piece, held.buffer] = tuple(map(ast.dump, call.args))
            return None
        if call is not None and isinstance(held, HeldBack):
            self._brought_back(stmt, (held.piece, held.buffer), tuple(map(ast.dump, call.args)))
            return None
        if call is not None and _is_copy(call):
            return self._copy(stmt, call)
        inner = stmt.value if isinstance(stmt, (ast.Assign, ast.Expr)) else None
        if isinstance(inner, ast.Call) and isinstance(self._held(inner.func), HeldReplay):
            return self._uncaptured(stmt, inner)
        return stmt

    def _held(self, name: ast.expr) -> object:
        return self.replay.held.get(name.id) if isinstance(name, ast.Name) else None

    def _copy(self, stmt: ast.stmt, call: ast.Call) -> ast.stmt | None:
        """``buffer.copy_(value)`` fills a buffer, ``value.copy_(buffer)`` brings it back; any other copy is the graph's."""
        assert isinstance(call.func, ast.Attribute)
        into, value = self._held(call.func.value), self._held(call.args[0])
        if isinstance(into, HeldBuffer):
            self.filled[into.piece, into.buffer] = (ast.dump(call.args[0]),)
            return None
        if isinstance(value, HeldBuffer):
            key = (value.piece, value.buffer)
            self._brought_back(stmt, key, (ast.dump(call.func.value),))
            return None
        return stmt

    def _brought_back(self, stmt: ast.stmt, key: tuple[int, int], values: tuple[str, ...]) -> None:
        if self.due.pop(key, None) != values:
            raise _differs(stmt, "something is brought back that the piece did not change")

    # --- one piece ---------------------------------------------------------------------------------

    def _uncaptured(self, stmt: ast.stmt, call: ast.Call) -> ast.stmt:
        held = self._held(call.func)
        assert isinstance(held, HeldReplay)
        if self.facts.pieces[held.piece].eager_reason is None:
            raise _differs(stmt, "a captured piece is called with arguments")
        subscript = ast.Subscript(
            ast.Name(SUBMODS, ast.Load()), ast.Constant(held.piece), ast.Load()
        )
        call.func = subscript
        return stmt

    def _replayed(self, stmt: ast.stmt, call: ast.Call, piece: int) -> ast.stmt:
        if self.facts.pieces[piece].eager_reason is not None:
            return self._uncaptured(stmt, call)
        if call.args or call.keywords:
            raise _differs(stmt, "a replay takes no arguments")
        if piece not in self.calls:
            raise _differs(stmt, "the stitching source does not call this piece")
        original = self.calls[piece]
        inner = original.value
        assert isinstance(inner, ast.Call)
        self._check_operands(stmt, piece, _leaves(inner.args, stmt))
        self._place_outputs(original, piece)
        self.replays += 1
        return original

    def _check_operands(self, stmt: ast.stmt, piece: int, leaves: Sequence[ast.expr]) -> None:
        facts = self.facts.pieces[piece]
        if len(leaves) != len(facts.reads):
            raise _differs(
                stmt, f"captured with {len(facts.reads)} operands, the graph has {len(leaves)}"
            )
        for number, buffer in enumerate(facts.buffers):
            expected = tuple(ast.dump(leaves[leaf]) for leaf in buffer.leaves)
            if self.filled.pop((piece, number), None) != expected:
                raise _differs(stmt, f"operands {list(buffer.leaves)} are not staged before it")
            if buffer.writes_back:
                self.due[piece, number] = expected
        for index, (leaf, read) in enumerate(zip(leaves, facts.reads, strict=True)):
            match read:
                case Staged(buffer=number):
                    if index not in facts.buffers[number].leaves:
                        raise _differs(stmt, f"operand {index} has no buffer")
                    self.operands += 1
                case InPlace():
                    self._check_place(stmt, index, leaf, read)
                case Frozen():
                    self._check_frozen(stmt, piece, index, read)
                case _:
                    assert_never(read)

    def _check_place(self, stmt: ast.stmt, index: int, leaf: ast.expr, read: InPlace) -> None:
        name = leaf.id if isinstance(leaf, ast.Name) else None
        if name is None or name not in self.places:
            self.vouched += 1
        elif self.places[name] != read.place:
            raise _differs(
                stmt,
                f"operand {index} is {name}, and the capture reads other memory ({read.owner})",
            )
        else:
            self.operands += 1

    def _check_frozen(self, stmt: ast.stmt, piece: int, index: int, read: Frozen) -> None:
        """What is built into the graph must be what the operand is at the captured sizes, whatever the data."""
        operand = self.graph.operand(piece, index)
        known: object = operand
        if isinstance(operand, torch.fx.Node):
            if operand.op == "get_attr":  # an object that the graph holds
                self.vouched += 1
                return
            if operand.name in self.facts.sizes:
                known = self.facts.sizes[operand.name]
            elif operand.name in self.facts.numbers:
                known = self.facts.numbers[operand.name]
            else:
                raise _differs(
                    stmt,
                    f"operand {index} is {operand.name}, which does not follow from the captured sizes, and was captured as "
                    f"{read.value!r}",
                )
        if known is not read.value and not same_constant(known, read.value):
            raise _differs(stmt, f"operand {index} is {known!r}, and was {read.value!r}")
        self.operands += 1

    def _check_number(
        self, stmt: ast.stmt, piece: int, element: int | None, output: Frozen
    ) -> None:
        """A number that a piece returned at the capture must be what the graph says that it is at these sizes."""
        for node in self.graph.results(piece, element):
            known = self.facts.numbers.get(node.name)
            if known is None and output.value is None:
                continue
            if known is None or not same_constant(known, output.value):
                raise _differs(
                    stmt,
                    f"{node.name} was {output.value!r} at the capture, and is {known!r} by the graph",
                )

    def _place_outputs(self, stmt: ast.Assign | ast.Expr, piece: int) -> None:
        if not isinstance(stmt, ast.Assign):
            return
        facts, target = self.facts.pieces[piece], stmt.targets[0]
        if isinstance(target, ast.Name):
            self._place(stmt, piece, None, target.id)
        elif isinstance(target, ast.Tuple) and isinstance(facts.outputs, tuple):
            names = [each.id for each in target.elts if isinstance(each, ast.Name)]
            if len(names) != len(facts.outputs):
                raise _differs(
                    stmt, f"{len(facts.outputs)} outputs were captured, not {len(names)}"
                )
            for element, name in enumerate(names):
                self._place(stmt, piece, element, name)

    def _place(self, stmt: ast.stmt, piece: int, element: int | None, name: str) -> None:
        output = self.facts.pieces[piece].output(element)
        if isinstance(output, Frozen):
            self._check_number(stmt, piece, element, output)
        self.places[name] = output


class _GraphCalls:
    """The calls of pieces in a stitching graph: their operands, flattened, and what takes their results."""

    def __init__(self, split_gm: torch.fx.GraphModule, names: Sequence[str]) -> None:
        calls = split_gm.graph.find_nodes(op="call_module")
        self._calls = {names.index(c.target): c for c in calls if c.target in names}

    def operand(self, piece: int, index: int) -> object:
        return list(_flat(self._calls[piece].args))[index]

    def results(self, piece: int, element: int | None) -> Iterator[torch.fx.Node]:
        call = self._calls[piece]
        if element is None:
            yield call
            return
        for user in call.users:
            if user.target is operator.getitem and user.args[1] == element:
                yield user


def _flat(argument: object) -> Iterator[object]:
    if isinstance(argument, (tuple, list)):
        for each in argument:
            yield from _flat(each)
    else:
        yield argument


def _piece_calls(entry: ast.FunctionDef) -> Mapping[int, ast.Assign | ast.Expr]:
    """The statement of the stitching source that calls each piece."""
    found: dict[int, ast.Assign | ast.Expr] = {}
    for stmt in flat_statements(entry.body):
        if isinstance(stmt, (ast.Assign, ast.Expr)):
            match stmt.value:
                case ast.Call(ast.Subscript(ast.Name(name), ast.Constant(int() as index))):
                    if name == SUBMODS:
                        found[index] = stmt
    return found


def _entry_of(source: StitchedSource) -> ast.FunctionDef:
    for stmt in parse_text(source.code).body:
        if isinstance(stmt, ast.FunctionDef) and stmt.name == ENTRY_NAME:
            return stmt
    raise EmitError(f"stitching source defines no function {ENTRY_NAME}")


def _bound_by(stmt: ast.stmt) -> list[str]:
    """The names that a statement binds where it stands."""
    match stmt:
        case ast.FunctionDef(name=name):
            return [name]
        case ast.Import(names=names):
            return [each.name.partition(".")[0] for each in names]
        case _:
            stored = (n for n in ast.walk(stmt) if isinstance(n, ast.Name))
            return [n.id for n in stored if not isinstance(n.ctx, ast.Load)]


def _bound_inside(function: ast.FunctionDef) -> list[str]:
    """The names that are local to ``function``."""
    parameters = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return parameters + [name for stmt in function.body for name in _bound_by(stmt)]


def _bare_call(stmt: ast.stmt) -> ast.Call | None:
    """The call that a statement consists of."""
    if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
        return stmt.value
    return None


def _is_copy(call: ast.Call) -> bool:
    function = call.func
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "copy_"
        and len(call.args) == 1
        and not call.keywords
    )


def _leaves(args: Sequence[ast.expr], stmt: ast.stmt) -> list[ast.expr]:
    found: list[ast.expr] = []
    for arg in args:
        if isinstance(arg, (ast.Tuple, ast.List)):
            found += _leaves(arg.elts, stmt)
        elif isinstance(arg, (ast.Dict, ast.Starred)):
            raise _differs(stmt, "a piece takes a container that has no replay form")
        else:
            found.append(arg)
    return found


def _differs(stmt: ast.stmt, what: str) -> EmitError:
    return EmitError(
        f"the replay differs from the graph: {what}",
        where=f"line {stmt.lineno}: {ast.unparse(stmt).splitlines()[0]}",
        hint="an edited file must still do what the graph does; a generated one that differs is a defect",
    )
