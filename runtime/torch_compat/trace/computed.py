"""What is computed, without computing it. In: runs of code on a model's own tensors, with fake results. Out: for each result and each tensor written to a number, the same for two runs where it is computed alike.

Nothing is computed or written: torch makes fake tensors of the real ones. Two runs are alike whatever order they call operators in, as long as each operator is given the same; which random number a
sampling operator would draw is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from piecework.runtime.torch_compat.tensors import storage_id
from piecework.runtime.torch_compat.trace.watch import written_operands

_SAME = frozenset(
    (
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.lift_fresh.default,
    )
)


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

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._faked, (args, kwargs or {}))
        given = pytree.tree_map_only(
            torch.Tensor, lambda each: ("tensor", self.of(each)), (args, kwargs)
        )
        number = self._number("call", str(func), repr(given))
        result = func(*args, **kwargs)
        written = list(written_operands(func, args, kwargs))
        owners = {storage_id(each): each for each in (args[:1] if func in _SAME else written)}
        for index, each in enumerate(pytree.tree_leaves(result)):
            if not isinstance(each, torch.Tensor):
                continue
            owner = owners.get(storage_id(each))
            made = (
                self._number("result", number, index) if owner is None else self._made[id(owner)][1]
            )
            self._made.setdefault(id(each), (each, made))
        for index, each in enumerate(written):
            self._written[storage_id(each)] = self._number("written", number, index)
        return result

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
    """Run the block with fake results, and note what is computed of ``known``; code that asks whether it is compiled is told that it is, as it is by Dynamo."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    compiler._is_compiling_flag = True
    try:
        with torch.no_grad(), FakeTensorMode() as fakes, Computed(fakes, known, numbers) as run:
            yield run
    finally:
        compiler._is_compiling_flag = before


def _contents(tensor: torch.Tensor) -> tuple[object, ...]:
    with torch.utils._python_dispatch._disable_current_modes():
        return (tensor.dtype, tuple(tensor.shape), repr(tensor.tolist()))
