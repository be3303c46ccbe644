"""The arguments of a captured model in persistent buffers, and what graphs wrote there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from piecework.errors import BindError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.memory.addresses import Placement, ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.batch_shape import BatchShape, StagedInput
from piecework.runtime.graphs.plan.options import CaptureOptions
from piecework.runtime.graphs.stage.inputs import InputSpec, StaticInputs

Tensors = Sequence[torch.Tensor]


class CapturedInputs:
    """Persistent buffers for every tensor argument, with and without a batch dimension.

    ``copies``: a call's tensors are copied; else they must be views of the buffers.

    Raises:
        BindError: ``pads`` or ``static`` name what is no such argument, or what does not fit it.
    """

    def __init__(
        self,
        shape: BatchShape,
        maximum: int,
        others: Mapping[str, int],
        options: CaptureOptions,
        copies: bool,
    ) -> None:
        names = [each.name for each in shape.dynamic]
        for unknown in sorted(set(options.pads) - set(names)):
            hint = f"inputs: {', '.join(names)}"
            raise BindError(f"no padded input {unknown!r}", where="pads", hint=hint)
        self._staged, self._copies = shape.staged, copies
        self._suffix = "".join(f" at {label}={value}" for label, value in others.items())
        examples = {each.name: _example(each, others) for each in shape.staged}
        fixed = [each.name for each in shape.staged if each.dim is None]
        self._kept = options.static
        for name, tensor in self._kept.items():
            _require_fit(name, tensor, {each: examples[each] for each in fixed})
        self._static = StaticInputs.allocate(
            {**examples, **self._kept},
            maximum,
            [
                InputSpec(
                    each.name,
                    each.dim,
                    options.pads.get(each.name, 0),
                    each.written,
                    in_place=each.name in self._kept or not copies,
                )
                for each in shape.staged
            ],
            poison=options.poison,
            keeps_tails=copies,
        )
        self._written = [n for n, each in enumerate(shape.staged) if each.written]

    def register(self, graphs: StaticGraphs) -> None:
        """Vouch for the buffers, and for what the caller keeps."""
        for each, buffer in zip(self._staged, self._static.buffers, strict=True):
            # What the caller keeps is the caller's: dummy runs put back what they write there.
            kept = each.name in self._kept
            kind = ValueOrigin.OUT_BUFFER if kept else ValueOrigin.PERSISTENT
            name = each.name + (self._suffix if each.dim is None else "")
            graphs.addresses.register_persistent(name, buffer, kind)

    @property
    def written_outside(self) -> list[torch.Tensor]:
        """What the graph writes to of the caller's own."""
        names = (self._staged[n].name for n in self._written)
        return [self._kept[name] for name in names if name in self._kept]

    def views(self, padded: int) -> tuple[torch.Tensor, ...]:
        """The static tensors of graphs captured for ``padded``, ordered as ``shape.staged``."""
        return self._static.views(padded)

    def by_name(self, padded: int) -> dict[str, torch.Tensor]:
        """The same static tensors by their parameter's name, for a caller who writes to them."""
        self._static.let_write()
        names = (each.name for each in self._staged)
        return dict(zip(names, self.views(padded), strict=True))

    def stager(self, padded: int) -> Callable[[Tensors], object]:
        """What copies the tensors of a call that was checked into the buffers, padded."""
        stage = self._static.stage_alike
        pairs = enumerate(each.dim for each in self._staged)
        first, dim = next((n, dim) for n, dim in pairs if dim is not None)
        return lambda inputs: stage(inputs, padded, inputs[first].shape[dim])

    def stage_once(self, padded: int) -> None:
        """Stage what lies there, a row short if there are several, so that kernels are loaded."""
        given = []
        for number, view in enumerate(self.views(padded)):
            dim = self._staged[number].dim
            rows = view if dim is None else view.narrow(dim, 0, max(1, padded - 1))
            in_place = self._staged[number].name in self._kept or not self._copies
            given.append(rows if in_place else rows.clone())
        self.stager(padded)(given)

    def bringer(self, padded: int) -> Callable[[Tensors, int], None] | None:
        """What copies written arguments back into the call's tensors, if there are any."""
        if not (self._written and self._copies):
            return None
        views = self.views(padded)
        own = [n for n in self._written if self._staged[n].name not in self._kept]
        back = [(n, views[n], self._staged[n].dim) for n in own]

        def bring_back(inputs: Tensors, count: int) -> None:
            for number, static, dim in back:
                rows = static if dim is None else static.narrow(dim, 0, count)
                inputs[number].copy_(rows, non_blocking=True)

        return bring_back

    def shares_what_is_written(self, inputs: Tensors) -> bool:
        """Whether a written tensor shares memory with another argument, as buffers don't."""
        spans = list(map(torch_compat.memory_span, inputs))
        return any(
            max(spans[n][0], span[0]) < min(spans[n][1], span[1])
            for n in self._written
            for number, span in enumerate(spans)
            if number != n
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


def _example(each: StagedInput, others: Mapping[str, int]) -> torch.Tensor:
    """A tensor of one row."""
    with torch.inference_mode(False):
        return torch.zeros(each.sizes(1, others), dtype=each.fake.dtype, device=each.fake.device)
