"""The arguments of a captured model. In: a call's tensors. Out: the same values in persistent buffers, and what the graph wrote to them back in the call's.

It holds one set of buffers for each combination of other sizes, and never moves one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from piecework.errors import BindError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.memory.addresses import Placement, ValueOrigin
from piecework.runtime.graphs.memory.owner import StaticGraphs
from piecework.runtime.graphs.plan.batch_shape import BatchShape, StagedInput
from piecework.runtime.graphs.stage.inputs import StaticInputs, require_in_place
from piecework.runtime.graphs.stage.slots import InputSpec, Number

Tensors = Sequence[torch.Tensor]


class CapturedInputs:
    """Persistent buffers for every tensor argument, with and without a batch dimension.

    Args:
        shape: which arguments there are.
        maximum: the largest batch.
        others: the other sizes, by label.
        pads: what fills the tail of each padded input, by its parameter's name.
        poison: pad floating inputs with NaN.
        copies: copy a call's tensors; else they must be views of the buffers.
        static: arguments that calls pass in the same memory each time, by name, each with the tensor that has it: graphs read and
            write that, and nothing of it is copied.

    Raises:
        BindError: ``pads`` names no padded input, or ``static`` one that is padded or is no argument, or a tensor that does not fit it.
    """

    def __init__(
        self,
        shape: BatchShape,
        maximum: int,
        others: Mapping[str, int],
        pads: Mapping[str, Number],
        poison: bool,
        copies: bool = True,
        static: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        names = [each.name for each in shape.dynamic]
        unknown = sorted(set(pads) - set(names))
        if unknown:
            raise BindError(
                f"no padded input {unknown[0]!r}",
                where="pads",
                hint=f"inputs: {', '.join(names)}",
            )
        self._staged = shape.staged
        self._suffix = "".join(f" at {label}={value}" for label, value in others.items())
        self._numbers = [n for n, each in enumerate(shape.staged) if each.dim is not None]
        self._static = StaticInputs.allocate(
            {each.name: _example(each, others) for each in shape.dynamic},
            maximum,
            [_spec(each, pads) for each in shape.dynamic],
            poison=poison,
            copies=copies,
            keeps_tails=copies,
        )
        self._copies = copies
        self._fixed = {
            n: _example(each, others) for n, each in enumerate(shape.staged) if each.dim is None
        }
        self._kept = self._kept_among(static or {}, others)
        self._fixed |= self._kept
        self._written = [n for n, each in enumerate(shape.staged) if each.written]

    def _kept_among(
        self, static: Mapping[str, torch.Tensor], others: Mapping[str, int]
    ) -> dict[int, torch.Tensor]:
        """The tensors of ``static`` by their argument's number."""
        numbers = {each.name: n for n, each in enumerate(self._staged) if each.dim is None}
        found = {}
        for name, tensor in static.items():
            if name not in numbers:
                hint = f"arguments without the batch size: {', '.join(numbers) or 'none'}"
                raise BindError(
                    f"no argument {name!r} that keeps its memory", where="static", hint=hint
                )
            argument = self._staged[numbers[name]]
            wanted = _example(argument, others)
            memory = tensor if argument.order is None else tensor.permute(argument.order)
            if not Placement.of(wanted).same_layout(Placement.of(memory)) or (
                wanted.device != tensor.device
            ):
                raise BindError(
                    f"{name} is {Placement.of(tensor).describe()} on {tensor.device}, and was traced as "
                    f"{Placement.of(argument.as_traced(wanted)).describe()} on {wanted.device}",
                    where="static",
                    hint="pass one that lies in memory as the example's argument does",
                )
            found[numbers[name]] = memory
        return found

    def register(self, graphs: StaticGraphs) -> None:
        """Vouch for the buffers, and for what the caller keeps."""
        self._static.register(graphs.addresses)
        for number, buffer in self._fixed.items():
            # What the caller keeps is the caller's: runs on dummy inputs put back what they write there.
            kind = ValueOrigin.OUT_BUFFER if number in self._kept else ValueOrigin.PERSISTENT
            name = self._staged[number].name + self._suffix
            graphs.addresses.register_persistent(name, buffer, kind)

    @property
    def written_outside(self) -> list[torch.Tensor]:
        """What the graph writes to of the caller's own."""
        return [self._kept[n] for n in self._written if n in self._kept]

    def views(self, padded: int) -> tuple[torch.Tensor, ...]:
        """The static tensors of graphs captured for ``padded``, in the order of ``shape.staged``."""
        held = {**dict(zip(self._numbers, self._static.views(padded), strict=True)), **self._fixed}
        return tuple(each.as_traced(held[n]) for n, each in enumerate(self._staged))

    def by_name(self, padded: int) -> dict[str, torch.Tensor]:
        """The same static tensors by their parameter's name, for a caller who may write to them."""
        self._static.let_write()
        names = (each.name for each in self._staged)
        return dict(zip(names, self.views(padded), strict=True))

    def stager(self, padded: int) -> Callable[[Tensors], object]:
        """What copies all tensor arguments of a call that was checked into the buffers, padded to ``padded``."""
        stage = self._static.stage_alike
        first = self._numbers[0]
        dim = self._staged[first].dim
        turned = {n: each.order for n, each in enumerate(self._staged) if each.order is not None}
        if not self._fixed and not turned:
            return lambda inputs: stage(inputs, padded, inputs[first].shape[dim])  # type: ignore[index]
        dynamic, fixed = self._numbers, tuple(self._fixed.items())
        names = [each.name for each in self._staged]
        copied = set(self._fixed) - set(self._kept) if self._copies else set()

        def stage_all(inputs: Tensors) -> None:
            count = inputs[first].shape[dim]  # type: ignore[index]
            inputs = [x.permute(turned[n]) if n in turned else x for n, x in enumerate(inputs)]
            stage([inputs[n] for n in dynamic], padded, count)
            for number, buffer in fixed:
                if number in copied:
                    buffer.copy_(inputs[number], non_blocking=True)
                else:
                    require_in_place(names[number], inputs[number], buffer)

        return stage_all

    def stage_once(self, padded: int) -> None:
        """Stage what lies there, a row short where there are several: a GPU loads a kernel at its first launch, which no served call need wait for."""
        given = []
        for number, view in enumerate(self.views(padded)):
            dim = self._staged[number].dim
            rows = view if dim is None else view.narrow(dim, 0, max(1, padded - 1))
            rows = rows.clone() if self._copies else rows  # uncopied inputs lie there already
            given.append(view if number in self._kept else rows)
        self.stager(padded)(given)

    def bringer(self, padded: int) -> Callable[[Tensors, int], None] | None:
        """What copies written arguments of a batch back into the call's tensors; None if there are none."""
        if not (self._written and self._copies):
            return None
        views = self.views(padded)
        back = [(n, views[n], self._staged[n].dim) for n in self._written if n not in self._kept]

        def bring_back(inputs: Tensors, count: int) -> None:
            for number, static, dim in back:
                rows = static if dim is None else static.narrow(dim, 0, count)
                inputs[number].copy_(rows, non_blocking=True)

        return bring_back

    def shares_what_is_written(self, inputs: Tensors) -> bool:
        """Whether a tensor that is written to shares memory with another argument, which static buffers don't."""
        spans = list(map(torch_compat.memory_span, inputs))
        return any(
            _overlap(spans[n], span)
            for n in self._written
            for number, span in enumerate(spans)
            if number != n
        )


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def _example(each: StagedInput, others: Mapping[str, int]) -> torch.Tensor:
    """A tensor of one row, laid out in memory as traced, dimensions in that order."""
    with torch.inference_mode(False):
        return torch.zeros(each.sizes(1, others), dtype=each.fake.dtype, device=each.fake.device)


def _spec(each: StagedInput, pads: Mapping[str, Number]) -> InputSpec:
    assert each.dim is not None
    dim = each.in_memory.index(each.dim)
    return InputSpec(each.name, dim, pads.get(each.name, 0), each.written)
