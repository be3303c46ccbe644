"""Inputs of captured graphs: in, tensors of any batch size; out, the same values in persistent buffers, padded to a captured size.

It never moves a buffer once it is allocated, and it never pads with anything but the declared value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.memory.addresses import AddressBook
from piecework.runtime.graphs.stage.one_launch import OneLaunch
from piecework.runtime.graphs.stage.slots import InputSpec, Number, Slot, dimension_of, slot_for

__all__ = ["InputSpec", "Kernel", "StaticInputs"]

Kernel = Literal["auto", "grouped", "reference", "triton"]
_Fill = tuple[torch.Tensor, Number]
#: Plans that are kept for combinations of sizes; an engine that stages tokens and requests meets very many.
_MOST_PLANS = 4096
_TRAITS = ("shape", "dtype", "device")


@dataclass(frozen=True, slots=True)
class _Plan:
    """How batches of one size reach one padded size: views that are made once and used every step.

    Attributes:
        count: the size of the batch, where all inputs have the same.
        groups: positions of inputs of one dtype on one device, with their heads; one alone where a GPU doesn't copy them together.
        tails: what is filled in each step.
        kept_tails: what is filled unless it holds its padding already: rows ``count`` to ``padded`` of its buffer.
        waits: batches come from another device, so their copies are done when they are staged: whoever has pinned memory may
            write the next batch there at once.
    """

    counts: tuple[int, ...]
    count: int | None
    padded: int
    static: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]
    groups: tuple[tuple[tuple[int, ...], list[torch.Tensor]], ...]
    tails: tuple[_Fill, ...]
    kept_tails: tuple[_Fill, ...]
    waits: bool = False


@dataclass(eq=False)
class StaticInputs:
    """Persistent buffers for the dynamic inputs of a model, filled before each replay.

    Args:
        specs: one per input.
        buffers: one per input, contiguous, as large as the largest batch.
        kernel: "grouped" copies inputs of one dtype together, in one launch on a GPU; "reference" copies one by one; "triton"
            copies and pads everything in one launch of our own, which costs the host more than several copies. "auto" is "grouped".
        poison: pad floating inputs with NaN, to find out what reads beyond the batch (debugging).
        copies: copy what is staged; else it must lie in the buffers already, and only their tails are filled.
        keeps_tails: nobody but ``stage`` writes to the buffers, so that what was padded stays so, and only rows that hold a batch's
            values are padded again. Inputs that a graph writes to are excepted by their specs.

    Raises:
        ConfigError: the declarations do not fit the buffers.

    Example:
        >>> inputs = StaticInputs.allocate({"ids": torch.zeros(1, dtype=torch.long)}, maximum=8)
        >>> inputs.stage([torch.tensor([5, 6, 7])], padded=4)[0].tolist()
        [5, 6, 7, 0]
    """

    specs: Sequence[InputSpec]
    buffers: Sequence[torch.Tensor]
    kernel: Kernel = "auto"
    poison: bool = False
    copies: bool = True
    keeps_tails: bool = False
    _slots: tuple[Slot, ...] = field(init=False)
    _plans: dict[tuple[int, tuple[int, ...]], _Plan] = field(init=False, default_factory=dict)
    _checked: dict[tuple[object, ...], _Plan] = field(init=False, default_factory=dict)
    _launcher: OneLaunch | None = field(init=False, default=None)
    # Rows from the first of these numbers to the second hold their padding, in each buffer that keeps it.
    _clean: tuple[int, int] = field(init=False, default=(0, 0))

    def __post_init__(self) -> None:
        if len(self.specs) != len(self.buffers):
            raise ConfigError(
                f"{len(self.specs)} inputs are declared, {len(self.buffers)} buffers given",
                where="StaticInputs",
            )
        pairs = zip(self.specs, self.buffers, strict=True)
        self._slots = tuple(slot_for(spec, buffer, self.poison) for spec, buffer in pairs)
        if self._slots and self.kernel == "triton":
            self._launcher = OneLaunch(self._slots)

    @classmethod
    def allocate(
        cls,
        examples: Mapping[str, torch.Tensor],
        maximum: int,
        specs: Sequence[InputSpec] | None = None,
        *,
        device: torch.device | str | None = None,
        kernel: Kernel = "auto",
        poison: bool = False,
        copies: bool = True,
        keeps_tails: bool = False,
    ) -> StaticInputs:
        """Buffers shaped like ``examples``, with ``maximum`` in each dynamic dimension.

        Args:
            examples: a tensor per input; only dtype, device and the other dimensions are read.
            maximum: the largest captured size.
            specs: dynamic dimension and padding by name; dimension 0 and 0 for inputs not listed.
            device: where the buffers are; the examples' own devices by default.
            kernel, poison, copies, keeps_tails: as for the class.

        Raises:
            ConfigError: a spec names no example, or does not fit it.
            StaticGraphError: there is no memory for the buffers.
        """
        declared = {spec.name: spec for spec in specs or ()}
        unknown = sorted(set(declared) - set(examples))
        if unknown:
            raise ConfigError(
                f"no input {', '.join(unknown)}",
                where="StaticInputs.allocate",
                hint=f"inputs: {', '.join(examples) or 'none'}",
            )
        chosen = [declared.get(name, InputSpec(name)) for name in examples]
        buffers = []
        for spec, example in zip(chosen, examples.values(), strict=True):
            shape = list(example.shape)
            shape[dimension_of(spec, example)] = maximum
            where = example.device if device is None else device
            with torch.inference_mode(False):
                buffers.append(_buffer(spec.name, shape, example.dtype, where))
        return cls(chosen, buffers, kernel, poison, copies, keeps_tails)

    def register(self, book: AddressBook) -> None:
        """Vouch for the buffers, so that captured pieces may read them in place."""
        for slot in self._slots:
            book.register_persistent(slot.spec.name, slot.buffer)

    def views(self, padded: int) -> tuple[torch.Tensor, ...]:
        """The static tensors that graphs captured for ``padded`` read; the same objects at every call.

        Raises:
            InputError: a buffer is smaller.
        """
        return self._plan(padded, (padded,) * len(self._slots)).static

    def batch_size(self, tensors: Sequence[torch.Tensor]) -> int:
        """The size that ``tensors`` have in their dynamic dimensions.

        Raises:
            InputError: there are none, one is no tensor of the right rank, or they disagree.
        """
        if len(tensors) != len(self._slots) or not tensors:
            raise InputError(
                f"{len(tensors)} tensors for {len(self._slots)} staged inputs", where="batch_size"
            )
        pairs = list(zip(self._slots, tensors, strict=True))
        sizes = {
            slot.spec.name: tensor.shape[slot.dim]
            for slot, tensor in pairs
            if getattr(tensor, "ndim", None) == slot.buffer.ndim
        }
        distinct = set(sizes.values())
        if len(sizes) == len(pairs) and len(distinct) == 1:
            return distinct.pop()
        found = ", ".join(
            f"{slot.spec.name}: {sizes.get(slot.spec.name, 'not a tensor of that rank')}"
            for slot, _ in pairs
        )
        raise InputError(f"the inputs have no common batch size ({found})", where="batch_size")

    def stage(self, tensors: Sequence[torch.Tensor], padded: int) -> tuple[torch.Tensor, ...]:
        """Copy ``tensors`` into the buffers, pad to ``padded``, and return the static tensors.

        Raises:
            InputError: an input has another dtype or shape, or does not fit; the message says the sizes. Or it lies elsewhere,
                and nothing is copied.
        """
        signature = (
            padded,
            *[tuple(getattr(t, each, None) for each in _TRAITS) for t in tensors],
        )
        plan = self._checked.get(signature)
        if plan is None:
            plan = self._checked[signature] = self._check(tensors, padded)
        return self._run(plan, tensors)

    def stage_alike(
        self, tensors: Sequence[torch.Tensor], padded: int, count: int
    ) -> tuple[torch.Tensor, ...]:
        """``stage`` for tensors that are known to fit, of one batch size: nothing of them is looked at."""
        key = (padded, count)
        plan = self._checked.get(key)
        if plan is None:
            plan = self._checked[key] = self._plan(padded, (count,) * len(self._slots))
        return self._run(plan, tensors)

    def _run(self, plan: _Plan, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if not self.copies:
            for slot, head, tensor in zip(self._slots, plan.heads, tensors, strict=True):
                require_in_place(slot.spec.name, tensor, head)
        elif self._launcher is not None and self._launcher.fits(tensors, plan.counts):
            self._launcher.launch(tensors, plan.counts[0], plan.padded)
            return plan.static
        else:
            self._copy(plan, tensors)
        for tail, pad in plan.tails:
            tail.fill_(pad)
        if self.keeps_tails:
            self._pad(plan)
        return plan.static

    def _copy(self, plan: _Plan, tensors: Sequence[torch.Tensor]) -> None:
        if self.kernel == "reference":
            for head, tensor in zip(plan.heads, tensors, strict=True):
                head.copy_(tensor, non_blocking=not plan.waits)
            return
        for positions, heads in plan.groups:
            if len(positions) == 1:
                heads[0].copy_(tensors[positions[0]], non_blocking=not plan.waits)
            else:
                torch_compat.copy_each(heads, [tensors[n] for n in positions], not plan.waits)

    def _pad(self, plan: _Plan) -> None:
        """Fill what keeps its padding, where it holds a larger batch's values or was never filled."""
        padded, (first, last) = plan.padded, self._clean
        if plan.count is None:
            self._clean = (0, 0)
            return
        first = max(first, plan.count)  # the batch lies in front of it now
        if plan.count < padded and (first > plan.count or last < padded):
            for tail, pad in plan.kept_tails:
                tail.fill_(pad)
            first, last = plan.count, max(last, padded) if first <= padded else padded
        self._clean = (first, last)

    def let_write(self) -> None:
        """Somebody else may write to the buffers from now on: pad in every step."""
        if self.keeps_tails:
            self.keeps_tails = False
            self._plans.clear()
            self._checked.clear()

    def _check(self, tensors: Sequence[torch.Tensor], padded: int) -> _Plan:
        """The plan for tensors of shapes that were not seen before; what fits once fits again."""
        if len(tensors) != len(self._slots):
            raise InputError(
                f"{len(tensors)} tensors for {len(self._slots)} staged inputs", where="stage"
            )
        pairs = list(zip(self._slots, tensors, strict=True))
        for slot, tensor in pairs:
            slot.check(tensor, padded)
        plan = self._plan(padded, tuple(tensor.shape[slot.dim] for slot, tensor in pairs))
        waits = any(tensor.device != slot.buffer.device for slot, tensor in pairs)
        return replace(plan, waits=True) if waits else plan

    def _plan(self, padded: int, counts: tuple[int, ...]) -> _Plan:
        plan = self._plans.get((padded, counts))
        if plan is None:
            if len(self._checked) >= _MOST_PLANS:
                # Not those whose views graphs were captured on: they are the same objects at every call.
                self._plans = {k: each for k, each in self._plans.items() if {*k[1]} == {k[0]}}
                self._checked.clear()
            plan = self._plans[padded, counts] = self._make_plan(padded, counts)
        return plan

    def _make_plan(self, padded: int, counts: tuple[int, ...]) -> _Plan:
        for slot in self._slots:
            if padded > slot.maximum:
                raise InputError(
                    f"can't be padded to {padded}; its buffer holds {slot.maximum} in dimension {slot.dim}",
                    where=f"input {slot.spec.name}",
                    hint="allocate the buffers for the largest captured size",
                )
        full = (padded,) * len(self._slots)
        static = (
            tuple(slot.view(padded) for slot in self._slots)
            if counts == full
            else self._plan(padded, full).static
        )
        heads: list[torch.Tensor] = []
        groups: dict[tuple[object, ...], list[int]] = {}
        tails: list[_Fill] = []
        kept: list[_Fill] = []
        count = counts[0] if len(set(counts)) == 1 else None
        for number, (slot, view, own) in enumerate(zip(self._slots, static, counts, strict=True)):
            heads.append(view.narrow(slot.dim, 0, own))
            alone = () if view.dtype in torch_compat.COPIED_TOGETHER else (number,)
            groups.setdefault((view.dtype, view.device, *alone), []).append(number)
            # Only where nothing lies before the dynamic dimension is a row at one place for all sizes.
            keeps = self.keeps_tails and count is not None and slot.outer == 1
            if padded > own:
                rest = view.narrow(slot.dim, own, padded - own)
                (kept if keeps and not slot.spec.written else tails).append((rest, slot.pad))
        together = tuple((tuple(ns), [heads[n] for n in ns]) for ns in groups.values())
        return _Plan(
            counts, count, padded, static, tuple(heads), together, tuple(tails), tuple(kept)
        )


def require_in_place(name: str, tensor: torch.Tensor, static: torch.Tensor) -> None:
    """Refuse an input that is not ``static``, where nothing is copied."""
    if tensor.data_ptr() != static.data_ptr() or tensor.stride() != static.stride():
        raise InputError(
            "does not lie in its static buffer, and is not copied",
            where=f"input {name}",
            hint="pass the tensor that capture(static=...) was given; or, without cudagraph_copy_inputs, views of "
            "static_graphs.static_inputs(size), or set it",
        )


def _buffer(
    name: str, shape: list[int], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        raise StaticGraphError(
            f"there is no memory for its static buffer, {shape} of {dtype}",
            where=f"input {name}",
            hint="capture smaller sizes",
        ) from error
