"""Tensors and the memory they lie in: storages, views, metadata, an allocator after a failure."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from piecework.errors import StaticGraphError

#: Copies each source into the target at its place, on a GPU in one launch where dtypes are the same: ``(targets, sources, non_blocking)``.
copy_each: Callable[[list[torch.Tensor], list[torch.Tensor], bool], None] = torch._foreach_copy_
#: The dtypes that it takes on a GPU; of others it raises there, and on no CPU.
COPIED_TOGETHER = frozenset(
    {
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    }
)


#: A storage over memory that it does not own: ``(address, device, bytes)``.
storage_at = torch._C._construct_storage_from_data_pointer
#: A tensor seen with its sign turned, without a copy.
negative_view = torch._neg_view


def storage_id(value: torch.Tensor) -> int:
    """A number that tensors share exactly when they share memory, while they live; fakes too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return int(value.untyped_storage()._cdata)


def is_fake(value: object) -> bool:
    """Whether a value is a tensor of a trace, without data."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def storage_users(tensor: torch.Tensor) -> int:
    """How many tensors lie in the memory of this one, itself among them."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def memory_apart(written: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether no other tensor reaches into the memory that ``written`` spans."""
    return memory_outside(written, map(memory_span, others))


def memory_outside(tensor: torch.Tensor, spans: Iterable[tuple[int, int]]) -> bool:
    """Whether the memory that ``tensor`` spans is in none of ``spans``."""
    start, end = memory_span(tensor)
    return not any(first < end and start < last for first, last in spans)


def memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of the first element, and that behind the last one."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return start, start + (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.itemsize


def is_same_view(left: object, right: object) -> bool:
    """Whether two tensors, or fakes, are the same elements of the same memory."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    places = [(storage_id(t), t.size(), t.stride(), t.storage_offset()) for t in (left, right)]
    return places[0] == places[1]


def metadata_guard(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """True while each tensor has the type, dtype, layout, device, sizes and strides of now."""
    tensors = tuple(tensors)
    expected = list(map(_metadata, tensors))
    fast: dict[bool, Callable[..., bool]] = {}

    def check() -> bool:
        # The fast check includes thread-local state that inference mode changes, hence one for each.
        known = fast.get(torch.is_inference_mode_enabled())
        if known is not None and known(*tensors):
            return True
        if list(map(_metadata, tensors)) != expected:
            return False
        made = _tensor_guards(tensors)
        if made is not None:
            fast[torch.is_inference_mode_enabled()] = made
        return True

    return check


def _metadata(tensor: torch.Tensor) -> tuple[object, ...]:
    stride = tensor.stride() if tensor.layout is torch.strided else None
    kind = type(tensor), tensor.dtype, tensor.layout, tensor.device
    return *kind, tensor.shape, stride, is_lazy(tensor)


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the values differ from memory: a view that is yet to be negated or conjugated."""
    return bool(tensor.is_neg() or tensor.is_conj())


def _tensor_guards(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    try:
        check = torch._C._dynamo.guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        ).check
        return check if check(*tensors) else None
    except (TypeError, RuntimeError):
        return None


def storage_mark(tensor: torch.Tensor) -> object:
    """Keeps a `storage_id` from being used again while it lives; the memory may be freed."""
    return StorageWeakRef(tensor.untyped_storage())


def places_guard(tensors: list[torch.Tensor]) -> tuple[Callable[[], bool], bool]:
    """True while each tensor's memory is where it is now, and whether that is quick to ask."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    fast = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if fast is not None:
        indices = list(range(len(tensors)))
        return lambda: fast(tensors, addresses, indices), True
    address = torch.Tensor.data_ptr
    return lambda: list(map(address, tensors)) == addresses, False


def abandon_capture(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: object, *, begun: bool
) -> None:
    """End a capture that failed: the stream leaves capture mode, the allocator lets go of ``pool``.

    What torch leaves to be done depends on how far ``capture_end`` gets with an invalid capture:

    - 2.11, 2.12: the pool goes on recording and keeps the graph's reference if ``begun``; both are
      ended by hand. The allocator of pinned memory keeps asking this graph, so it is kept for good.
    - 2.13: ``reset`` gives the reference back only if the capture ended. That is done by hand.
    - 2.14 and newer: ``reset`` does all of it; to give back twice would free other graphs' memory.
    """
    # The error to report is the one that made the capture fail; what is raised here only follows from it.
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # says it where the capture was valid, whatever became of the graph
        ended = True
    except RuntimeError:
        ended = False
    graph.reset()
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)  # type: ignore[attr-defined]
    except RuntimeError:  # it records no longer
        if begun and not ended and not hasattr(type(graph), "capture_end_pre"):
            torch._C._cuda_releasePool(device.index, pool)  # type: ignore[attr-defined]
        return
    torch._C._cuda_releasePool(device.index, pool)  # type: ignore[attr-defined]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))


def stream_number(device: torch.device) -> int:
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return int(raw(device.index) if raw else torch.cuda.current_stream(device).cuda_stream)


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of nobody else's; never destroyed, as torch keeps things by its number."""
    made, non_blocking = ctypes.c_void_p(), 1
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # so that the driver knows this thread's device
        try:
            code = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(made), non_blocking)
        except OSError as error:
            code = error
    if code != 0 or made.value is None:
        why = f"the CUDA driver made no stream to capture on: {code}"
        raise StaticGraphError(why, where=str(device), hint="use cudagraph_mode NONE")
    return torch.cuda.ExternalStream(made.value, device)
