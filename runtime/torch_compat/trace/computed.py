"""What is computed, without computing it. In: runs of code on a model's own tensors, with fake results. Out: for each result and each tensor written to a number, the same for two runs where it is computed alike.

Nothing is computed or written: torch makes fake tensors of the real ones. Two runs are alike whatever order they call operators in, as long as each operator is given the same, and those that give
nothing back are called in one order. An operator that draws random numbers gives others each time; in which order several such operators draw is not looked at.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.runtime.torch_compat.tensors import MemoryLike, is_fake, storage_id, traits_of
from piecework.runtime.torch_compat.trace.dynamo import one_trace_at_a_time
from piecework.runtime.torch_compat.trace.watch import written_operands

_SAME = frozenset(
    (
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.lift_fresh.default,
    )
)
#: The operators of these write and draw what their schemas and tags say; others may do more.
_TORCHS = ("aten", "prim", "prims", "profiler")


class Computed(TorchDispatchMode):
    """One run.

    Args:
        fakes: the mode that is active below this one.
        known: tensors that exist before; all others that are not made in the run count by their contents.
        numbers: of what was computed so far, shared by runs that are to be compared.
    """

    def __init__(
        self, fakes: Any, known: Iterable[torch.Tensor], numbers: dict[tuple[object, ...], int]
    ) -> None:
        super().__init__()
        self._fakes = fakes
        self._position = {id(each): index for index, each in enumerate(known)}
        self._numbers = numbers
        self._fake: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: dict[int, tuple[torch.Tensor, int]] = {}
        self._written: dict[int, int] = {}
        self._kind: dict[int, int | None] = {}
        self._like: dict[tuple[object, ...], tuple[list[torch.Tensor], Any]] = {}
        self._drawn: Counter[int] = Counter()
        self._others: Counter[int] = Counter()
        self._in_order: list[int] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        given: list[torch.Tensor] = []
        (args, kwargs), form = self._given((args, kwargs or {}), given)
        number = self._call(func, (form, *map(self.of, given)))
        result = self._result(func, args, kwargs, form, given)
        written = list(written_operands(func, args, kwargs)) if func._schema.is_mutable else []
        owners = {storage_id(each): each for each in (args[:1] if func in _SAME else written)}
        for index, each in enumerate(_tensors(result)):
            owner = owners.get(storage_id(each)) if owners else None
            made = (
                self._number("result", number, index) if owner is None else self._made[id(owner)][1]
            )
            self._made.setdefault(id(each), (each, made))
        for index, each in enumerate(written):
            self._written[storage_id(each)] = self._number("written", number, index)
        return result

    def _result(
        self, func: Any, args: Any, kwargs: Any, form: object, given: list[torch.Tensor]
    ) -> Any:
        """What an operator gives. On the like of what it was given before it is the like of what it gave then, which takes a fraction of asking torch."""
        if _changes_kinds(func):
            self._like.clear()
            self._kind.clear()
        kinds = tuple(map(self._kind_of, given)) if given and _is_told_by_kinds(func) else (None,)
        if None in kinds:
            return func(*args, **kwargs)
        key = func, form, kinds, torch.get_default_dtype()
        before, gave = self._like.get(key, ((), None))
        memory = MemoryLike()
        if gave is not None and all(map(memory.is_like, before, given)):
            is_one = isinstance(gave, torch.Tensor)
            result = (
                memory.tensor(gave)
                if is_one
                else pytree.tree_map_only(torch.Tensor, memory.tensor, gave)
            )
            for old, new in zip(_tensors(gave), _tensors(result), strict=True):
                self._kind[id(new)] = self._kind_of(old)
            return result
        result = func(*args, **kwargs)
        lazy = any(each.is_conj() or each.is_neg() for each in _tensors(result))
        if not lazy and None not in map(self._kind_of, _tensors(result)):
            self._like[key] = given, result
        return result

    def _kind_of(self, fake: torch.Tensor) -> int | None:
        """A number for what code can ask of a fake tensor; None where there could be more to ask."""
        if id(fake) not in self._kind:
            traits = traits_of(fake)
            self._kind[id(fake)] = None if traits is None else self._number("kind", traits)
        return self._kind[id(fake)]

    def _call(self, func: Any, key: object) -> int:
        """What a call of an operator is, and note of it what none of its results need show."""
        number = self._number("call", func, key)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawn[number] += 1
            number = self._number("draw", number, self._drawn[number])
        if func.namespace not in _TORCHS:
            self._others[number] += 1
            if not func._schema.returns and not func._schema.is_mutable:
                self._in_order.append(number)
        return number

    def of(self, tensor: torch.Tensor) -> int:
        """What a tensor holds now."""
        fake = self._faked(tensor)
        made, write = self._made[id(fake)][1], self._written.get(storage_id(fake))
        return made if write is None else self._number("after", made, write)

    def writes(self) -> dict[int, int]:
        """By position among the known tensors: what was written to the memory of each."""
        return {
            self._position[key]: self._written[storage_id(fake)]
            for key, (_, fake) in self._fake.items()
            if key in self._position and storage_id(fake) in self._written
        }

    def effects(self) -> object:
        """The calls of operators that are not torch's, and the order of those that are called for what they do elsewhere."""
        return self._others, self._in_order

    def _given(self, value: Any, tensors: list[torch.Tensor]) -> tuple[Any, object]:
        """An operator's arguments with fake tensors, and what they are but for these, which are added to ``tensors``."""
        if isinstance(value, torch.Tensor):
            tensors.append(self._faked(value))
            return tensors[-1], torch.Tensor
        if isinstance(value, (tuple, list)) and value:
            pairs = [self._given(each, tensors) for each in value]
            return type(value)([each for each, _ in pairs]), tuple([key for _, key in pairs])
        if isinstance(value, dict) and value:
            inner, keys = self._given(list(value.values()), tensors)
            return dict(zip(value, inner, strict=True)), (tuple(value), keys)
        return value, repr(value)

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        """What stands for a tensor: an operator that is given none but real ones would be run."""
        if id(tensor) in self._made:
            return tensor
        if id(tensor) not in self._fake:
            fake = self._fakes.from_tensor(tensor, static_shapes=True)
            position = self._position.get(id(tensor))
            what = ("constant", *_contents(tensor)) if position is None else ("known", position)
            self._fake[id(tensor)] = tensor, fake
            self._made[id(fake)] = fake, self._number(*what)
        return self._fake[id(tensor)][1]

    def _number(self, *what: object) -> int:
        return self._numbers.setdefault(what, len(self._numbers))


@contextmanager
def computed(
    known: Iterable[torch.Tensor], numbers: dict[tuple[object, ...], int]
) -> Iterator[Computed]:
    """Run the block with fake results, and note what is computed of ``known``; code that asks whether it is compiled is told that it is, as it is by Dynamo, whose lock is held."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    compiler: Any = torch.compiler
    with one_trace_at_a_time():
        before = compiler._is_compiling_flag
        compiler._is_compiling_flag = True
        try:
            with torch.no_grad(), FakeTensorMode() as fakes, Computed(fakes, known, numbers) as run:
                yield run
        finally:
            compiler._is_compiling_flag = before


def outputs_of(gm: torch.fx.GraphModule, given: Iterable[object]) -> Any:
    """What a graph gives. Where an operator fails, all that does not need its result is run nevertheless: what a graph enters (autocast, a level of ``torch.func``) it leaves again."""
    run = _ToItsEnd(gm)
    outputs = run.run(*given)
    if run.failure is not None:
        raise run.failure
    return outputs


class _ToItsEnd(torch.fx.Interpreter):
    failure: Exception | None = None

    def run_node(self, n: torch.fx.Node) -> Any:
        if any(self.env[each] is _FAILED for each in n.all_input_nodes):
            return _FAILED
        try:
            return super().run_node(n)
        except Exception as error:  # noqa: BLE001 - raised at the end
            self.failure = self.failure or error
            return _FAILED


_FAILED = object()


@functools.cache
def _changes_kinds(func: Any) -> bool:
    """Whether an operator may change what code can ask of a tensor that it is given: its sizes."""
    return torch.Tag.inplace_view in func.tags or any(a.is_out for a in func._schema.arguments)


@functools.cache
def _is_told_by_kinds(func: Any) -> bool:
    """Whether the kinds of an operator's results follow from those of its arguments."""
    unknown = torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output
    return (
        func.namespace in _TORCHS
        and not func._schema.is_mutable
        and not any(each in func.tags for each in unknown)
    )


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]


def _contents(tensor: torch.Tensor) -> tuple[object, ...]:
    if is_fake(tensor):
        raise TypeError("a fake tensor was made past the dispatcher")
    with torch.utils._python_dispatch._disable_current_modes():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        digest = hashlib.sha256(ctypes.string_at(plain.data_ptr(), plain.nbytes)).digest()
    return tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride(), digest
