"""Inputs of captured graphs: persistent buffers that take batches of any size, padded."""

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch

from piecework.errors import ConfigError, InputError, StaticGraphError
from piecework.runtime import torch_compat
from piecework.runtime.graphs.memory.addresses import AddressBook

Number = bool | int | float | complex
Kernel = Literal["grouped", "reference", "triton"]
#: Plans that are kept; an engine that stages tokens and requests meets very many sizes.
_MOST_PLANS = 4096
_TRAITS = ("shape", "dtype", "device")


@dataclass(frozen=True, slots=True)
class InputSpec:
    name: str  # for errors, and in the address book
    dim: int | None = 0  # its dynamic dimension; may be negative; None where it has none
    pad: Number = 0  # what fills the tail
    written: bool = False  # what reads it writes to it too, so its tail is filled each time
    in_place: bool = False  # it lies in the buffer already, and nothing is copied


@dataclass(frozen=True, slots=True)
class Slot:
    """One buffer, of which each padded size uses the head, dense as (outer, padded, inner)."""

    spec: InputSpec
    buffer: torch.Tensor
    dim: int | None
    pad: Number

    @classmethod
    def make(cls, spec: InputSpec, buffer: torch.Tensor, *, poison: bool) -> Self:
        dim = _dimension_of(spec, buffer)
        if not buffer.is_contiguous():
            why = f"a buffer must be contiguous; this one has strides {list(buffer.stride())}"
            raise ConfigError(why, where=f"input {spec.name}")
        floats = buffer.is_floating_point() or buffer.is_complex()
        try:
            held = torch.tensor([spec.pad], dtype=buffer.dtype).item()
            fits = floats or held == spec.pad
        except (RuntimeError, TypeError, OverflowError):
            fits = False
        if not fits:
            why = f"{spec.pad!r} can't be held by {buffer.dtype}"
            hint = "declare a padding value of the input's own type"
            raise ConfigError(why, where=f"input {spec.name}", hint=hint)
        poisoned = poison and buffer.is_floating_point()
        return cls(spec, buffer, dim, math.nan if poisoned else spec.pad)

    @property
    def outer(self) -> int:
        return math.prod(self.buffer.shape[: self.dim])

    @property
    def inner(self) -> int:
        return math.prod(self.buffer.shape[self.dim + 1 :])  # type: ignore[operator]

    @property
    def keeps(self) -> bool:
        """Whether what was padded may stay so: a row has one place, and nobody writes there."""
        return self.dim is not None and self.outer == 1 and not self.spec.written

    def view(self, padded: int) -> torch.Tensor:
        """The static tensor that a graph captured for ``padded`` reads."""
        if self.dim is None:
            return self.buffer
        maximum = self.buffer.shape[self.dim]
        if padded > maximum:
            why = f"can't be padded to {padded}; its buffer holds {maximum} in dimension {self.dim}"
            hint = "allocate the buffers for the largest captured size"
            raise InputError(why, where=f"input {self.spec.name}", hint=hint)
        shape = (*self.buffer.shape[: self.dim], padded, *self.buffer.shape[self.dim + 1 :])
        return self.buffer.view(-1)[: math.prod(shape)].view(shape)

    def count(self, tensor: torch.Tensor, padded: int) -> int:
        """The size of ``tensor`` in the dynamic dimension, where it fits."""
        where, shape = f"input {self.spec.name}", list(self.buffer.shape)
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != self.buffer.dtype:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(f"is {found}, its buffer {self.buffer.dtype}", where=where)
        count = padded
        if self.dim is not None and tensor.dim() == len(shape):
            count = shape[self.dim] = tensor.shape[self.dim]
        if list(tensor.shape) != shape:
            raise InputError(
                f"has shape {list(tensor.shape)}, which does not fit its buffer "
                f"{list(self.buffer.shape)} (dimension {self.dim} may be smaller)",
                where=where,
            )
        if count > padded:
            raise InputError(
                f"has size {count} in dimension {self.dim}, more than the {padded} it is staged "
                f"for (the buffer holds {self.buffer.shape[self.dim]})",  # type: ignore[index]
                where=where,
                hint="dispatch to a captured size of at least that, or run uncaptured",
            )
        return count


def _dimension_of(spec: InputSpec, tensor: torch.Tensor) -> int | None:
    """The dynamic dimension of an input, counted from the front."""
    if spec.dim is None:
        return None
    if not -tensor.dim() <= spec.dim < tensor.dim():
        why = f"dimension {spec.dim} of a tensor with {tensor.dim()} dimensions"
        hint = "a staged input needs a dynamic dimension"
        raise ConfigError(why, where=f"input {spec.name}", hint=hint)
    return spec.dim % tensor.dim()


@dataclass(frozen=True, slots=True)
class _Plan:
    """How batches of one size reach one padded size, in views that are made once."""

    count: int | None  # the size of all inputs with a dynamic dimension, if it is one
    padded: int
    static: tuple[torch.Tensor, ...]
    in_place: tuple[tuple[int, torch.Tensor], ...]
    groups: tuple[tuple[tuple[int, ...], list[torch.Tensor]], ...]  # copied together
    tails: tuple[tuple[torch.Tensor, Number], ...]
    waits: bool  # a batch on another device (pinned memory, say) may be written again at once


@dataclass(eq=False)
class StaticInputs:
    """Persistent buffers for the dynamic inputs of a model, filled before each replay.

    Args:
        specs: one per input.
        buffers: one per input, contiguous, as large as the largest batch.
        kernel: "grouped" copies inputs of one dtype together, "reference" one by one, "triton" all
            in one launch of our own, which costs the host more.
        poison: pad floating inputs with NaN, to find out what reads beyond the batch.
        keeps_tails: only ``stage`` writes to the buffers, so rows once padded stay so.

    Example:
        >>> inputs = StaticInputs.allocate({"ids": torch.zeros(1, dtype=torch.long)}, maximum=8)
        >>> inputs.stage([torch.tensor([5, 6, 7])], padded=4)[0].tolist()
        [5, 6, 7, 0]
    """

    specs: Sequence[InputSpec]
    buffers: Sequence[torch.Tensor]
    kernel: Kernel = "grouped"
    poison: bool = False
    keeps_tails: bool = False
    _slots: tuple[Slot, ...] = field(init=False)
    _written: tuple[int, ...] = field(init=False)
    # Graphs were captured on these views: they stay the same objects.
    _views: dict[int, tuple[torch.Tensor, ...]] = field(init=False, default_factory=dict)
    _plans: dict[tuple[object, ...], _Plan] = field(init=False, default_factory=dict)
    _launcher: Any = field(init=False, default=None)
    _filled: int = field(init=False, default=sys.maxsize)  # most rows in front of kept padding

    def __post_init__(self) -> None:
        pairs = zip(self.specs, self.buffers, strict=True)
        self._slots = tuple(Slot.make(*pair, poison=self.poison) for pair in pairs)
        self._written = tuple(n for n, spec in enumerate(self.specs) if spec.written)
        if self._slots and self.kernel == "triton":
            # Triton takes a while to import and is of no use without a GPU (or its interpreter).
            kernel = importlib.import_module("piecework.runtime.graphs.stage.kernel")
            self._launcher, self.keeps_tails = kernel.OneLaunch(self._slots), False

    @classmethod
    def allocate(
        cls,
        examples: Mapping[str, torch.Tensor],
        maximum: int,
        specs: Sequence[InputSpec] | None = None,
        *,
        kernel: Kernel = "grouped",
        poison: bool = False,
        keeps_tails: bool = False,
    ) -> Self:
        """Buffers shaped like ``examples``, with ``maximum`` in each dynamic dimension."""
        declared = {spec.name: spec for spec in specs or ()}
        unknown = sorted(set(declared) - set(examples))
        if unknown:
            why = f"no input {', '.join(unknown)}"
            hint = f"inputs: {', '.join(examples) or 'none'}"
            raise ConfigError(why, where="StaticInputs.allocate", hint=hint)
        chosen = [declared.get(name, InputSpec(name)) for name in examples]
        buffers = []
        for spec, example in zip(chosen, examples.values(), strict=True):
            dim = _dimension_of(spec, example)
            shape = [maximum if n == dim else size for n, size in enumerate(example.shape)]
            buffers.append(example if dim is None else new_buffer(spec.name, shape, example))
        return cls(chosen, buffers, kernel, poison, keeps_tails)

    def register(self, book: AddressBook) -> None:
        """Vouch for the buffers, so that captured pieces may read them in place."""
        for slot in self._slots:
            book.register_persistent(slot.spec.name, slot.buffer)

    def views(self, padded: int) -> tuple[torch.Tensor, ...]:
        """The static tensors that graphs captured for ``padded`` read; the same at every call."""
        found = self._views.get(padded)
        if found is None:
            found = self._views[padded] = tuple(slot.view(padded) for slot in self._slots)
        return found

    def stage(self, tensors: Sequence[torch.Tensor], padded: int) -> tuple[torch.Tensor, ...]:
        """Copy and pad, and return the static tensors; `InputError` where one does not fit."""
        traits = [tuple(getattr(t, each, None) for each in _TRAITS) for t in tensors]
        plan = self._plans.get((padded, *traits))
        if plan is None:
            if len(tensors) != len(self._slots):
                text = f"{len(tensors)} tensors for {len(self._slots)} staged inputs"
                raise InputError(text, where="stage")
            pairs = list(zip(self._slots, tensors, strict=True))
            counts = tuple(slot.count(tensor, padded) for slot, tensor in pairs)
            waits = any(tensor.device != slot.buffer.device for slot, tensor in pairs)
            plan = self._remember((padded, *traits), padded, counts, waits)
        return self._run(plan, tensors)

    def stage_alike(
        self, tensors: Sequence[torch.Tensor], padded: int, count: int
    ) -> tuple[torch.Tensor, ...]:
        """``stage`` for tensors of one batch size that are known to fit."""
        plan = self._plans.get((padded, count))
        if plan is None:
            counts = (count,) * len(self._slots)
            plan = self._remember((padded, count), padded, counts, False)
        return self._run(plan, tensors)

    def _run(self, plan: _Plan, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        for number, head in plan.in_place:
            _require_in_place(self._slots[number].spec.name, tensors[number], head)
        if self._launcher and plan.count is not None and self._launcher.fits(tensors):
            self._launcher.launch(tensors, plan.count, plan.padded)
            return plan.static
        for positions, heads in plan.groups:
            if len(positions) == 1:
                heads[0].copy_(tensors[positions[0]], non_blocking=not plan.waits)
            else:
                torch_compat.copy_each(heads, [tensors[n] for n in positions], not plan.waits)
        for tail, pad in plan.tails:
            tail.fill_(pad)
        if self.keeps_tails and plan.count != self._filled:
            self._pad_kept(sys.maxsize if plan.count is None else plan.count)
        return plan.static

    def _pad_kept(self, count: int) -> None:
        """Pad the rows of earlier batches beyond ``count``, where they are not filled each time."""
        for slot in self._slots:
            if slot.keeps:
                dim: int = slot.dim  # type: ignore[assignment]
                rows = min(self._filled, slot.buffer.shape[dim]) - count
                if rows > 0:
                    slot.buffer.narrow(dim, count, rows).fill_(slot.pad)
        self._filled = count

    def by_name(self, padded: int) -> dict[str, torch.Tensor]:
        """The static tensors by name, for a caller who writes to them from now on."""
        self.let_write()
        return {s.spec.name: v for s, v in zip(self._slots, self.views(padded), strict=True)}

    def stager(self, padded: int) -> Callable[[Sequence[torch.Tensor]], object]:
        """What copies the tensors of a call that was checked into the buffers, padded."""
        first, dim = next((n, s.dim) for n, s in enumerate(self._slots) if s.dim is not None)
        stage = self.stage_alike
        return lambda tensors: stage(tensors, padded, tensors[first].shape[dim])

    def short_batch(self, padded: int) -> tuple[list[torch.Tensor], int]:
        """What lies in the buffers as a call's tensors, a row short if there are several."""
        count, given = max(1, padded - 1), []
        for slot, view in zip(self._slots, self.views(padded), strict=True):
            rows = view if slot.dim is None else view.narrow(slot.dim, 0, count)
            given.append(rows if slot.spec.in_place else rows.clone())
        return given, count

    def bringer(self, padded: int) -> Callable[[Sequence[torch.Tensor], int], None] | None:
        """What copies written arguments back into the call's tensors, if there are any."""
        views, slots = self.views(padded), self._slots
        copied = [n for n in self._written if not self.specs[n].in_place]
        back = [(n, slots[n].dim, views[n]) for n in copied]

        def bring_back(tensors: Sequence[torch.Tensor], count: int) -> None:
            for number, dim, static in back:
                rows = static if dim is None else static.narrow(dim, 0, count)
                tensors[number].copy_(rows, non_blocking=True)

        return bring_back if back else None

    def shares_what_is_written(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a written tensor shares memory with another argument, as buffers don't."""
        return not all(
            torch_compat.memory_apart(tensors[n], *tensors[:n], *tensors[n + 1 :])
            for n in self._written
        )

    def let_write(self) -> None:
        """Somebody else may write to the buffers from now on: pad in every step."""
        self.keeps_tails = False
        self._plans.clear()

    def _remember(
        self, key: tuple[object, ...], padded: int, counts: tuple[int, ...], waits: bool
    ) -> _Plan:
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        static = self.views(padded)
        groups: dict[tuple[object, ...], list[tuple[int, torch.Tensor]]] = {}
        in_place: list[tuple[int, torch.Tensor]] = []
        tails: list[tuple[torch.Tensor, Number]] = []
        sizes = {n for slot, n in zip(self._slots, counts, strict=True) if slot.dim is not None}
        count = sizes.pop() if len(sizes) == 1 else None
        for number, (slot, view, own) in enumerate(zip(self._slots, static, counts, strict=True)):
            head = view if slot.dim is None else view.narrow(slot.dim, 0, own)
            if slot.spec.in_place:
                in_place.append((number, head))
            else:
                together = view.dtype in torch_compat.COPIED_TOGETHER and self.kernel != "reference"
                group = (view.dtype, view.device, None if together else number)
                groups.setdefault(group, []).append((number, head))
            kept = self.keeps_tails and count is not None and slot.keeps
            if slot.dim is not None and padded > own and not kept:
                tails.append((view.narrow(slot.dim, own, padded - own), slot.pad))
        copied = tuple((tuple(n for n, _ in g), [head for _, head in g]) for g in groups.values())
        plan = _Plan(count, padded, static, tuple(in_place), copied, tuple(tails), waits)
        self._plans[key] = plan
        return plan


def new_buffer(name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Zeros of the dtype and on the device of ``like``."""
    try:
        # Replays write to buffers, also outside of the inference mode they were made in.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
    except RuntimeError as error:
        why = f"there is no memory for its static buffer, {list(shape)} of {like.dtype}"
        raise StaticGraphError(why, where=f"input {name}", hint="capture smaller sizes") from error


def _require_in_place(name: str, tensor: torch.Tensor, static: torch.Tensor) -> None:
    """Refuse an input that is not ``static``, where nothing is copied."""
    if tensor.data_ptr() != static.data_ptr() or tensor.stride() != static.stride():
        why = "does not lie in its static buffer, and is not copied"
        hint = "pass views of static_graphs.static_inputs(size), or set cudagraph_copy_inputs"
        raise InputError(why, where=f"input {name}", hint=hint)


def make_copy_and_call(
    sym_tensor_indices: Sequence[int],
    input_buffers: Sequence[torch.Tensor],
    callable_fn: Callable[..., object],
    *,
    dims: Sequence[int] | None = None,
    pads: Sequence[Number] | None = None,
    padded_size: Callable[[int], int] = lambda size: size,
    size_indices: Sequence[int] = (),
) -> Callable[..., object]:
    """``callable_fn`` on filled buffers; those at ``size_indices`` become the padded batch size."""
    indices, count = tuple(sym_tensor_indices), len(sym_tensor_indices)
    dims, pads = dims or (0,) * count, pads or (0,) * count
    if not count == len(dims) == len(pads) == len(input_buffers):
        raise ConfigError(
            f"{count} staged arguments, {len(input_buffers)} buffers, {len(dims)} dimensions, "
            f"{len(pads)} paddings",
            where="make_copy_and_call",
        )
    rows = zip(indices, dims, pads, strict=True)
    inputs = StaticInputs([InputSpec(f"argument {n}", *row) for n, *row in rows], input_buffers)

    def copy_and_call(*args: object) -> object:
        if not indices:
            return callable_fn(*args)
        tensors: list[Any] = [args[n] if n < len(args) else None for n in indices]
        shapes = [getattr(each, "shape", ()) for each in tensors]
        sizes = {s[d] if -len(s) <= d < len(s) else None for s, d in zip(shapes, dims, strict=True)}
        if len(sizes) > 1 or None in sizes:
            text = f"the arguments {list(indices)} have no common batch size: {sizes}"
            raise InputError(text, where="make_copy_and_call")
        padded = padded_size(sizes.pop())  # type: ignore[arg-type]
        staged: dict[int, object] = dict(zip(indices, inputs.stage(tensors, padded), strict=True))
        staged.update(dict.fromkeys(size_indices, padded))
        return callable_fn(*(staged.get(n, each) for n, each in enumerate(args)))

    return copy_and_call
