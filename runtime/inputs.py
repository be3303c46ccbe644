"""Inputs of captured graphs: in, tensors of any batch size; out, the same values in persistent buffers, padded to a captured size.

It never moves a buffer once it is allocated, and it never pads with anything but the declared value.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from piecework.errors import ConfigError, InputError
from piecework.runtime.graphs.address import AddressBook

Number = bool | int | float | complex
Kernel = Literal["auto", "reference", "triton"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What is declared about one staged input.

    Attributes:
        name: for errors, and in the address book.
        dim: its dynamic dimension; may be negative.
        pad: what fills the tail.
    """

    name: str
    dim: int = 0
    pad: Number = 0


@dataclass(frozen=True, slots=True)
class _Slot:
    """One persistent buffer: flat memory that is seen as (outer, padded, inner) for each padded size.

    A padded size uses the head of the memory, densely, so that the strides are those of a plain tensor of that
    shape and the address is the same for every size.
    """

    spec: InputSpec
    buffer: torch.Tensor
    dim: int
    pad: Number

    @property
    def maximum(self) -> int:
        return self.buffer.shape[self.dim]

    @property
    def outer(self) -> int:
        return math.prod(self.buffer.shape[: self.dim])

    @property
    def inner(self) -> int:
        return math.prod(self.buffer.shape[self.dim + 1 :])

    def view(self, padded: int) -> torch.Tensor:
        """The static tensor that a graph captured for ``padded`` reads."""
        shape = (*self.buffer.shape[: self.dim], padded, *self.buffer.shape[self.dim + 1 :])
        return self.buffer.view(-1)[: math.prod(shape)].view(shape)

    def check(self, tensor: torch.Tensor, padded: int) -> None:
        where = f"input {self.spec.name}"
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != self.buffer.dtype:
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InputError(f"is {found}, its buffer {self.buffer.dtype}", where=where)
        fixed = list(tensor.shape)
        fixed[self.dim : self.dim + 1] = [self.maximum] if self.dim < tensor.dim() else []
        if tensor.dim() != self.buffer.dim() or fixed != list(self.buffer.shape):
            raise InputError(
                f"has shape {list(tensor.shape)}, which does not fit its buffer {list(self.buffer.shape)} "
                f"(dimension {self.dim} may be smaller)",
                where=where,
            )
        count = tensor.shape[self.dim]
        if count > padded:
            raise InputError(
                f"has size {count} in dimension {self.dim}, more than the {padded} it is staged for "
                f"(the buffer holds {self.maximum})",
                where=where,
                hint="dispatch to a captured size of at least that, or run uncaptured",
            )


@dataclass(frozen=True, slots=True)
class _Plan:
    """How batches of one size reach one padded size: views that are made once and used every step."""

    counts: tuple[int, ...]
    static: tuple[torch.Tensor, ...]
    heads: tuple[torch.Tensor, ...]
    tails: tuple[torch.Tensor | None, ...]


@dataclass(eq=False)
class StaticInputs:
    """Persistent buffers for the dynamic inputs of a model, filled before each replay.

    Args:
        specs: one per input.
        buffers: one per input, contiguous, as large as the largest batch.
        kernel: "triton" stages everything in one launch, "reference" with one copy and one fill per input;
            "auto" is Triton on CUDA and the reference elsewhere.
        poison: pad floating inputs with NaN, to find out what reads beyond the batch (debugging).

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
    _slots: tuple[_Slot, ...] = field(init=False)
    _plans: dict[tuple[int, tuple[int, ...]], _Plan] = field(init=False, default_factory=dict)
    _checked: dict[tuple[object, ...], _Plan] = field(init=False, default_factory=dict)
    _launcher: _TritonStaging | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if len(self.specs) != len(self.buffers):
            raise ConfigError(
                f"{len(self.specs)} inputs are declared, {len(self.buffers)} buffers given",
                where="StaticInputs",
            )
        pairs = zip(self.specs, self.buffers, strict=True)
        self._slots = tuple(_slot(spec, buffer, self.poison) for spec, buffer in pairs)
        if self._slots and self._uses_triton():
            self._launcher = _TritonStaging(self._slots)

    def _uses_triton(self) -> bool:
        if self.kernel != "auto":
            return self.kernel == "triton"
        on_cuda = all(buffer.device.type == "cuda" for buffer in self.buffers)
        return on_cuda and importlib.util.find_spec("triton") is not None

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
    ) -> StaticInputs:
        """Buffers shaped like ``examples``, with ``maximum`` in each dynamic dimension.

        Args:
            examples: a tensor per input; only dtype, device and the other dimensions are read.
            maximum: the largest captured size.
            specs: dynamic dimension and padding by name; dimension 0 and 0 for inputs not listed.
            device: where the buffers are; the examples' own devices by default.
            kernel, poison: as for the class.

        Raises:
            ConfigError: a spec names no example, or does not fit it.
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
            shape[_dimension(spec, example)] = maximum
            where = example.device if device is None else device
            with torch.inference_mode(False):
                buffers.append(torch.zeros(shape, dtype=example.dtype, device=where))
        return cls(chosen, buffers, kernel, poison)

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
            InputError: an input has another dtype or shape, or does not fit; the message says the sizes.
        """
        signature = (
            padded,
            *[(getattr(t, "shape", None), getattr(t, "dtype", None)) for t in tensors],
        )
        plan = self._checked.get(signature)
        if plan is None:
            plan = self._checked[signature] = self._check(tensors, padded)
        if self._launcher is not None and self._launcher.fits(tensors, plan.counts):
            self._launcher.launch(tensors, plan.counts[0], padded)
            return plan.static
        for head, tail, slot, tensor in zip(
            plan.heads, plan.tails, self._slots, tensors, strict=True
        ):
            head.copy_(tensor, non_blocking=True)
            if tail is not None:
                tail.fill_(slot.pad)
        return plan.static

    def _check(self, tensors: Sequence[torch.Tensor], padded: int) -> _Plan:
        """The plan for tensors of shapes that were not seen before; what fits once fits again."""
        if len(tensors) != len(self._slots):
            raise InputError(
                f"{len(tensors)} tensors for {len(self._slots)} staged inputs", where="stage"
            )
        pairs = list(zip(self._slots, tensors, strict=True))
        for slot, tensor in pairs:
            slot.check(tensor, padded)
        return self._plan(padded, tuple(tensor.shape[slot.dim] for slot, tensor in pairs))

    def _plan(self, padded: int, counts: tuple[int, ...]) -> _Plan:
        plan = self._plans.get((padded, counts))
        if plan is None:
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
        heads, tails = [], []
        for slot, view, count in zip(self._slots, static, counts, strict=True):
            heads.append(view.narrow(slot.dim, 0, count))
            rest = padded - count
            tails.append(view.narrow(slot.dim, count, rest) if rest else None)
        return _Plan(counts, static, tuple(heads), tuple(tails))


def make_copy_and_call(
    sym_tensor_indices: Sequence[int],
    input_buffers: Sequence[torch.Tensor],
    callable_fn: Callable[..., object],
    *,
    dims: Sequence[int] | None = None,
    pads: Sequence[Number] | None = None,
    padded_size: Callable[[int], int] | None = None,
    size_indices: Sequence[int] = (),
    kernel: Kernel = "auto",
) -> Callable[..., object]:
    """A callable that copies some arguments into persistent buffers before it calls ``callable_fn`` with those.

    Args:
        sym_tensor_indices: which positional arguments are copied.
        input_buffers: their buffers, of the largest size.
        callable_fn: what is called.
        dims: the dynamic dimension of each; 0 by default.
        pads: what fills the tail of each; 0 by default.
        padded_size: the captured size for a batch size; without it nothing is padded.
        size_indices: integer arguments that are the batch size, and become the padded one.
        kernel: as for ``StaticInputs``.

    Raises:
        ConfigError: the declarations do not fit the buffers.

    Example:
        >>> add = make_copy_and_call([0], [torch.zeros(8)], lambda x, n: x + n, padded_size=lambda n: 4, size_indices=[1])
        >>> add(torch.ones(3), 3).tolist()
        [5.0, 5.0, 5.0, 4.0]
    """
    count = len(sym_tensor_indices)
    indices = tuple(sym_tensor_indices)
    dims = (0,) * count if dims is None else dims
    pads = (0,) * count if pads is None else pads
    if not count == len(dims) == len(pads) == len(input_buffers):
        raise ConfigError(
            f"{count} staged arguments, {len(input_buffers)} buffers, {len(dims)} dimensions, "
            f"{len(pads)} paddings",
            where="make_copy_and_call",
        )
    specs = [
        InputSpec(f"argument {index}", dim, pad)
        for index, dim, pad in zip(indices, dims, pads, strict=True)
    ]
    inputs = StaticInputs(specs, input_buffers, kernel)

    def copy_and_call(*args: object) -> object:
        if not indices:
            return callable_fn(*args)
        tensors = [_tensor(args, index) for index in indices]
        largest = max(
            tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
            for tensor, dim in zip(tensors, dims, strict=True)
        )
        padded = largest if padded_size is None else padded_size(largest)
        staged = list(args)
        for index, static in zip(indices, inputs.stage(tensors, padded), strict=True):
            staged[index] = static
        for index in size_indices:
            staged[index] = padded
        return callable_fn(*staged)

    return copy_and_call


def _tensor(args: tuple[object, ...], index: int) -> torch.Tensor:
    value = args[index] if index < len(args) else None
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"argument {index} must be a tensor, not a {type(value).__name__}",
            where="make_copy_and_call",
        )
    return value


class _TritonStaging:
    """The one-launch way of filling the slots."""

    def __init__(self, slots: tuple[_Slot, ...]) -> None:
        # Triton takes a while to import and is of no use without a GPU (or its interpreter).
        self._kernel = importlib.import_module("piecework.runtime.staging_kernel")
        self._slots = slots
        self._words = tuple(_words(slot) for slot in slots)

    def fits(self, tensors: Sequence[torch.Tensor], counts: tuple[int, ...]) -> bool:
        """Whether the kernel can take these: one batch size, dense, on the buffers' device, at most 64-bit elements."""
        return len(set(counts)) == 1 and all(
            words is not None and tensor.is_contiguous() and tensor.device == slot.buffer.device
            for words, tensor, slot in zip(self._words, tensors, self._slots, strict=True)
        )

    def launch(self, tensors: Sequence[torch.Tensor], count: int, padded: int) -> None:
        staged = [
            self._kernel.StagedTensor(
                tensor.detach().view(words.dtype), words.target, slot.outer, slot.inner, words.pad
            )
            for tensor, words, slot in zip(tensors, self._words, self._slots, strict=True)
            if words is not None
        ]
        for first in range(0, len(staged), self._kernel.SLOTS):
            chunk = staged[first : first + self._kernel.SLOTS]
            self._kernel.stage_in_one_launch(chunk, count, padded)


@dataclass(frozen=True, slots=True)
class _Words:
    """A buffer as integers of its element's width."""

    dtype: torch.dtype
    target: torch.Tensor
    pad: int


def _words(slot: _Slot) -> _Words | None:
    dtype = _WORDS.get(slot.buffer.element_size())
    if dtype is None:
        return None
    pattern = torch.tensor([slot.pad], dtype=slot.buffer.dtype).view(dtype).item()
    return _Words(dtype, slot.buffer.detach().view(-1).view(dtype), int(pattern))


def _dimension(spec: InputSpec, tensor: torch.Tensor) -> int:
    if not -tensor.dim() <= spec.dim < tensor.dim():
        raise ConfigError(
            f"dimension {spec.dim} of a tensor with {tensor.dim()} dimensions",
            where=f"input {spec.name}",
            hint="a staged input needs a dynamic dimension",
        )
    return spec.dim % tensor.dim()


def _slot(spec: InputSpec, buffer: torch.Tensor, poison: bool) -> _Slot:
    dim = _dimension(spec, buffer)
    if not buffer.is_contiguous():
        raise ConfigError(
            f"a buffer must be contiguous; this one has strides {list(buffer.stride())}",
            where=f"input {spec.name}",
        )
    pad = spec.pad
    try:
        held = torch.tensor([pad], dtype=buffer.dtype).item()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise _unfit_pad(spec, buffer) from error
    same = held == pad or (held != held and pad != pad)
    if not same and not (buffer.is_floating_point() or buffer.is_complex()):
        raise _unfit_pad(spec, buffer)
    return _Slot(spec, buffer, dim, math.nan if poison and buffer.is_floating_point() else pad)


def _unfit_pad(spec: InputSpec, buffer: torch.Tensor) -> ConfigError:
    return ConfigError(
        f"{spec.pad!r} can't be held by {buffer.dtype}",
        where=f"input {spec.name}",
        hint="declare a padding value of the input's own type",
    )
