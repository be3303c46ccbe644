"""The arguments of a captured model in persistent buffers, and what graphs wrote there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from piecework.errors import BindError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.plan.batch_shape import BatchShape
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs, new_buffer

Tensors = Sequence[torch.Tensor]


class CapturedInputs(StaticInputs):
    """Persistent buffers for all tensor arguments; calls copy to them or pass their views."""

    def __init__(
        self, shape: BatchShape, maximum: int, options: CaptureOptions, copies: bool
    ) -> None:
        for unknown in sorted(set(options.pads) - {each.name for each in shape.dynamic}):
            hint = f"inputs: {', '.join(each.name for each in shape.dynamic)}"
            raise BindError(f"no padded input {unknown!r}", where="pads", hint=hint)
        self.staged, self._copies, pads = shape.staged, copies, options.pads
        specs = [
            InputSpec(each.name, each.dim, pads.get(each.name, 0), each.written, not copies)
            for each in shape.staged
        ]
        buffers = [new_buffer(e.name, e.sizes(maximum), e.fake) for e in shape.staged]
        super().__init__(specs, buffers, poison=options.poison, keeps_tails=copies)
        self._written = [n for n, each in enumerate(shape.staged) if each.written]
        self._batch_at = next((n, e.dim) for n, e in enumerate(shape.staged) if e.dim is not None)

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
        for each, view in zip(self.staged, self.views(padded), strict=True):
            rows = view if each.dim is None else view.narrow(each.dim, 0, count)
            given.append(rows.clone() if self._copies else rows)
        return given, count

    def bringer(self, padded: int) -> Callable[[Tensors, int], None] | None:
        """What copies written arguments back into the call's tensors, if there are any."""
        views = self.views(padded)
        back = [(n, views[n], self.staged[n].dim) for n in self._written if self._copies]

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
