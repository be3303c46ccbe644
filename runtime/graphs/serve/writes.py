"""What runs on dummy inputs write outside the graphs' memory is put back.

Warming up, estimating and capturing run splitting operators for real, and those write: to buffers
of the model, or to a cache in the forward context. Operators say by their schemas what they write;
that is copied before, and put back after the run. Writes past the dispatcher are not seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.fx

from piecework.codegen.graph.origin import nodes_of, value_of
from piecework.codegen.graph.schemas import shows_nothing
from piecework.runtime import torch_compat
from piecework.runtime.batch.forward_context import (
    current_forward_context,
    override_forward_context,
)
from piecework.runtime.graphs.device.contract import owns_plain_memory
from piecework.runtime.splitting_op import registry


class DryWrites:
    """Puts back what runs on dummy inputs write."""

    def __init__(
        self,
        is_own: Callable[[torch.Tensor], bool],
        outside: list[torch.Tensor],
        known: list[torch.Tensor],
    ) -> None:
        self._is_own, self._known = is_own, known
        self._outside = {_address(t) for t in outside if owns_plain_memory(t)}
        self._watch = torch_compat.OperatorWatch(self._before, _body_of, self._after)
        self._active = False
        # By place: a tensor, and what it held; and tensors that earlier runs wrote to.
        self._kept: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        self._learned: dict[object, torch.Tensor] = {}
        # The marks keep the numbers from being given to other memory, and no memory alive.
        self._born: dict[int, object] = {}

    def forget(self) -> None:
        """Let go of the memory that was written; dummy runs are over."""
        self._learned.clear()

    @contextmanager
    def put_back(self, *, watched: bool) -> Iterator[None]:
        """Put back after the block what was seen written in it (``watched``) or before."""
        self._kept, self._born = {}, {}
        try:
            for tensor in () if watched else (*self._known, *self._learned.values()):
                self._keep(tensor)
            self._active = watched
            with self._watch if watched else nullcontext():
                yield
        finally:
            self._active = False
            for tensor, before in reversed(self._kept.values()):
                with torch.inference_mode(tensor.is_inference()):
                    tensor.copy_(before)
            self._kept, self._born = {}, {}

    def unwatched(self, piece: Callable[..., object]) -> Callable[..., object]:
        """``piece`` as a dummy run calls it: it writes to nobody's tensors, and is not dry."""

        def run(*args: object) -> object:
            if not self._active:
                return piece(*args)
            context = current_forward_context()
            real = context if context is None or not context.dry else replace(context, dry=False)
            self._active = False
            try:
                # Some of torch's operators take another way, and give other strides, under a mode.
                with override_forward_context(real), torch_compat.no_dispatch_modes():
                    results = piece(*args)
            finally:
                self._active = True
            self._note_new(args, results)
            return results

        return run

    def _before(
        self, op: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        if not self._active:
            return
        for each in torch_compat.written_operands(op, args, kwargs):
            born = owns_plain_memory(each) and torch_compat.storage_id(each) in self._born
            if owns_plain_memory(each) and not born and not self._is_own(each):
                self._keep(each)

    def _keep(self, tensor: torch.Tensor) -> None:
        placed = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if placed not in self._kept:
            self._kept[placed] = (tensor, tensor.clone())
            self._learned.setdefault(placed, tensor)

    def _after(self, op: torch._ops.OpOverload, args: tuple[object, ...], result: object) -> None:
        """What torch's own operators make new in this run is nobody's."""
        aliases = any(each.alias_info is not None for each in op._schema.returns)
        if self._active and op.namespace == "aten" and not aliases:
            self._note_new(args, result)

    def _note_new(self, given: object, made: object) -> None:
        """Remember memory made in this run, which nobody else has; what was given may come out."""
        old = self._outside | {_address(each) for each in _tensors(given)}
        for each in _tensors(made):
            if _address(each) not in old:
                self._born[torch_compat.storage_id(each)] = torch_compat.storage_mark(each)


def _tensors(tree: object) -> list[torch.Tensor]:
    return list(filter(owns_plain_memory, torch_compat.tensors_in(tree)))


def _address(tensor: torch.Tensor) -> int:
    """Where its memory begins; weak references to it have the same."""
    return tensor.untyped_storage().data_ptr()


def _body_of(op: torch._ops.OpOverload, args: tuple[object, ...]) -> Callable[..., object] | None:
    """The Python function that a user's operator runs; any other's schema has to be believed."""
    device = next((a.device.type for a in args if isinstance(a, torch.Tensor)), "cpu")
    known = registry.find(op)
    if known is not None:
        return known.implementation_for(device)
    kernel = torch_compat.custom_op_kernel(op._schema.name, device)
    return None if kernel is None else torch_compat.custom_op_function(kernel)


def acting_unseen(split_gm: torch.fx.GraphModule, pieces: list[str]) -> tuple[str, ...]:
    """Operators between the pieces that return nothing and declare no write."""
    nodes = (node for _, node in nodes_of(split_gm, pieces) if value_of(node) is None)
    return tuple(dict.fromkeys(str(n.target) for n in nodes if shows_nothing(n.target)))
