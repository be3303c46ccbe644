"""What is known of the values of one run. In: operators as the dispatcher sees them, with fake arguments and results. Out: the rows of each value and piece of memory, and why nothing may be padded.

It asks the table for each operator, holds the answers against the sizes that came out, and keeps what writes do to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from piecework.codegen.graph.origin import source_line
from piecework.runtime import torch_compat
from piecework.runtime.analysis.memory import Memory
from piecework.runtime.analysis.rows.call import Call, base_name, bound, is_metadata_only, is_own
from piecework.runtime.analysis.rows.rule import Rule
from piecework.runtime.analysis.rows.table import is_random, rule_for
from piecework.runtime.analysis.state import SAME, Batch, Mixes, Rows, symbols_in, tensors_in
from piecework.runtime.splitting_op import registry

Inspect = Callable[[Call, Rule | None, Sequence[Rows]], str | None]

# Operators that give numbers of a tensor's shape, and none of its data.
_OF_SHAPE = (
    "sym_size",
    "sym_stride",
    "sym_numel",
    "sym_storage_offset",
    "is_contiguous",
    "dim",
)


class Walk:
    """What is known of values and of the memory that they lie in, in the order of execution."""

    def __init__(
        self,
        fresh: torch_compat.Refaked,
        batch: Batch,
        inspect: Inspect | None,
        outside: frozenset[str],
    ) -> None:
        self.fresh, self.batch, self.inspect, self.outside = fresh, batch, inspect, outside
        self.node: torch.fx.Node | None = None
        self.refused: str | None = None
        self.undeclared = self.by_context = False
        self.complaints: list[str] = []
        # Held here, so that no tensor dies and hands its identity to another.
        self._states: dict[int, tuple[torch.Tensor, Rows]] = {}
        self._memory: dict[int, Memory] = {}
        self._arguments: set[int] = set()
        self._read: set[str] = set()  # symbols that stand for numbers read from rows
        self._sizes: set[str] = set()  # symbols that arguments have

    # --- values ------------------------------------------------------------------------------------

    def enter(self, value: object) -> None:
        """Take in an argument."""
        self._sizes |= set(symbols_in(value))
        if not isinstance(value, torch.Tensor):
            return
        try:
            rows = self.batch.plain_rows(value)
        except Mixes as reason:
            rows = Rows(mixed=f"an argument: {reason}")
        known = self._memory.get(self.fresh.memory_of(value))
        if known is not None:
            known.shared = True
        self._arguments.add(id(value))
        self.set(value, rows)

    def state_of(self, tensor: torch.Tensor) -> Rows:
        found = self._states.get(id(tensor))
        if found is None:
            if self.batch.held_by(tensor):
                return Rows(mixed="a value of unknown origin")
            return SAME
        memory = self.memory_of(tensor)
        if memory.mixed is not None:
            return Rows(mixed=memory.mixed)
        return found[1].unnumbered() if memory.written else found[1]

    def set(self, tensor: torch.Tensor, rows: Rows) -> None:
        self._states[id(tensor)] = (tensor, rows)
        self.memory_of(tensor, rows)

    def memory_of(self, tensor: torch.Tensor, rows: Rows = SAME) -> Memory:
        key = self.fresh.memory_of(tensor)
        return self._memory.setdefault(key, Memory(bool(rows.dims)))

    def constant(self, value: object) -> object:
        """A tensor that the graph holds."""
        return self.fresh.real(value) if isinstance(value, torch.Tensor) else value

    def reason_of(self, value: object) -> str | None:
        """Why padding would change a value that the graph returns."""
        if isinstance(value, torch.Tensor):
            rows = self.state_of(value)
            if rows.mixed is None and any(blocks != 1 for blocks in rows.dims.values()):
                return "a result lists the rows several times"
            return rows.mixed
        if isinstance(value, (list, tuple)):
            return next((r for each in value if (r := self.reason_of(each)) is not None), None)
        if not self._read.isdisjoint(symbols_in(value)):
            return "a number that is read from rows"
        return None

    def is_same(self, value: object) -> bool:
        """Whether a value is the same in a padded batch."""
        if isinstance(value, torch.Tensor):
            return self.state_of(value) == SAME
        return not self.batch.held_by(value) and self._read.isdisjoint(symbols_in(value))

    # --- operators ---------------------------------------------------------------------------------

    def operator(
        self,
        op: torch._ops.OpOverload,
        args: Sequence[object],
        kwargs: dict[str, object],
        run: Callable[[], object],
    ) -> object:
        """Run one operator, and note what its results and what it writes are."""
        if op.namespace == "prim":
            return run()
        named, written = bound(op, args, kwargs)
        if is_metadata_only(op):  # its argument will have another shape
            if id(named["self"]) in self._arguments:
                self.refused = self.refused or f"{self.told(op)} changes the shape of an argument"
            named["self"] = self._alias(named["self"])
        places = [self.state_of(each) for each in written]
        out = run()
        call = Call(op, named, written, out, self.batch, self.state_of)
        answers = self._answers(call)
        results = call.results
        if not is_metadata_only(op):
            for tensor, place in zip(written, places, strict=True):
                value = self._written_value(call, tensor, answers)
                self.memory_of(tensor).write(place, value, self.told(op))
        for tensor, answer in zip(results, answers, strict=True):
            found = self._checked(op, tensor, answer)
            self.set(tensor, found)
            if found.mixed is not None:  # as many elements as the rows made it
                self._read |= set(symbols_in(tensor)) - self._sizes
        self._numbers(call)
        return out

    def _alias(self, value: object) -> object:
        assert isinstance(value, torch.Tensor)
        alias = value.view_as(value)
        self.set(alias, self.state_of(value))
        return alias

    def _answers(self, call: Call) -> list[Rows]:
        count = len(call.results)
        rule = rule_for(call.op)
        try:
            if call.op._schema.name in self.outside:
                found: Rows | Sequence[Rows] = list(map(self.batch.plain_rows, call.results))
            else:
                found = self._own(call) if is_own(call.op) else self._apply(call, rule)
            answers = [found] * count if isinstance(found, Rows) else list(found)
            if rule is None or not rule.numbers:
                answers = [each.unnumbered() for each in answers]
        except Mixes as reason:
            answers = [Rows(mixed=str(reason))] * count
            if not count:
                answers = []
        if self.inspect is not None:
            said = self.inspect(call, rule, answers)
            if said is not None:
                self.complaints.append(f"{self.told(call.op)} {said}")
        return answers

    def _apply(self, call: Call, rule: Rule | None) -> Rows | Sequence[Rows]:
        reads = rule is None or rule.reads
        if reads:
            for each in (*call.inputs(), *call.written):
                mixed = self.state_of(each).mixed
                if mixed is not None:
                    raise Mixes(mixed)
        sizes = frozenset() if rule is None else rule.sizes
        for name, value in call.args.items():
            held = [symbol for each in _numbers_in(value) for symbol in symbols_in(each)]
            if not self._read.isdisjoint(held):
                raise Mixes(f"{self.told(call.op)} takes a number that is read from rows")
            if name not in sizes and not self.batch.symbols.isdisjoint(held):
                raise Mixes(f"{self.told(call.op)} uses the batch size as a number")
        if is_random(call.op) and "attention" not in call.name:
            raise Mixes(f"{self.told(call.op)} draws random numbers")
        tensors = (*call.inputs(), *call.results, *call.written)
        if not any(map(self.batch.held_by, tensors)):
            return SAME
        if rule is None:
            raise Mixes(f"{self.told(call.op)} is not known to keep rows apart")
        try:
            return rule.apply(call)
        except Mixes as reason:
            raise Mixes(f"{self.told(call.op)} {reason}") from None

    def _own(self, call: Call) -> Rows | Sequence[Rows]:
        """Somebody's own operator: what it was declared to do."""
        declared, told = registry.rows_of(call.op), self.told(call.op)
        if declared is None:
            reason = f"{told} does not say what it does with rows"
            self.undeclared = self.undeclared or self.refused is None
            self.refused = self.refused or reason
            raise Mixes(reason)
        self.by_context = self.by_context or declared == "context"
        for each in call.inputs():
            mixed = self.state_of(each).mixed
            if mixed is not None:
                self.refused = self.refused or mixed  # whatever it does with them
                raise Mixes(mixed)
        return [self._of_own(each, call, declared) for each in call.results]

    def _of_own(self, tensor: torch.Tensor, call: Call, declared: str) -> Rows:
        rows = self.batch.plain_rows(tensor)
        if (
            declared == "independent"
            and not rows.dims
            and not all(map(self.is_same, call.inputs()))
        ):
            raise Mixes(f"{self.told(call.op)} takes all rows together")
        return rows

    def _written_value(self, call: Call, tensor: torch.Tensor, answers: Sequence[Rows]) -> Rows:
        """What an operator wrote to a tensor."""
        for result, answer in zip(call.results, answers, strict=True):
            if result is tensor:
                return self._checked(call.op, tensor, answer)
        try:
            if call.op._schema.name in self.outside:
                return self.batch.plain_rows(tensor)
            if is_own(call.op) and (declared := registry.rows_of(call.op)) is not None:
                for each in call.inputs():
                    if (mixed := self.state_of(each).mixed) is not None:
                        raise Mixes(mixed)
                return self._of_own(tensor, call, declared)
        except Mixes as reason:
            return Rows(mixed=str(reason))
        if all(map(self.is_same, (*call.inputs(), *call.written))) and not is_own(call.op):
            return SAME
        return Rows(mixed=f"{self.told(call.op)} is not known to write rows apart")

    def _checked(self, op: torch._ops.OpOverload, tensor: torch.Tensor, answer: Rows) -> Rows:
        """An answer, if the sizes bear it out."""
        if answer.mixed is not None:
            return answer
        dims = self.batch.dims_of(tensor)
        if set(dims) != set(answer.dims) or any(
            self.batch.factor(tensor.shape[dim]) is None for dim in dims
        ):
            return Rows(mixed=f"{self.told(op)} gives a size that is computed from the batch size")
        return answer

    def _numbers(self, call: Call) -> None:
        """Numbers that an operator read from rows stand for more than the batch size."""
        listed = call.out if isinstance(call.out, (list, tuple)) else [call.out]
        numbers = [
            each for each in listed if each is not None and not isinstance(each, torch.Tensor)
        ]
        if call.results or not numbers or all(map(self.is_same, call.inputs())):
            return
        if call.name in _OF_SHAPE:
            return
        self._read |= set(symbols_in(numbers))
        if not set(symbols_in(numbers)):
            self.refused = self.refused or f"{self.told(call.op)} makes a number of rows"

    # --- what the follower tells -------------------------------------------------------------------

    def joined(self, value: Any, other: Any, why: str | None) -> None:
        """``value`` is one of two, as a condition says; ``why`` the condition itself depends on the padding."""
        for one, two in zip(tensors_in(value), tensors_in(other), strict=True):
            first, second = self.state_of(one), self.state_of(two)
            mixed = why or first.mixed or second.mixed
            if mixed is None and dict(first.dims) != dict(second.dims):
                mixed = "cond returns rows in two orders"
            self.set(one, first.unnumbered() if mixed is None else Rows(mixed=mixed))

    def told(self, op: torch._ops.OpOverload) -> str:
        name = base_name(op).strip("_")
        line = "" if self.node is None else source_line(self.node)
        return f"{name} ({line})" if line else name


def _numbers_in(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return [number for each in value for number in _numbers_in(each)]
    return [] if isinstance(value, torch.Tensor) else [value]
