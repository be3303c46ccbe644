"""Kernels inside CUDA graphs that say in traces what they stand for, where torch and CUDA can.

Only ``torch.cuda.graph`` switches it on publicly, and that empties the cache before each capture
and hides the error of a failed one. What it calls of torch's recorder is called here, in its order.
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def why_kernels_unmarked() -> str:
    """Why kernels inside graphs can't be marked; "" where they can."""
    recorder = _recorder()
    if recorder is None:
        return f"torch {torch.__version__} can't mark kernels inside graphs (2.15 can)"
    try:
        able = recorder.is_available()
    except (ImportError, RuntimeError) as error:
        # Bindings of an unknown kind, or without their library.
        return f"torch can't tell whether kernels inside graphs can be marked: {error}"
    if not able:
        return "kernels inside graphs are marked with cuda-bindings 13.1 and a driver of CUDA 13.1, or newer ones"
    return ""


@contextlib.contextmanager
def kernels_marked(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Record marks for ``graph``, which is captured in the block; none of one that fails."""
    recorder = _recorder()
    assert recorder is not None

    def ended(graph: Any) -> None:
        # Before it is instantiated, which gives marks the ids of what is replayed.
        recorder.resolve_pending_annotations()
        graph._recorded_exec_ids |= recorder.take_body_graph_ids()

    graph.register_capture_start_hook(recorder.maybe_stamp_capture_root)
    graph.register_capture_end_hook(ended)
    recorder._set_annotation_key_by("exec")
    recorder._set_annotation_backend("edge_walk")
    recorder._set_annotations_enabled(True)
    try:
        yield
    except BaseException:
        recorder.discard_capture_annotations(graph)
        raise
    finally:
        recorder._set_annotations_enabled(False)


def mark_kernels(what: Mapping[str, object]) -> AbstractContextManager[None]:
    """Mark what the current stream captures in the block; an inner block's values come first."""
    recorder = _recorder()
    if recorder is None or not what:
        return nullcontext()
    return recorder.mark_kernels(dict(what), backward=False)  # type: ignore[no-any-return]


def marks_for_trace() -> dict[str, Any]:
    """What ``export_chrome_trace`` has to be told, so that kernels carry their marks."""
    recorder = _recorder()
    marks = {} if recorder is None else recorder.get_kernel_annotations()
    return {"cuda_graph_annotations": marks} if marks else {}


def _recorder() -> Any:
    """torch's module that records; None where only ``torch.cuda.graph`` drives it (before 2.15)."""
    if not hasattr(torch.cuda.CUDAGraph, "register_capture_start_hook"):
        return None
    return importlib.import_module("torch.cuda._graph_annotations")
