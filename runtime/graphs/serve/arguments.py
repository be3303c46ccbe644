"""The arguments of a captured model in persistent buffers, and what graphs wrote there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from piecework.errors import BindError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.memory.addresses import AddressBook, Placement, ValueOrigin
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs

Tensors = Sequence[torch.Tensor]


class CapturedInputs(StaticInputs):
    """Persistent buffers for every tensor argument, with and without a batch dimension.

    ``copies``: a call's tensors are copied; else they must be views of the buffers. A `BindError`
    where ``pads`` or ``static`` name what is no such argument, or what does not fit it.
    """

    def __init__(
        self, shape: BatchShape, maximum: int, options: CaptureOptions, copies: bool
    ) -> None:
        for unknown in sorted(set(options.pads) - {each.name for each in shape.dynamic}):
            hint = f"inputs: {', '.join(each.name for each in shape.dynamic)}"
            raise BindError(f"no padded input {unknown!r}", where="pads", hint=hint)
        self.staged, self._kept = shape.staged, options.static
        with torch.inference_mode(False):
            rows = {
                each.name: torch.zeros(each.row, dtype=each.fake.dtype, device=each.fake.device)
                for each in shape.staged
            }
        fixed = {each.name: rows[each.name] for each in shape.staged if each.dim is None}
        for name, tensor in self._kept.items():
            _require_fit(name, tensor, fixed)
        self._in_place = [each.name in self._kept or not copies for each in shape.staged]
        specs = [
            InputSpec(each.name, each.dim, options.pads.get(each.name, 0), each.written, in_place)
            for each, in_place in zip(shape.staged, self._in_place, strict=True)
        ]
        made = StaticInputs.allocate({**rows, **self._kept}, maximum, specs)
        super().__init__(specs, made.buffers, poison=options.poison, keeps_tails=copies)
        self._written = [n for n, each in enumerate(shape.staged) if each.written]
        self._batch_at = next((n, e.dim) for n, e in enumerate(shape.staged) if e.dim is not None)

    def register(self, book: AddressBook) -> None:
        """Vouch for the buffers, and for what the caller keeps."""
        for each, buffer in zip(self.staged, self.buffers, strict=True):
            # What the caller keeps is the caller's: dummy runs put back what they write there.
            kept = each.name in self._kept
            kind = ValueOrigin.OUT_BUFFER if kept else ValueOrigin.PERSISTENT
            book.register_persistent(each.name, buffer, kind)

    @property
    def written_outside(self) -> list[torch.Tensor]:
        """What the graph writes to of the caller's own."""
        names = (self.staged[n].name for n in self._written)
        return [self._kept[name] for name in names if name in self._kept]

    def by_name(self, padded: int) -> dict[str, torch.Tensor]:
        """The static tensors by their parameter's name, for a caller who writes to them."""
        self.let_write()
        return dict(zip((each.name for each in self.staged), self.views(padded), strict=True))

    def stager(self, padded: int) -> Callable[[Tensors], object]:
        """What copies the tensors of a call that was checked into the buffers, padded."""
        stage, (first, dim) = self.stage_alike, self._batch_at
        return lambda inputs: stage(inputs, padded, inputs[first].shape[dim])

    def short_batch(self, padded: int) -> tuple[list[torch.Tensor], int]:
        """What lies in the buffers as a call's tensors, a row short if there are several."""
        count = max(1, padded - 1)
        given = []
        for each, view, in_place in zip(
            self.staged, self.views(padded), self._in_place, strict=True
        ):
            rows = view if each.dim is None else view.narrow(each.dim, 0, count)
            given.append(rows if in_place else rows.clone())
        return given, count

    def bringer(self, padded: int) -> Callable[[Tensors, int], None] | None:
        """What copies written arguments back into the call's tensors, if there are any."""
        views = self.views(padded)
        back = [(n, views[n], self.staged[n].dim) for n in self._written if not self._in_place[n]]

        def bring_back(inputs: Tensors, count: int) -> None:
            for number, static, dim in back:
                rows = static if dim is None else static.narrow(dim, 0, count)
                inputs[number].copy_(rows, non_blocking=True)

        return bring_back if back else None

    def shares_what_is_written(self, inputs: Tensors) -> bool:
        """Whether a written tensor shares memory with another argument, as buffers don't."""
        return not all(
            torch_compat.memory_apart(inputs[n], *inputs[:n], *inputs[n + 1 :])
            for n in self._written
        )


def _require_fit(name: str, tensor: torch.Tensor, fixed: Mapping[str, torch.Tensor]) -> None:
    """Refuse a tensor to be kept that is no such argument, or lies in memory otherwise."""
    if name not in fixed:
        hint = f"arguments without the batch size: {', '.join(fixed) or 'none'}"
        raise BindError(f"no argument {name!r} that keeps its memory", where="static", hint=hint)
    here, there = Placement.of(tensor), Placement.of(fixed[name])
    if not there.same_layout(here) or fixed[name].device != tensor.device:
        raise BindError(
            f"{name} is {here.describe()} on {tensor.device}, and was traced as "
            f"{there.describe()} on {fixed[name].device}",
            where="static",
            hint="pass one that lies in memory as the example's argument does",
        )
