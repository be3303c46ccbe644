"""Inside a compiled artifact: its innermost function, what it checks by itself, its text."""

from __future__ import annotations

import re
import types
from collections.abc import Callable

from piecework.code_objects import cells_of


class _MustStay(Exception):
    """Why a wrapper can't be left out."""


def direct_entry(
    artifact: object, inputs: int, outputs: int, *, vouched: bool = False
) -> tuple[Callable[..., object] | None, str]:
    """The innermost function of an Inductor artifact, past wrappers that do nothing for it.

    The function takes one list, which it empties, and returns the outputs. Each wrapper between the artifact and it must
    be one that is known, and the metadata that AOTAutograd recorded must say that there is nothing to do before or after
    the call: no mutation to write back, no output to make an alias of an input, no tensor subclass, no random state, no
    effect token, no change of grad mode. Copies of misaligned inputs and CUDA graphs, where there are any, are part of
    what is returned.

    Args:
        inputs, outputs: how many the piece has.
        vouched: the same program was found clean before it was saved; a loaded artifact has no record of its own.

    Returns:
        The function and ""; or None and why the artifact must be called as it is.
    """
    current, record = getattr(artifact, "_compiled_fn", None), None
    try:
        for _ in range(12):
            if type(current).__name__ == "CompiledFxGraph":
                if record is not None or not vouched:
                    _require_clean(record, inputs, outputs)
                return _callable_of(current), ""
            current, told = _inside(current)
            record = told or record
        return None, "too many wrappers"
    except _MustStay as reason:
        return None, str(reason)


def _inside(current: object) -> tuple[object, object]:
    """What a wrapper calls, and AOTAutograd's record where the wrapper has it."""
    if type(current).__name__ == "SerializableCompiledFunction":
        kept = current.serialize_fn()  # type: ignore[attr-defined]
        return current.compiled_fn, getattr(kept, "runtime_metadata", None)  # type: ignore[attr-defined]
    cells = cells_of(current) if isinstance(current, types.FunctionType) else {}
    # The code's own name: `functools.wraps` gives a wrapper that of what it wraps.
    code = getattr(current, "__code__", None)
    name = type(current).__name__ if code is None else code.co_qualname
    if type(cells.get("self")).__name__ == "DisableContext" and "fn" in cells:
        return cells["fn"], None
    reason, inner = "", cells.get("compiled_fn")
    record = cells.get("runtime_metadata")
    match name:
        case "aot_module_simplified.<locals>.forward":
            reason = "it holds parameters of its own" if cells.get("params_buffers_flat") else ""
        case "CacheCompiledArtifact._load_impl.<locals>.<lambda>":
            pass
        case "FunctionalizedRngRuntimeWrapper.post_compile.<locals>.wrapper":
            pass  # the record says whether there is random state
        case "EffectTokensWrapper.post_compile.<locals>.inner_fn":
            tokens = cells.get("num_tokens")  # torch 2.11 wraps where there are none, too
            reason = f"num_tokens is {tokens}" if tokens != 0 else ""
        case "_create_runtime_wrapper.<locals>.runtime_wrapper":
            if "_codegen_runtime_wrapper" in cells:
                inner, record = cells.get("_inner_compiled_fn"), None
                reason = _written_does_more(cells["_codegen_runtime_wrapper"])
            elif any(map(cells.get, ("epilogue_args_idx", "trace_joint", "disable_amp"))):
                reason = "the runtime wrapper does more than call"  # that of torch 2.11
        case _:
            reason = f"unknown wrapper {name}"
    if reason or inner is None:
        raise _MustStay(reason or f"{name} shows no inner function")
    return inner, record


def _written_does_more(written: object) -> str:
    """What the runtime wrapper that AOTAutograd wrote does beside calling; "" if nothing."""
    if not isinstance(written, types.FunctionType):
        return "a runtime wrapper of an unknown form"
    harmless = {"torch", "_DisableAutocast_", "__builtins__", written.__name__}
    # Marks for Dynamo on dynamic outputs speak to graphs traced after a graph break, and there is none here.
    marks = ("_mark_dynamic_", "_dyn_dims_")
    more = sorted(n for n in written.__globals__.keys() - harmless if not n.startswith(marks))
    return f"the runtime wrapper does more than call: {', '.join(more)}" if more else ""


def _require_clean(meta: object, inputs: int, outputs: int) -> None:
    """Raise `_MustStay` unless AOTAutograd's record says that nothing is to be done around the call."""
    if meta is None:
        raise _MustStay("AOTAutograd's record of the piece can't be found")
    must_be_empty = (
        "num_mutated_inp_runtime_indices",
        "num_outputs_aliased",
        "num_intermediate_bases",
        "mutated_graph_handled_indices_seen_by_autograd",
        "tokens",
        "is_rng_op_functionalized",
        "num_symints_saved_for_bw",
    )
    for name in must_be_empty:
        if getattr(meta, name, "not in the record"):
            raise _MustStay(f"{name} is {getattr(meta, name, 'not in the record')}")
    if getattr(meta, "grad_enabled_mutation", 0) is not None:
        raise _MustStay("it changes grad mode")
    if getattr(meta, "traced_tangents", ()):
        raise _MustStay("it is part of a backward pass")
    for kind in ("subclass_inp_meta", "subclass_fw_graph_out_meta"):
        if any(type(each).__name__ != "PlainTensorMeta" for each in getattr(meta, kind, (0,))):
            raise _MustStay("it takes or returns a tensor subclass")
    if len(meta.input_info) != inputs or meta.num_outputs != outputs:  # type: ignore[attr-defined]
        raise _MustStay("its inputs or outputs are not those of the piece")


def _callable_of(graph: object) -> Callable[..., object]:
    call = getattr(graph, "current_callable", None)
    if not callable(call):
        raise _MustStay("the compiled graph shows no callable")
    if getattr(graph, "_compile_context", None) is not None:
        raise _MustStay("autotuning results are still to be written at its first call")
    return call


#: Matrix products that refuse operands of different dtypes or devices, by the names that generated code calls them.
_STRICT_KERNEL = re.compile(r"extern_kernels\.(?:mm|addmm|bmm|baddbmm)\(")
_HARMLESS = ("assert_size_stride(", "assert_size_stride_grouped(", "del ", "#")


def strict_inputs(artifact: object, inputs: int) -> frozenset[int]:
    """Which inputs of an Inductor artifact are read by nothing but ATen's matrix products.

    Generated kernels read memory without looking at a dtype; ATen's products raise for an operand of another dtype or
    device. Told from the generated text; an input that is used in any way that is not known here is left out.
    """
    source = next(iter(inductor_sources(artifact)), "")
    found = re.search(
        r"\n    def call\(self, args\):\n(.*?)\n        return (.*)", source, re.DOTALL
    )
    lines = [line.strip() for line in found[1].splitlines()] if found else []
    unpacking = next((line for line in lines if line.endswith("= args")), "")
    names = re.findall(r"\w+", unpacking.removesuffix("= args"))
    if found is None or len(names) != inputs:
        return frozenset()
    loose: set[str] = set()
    for line in [*lines, found[2].partition("\n")[0]]:
        if not (line.startswith(_HARMLESS) or line == unpacking or _STRICT_KERNEL.match(line)):
            loose |= set(re.findall(r"\w+", line))
    return frozenset(i for i, name in enumerate(names) if name not in loose)


def inductor_sources(compiled: object) -> tuple[str, ...]:
    """The Python that Inductor generated for a compiled piece, found inside it; empty where this torch keeps none."""
    texts = (getattr(graph, "source_code", "") for graph in _compiled_graphs(compiled))
    return tuple(dict.fromkeys(text for text in texts if text))


def realign_inputs(compiled: object) -> None:
    """Let code in a compiled piece copy the inputs that it took to be aligned and are not, as ``ids[1:]`` would be.

    Inductor does that by itself, except where a hook is set for its partitions: it leaves out all that comes after. Kernels read
    16 bytes at once from an address that they take to be aligned; elsewhere that is an error which ends the process's use of the GPU.
    """
    from torch._inductor.output_code import maybe_realign_inputs

    for graph in _compiled_graphs(compiled):
        maybe_realign_inputs(False, graph, graph.inputs_to_check, graph.mutated_input_idxs)  # type: ignore[attr-defined,arg-type]


def _compiled_graphs(compiled: object) -> list[object]:
    """Inductor's graphs inside a compiled piece."""
    graphs = []
    waiting, seen = [(compiled, 0)], set()
    while waiting:
        current, depth = waiting.pop(0)
        if id(current) in seen or len(seen) > 2000:
            continue
        seen.add(id(current))
        if type(current).__name__ == "CompiledFxGraph":
            graphs.append(current)
        elif depth < 10:
            waiting += [(each, depth + 1) for each in _held_by(current)]
    return graphs


def _held_by(value: object) -> list[object]:
    """What a wrapper of a compiled function holds, where another wrapper or the function may be."""
    if isinstance(value, types.FunctionType):
        return list(cells_of(value).values())
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if isinstance(value, (tuple, list)):
        return list(value) if len(value) < 20 else []
    if type(value).__module__.startswith(("torch._inductor", "torch._functorch", "functools")):
        parts = [getattr(value, "func", None), getattr(value, "__wrapped__", None)]
        return [*vars(value).values(), *parts] if hasattr(value, "__dict__") else parts
    return []
